"""Sequences on disk: what `prepare` wrote is read back in shards of consecutive users, never as a whole.

A sequences.parquet enters; record batches of bounded size leave, in user_index order.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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
        return self.read(self._cut(positions))

    def cut(self, positions: int) -> list["Shard"]:
        """The shards (see `shards`) of each row group."""
        return list(self._cut(positions))

    def _cut(self, positions: int) -> Iterator["Shard"]:
        """One row group at a time: whoever looks at the first shard cuts no others."""
        begin = before = 0
        metadata = pq.read_metadata(self.path)
        for group in range(metadata.num_row_groups):
            end = begin + metadata.row_group(group).num_rows
            ends = before + self.lengths[begin:end].cumsum()
            for first, users in _cut_at(ends, positions, begin):
                yield Shard(group, begin, first, users)
            begin, before = end, int(ends[-1]) if len(ends) else before

    def read(self, wanted: Iterable["Shard"]) -> Iterator[pa.RecordBatch]:
        """Some shards, each as a batch; of those that follow one another in a row group it is read once."""
        with pq.ParquetFile(self.path) as file:
            for number, together in itertools.groupby(wanted, key=lambda shard: shard.group):
                group = file.read_row_group(number).combine_chunks().to_batches()[0]
                for shard in together:
                    place = shard.first - shard.begin
                    batch = group.take(pa.array(range(place, place + shard.users)))  # a slice is sent whole
                    for name, column in self.further.items():
                        further = column.slice(shard.first, shard.users)
                        batch = batch.append_column(name, further.take(pa.array(range(shard.users))))
                    yield batch


class Shard(NamedTuple):
    """Consecutive users of one row group."""

    group: int  # number of the row group
    begin: int  # user_index of its first user
    first: int  # user_index of the shard's first user
    users: int


def shards(
    lengths: npt.NDArray[np.int64], positions: int, begin: int = 0, end: int | None = None
) -> list[tuple[int, int]]:
    """(first user, users) of consecutive users with at most `positions` interactions, and one user's overhang.

    Of users begin..end - 1 only. Cuts stand at multiples of `positions` over all users, wherever one begins.
    """
    end = len(lengths) if end is None else end
    return _cut_at(int(lengths[:begin].sum()) + lengths[begin:end].cumsum(), positions, begin)


def _cut_at(ends: npt.NDArray[np.int64], positions: int, begin: int) -> list[tuple[int, int]]:
    """See `shards`; `ends`: of each user from `begin` on, the interactions of all users up to it."""
    cuts = np.flatnonzero(np.diff((ends - 1) // positions)) + 1 + begin
    return [(int(a), int(b - a)) for a, b in itertools.pairwise([begin, *cuts, begin + len(ends)]) if b > a]
