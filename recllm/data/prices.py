"""Days and close prices: when a day is known, the newest price before a day, and what the prices of some days say.

Close prices as a matrix of days and assets enter; prices and features an asset (A,) leave. What is known of a day is
known when it ends: `known_at` gives its last second, so that a cut-off at midnight or within a day never sees that day.
"""

import datetime
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from recllm.errors import UserError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

DAY_S = 86_400
_FEWEST_RETURNS = 2


def known_at(day: Any) -> Any:
    """The last second of a day since the epoch (int or array), in seconds since the epoch.

    >>> known_at(0), known_at(0) < DAY_S
    (86399, True)
    """
    return (day + 1) * DAY_S - 1


def day_of(date: str) -> int:
    """Days since the epoch of a date YYYY-MM-DD.

    >>> day_of("1970-01-02")
    1
    """
    try:
        return (datetime.date.fromisoformat(date) - datetime.date(1970, 1, 1)).days
    except ValueError:
        raise UserError(f'"{date}" is no date: write it as YYYY-MM-DD') from None


def date_of(day: int) -> str:
    """The date of a day since the epoch.

    >>> date_of(day_of("2021-02-28") + 1)
    '2021-03-01'
    """
    return (datetime.date(1970, 1, 1) + datetime.timedelta(days=int(day))).isoformat()


@dataclass(frozen=True)
class Prices:
    """Close prices of A assets on the D days on which any of them has one."""

    days: Ints  # (D,) days since the epoch, ascending
    close: Floats  # (D, A) euros; NaN where an asset has no price on that day

    @cached_property
    def _newest(self) -> npt.NDArray[np.int32]:
        """(D, A) the newest row with a price, up to each row; −1 before the first."""
        rows = np.arange(len(self.days), dtype=np.int32)[:, None]
        return np.maximum.accumulate(np.where(np.isnan(self.close), np.int32(-1), rows), axis=0)

    def rows(self, begin: int, end: int) -> slice:
        """The rows of the days in [begin, end)."""
        low, high = np.searchsorted(self.days, [begin, end])
        return slice(int(low), int(high))

    def last(self, begin: int, end: int) -> Floats:
        """(A,) the newest price of the days in [begin, end); NaN where there is none."""
        rows = self.rows(begin, end)
        if rows.start >= rows.stop:
            return np.full(self.close.shape[1], np.nan)
        row = self._newest[rows.stop - 1]
        found = self.close[row, np.arange(len(row))]
        return np.where(row >= rows.start, found, np.nan)

    def before(self, day: int) -> Floats:
        """(A,) the newest price of the days before `day`, however old; NaN where there is none."""
        return self.last(int(np.iinfo(np.int32).min), day)


class Features(NamedTuple):
    """Of the close prices of A assets in some days, each (A,); NaN where there are fewer than three."""

    first: Floats  # euros
    last: Floats
    mean: Floats  # of the returns from one price to the next, μ
    variance: Floats  # of these returns, population, σ²
    drawdown: Floats  # largest loss from a peak, 0 to 1 (Magdon-Ismail & Atiya 2004)


def price_features(prices: Prices, begin: int, end: int) -> Features:
    """Features of the days in [begin, end). A day without a price is skipped: the next return spans the gap.

    >>> prices = Prices(np.arange(4), np.array([[10.0], [12.0], [np.nan], [9.0]]))
    >>> found = price_features(prices, 0, 4)
    >>> found.mean.round(9).tolist() == [round((2 / 10 - 3 / 12) / 2, 9)], found.drawdown.tolist()
    (True, [0.25])
    """
    block = prices.close[prices.rows(begin, end)]  # (T, A)
    if not len(block):
        return Features(*[np.full(block.shape[1], np.nan)] * 5)
    known = ~np.isnan(block)
    newest = np.maximum.accumulate(np.where(known, np.arange(len(block))[:, None], -1), axis=0)
    filled = np.where(newest >= 0, np.take_along_axis(block, np.maximum(newest, 0), axis=0), np.nan)
    previous = np.concatenate([np.full((1, block.shape[1]), np.nan), filled[:-1]])
    returns = np.where(known, block / previous - 1, np.nan)
    count = np.isfinite(returns).sum(axis=0)
    enough = count >= _FEWEST_RETURNS
    mean = np.nansum(returns, axis=0) / np.maximum(count, 1)
    variance = np.nansum((returns - mean) ** 2, axis=0) / np.maximum(count, 1)
    fall = np.fmax.reduce(1 - filled / np.fmax.accumulate(filled, axis=0), axis=0)
    first = block[known.argmax(axis=0), np.arange(block.shape[1])]
    return Features(*(np.where(enough, values, np.nan) for values in (first, filled[-1], mean, variance, fall)))


def rose(prices: Prices, cutoff: int, end: int) -> Booleans:
    """(A,) whether the last price in [cutoff, end) is above the last before `cutoff`; False where one is missing."""
    with np.errstate(invalid="ignore"):
        return np.asarray(prices.last(cutoff, end) > prices.before(cutoff))
