"""Rows of fixed size in scratch files: logs that do not fit into memory pass through here.

Structured arrays enter, each under the number of a bucket; the same rows leave, a bucket or a bounded chunk at a time.
The files are read, not mapped: memory holds one chunk, whatever their size.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CHUNK = 1 << 19  # rows read at a time: some 20 MB

Rows = npt.NDArray[Any]  # structured (rows.take(…) costs a tenth of rows[…] then), or of one plain type


class Spool:
    """Buckets of rows in a folder of its own."""

    def __init__(self, folder: Path, dtype: npt.DTypeLike) -> None:
        self.folder, self.dtype = folder, np.dtype(dtype)
        folder.mkdir()

    def append(self, rows: Rows, bucket: int = 0) -> None:
        """Write rows of the spool's type behind those of their bucket.

        Raises:
            OSError: the disk is full.
        """
        with self._path(bucket).open("ab") as file:
            file.write(np.asarray(rows, self.dtype).tobytes())

    def scatter(self, rows: Rows, buckets: npt.NDArray[np.int64]) -> None:
        """Append each row to its bucket, (rows,), in the order given."""
        order = np.argsort(buckets, kind="stable")
        rows, found = rows.take(order), buckets[order]
        edges = np.flatnonzero(np.diff(found, prepend=-1))
        for begin, end in zip(edges, [*edges[1:], len(found)]):
            self.append(rows[begin:end], int(found[begin]))

    def read(self, bucket: int = 0) -> Rows:
        """All rows of a bucket; none if nothing was written to it."""
        path = self._path(bucket)
        return np.fromfile(path, self.dtype) if path.exists() else np.empty(0, self.dtype)

    def chunks(self) -> Iterator[Rows]:
        """All rows, bucket by bucket, at most CHUNK at a time."""
        for path in sorted(self.folder.iterdir()):
            with path.open("rb") as file:
                while len(rows := np.fromfile(file, self.dtype, CHUNK)):
                    yield rows

    def clear(self) -> None:
        """Give the disk back."""
        for path in self.folder.iterdir():
            path.unlink()

    def _path(self, bucket: int) -> Path:
        return self.folder / f"{bucket:08d}"
