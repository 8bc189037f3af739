"""Sequences on disk: what `prepare` wrote is read back in shards of consecutive users, never as a whole.

A sequences.parquet enters; record batches of bounded size leave, in user_index order.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

SHARD_POSITIONS = 1 << 17  # interactions of a shard, and at most one user's more: tens of MiB of examples
GROUP_POSITIONS = 8 * SHARD_POSITIONS  # of a row group of sequences.parquet: what is sorted in memory at a time
# Further columns on the way to the converter: the text about each user; of a bank's customers the lines of their ledger
# and the dates on which a bank's tasks ask them (convert/finance.py)
USER, LEDGER, DATES = "user", "ledger", "dates"


@dataclass(frozen=True)
class StoredSequences:
    """Users of a sequences.parquet whose row groups hold consecutive users, cut by GROUP_POSITIONS."""

    path: Path
    lengths: npt.NDArray[np.int64]  # (users,) interactions
    further: Mapping[str, pa.Array] = field(default_factory=dict)  # (users,) each: what else the converter is told

    @property
    def num_users(self) -> int:
        """Rows of the file."""
        return len(self.lengths)

    def frame(self) -> pl.DataFrame:
        """All of them in memory."""
        return pl.read_parquet(self.path)

    def batches(self, positions: int) -> Iterator[pa.RecordBatch]:
        """Shards (see `shards`) as batches of schema.SEQUENCES and the further columns."""
        begin = 0
        with pq.ParquetFile(self.path) as file:
            for number in range(file.num_row_groups):
                group = file.read_row_group(number).combine_chunks().to_batches()[0]
                end = begin + group.num_rows
                for name, column in self.further.items():
                    group = group.append_column(name, column.slice(begin, group.num_rows))
                for first, rows in shards(self.lengths, positions, begin, end):
                    yield group.take(pa.array(range(first - begin, first - begin + rows)))  # a slice is sent whole
                begin = end


def shards(
    lengths: npt.NDArray[np.int64], positions: int, begin: int = 0, end: int | None = None
) -> list[tuple[int, int]]:
    """(first user, users) of consecutive users with at most `positions` interactions, and one user's overhang.

    Of users begin..end - 1 only. Cuts stand at multiples of `positions` over all users, wherever one begins.
    """
    end = len(lengths) if end is None else end
    ends = int(lengths[:begin].sum()) + lengths[begin:end].cumsum()
    cuts = np.flatnonzero(np.diff((ends - 1) // positions)) + 1 + begin
    return [(int(a), int(b - a)) for a, b in itertools.pairwise([begin, *cuts, end]) if b > a]
