"""Which positions of the users' sequences become examples.

A batch of sequences and a task enter; `Targets` leave: for each example its row and the positions that it predicts.
No text is made here. Every random choice hangs on (seed, user, position), never on the order of rows.
"""

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recllm import schema
from recllm.data.dataset import flat
from recllm.data.randomness import mix
from recllm.data.stored import DATES, LEDGER, USER

TARGET_SALT, PHRASING_SALT, START_SALT = 1, 2, 3  # keep the random choices of one position independent

Ints = npt.NDArray[np.int64]


DATES_TYPE = pa.list_(
    pa.struct(
        [
            ("split", pa.int8()),
            ("cutoff", pa.int64()),
            ("window_end", pa.int64()),
            ("history_end", pa.int32()),
            ("answer", pa.string()),
        ]
    )
)


@dataclasses.dataclass(frozen=True)
class Dates:
    """When the task assets asks the users of a batch; D dates."""

    row: Ints  # (D,) of the batch, ascending
    split: npt.NDArray[np.int8]  # (D,) schema.TRAIN, VALID or TEST
    cutoff: Ints  # (D,) seconds since the epoch, as is the window's end
    window_end: Ints
    history_end: Ints  # (D,) positions before the cut-off
    answer: pa.StringArray  # (D,)

    @classmethod
    def of(cls, column: pa.ListArray) -> "Dates":
        """From a column of DATES_TYPE."""
        found = column.flatten()
        row = np.repeat(np.arange(len(column)), column.value_lengths().to_numpy())
        split, cutoff, end, history = (found.field(place).to_numpy() for place in range(4))
        return cls(row, split, cutoff, end, history, found.field("answer"))


@dataclasses.dataclass(frozen=True)
class Sequences:
    """A batch of schema.SEQUENCES as flat arrays: those of user u lie in [offsets[u], offsets[u + 1])."""

    offsets: Ints  # (U + 1,)
    items: npt.NDArray[np.int32]
    timestamps: Ints
    splits: npt.NDArray[np.int8]
    actions: pa.StringArray | None
    user_index: npt.NDArray[np.int32]  # (U,)
    user_key: npt.NDArray[np.uint64]  # (U,)
    user_id: pa.StringArray  # (U,)
    user: pa.StringArray | None = None  # (U,) the text about each user, if templates show it
    ledger: pa.ListArray | None = None  # (U,) of the task assets: a line for each position, oldest first
    dates: Dates | None = None  # of the task assets

    @cached_property
    def first_of_second(self) -> Ints:
        """For each flat position the first of its user's of the same second."""
        place, begins = np.arange(len(self.items)), np.zeros(len(self.items), dtype=bool)
        begins[self.offsets[:-1][np.diff(self.offsets) > 0]] = True
        begins[1:] |= np.diff(self.timestamps) != 0
        first: Ints = np.maximum.accumulate(np.where(begins, place, 0))
        return first

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "Sequences":
        """Views into `batch`, of schema.SEQUENCES and stored.py's further columns; nothing but offsets is copied."""
        offsets, items = flat(batch.column("items"))
        actions = batch.column("actions")
        return cls(
            offsets=offsets,
            items=items,
            timestamps=flat(batch.column("timestamps"))[1],
            splits=flat(batch.column("splits"))[1],
            actions=None if actions.null_count else actions.flatten(),
            user_index=batch.column("user_index").to_numpy(),
            user_key=batch.column("user_key").to_numpy(),
            user_id=batch.column(schema.USER_ID),
            user=batch.column(USER) if USER in batch.schema.names else None,
            ledger=batch.column(LEDGER) if LEDGER in batch.schema.names else None,
            dates=Dates.of(batch.column(DATES)) if DATES in batch.schema.names else None,
        )


@dataclasses.dataclass(frozen=True)
class Targets:
    """Examples to be: row of the batch, and positions [start, stop) of that user's sequence that are predicted.

    The gate and the prompt see positions before `start` only. Of the task assets start = stop, and `date` says which of
    the batch's dates it is.
    """

    row: Ints
    start: Ints
    stop: Ints
    date: Ints | None = None

    def __len__(self) -> int:
        return len(self.row)

    def take(self, chosen: npt.NDArray[Any] | slice) -> "Targets":
        """The chosen examples, in the given order."""
        date = None if self.date is None else self.date[chosen]
        return Targets(self.row[chosen], self.start[chosen], self.stop[chosen], date)

    def pieces(self, size: int) -> Iterator["Targets"]:
        """Slices of at most `size` examples, so that the text of a long batch never lies in memory at once."""
        for begin in range(0, len(self), size):
            yield self.take(slice(begin, begin + size))


def find_targets(
    sequences: Sequences,
    split: int,
    *,
    dense_window: int = 0,
    needs_action: bool = False,
    max_train_targets: int | None = None,
    seed: int = 0,
) -> Targets:
    """The examples of one split (schema.TRAIN, VALID or TEST), by user and position.

    Training: every TRAIN position with an earlier item, or windows if `dense_window` > 0. Otherwise: every position
    with the split's code. `max_train_targets` keeps a seeded choice of a user's training examples.
    """
    wanted = sequences.splits == split
    if needs_action and sequences.actions is not None:
        wanted &= sequences.actions.is_valid().to_numpy(zero_copy_only=False)
    place = np.flatnonzero(wanted)
    row = np.searchsorted(sequences.offsets, place, side="right") - 1
    position = place - sequences.offsets[row]
    if split != schema.TRAIN:
        return Targets(row, position, position + 1)
    found = _windows(row, position, dense_window) if dense_window else _single(row, position)
    return found if max_train_targets is None else _choose(found, sequences.user_key, max_train_targets, seed)


def find_dates(sequences: Sequences, split: int, max_train_targets: int | None = None, seed: int = 0) -> Targets:
    """The examples of the task assets, by user and date; `max_train_targets` as in `find_targets`."""
    dates = sequences.dates
    assert dates is not None  # the pipeline refuses the task without `finance`
    chosen = np.flatnonzero(dates.split == split)
    start = dates.history_end[chosen].astype(np.int64)
    found = Targets(dates.row[chosen], start, start, chosen)
    if split != schema.TRAIN or max_train_targets is None:
        return found
    return _choose(found, sequences.user_key, max_train_targets, seed)


def _single(row: Ints, position: Ints) -> Targets:
    kept = position >= 1
    return Targets(row[kept], position[kept], position[kept] + 1)


def _windows(row: Ints, position: Ints, size: int) -> Targets:
    """Tile each run of consecutive positions from its newest end backwards; the oldest window may be shorter.

    A window has at least two titles: a single left-over is the oldest item of its run, and dropped.
    """
    if not len(row):
        return Targets(row, position, position)
    breaks = np.flatnonzero((np.diff(row) != 0) | (np.diff(position) != 1)) + 1
    run_begin = np.concatenate([[0], breaks])
    run_end = np.concatenate([breaks, [len(row)]])
    from_end = np.repeat(run_end, run_end - run_begin) - 1 - np.arange(len(row))  # 0 at the newest of a run
    first = from_end % size == size - 1
    first[run_begin] = True
    start = np.flatnonzero(first)
    length = np.diff(np.concatenate([start, [len(row)]]))
    start, length = start[length >= 2], length[length >= 2]
    return Targets(row[start], position[start], position[start] + length)


def _choose(targets: Targets, user_key: npt.NDArray[np.uint64], count: int, seed: int) -> Targets:
    """The `count` examples of each user with the smallest seeded hash, in their old order."""
    drawn = mix(seed, TARGET_SALT, user_key[targets.row], targets.start)
    order = np.lexsort((drawn, targets.row))
    ordered = targets.row[order]
    rank = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)  # within the user
    return targets.take(np.sort(order[rank < count]))
