"""A log in memory: sequences of users, oldest first, as flat arrays."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

_US = 1_000_000


@dataclass(frozen=True)
class Log:
    """All users' sequences, oldest first. U users, P positions; user u owns positions offsets[u]:offsets[u + 1]."""

    user_ids: list[str]  # (U,)
    user_keys: npt.NDArray[np.uint64]  # (U,)
    offsets: npt.NDArray[np.int64]  # (U + 1,)
    items: npt.NDArray[np.int32]  # (P,) item_index; NO_ITEM of events without one
    order_us: npt.NDArray[np.int64]  # (P,) microseconds since the epoch
    sessions: npt.NDArray[np.int32] | None = None  # (P,) number of the session within its user
    session_keys: npt.NDArray[np.uint64] | None = None  # (P,) hash of session_id, or of the time at which it begins

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

    @property
    def session_numbers(self) -> tuple[npt.NDArray[np.int64], int]:
        """Number of each position's session among all users', (P,), and how many sessions there are."""
        assert self.sessions is not None  # callers look first
        sessions_of = np.maximum.reduceat(self.sessions, self.offsets[:-1]) + 1  # (U,) numbers run from 0
        begins = np.cumsum(sessions_of, dtype=np.int64) - sessions_of
        return np.asarray(np.repeat(begins, self.lengths) + self.sessions), int(sessions_of.sum())

    def users_between(self, first: int, end: int) -> "Log":
        """The log of users first..end - 1 alone."""
        part = slice(self.offsets[first], self.offsets[end])
        return Log(
            user_ids=self.user_ids[first:end],
            user_keys=self.user_keys[first:end],
            offsets=self.offsets[first : end + 1] - self.offsets[first],
            items=self.items[part],
            order_us=self.order_us[part],
            sessions=None if self.sessions is None else self.sessions[part],
            session_keys=None if self.session_keys is None else self.session_keys[part],
        )

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

    def after_first(self, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which positions come after the first of their user's in `mask`, (P,)."""
        place = np.arange(len(mask))
        first = np.minimum.reduceat(np.where(mask, place, len(mask)), self.offsets[:-1])  # no sequence is empty
        return np.asarray(place > np.repeat(first, self.lengths))
