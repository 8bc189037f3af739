"""Gives every position of every user's sequence its role, and audits what the split leaks.

A `Log` (all sequences as flat arrays) and a split section enter; one code a position (UNUSED, TRAIN, VALID or TEST),
the cut-offs and the audit leave. Choices by lot hang on (seed, user) or (seed, user, session), never on row order.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recllm.data import offline
from recllm.data.randomness import mix, uniform
from recllm.errors import UserError
from recllm.recipe import GivenRows, SplitSection
from recllm.schema import SPLIT_CODES, TEST, TRAIN, UNUSED, VALID

_USER_LOT, _SESSION_LOT = 101, 102  # keep the lots of different questions apart
_US = 1_000_000

Codes = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Log:
    """All users' sequences, oldest first. U users, P positions; user u owns positions offsets[u]:offsets[u + 1]."""

    user_ids: list[str]  # (U,)
    user_keys: npt.NDArray[np.uint64]  # (U,)
    offsets: npt.NDArray[np.int64]  # (U + 1,)
    items: npt.NDArray[np.int32]  # (P,) item_index
    order_us: npt.NDArray[np.int64]  # (P,) microseconds since the epoch
    sessions: npt.NDArray[np.int32] | None = None  # (P,) number of the session within its user
    session_keys: npt.NDArray[np.uint64] | None = None  # (P,) hash of session_id

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Interactions per user, (U,)."""
        return np.diff(self.offsets)

    @property
    def users(self) -> npt.NDArray[np.int32]:
        """Owner of each position, (P,)."""
        return np.repeat(np.arange(len(self.user_keys), dtype=np.int32), self.lengths)

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Place of each position within its sequence, from 0, (P,): the number of earlier interactions."""
        return np.arange(len(self.items)) - np.repeat(self.offsets[:-1], self.lengths)

    def reordered(self, order: npt.NDArray[np.int64]) -> "Log":
        """The log with its positions in another order, (P,), that leaves every position with its user."""
        return replace(
            self,
            items=self.items[order],
            order_us=self.order_us[order],
            sessions=None if self.sessions is None else self.sessions[order],
            session_keys=None if self.session_keys is None else self.session_keys[order],
        )

    @property
    def seconds(self) -> npt.NDArray[np.int64]:
        """Whole seconds since the epoch, rounded down, (P,)."""
        return self.order_us // _US


@dataclass(frozen=True)
class Split:
    """The role of each position, the cut-offs in time (seconds) and what is worth knowing about how it came out."""

    codes: Codes  # (P,)
    cutoffs: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def assign(log: Log, section: SplitSection, seed: int, item_ids: list[str], given: "Given | None" = None) -> Split:
    """Split a log. `item_ids` stand in item_index order; only the given split looks at them and at `given`.

    valid and test: of a user's positions that have at least `min_history` earlier interactions, the first, the last or
    all (`targets`) are scored, the others are UNUSED. TRAIN keeps every position, except that with session_holdout the
    positions of a user after the beginning of their first valid or test session are UNUSED: no history of a training
    example holds a target of valid or test.

    Raises:
        UserError: a split that comes out empty, session_holdout without sessions, given rows that do not fit.
    """
    if section.method == "leave_one_out":
        result = _leave_one_out(log, section)
    elif section.method == "temporal":
        result = _temporal(log, section)
    elif section.method == "user_holdout":
        result = _by_lot(log, section, uniform(mix(seed, _USER_LOT, log.user_keys))[log.users])
    elif section.method == "session_holdout":
        result = _by_lot(log, section, _session_lots(log, seed))
    else:
        result = _given(log, item_ids, given or read_given(section))
    _refuse_empty(result, log, section)
    return result


def _leave_one_out(log: Log, section: SplitSection) -> Split:
    needed = section.min_history + 2  # a history, one valid, one test
    enough = log.lengths >= needed
    if not enough.any():
        longest = int(np.argmax(log.lengths))
        raise UserError(
            f"user {log.user_ids[longest]} has {log.lengths[longest]} interactions, the most of all users, "
            f"the split needs {needed}: lower split.min_history ({section.min_history}) or read more data"
        )
    codes = np.full(len(log.items), TRAIN, dtype=np.int8)
    codes[log.offsets[1:][enough] - 1] = TEST
    codes[log.offsets[1:][enough] - 2] = VALID
    return Split(codes, notes={"users_too_short": int((~enough).sum()), "interactions_needed": needed})


def _temporal(log: Log, section: SplitSection) -> Split:
    """Interactions at a cut-off belong to the later side."""
    seconds = log.seconds
    test_cut = _cutoff(seconds, section.test_fraction)
    valid_cut = _cutoff(seconds, min(1.0, section.test_fraction + section.valid_fraction))
    codes = np.full(len(seconds), TRAIN, dtype=np.int8)
    codes[seconds >= valid_cut] = VALID
    codes[seconds >= test_cut] = TEST
    return Split(_scored(log, codes, section), {"valid": valid_cut, "test": test_cut})


def _cutoff(seconds: npt.NDArray[np.int64], newest: float) -> int:
    place = len(seconds) - max(1, round(len(seconds) * newest))
    return int(np.partition(seconds, place)[place])


def _by_lot(log: Log, section: SplitSection, lots: npt.NDArray[np.float64]) -> Split:
    """lots: (P,) in [0, 1), equal for all positions that must stay together."""
    codes = np.full(len(lots), TRAIN, dtype=np.int8)
    held_out = lots < section.test_fraction + section.valid_fraction
    codes[_after_first(log, held_out)] = UNUSED
    codes[held_out] = VALID
    codes[lots < section.test_fraction] = TEST
    return Split(_scored(log, codes, section))


def _after_first(log: Log, mask: Mask) -> Mask:
    """Which positions come after the first of their user's in `mask`, (P,)."""
    place = np.arange(len(mask))
    first = np.minimum.reduceat(np.where(mask, place, len(mask)), log.offsets[:-1])  # no sequence is empty
    return place > np.repeat(first, log.lengths)


def _session_lots(log: Log, seed: int) -> npt.NDArray[np.float64]:
    if log.session_keys is None:
        raise UserError(
            "split.method session_holdout needs a session id for each interaction, the source has none: map one with "
            "data.interactions.columns.session_id or take another split"
        )
    return uniform(mix(seed, _SESSION_LOT, log.user_keys[log.users], log.session_keys))


def _scored(log: Log, codes: Codes, section: SplitSection) -> Codes:
    """VALID and TEST positions that are not scored become UNUSED."""
    enough = log.positions >= section.min_history
    users = log.users
    result = np.where(codes == TRAIN, TRAIN, UNUSED).astype(np.int8)
    for code in (VALID, TEST):
        places = np.flatnonzero((codes == code) & enough)
        owners = users[places]
        edge = owners[1:] != owners[:-1]
        if section.targets == "first":
            places = places[np.concatenate([[True], edge])] if len(places) else places
        elif section.targets == "last":
            places = places[np.concatenate([edge, [True]])] if len(places) else places
        result[places] = code
    return result


def _refuse_empty(result: Split, log: Log, section: SplitSection) -> None:
    found = {name: int((result.codes == code).sum()) for name, code in SPLIT_CODES.items()}
    if all(found.values()):
        return
    empty = ", ".join(name for name, count in found.items() if not count)
    total = section.valid_fraction + section.test_fraction
    raise UserError(
        f"split {section.method}: {empty} came out empty (train {found['train']}, valid {found['valid']}, test "
        f"{found['test']} of {len(log.items)} interactions of {len(log.user_keys)} users; cut-offs "
        f"{result.cutoffs or 'none'}; valid_fraction + test_fraction = {total:g}, min_history {section.min_history}): "
        "change the fractions, lower split.min_history or read more data"
    )


@dataclass(frozen=True)
class Given:
    """The rows of a published protocol, as read: (line, row) by split, and how their keys are called."""

    section: GivenRows
    rows: dict[str, list[tuple[int, dict[str, Any]]]]  # "valid" and "test"


def read_given(section: SplitSection) -> Given:
    """Read the rows of split.given.

    Raises:
        UserError: no split.given, a missing file, a line that is no JSON object.
    """
    if section.given is None:
        raise UserError("split.method given needs split.given with valid and test: paths of JSONL rows")
    return Given(section.given, {"valid": _rows(section.given.valid), "test": _rows(section.given.test)})


def settle_ties(log: Log, item_ids: list[str], given: Given) -> npt.NDArray[np.int64]:
    """Order of positions, (P,), in which ties stand as the given rows have them; only ever moves within one time.

    Published rows often come from a log whose ties were ordered by something that was not published. Where the rows
    say which of two simultaneous interactions came first, they are followed: items of a row's history keep its order
    and its target comes last; everything else at the time of the oldest goes before, at the time of the target after.
    """
    order = np.arange(len(log.items))
    index = _GivenIndex(log, item_ids, given.section)
    found = [
        index.place(getattr(given.section, name), number, row)
        for name, rows in given.rows.items()
        for number, row in rows
    ]
    for row in sorted(found, key=lambda row: int(log.order_us[row.position])):
        start, end = log.offsets[log.users[row.position]], log.offsets[log.users[row.position] + 1]
        part = order[start:end]
        order[start:end] = part[np.lexsort((_ranks(log, part, row), log.order_us[part]))]
    return order


def _ranks(log: Log, part: npt.NDArray[np.int64], row: "_GivenRow") -> npt.NDArray[np.int64]:
    items, times = log.items[part], log.order_us[part]
    places = {int(item): place for place, item in enumerate([*row.history, row.target], 1)}
    known = times[np.isin(items, row.history)]
    oldest = known.min() if len(known) else log.order_us[row.position]
    others = np.where(times <= oldest, 0, len(places) + 1)
    return np.array([places.get(int(item), other) for item, other in zip(items, others)], dtype=np.int64)


def _given(log: Log, item_ids: list[str], given: Given) -> Split:
    """Roles from explicit rows: each row's target is VALID or TEST, later positions of its user UNUSED, the rest TRAIN.

    How many rows' histories stand directly before their target in the log is noted (`history_equal`).
    """
    index = _GivenIndex(log, item_ids, given.section)
    codes = np.full(len(log.items), TRAIN, dtype=np.int8)
    notes: dict[str, Any] = {}
    targets: dict[int, int] = {}  # position → code
    for name, rows in given.rows.items():
        path = getattr(given.section, name)
        found = [index.place(path, number, row) for number, row in rows]
        for row in found:
            if targets.setdefault(row.position, SPLIT_CODES[name]) != SPLIT_CODES[name]:
                raise UserError(
                    f"{path}: item {item_ids[row.target]} of user {log.user_ids[log.users[row.position]]} is a "
                    f"target in {index.given.valid}, too: a position cannot be valid and test"
                )
        notes[name] = {"rows": len(found), "history_equal": sum(row.history_equal for row in found)}
    for place in targets:
        codes[place : log.offsets[log.users[place] + 1]] = UNUSED
    for place, code in targets.items():
        codes[place] = code
    return Split(codes, notes={"given": notes})


def _rows(path: str) -> list[tuple[int, dict[str, Any]]]:
    file = Path(offline.resolve(path))
    if not file.is_file():
        raise UserError(f"{path} does not exist: split.given names JSONL files of rows with a user, history and target")
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8")
            row = json.loads(text)
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}: is not UTF-8 text: save the file as UTF-8") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error.msg}): mend or drop the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: holds {text[:60]!r}, one JSON object a line is expected")
        rows.append((number, row))
    return rows


@dataclass(frozen=True)
class _GivenRow:
    """A row found in a log."""

    position: int  # of the target, in the flat log
    target: int  # item_index
    history: list[int]  # item_index, oldest first
    history_equal: bool  # the history stands directly before the target


class _GivenIndex:
    """Finds given rows in a log."""

    def __init__(self, log: Log, item_ids: list[str], given: GivenRows) -> None:
        self.log, self.given = log, given
        self.user_of = {user_id: number for number, user_id in enumerate(log.user_ids)}
        self.item_of = {item_id: number for number, item_id in enumerate(item_ids)}

    def place(self, path: str, number: int, row: dict[str, Any]) -> _GivenRow:
        """The row in the log; of several interactions with the target the one its history precedes, else the last."""
        where, given = f"{path}, line {number}", self.given
        for key in (given.user, given.history, given.target):
            if key not in row:
                raise UserError(f'{where}: no key "{key}", keys there: {", ".join(row)}; set split.given')
        if not isinstance(row[given.history], list):
            raise UserError(f"{where}: {given.history} is {row[given.history]!r}, a list of item ids is expected")
        user = self.user_of.get(str(row[given.user]))
        if user is None:
            raise UserError(
                f"{where}: user {row[given.user]} is not in the interactions (after filtering): "
                "check the filter section and split.given.user"
            )
        start, end = (int(edge) for edge in self.log.offsets[user : user + 2])
        sequence = self.log.items[start:end]
        target = self._item(row[given.target], where)
        places = np.flatnonzero(sequence == target)
        if not len(places):
            raise UserError(
                f"{where}: user {row[given.user]} has no interaction with target {row[given.target]} (after "
                "filtering): check the filter section and split.given.item_id_offset"
            )
        history = [self._item(item, where) for item in row[given.history]]
        equal = [place for place in places if _ends_with(sequence[:place], history)]
        return _GivenRow(start + int(equal[-1] if equal else places[-1]), target, history, bool(equal))

    def _item(self, given_id: Any, where: str) -> int:
        try:
            name = str(int(given_id) + self.given.item_id_offset) if self.given.item_id_offset else str(given_id)
        except (TypeError, ValueError):
            raise UserError(
                f"{where}: item id {given_id!r} is no whole number, split.given.item_id_offset can only be added to one"
            ) from None
        if name not in self.item_of:
            raise UserError(f'{where}: item "{name}" is not in the items: check split.given.item_id_offset')
        return self.item_of[name]


def _ends_with(sequence: npt.NDArray[np.int32], history: list[int]) -> bool:
    return len(history) <= len(sequence) and sequence[len(sequence) - len(history) :].tolist() == history


def audit(log: Log, split: Split, section: SplitSection) -> dict[str, Any]:
    """What the split leaks: shares in [0, 1], counts, and `warnings` as sentences.

    test_older_than_last_train: test targets with a time before the newest TRAIN interaction of anybody.
    test_older_than_own_last_train: the same against the user's own TRAIN interactions.
    train_histories_with_test_targets: TRAIN positions that come after a TEST position of their own user.
    shared_sessions: sessions with positions in more than one of train, valid and test; null without sessions.
    users_with_tied_last_timestamps: of users with two interactions or more, those whose last two have one time.
    """
    codes = split.codes
    found = {f"{name}_targets": int((codes == code).sum()) for name, code in SPLIT_CODES.items()}
    result: dict[str, Any] = found | _older(log, codes) | split.notes
    result["train_histories_with_test_targets"] = int((_after_first(log, codes == TEST) & (codes == TRAIN)).sum())
    result["shared_sessions"] = _shared_sessions(log, codes)
    result["users_with_tied_last_timestamps"] = _tied_at_the_end(log)
    return result | {"warnings": _warnings(result, section)}


def _older(log: Log, codes: Codes) -> dict[str, float]:
    lowest = np.iinfo(np.int64).min
    train_times = np.where(codes == TRAIN, log.order_us, lowest)
    own_last = np.maximum.reduceat(train_times, log.offsets[:-1])  # (U,) no sequence is empty
    tested = np.flatnonzero(codes == TEST)
    times = log.order_us[tested]
    return {
        "test_older_than_last_train": float((times < train_times.max()).mean()),
        "test_older_than_own_last_train": float((times < own_last[log.users[tested]]).mean()),
    }


def _shared_sessions(log: Log, codes: Codes) -> int | None:
    if log.sessions is None:
        return None
    sessions_of = np.maximum.reduceat(log.sessions, log.offsets[:-1]) + 1  # (U,) numbers run from 0
    begins = np.cumsum(sessions_of) - sessions_of
    session = np.repeat(begins, log.lengths) + log.sessions
    seen = np.zeros((len(SPLIT_CODES), int(sessions_of.sum())), dtype=bool)
    for number, code in enumerate(SPLIT_CODES.values()):
        seen[number, session[codes == code]] = True
    return int((seen.sum(axis=0) > 1).sum())


def _tied_at_the_end(log: Log) -> float:
    last = log.offsets[1:][log.lengths >= 2] - 1
    return float((log.order_us[last] == log.order_us[last - 1]).mean()) if len(last) else 0.0


def _warnings(result: dict[str, Any], section: SplitSection) -> list[str]:
    older, tied = result["test_older_than_last_train"], result["users_with_tied_last_timestamps"]
    warnings = []
    if section.method == "leave_one_out":
        warnings.append(
            f"leave_one_out leaks: {older:.1%} of the test targets are older than the newest training "
            "interaction, so the model has seen the future of other users. Compare with split.method temporal."
        )
    elif older > 0 and section.method != "user_holdout":
        warnings.append(f"{older:.1%} of the test targets are older than the newest training interaction.")
    if count := result["train_histories_with_test_targets"]:
        warnings.append(
            f"train_histories_with_test_targets: {count} training positions come after a test target of their own "
            "user, so training prompts show test answers."
        )
    if result["shared_sessions"]:
        warnings.append(f"{result['shared_sessions']} sessions have positions in more than one split.")
    if tied > 0.05:
        warnings.append(
            f"{tied:.1%} of the users have tied timestamps at the end: the order of those interactions is "
            "drawn by lot (seed, user, item), so the last item is partly chance."
        )
    if result.get("users_too_short"):
        warnings.append(
            f"{result['users_too_short']} users have fewer than {result['interactions_needed']} interactions "
            "and are in train only."
        )
    for name, rows in result.get("given", {}).items():
        if rows["history_equal"] < rows["rows"]:
            warnings.append(
                f"{rows['rows'] - rows['history_equal']} of {rows['rows']} given {name} rows have a history "
                "that differs from the positions directly before the target; the log's order is used."
            )
    return warnings
