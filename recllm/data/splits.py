"""Gives every position of every user's sequence its role.

A log enters in parts, each a `Log` with the whole sequences of some users; one code a position (UNUSED, TRAIN, VALID or
TEST) leaves, the same however the users are parted. What must be known of the whole log is in `Rules`. Choices by lot
hang on (seed, user) or (seed, user, session), never on row order.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm.data.given import Given, GivenRow
from recllm.data.log import Log
from recllm.data.prices import DAY_S, day_of
from recllm.data.randomness import mix, uniform
from recllm.errors import UserError
from recllm.recipe import SplitSection
from recllm.schema import SPLIT_CODES, TEST, TRAIN, UNUSED, VALID

_USER_LOT, _SESSION_LOT = 101, 102  # keep the lots of different questions apart
_BINS = 1 << 20

Codes = npt.NDArray[np.int8]
Times = Callable[[], Iterable[npt.NDArray[np.int64]]]  # all times of a log (seconds), in pieces, as often as asked


@dataclass(frozen=True)
class Rules:
    """How to split a log, with what hangs on all of its users."""

    section: SplitSection
    seed: int
    cutoffs: dict[str, int] = field(default_factory=dict)  # seconds
    given: Given | None = None


def rules(
    section: SplitSection,
    seed: int,
    user_ids: pl.Series,
    lengths: npt.NDArray[np.int64],
    times: Times,
    given: Given | None = None,
) -> Rules:
    """Look at the whole log before any part of it is split.

    Args:
        section: the protocol's split.
        seed: of every lot.
        user_ids: (U,) texts.
        lengths: (U,) interactions of each user.
        times: the seconds of all interactions, in any order.
        given: the rows of split.given, if that is the method.

    Raises:
        UserError: no user has enough interactions for leave_one_out; given rows of users who are not there.
    """
    cutoffs: dict[str, int] = {}
    if section.method == "leave_one_out":
        _check_lengths(section, user_ids, lengths)
    elif section.method == "temporal":
        newest = {"valid": min(1.0, section.test_fraction + section.valid_fraction), "test": section.test_fraction}
        total = int(lengths.sum())
        cutoffs = {name: nth(times, total - max(1, round(total * part))) for name, part in newest.items()}
    elif section.valid_from and section.test_from:
        cutoffs = {
            "valid": day_of(section.valid_from.isoformat()) * DAY_S,
            "test": day_of(section.test_from.isoformat()) * DAY_S,
        }
    elif given is not None:
        given.check_users(user_ids)
    return Rules(section, seed, cutoffs, given)


def interactions_needed(section: SplitSection) -> int:
    """By leave_one_out, for a user to be scored: a history, one valid, one test."""
    return section.min_history + 2


def _check_lengths(section: SplitSection, user_ids: pl.Series, lengths: npt.NDArray[np.int64]) -> None:
    if (longest := int(lengths.max())) >= interactions_needed(section):
        return
    raise UserError(
        f"user {user_ids[int(np.argmax(lengths))]} has {longest} interactions, the most of all users, the split needs "
        f"{interactions_needed(section)}: lower split.min_history ({section.min_history}) or read more data"
    )


def nth(pieces: Times, place: int) -> int:
    """The value that stands at `place` (from 0) when all are sorted, by counting: memory does not grow with them.

    >>> nth(lambda: [np.array([5, 1]), np.array([9, -3])], 2)
    5
    """
    low = min(int(piece.min()) for piece in pieces())
    high = max(int(piece.max()) for piece in pieces())
    while low < high:
        width = -(-(high - low + 1) // _BINS)
        counts = np.zeros(_BINS, dtype=np.int64)
        for piece in pieces():
            inside = piece[(piece >= low) & (piece <= high)]
            counts += np.bincount((inside - low) // width, minlength=_BINS)
        below = np.cumsum(counts)
        chosen = int(np.searchsorted(below, place, side="right"))
        place -= int(below[chosen - 1]) if chosen else 0
        low, high = low + chosen * width, min(high, low + (chosen + 1) * width - 1)
    return low


def assign(log: Log, rules: Rules, rows: dict[str, list[GivenRow]] | None = None) -> Codes:
    """The role of each position, (P,), of some users' sequences; `rows`: those of split.given that lie in `log`.

    valid and test: of a user's positions that have at least `min_history` earlier interactions, the first, the last or
    all (`targets`) are scored, the others are UNUSED. TRAIN keeps every position, except that with session_holdout the
    positions of a user after the beginning of their first valid or test session are UNUSED, and with whole_sessions
    those that `trimmed` names: no history of a training example holds a target of valid or test, and no session of a
    target of valid or test has a position in TRAIN. With session_holdout VALID keeps no position after the beginning of
    the user's first test session either: what is chosen on validation has seen no test answer in a history.

    Raises:
        UserError: session_holdout or whole_sessions without sessions.
    """
    section = rules.section
    if section.method == "leave_one_out":
        return _leave_one_out(log, section)
    if section.method in ("temporal", "dates"):
        return _temporal(log, rules)
    if section.method == "user_holdout":
        return _by_lot(log, section, uniform(mix(rules.seed, _USER_LOT, log.user_keys))[log.users])
    if section.method == "session_holdout":
        return _by_lot(log, section, _session_lots(log, rules.seed))
    return _given(log, rows or {})


def _leave_one_out(log: Log, section: SplitSection) -> Codes:
    enough = log.lengths >= interactions_needed(section)
    codes = np.full(len(log.items), TRAIN, dtype=np.int8)
    codes[log.offsets[1:][enough] - 1] = TEST
    codes[log.offsets[1:][enough] - 2] = VALID
    return codes


def _temporal(log: Log, rules: Rules) -> Codes:
    codes = _sides(log.seconds, rules)
    if rules.section.whole_sessions:
        codes = np.where(trimmed(log, rules), UNUSED, _sides(_beginnings(log), rules)).astype(np.int8)
    return _scored(log, codes, rules.section)


def _sides(seconds: npt.NDArray[np.int64], rules: Rules) -> Codes:
    """What lies at a cut-off belongs to the later side."""
    codes = np.full(len(seconds), TRAIN, dtype=np.int8)
    codes[seconds >= rules.cutoffs["valid"]] = VALID
    codes[seconds >= rules.cutoffs["test"]] = TEST
    return codes


def trimmed(log: Log, rules: Rules) -> npt.NDArray[np.bool_]:
    """By whole_sessions, positions at or after the next cut-off behind the beginning of their session, (P,).

    As the OTTO dataset has it, whose training sessions end where its test week begins.

    Raises:
        UserError: there are no sessions.
    """
    later: npt.NDArray[np.bool_] = _sides(log.seconds, rules) > _sides(_beginnings(log), rules)
    return later


def _beginnings(log: Log) -> npt.NDArray[np.int64]:
    """When the session of each position begins, (P,) seconds."""
    if log.sessions is None:
        raise UserError(_no_sessions("whole_sessions"))
    session, count = log.session_numbers
    first = np.empty(count, dtype=np.int64)
    first[session[::-1]] = log.seconds[::-1]  # what is written last stays: the oldest
    return first[session]


def _by_lot(log: Log, section: SplitSection, lots: npt.NDArray[np.float64]) -> Codes:
    """lots: (P,) in [0, 1), equal for all positions that must stay together."""
    codes = np.full(len(lots), TRAIN, dtype=np.int8)
    held_out = lots < section.test_fraction + section.valid_fraction
    codes[log.after_first(held_out)] = UNUSED
    test = lots < section.test_fraction
    codes[held_out & ~log.after_first(test)] = VALID
    codes[test] = TEST
    return _scored(log, codes, section)


def _session_lots(log: Log, seed: int) -> npt.NDArray[np.float64]:
    if log.session_keys is None:
        raise UserError(_no_sessions("method session_holdout"))
    return uniform(mix(seed, _SESSION_LOT, log.user_keys[log.users], log.session_keys))


def _no_sessions(what: str) -> str:
    return (
        f"split.{what} needs a session id for each interaction, the source has none: map one with "
        "data.interactions.columns.session_id or take another split"
    )


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


def _given(log: Log, rows: dict[str, list[GivenRow]]) -> Codes:
    """Each row's target is VALID or TEST, later positions of its user UNUSED, the rest TRAIN."""
    codes = np.full(len(log.items), TRAIN, dtype=np.int8)
    users = log.users
    targets = {row.position: SPLIT_CODES[name] for name, found in rows.items() for row in found}
    for place in targets:
        codes[place : log.offsets[users[place] + 1]] = UNUSED
    for place, code in targets.items():
        codes[place] = code
    return codes


def refuse_empty(found: dict[str, int], users: int, interactions: int, rules: Rules) -> None:
    """Refuse a split without any position in train, valid or test.

    Raises:
        UserError: what came out empty, the numbers, and what to change.
    """
    if all(found.values()):
        return
    section = rules.section
    empty = ", ".join(name for name, count in found.items() if not count)
    total = section.valid_fraction + section.test_fraction
    raise UserError(
        f"split {section.method}: {empty} came out empty (train {found['train']}, valid {found['valid']}, test "
        f"{found['test']} of {interactions} interactions of {users} users; cut-offs "
        f"{rules.cutoffs or 'none'}; valid_fraction + test_fraction = {total:g}, min_history {section.min_history}"
        + ("; by whole_sessions a side has the sessions that begin there" if section.whole_sessions else "")
        + "): change the fractions, lower split.min_history or read more data"
    )
