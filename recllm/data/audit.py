"""What a split leaks, added up over the parts of a log.

Parts of a log with the roles of their positions enter, one after the other; the audit of the manifest leaves.
"""

from pathlib import Path
from typing import Any

import numpy as np

from recllm.data.given import GivenRow
from recllm.data.log import Log
from recllm.data.splits import Codes, interactions_needed
from recllm.data.spool import Spool
from recllm.recipe import SplitSection
from recllm.schema import SPLIT_CODES, TEST, TRAIN

_EARLIEST = int(np.iinfo(np.int64).min)
_YEAR_US = 365 * 86_400 * 1_000_000


class Audit:
    """`add` every part of a log once, then `finish`. The times of the test targets wait in `folder`."""

    def __init__(self, section: SplitSection, folder: Path, events: bool = False) -> None:
        self.section, self.events = section, events
        self.found = dict.fromkeys(SPLIT_CODES, 0)  # positions by role
        self._test_times = Spool(folder, np.int64)
        self._newest = self._newest_train = _EARLIEST
        self._older_than_own = self._too_short = 0
        self._after_test = dict.fromkeys(("train", "valid"), 0)
        self._ended = self._tied = 0  # users with two interactions and more; of these, those whose last two are tied
        self._sessions: int | None = 0
        self._given: dict[str, dict[str, int]] = {}
        self._trimmed = self._disordered = self._simultaneous = self._positions = 0

    def add(
        self,
        log: Log,
        codes: Codes,
        rows: dict[str, list[GivenRow]] | None = None,
        trimmed: int = 0,
        disordered: int = 0,
    ) -> None:
        """Count what one part of the log holds.

        Args:
            log: the part.
            codes: (P,) the role of each position.
            rows: those of split.given that lie in it.
            trimmed: how many of its positions whole_sessions leaves unused.
            disordered: of events, how many are older than the one before them in the files.
        """
        self._trimmed += trimmed
        self._disordered += disordered
        self._positions += len(codes)
        self._simultaneous += _simultaneous(log)
        for name, code in SPLIT_CODES.items():
            self.found[name] += int((codes == code).sum())
        train_times = np.where(codes == TRAIN, log.order_us, _EARLIEST)
        self._newest_train = max(self._newest_train, int(train_times.max()))
        self._newest = max(self._newest, int(log.order_us.max()))
        tested = np.flatnonzero(codes == TEST)
        times = log.order_us[tested]
        self._test_times.append(times)
        own_last = np.maximum.reduceat(train_times, log.offsets[:-1])  # (U,) no sequence is empty
        self._older_than_own += int((times < own_last[log.users[tested]]).sum())
        after_test = log.after_first(codes == TEST)
        for name in self._after_test:
            self._after_test[name] += int((after_test & (codes == SPLIT_CODES[name])).sum())
        self._too_short += int((log.lengths < interactions_needed(self.section)).sum())
        last = log.offsets[1:][log.lengths >= 2] - 1
        self._ended += len(last)
        self._tied += int((log.order_us[last] == log.order_us[last - 1]).sum())
        shared = _shared_sessions(log, codes)
        self._sessions = None if shared is None or self._sessions is None else self._sessions + shared
        for name, found in (rows or {}).items():
            counts = self._given.setdefault(name, {"rows": 0, "history_equal": 0})
            counts["rows"] += len(found)
            counts["history_equal"] += sum(row.history_equal for row in found)

    def finish(self) -> dict[str, Any]:
        """What the split leaks: shares in [0, 1], counts, and `warnings` as sentences.

        test_older_than_last_train: test targets with a time before the newest TRAIN interaction of anybody.
        test_older_than_own_last_train: the same against the user's own TRAIN interactions.
        {train,valid}_histories_with_test_targets: such positions that come after a TEST position of their own user.
        shared_sessions: sessions with positions in more than one of train, valid and test; null without sessions.
        users_with_tied_last_timestamps: of users with two interactions or more, those whose last two have one time.
        trimmed_events: with whole_sessions, those that lie beyond the next cut-off and are unused.
        out_of_order_events: of an event log, those older than the one of their session before them in the files.
        simultaneous_events: of an event log, the share with the time of the one of their session before them.
        """
        older = sum(int((times < self._newest_train).sum()) for times in self._test_times.chunks())
        result: dict[str, Any] = {f"{name}_targets": count for name, count in self.found.items()}
        result["test_older_than_last_train"] = older / self.found["test"]
        result["test_older_than_own_last_train"] = self._older_than_own / self.found["test"]
        if self.section.method == "leave_one_out":
            result["users_too_short"] = self._too_short
            result["interactions_needed"] = interactions_needed(self.section)
        if self._given:
            result["given"] = self._given
        for name, count in self._after_test.items():
            result[f"{name}_histories_with_test_targets"] = count
        result["shared_sessions"] = self._sessions
        result["users_with_tied_last_timestamps"] = self._tied / self._ended if self._ended else 0.0
        if self.section.whole_sessions:
            result["trimmed_events"] = self._trimmed
        if self.events:
            result["out_of_order_events"] = self._disordered
            result["simultaneous_events"] = self._simultaneous / self._positions
        return result | {"warnings": [*_warnings(result, self.section), *self._early()]}

    def _early(self) -> list[str]:
        """Seconds that were read as milliseconds pass for the beginning of 1970."""
        if not 0 <= self._newest < _YEAR_US:
            return []
        return [
            "every interaction lies in 1970: unless the timestamps are plain numbers that count up, "
            "data.interactions.timestamp_unit is too fine."
        ]


def _shared_sessions(log: Log, codes: Codes) -> int | None:
    if log.sessions is None:
        return None
    session, count = log.session_numbers
    seen = np.zeros((len(SPLIT_CODES), count), dtype=bool)
    for number, code in enumerate(SPLIT_CODES.values()):
        seen[number, session[codes == code]] = True
    return int((seen.sum(axis=0) > 1).sum())


def _simultaneous(log: Log) -> int:
    """Positions with the time of the position of their session directly before."""
    if log.sessions is None:
        return 0
    session, _ = log.session_numbers
    order = np.argsort(session, kind="stable")
    return int(((np.diff(session[order]) == 0) & (np.diff(log.order_us[order]) == 0)).sum())


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
    if count := result["valid_histories_with_test_targets"]:
        warnings.append(
            f"valid_histories_with_test_targets: {count} validation positions come after a test target of their own "
            "user, so what is chosen on validation has seen test answers in histories."
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
    if count := result.get("out_of_order_events"):
        warnings.append(
            f"{count} events stand in the files behind a later one of their session: they were sorted by time. Check "
            "data.interactions.timestamp_unit, and that timestamp is when they happened."
        )
    if (share := result.get("simultaneous_events", 0)) > 0.05:
        warnings.append(
            f"{share:.1%} of the events have the time of the one of their session before them: the order of those is "
            "drawn by lot (seed, user, item, time, action), so what comes next is partly chance."
        )
    for name, rows in result.get("given", {}).items():
        if rows["history_equal"] < rows["rows"]:
            warnings.append(
                f"{rows['rows'] - rows['history_equal']} of {rows['rows']} given {name} rows have a history "
                "that differs from the positions directly before the target; the log's order is used."
            )
    return warnings
