"""Which positions of the users' sequences become examples.

A batch of sequences and a task enter; `Targets` leave: for each example its row and the positions that it predicts.
No text is made here. Every random choice hangs on (seed, user, position), never on the order of rows.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recllm import schema
from recllm.data.dataset import flat
from recllm.data.randomness import mix
from recllm.data.stored import DATES, LEDGER, USER

TARGET_SALT, PHRASING_SALT, START_SALT = 1, 2, 3  # keep the random choices of one position independent

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# Why a session has no example
ONE_EVENT = "sessions_of_one_event"  # there is nothing before it
TOO_SHORT, ALREADY, TRIMMED = "sessions_too_short", "sessions_already_positive", "sessions_trimmed"  # of outcome
LEFT_OUT = (ONE_EVENT, TOO_SHORT, ALREADY, TRIMMED)
WITHOUT_RATIONALE = "without_rationale"  # why an event is no target of training, where the task asks for a rationale

DATES_TYPE = pa.list_(
    pa.struct(
        [
            ("split", pa.int8()),
            ("cutoff", pa.int64()),
            ("window_end", pa.int64()),
            ("history_end", pa.int32()),
            ("task", pa.string()),
            ("answer", pa.string()),
            ("target", pa.int32()),  # this and the rest of rank_assets only, else null
            ("candidates", pa.list_(pa.int32())),
            ("shown", pa.string()),  # a line for each candidate
        ]
    )
)


@dataclasses.dataclass(frozen=True)
class Dates:
    """When the tasks of a bank ask the users of a batch; D dates."""

    row: Ints  # (D,) of the batch, ascending
    split: npt.NDArray[np.int8]  # (D,) schema.TRAIN, VALID or TEST
    cutoff: Ints  # (D,) seconds since the epoch, as is the window's end
    window_end: Ints
    history_end: Ints  # (D,) positions before the cut-off
    task: npt.NDArray[np.object_]  # (D,) which one asks
    answer: pa.StringArray  # (D,)
    target: pa.Int32Array  # (D,) of rank_assets, as the next two: item_index of the choice
    candidates: pa.ListArray  # (D,) of item_index
    shown: pa.StringArray  # (D,) the lines of the candidates

    @classmethod
    def of(cls, column: pa.ListArray) -> "Dates":
        """From a column of DATES_TYPE."""
        found = column.flatten()
        row = np.repeat(np.arange(len(column)), column.value_lengths().to_numpy())
        split, cutoff, end, history = (found.field(place).to_numpy() for place in range(4))
        task = found.field("task").to_numpy(zero_copy_only=False)
        rest = (found.field(name) for name in ("answer", "target", "candidates", "shown"))
        return cls(row, split, cutoff, end, history, task, *rest)


@dataclasses.dataclass(frozen=True)
class Groups:
    """The flat positions of a batch by user or by session: those of a group stand side by side, oldest first."""

    order: Ints  # (P,) flat positions
    place: Ints  # (P,) where each flat position stands in `order`
    begin: Ints  # (P,) of each flat position the place at which its group begins
    end: Ints  # (P,) and ends

    @classmethod
    def of(cls, keys: Ints) -> "Groups":
        """From (P,) integers, equal for the positions of a group."""
        count = np.arange(len(keys))
        order, place = count, count
        if (np.diff(keys) < 0).any():  # sessions that interleave
            order = np.argsort(keys, kind="stable")
            place = np.empty_like(order)
            place[order] = count
        first = np.flatnonzero(np.diff(keys[order], prepend=-1) != 0)
        lengths = np.diff(np.append(first, len(keys)))
        begin, end = np.repeat(first, lengths)[place], np.repeat(first + lengths, lengths)[place]
        return cls(order, place, begin, end)

    def earlier(self, chosen: Bools) -> Ints:
        """(P,) of each flat position, how many of the `chosen` (P,) of its group come before it."""
        before = _sums(chosen[self.order])
        return before[self.place] - before[self.begin]

    def last(self, flat: Ints, chosen: Bools, most: Ints | int) -> tuple[Ints, Ints]:
        """Of each of N flat positions the last `most` of the `chosen` (P,) of its group before it, oldest first.

        Returns offsets (N + 1,) and flat positions.
        """
        listed, before = self.order[chosen[self.order]], _sums(chosen[self.order])
        end = before[self.place[flat]]
        offsets, places = ranges(np.maximum(before[self.begin[flat]], end - most), end)
        return offsets, listed[places]

    def between(self, first: Ints, last: Ints, chosen: Bools, with_last: bool = True) -> tuple[Ints, Ints]:
        """Of N groups the `chosen` (P,) from flat position `first` to `last`, (N,) each; what `last` returns."""
        listed, before = self.order[chosen[self.order]], _sums(chosen[self.order])
        offsets, places = ranges(before[self.place[first]], before[self.place[last] + with_last])
        return offsets, listed[places]


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
    ledger: pa.ListArray | None = None  # (U,) of a bank's tasks: a line for each position, oldest first
    dates: Dates | None = None  # of a bank's tasks
    sessions: npt.NDArray[np.int32] | None = None  # (P,) numbers within the user; None without sessions
    attributes: Mapping[str, pa.StringArray] = dataclasses.field(default_factory=dict)  # (P,) each, "" where blank

    @cached_property
    def rows(self) -> Ints:
        """(P,) the user of each flat position, as its row of the batch."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    @cached_property
    def has_item(self) -> Bools:
        """(P,) false where an event has no item."""
        return self.items != schema.NO_ITEM

    @cached_property
    def by_user(self) -> Groups:
        """All positions of a user."""
        return Groups.of(self.rows)

    @cached_property
    def by_session(self) -> Groups:
        """All positions of a session."""
        assert self.sessions is not None  # the pipeline refuses what asks within sessions
        most = int(self.sessions.max(initial=0)) + 1
        return Groups.of(self.rows * most + self.sessions)

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
            sessions=None if batch.column("sessions").null_count else flat(batch.column("sessions"))[1],
            attributes={
                name.removeprefix(schema.ATTRIBUTE): batch.column(name).flatten()
                for name in batch.schema.names
                if name.startswith(schema.ATTRIBUTE)
            },
        )


@dataclasses.dataclass(frozen=True)
class Targets:
    """Examples to be: row of the batch, and positions [start, stop) of that user's sequence that are predicted.

    The gate and the prompt see positions before `start` only. Of a window of titles those of [start, stop) are
    predicted that have an item, and within sessions those of the session of `start`; its first and last are such ones.
    Of a bank's tasks start = stop, and `date` says which of the batch's dates it is.
    """

    row: Ints
    start: Ints
    stop: Ints
    date: Ints | None = None
    yes: Bools | None = None  # (N,) of outcome: whether the session comes to what is asked
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)  # sessions without an example, by reason

    def __len__(self) -> int:
        return len(self.row)

    def take(self, chosen: npt.NDArray[Any] | slice) -> "Targets":
        """The chosen examples, in the given order."""
        date = None if self.date is None else self.date[chosen]
        yes = None if self.yes is None else self.yes[chosen]
        return Targets(self.row[chosen], self.start[chosen], self.stop[chosen], date, yes, self.left_out)

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
    needs_item: bool = True,
    within_session: bool = False,
    max_train_targets: int | None = None,
    seed: int = 0,
) -> Targets:
    """The examples of one split (schema.TRAIN, VALID or TEST), by user and position.

    Training: every TRAIN position with an earlier item, or windows if `dense_window` > 0. Otherwise: every position
    with the split's code. `max_train_targets` keeps a seeded choice of a user's training examples.

    Args:
        needs_item: positions without an item are no targets and do not count as earlier; else they are and do.
        within_session: the earlier item must be of the target's session, in every split; windows end with a session.

    A window runs over events without item and over other sessions that interleave, of which it holds nothing.
    """
    wanted = sequences.splits == split
    if needs_action and sequences.actions is not None:
        wanted &= sequences.actions.is_valid().to_numpy(zero_copy_only=False)
    shown = sequences.has_item if needs_item else np.ones(len(wanted), dtype=bool)
    groups = sequences.by_session if within_session else sequences.by_user
    windows = split == schema.TRAIN and dense_window > 0
    wanted &= shown
    left_out = _single_events(sequences, wanted) if within_session and not windows else {}
    if not windows and (within_session or split == schema.TRAIN):
        wanted &= groups.earlier(shown) > 0
    place = np.flatnonzero(wanted)
    row = sequences.rows[place]
    position = place - sequences.offsets[row]
    if windows:
        found = _windows(sequences, groups, place, groups.earlier(shown), dense_window)
    else:
        found = Targets(row, position, position + 1, left_out=left_out)
    if split != schema.TRAIN or max_train_targets is None:
        return found
    return choose(found, sequences.user_key, max_train_targets, seed)


def _single_events(sequences: Sequences, wanted: Bools) -> dict[str, int]:
    """How many of the wanted positions (P,) are a session of their own."""
    groups = sequences.by_session
    return {ONE_EVENT: int((wanted & (groups.end - groups.begin == 1)).sum())}


def find_outcomes(
    sequences: Sequences,
    split: int,
    positive: Collection[str],
    after: int,
    max_train_targets: int | None = None,
    seed: int = 0,
) -> Targets:
    """Whether sessions come to an action of `positive`: one example for each session of more than `after` events.

    It is asked at the event after these, whose split is the example's. Yes if that event or a later one of the session
    is positive. Where one of them is of another split or UNUSED, the session is cut off and has no example, whatever it
    shows: cut sessions that had come to it would otherwise be kept and the others not, and the share of yes would rise
    with the cut. Nor is there an example where an event before is positive. The end of the log cuts the newest sessions
    off in the same way, which no log tells: the last of them are "no" because nothing more was written.
    """
    place, yes, left_out = _outcomes(sequences, split, positive, after)
    row = sequences.rows[place]
    position = place - sequences.offsets[row]
    found = Targets(row, position, position + 1, yes=yes, left_out=left_out)
    if split != schema.TRAIN or max_train_targets is None:
        return found
    return choose(found, sequences.user_key, max_train_targets, seed)


def _outcomes(
    sequences: Sequences, split: int, positive: Collection[str], after: int
) -> tuple[Ints, Bools, dict[str, int]]:
    """Ascending flat positions at which S sessions are asked, their answers, and how many are not asked."""
    groups = sequences.by_session
    order, first = groups.order, groups.place == groups.begin
    begin, end = groups.begin[first], groups.end[first]  # (S,) places
    own = (sequences.splits == split)[order]
    good = pc.is_in(sequences.actions, pa.array(list(positive))).to_numpy(zero_copy_only=False)[order]
    of_split, of_good = _sums(own), _sums(good)
    asked = np.minimum(begin + after, end - 1)
    present, long = of_split[end] > of_split[begin], begin + after < end
    already = long & (of_good[asked] > of_good[begin])
    yes = of_good[end] > of_good[asked]
    known = long & (of_split[end] - of_split[asked] == end - asked)
    left_out = {
        TOO_SHORT: int((present & ~long).sum()),
        ALREADY: int((present & already).sum()),
        TRIMMED: int((present & long & ~already & ~known).sum()),
    }
    kept = known & ~already
    place = order[asked[kept]]
    ascending = np.argsort(place, kind="stable")
    return place[ascending], yes[kept][ascending], left_out


def ranges(begin: Ints, end: Ints) -> tuple[Ints, Ints]:
    """Offsets (N + 1,) and the flat indices begin[0]..end[0]-1, begin[1]..end[1]-1, …

    >>> [part.tolist() for part in ranges(np.array([3, 7]), np.array([5, 8]))]
    [[0, 2, 3], [3, 4, 7]]
    """
    lengths = end - begin
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return offsets, np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], lengths)


def _sums(mask: Bools) -> Ints:
    """(P + 1,) how many before each place are true."""
    return np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])


def find_dates(
    sequences: Sequences, task: str, split: int, max_train_targets: int | None = None, seed: int = 0
) -> Targets:
    """The examples of a bank's task, by user and date; `max_train_targets` as in `find_targets`."""
    dates = sequences.dates
    assert dates is not None  # the pipeline refuses the task without `finance`
    chosen = np.flatnonzero((dates.split == split) & (dates.task == task))
    start = dates.history_end[chosen].astype(np.int64)
    found = Targets(dates.row[chosen], start, start, chosen)
    if split != schema.TRAIN or max_train_targets is None:
        return found
    return choose(found, sequences.user_key, max_train_targets, seed)


def _windows(sequences: Sequences, groups: Groups, place: Ints, rank: Ints, size: int) -> Targets:
    """Tile each run of a group's titles from its newest end; the oldest window may be shorter.

    The titles are at the flat positions `place`; in a run their `rank` (P,) among all titles of the group, of whatever
    split, counts up by one. A window has at least two titles: a single left-over is the oldest item of its run, and
    dropped.
    """
    place = place[np.argsort(groups.place[place], kind="stable")]  # sessions may interleave
    breaks = np.flatnonzero((np.diff(groups.begin[place]) != 0) | (np.diff(rank[place]) != 1)) + 1
    run_begin = np.concatenate([[0], breaks]) if len(place) else breaks
    run_end = np.append(breaks, len(place)) if len(place) else breaks
    from_end = np.repeat(run_end, run_end - run_begin) - 1 - np.arange(len(place))  # 0 at the newest of a run
    first = from_end % size == size - 1
    first[run_begin] = True
    start = np.flatnonzero(first)
    length = np.diff(np.append(start, len(place)))
    start, length = start[length >= 2], length[length >= 2]
    begin, last = place[start], place[start + length - 1]
    ascending = np.argsort(begin, kind="stable")
    begin, last = begin[ascending], last[ascending]
    row = sequences.rows[begin]
    return Targets(row, begin - sequences.offsets[row], last + 1 - sequences.offsets[row])


def choose(targets: Targets, user_key: npt.NDArray[np.uint64], count: int, seed: int) -> Targets:
    """The `count` examples of each user with the smallest seeded hash, in their old order: what training takes."""
    drawn = mix(seed, TARGET_SALT, user_key[targets.row], targets.start)
    order = np.lexsort((drawn, targets.row))
    ordered = targets.row[order]
    rank = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)  # within the user
    return targets.take(np.sort(order[rank < count]))
