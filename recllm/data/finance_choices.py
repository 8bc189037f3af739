"""The task rank_assets: from a bank's data to C candidates of a customer on a date, and the utility that ranks them.

A `FarTrans` enters. Leave: choices (each purchase among assets that had prices too), tastes that are fitted to the
choices before a date, and `Rankings`, the examples. "Which of these suits me best?"

A date is a midnight, the beginning of a day in UTC. Ledger, prices and choices are of days before it. What lies behind
it says two things only: which asset the customer then bought first, the choice that mrr and hit rates are about, and
which they did not buy, of which the other candidates are drawn. Neither has a part in the order that is taught.

Source: Conv-FinRe (finance_utility.py). Its released calibration fits a user to the very choices that are scored; here
only what came before counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm.data.far_trans import BUY, FarTrans
from recllm.data.finance_utility import Taste, Views, fit_taste, views
from recllm.data.prices import DAY_S, date_of, price_features
from recllm.data.randomness import mix, text_keys
from recllm.errors import UserError
from recllm.recipe import CandidatesSection, FinanceSection

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
Booleans = npt.NDArray[np.bool_]

_DRAW_LOT, _PLACE_LOT = 211, 212  # beside those of candidates.py
_FIRST_LOT, _LAST_LOT = np.uint64(0), np.uint64(0xFFFFFFFFFFFFFFFF)


# ---- choices ----


class Choices(NamedTuple):
    """N purchases as choices among C candidates, for `fit_taste`; by day, then customer."""

    customer_ids: list[str]
    cutoffs: Ints  # (N,) seconds: midnight before the purchase
    candidates: Ints  # (N, C) asset numbers
    chosen: Ints  # (N,) column of the purchase
    mean: Floats  # (N, C) features of the prices of the days before the cut-off
    variance: Floats
    drawdown: Floats


def draw_choices(data: FarTrans, num_candidates: int = 10, lookback_days: int = 70, seed: int = 0) -> Choices:
    """Every purchase of an asset with prices before it, among others that had prices too and were not bought that day.

    Prices: at least three in the `lookback_days` before. The others are drawn uniformly by a hash of (seed, customer,
    day, purchase, asset), and so is the candidates' order. A purchase with too few others is left out.
    """
    buys = data.transactions.filter(pl.col("side") == BUY).unique(["customer_id", "day", "asset"])
    buys = buys.sort("day", "customer_id", "asset")
    days, assets = buys["day"].to_numpy(), buys["asset"].to_numpy()
    keys = text_keys(buys["customer_id"].to_list())
    found = []
    for day in np.unique(days).tolist():
        rows = np.arange(*np.searchsorted(days, [day, day + 1]))
        known = price_features(data.prices, day - lookback_days, day)
        table = np.stack([known.mean, known.variance, known.drawdown])
        found.append(_choices_on(day, rows, assets[rows], keys[rows], table, num_candidates, seed))
    rows = np.concatenate([part[0] for part in found] or [np.zeros(0, np.int64)])
    candidates = np.concatenate([part[1] for part in found] or [np.zeros((0, num_candidates), np.int64)])
    features = np.concatenate([part[2] for part in found] or [np.zeros((3, 0, num_candidates))], axis=1)
    chosen = (candidates == assets[rows][:, None]).argmax(axis=1)
    return Choices(buys["customer_id"].gather(rows).to_list(), days[rows] * DAY_S, candidates, chosen, *features)


def _choices_on(
    day: int, rows: Ints, bought: Ints, keys: Keys, features: Floats, num_candidates: int, seed: int
) -> tuple[Ints, Ints, Floats]:
    """Of one day's purchases (n,) those that become choices: their rows (m,), candidates (m, C), features (3, m, C)."""
    able = np.flatnonzero(~np.isnan(features[0]))
    customers, number = np.unique(keys, return_inverse=True)
    baskets = np.zeros((len(customers), features.shape[1]), dtype=bool)
    baskets[number, bought] = True
    taken = baskets[number][:, able]  # (n, able)
    kept = np.isin(bought, able) & ((~taken).sum(axis=1) >= num_candidates - 1)
    if not kept.any():
        return rows[:0], np.zeros((0, num_candidates), np.int64), np.zeros((3, 0, num_candidates))
    purchases = mix(seed, keys[kept], np.array([day]), bought[kept])
    candidates = _draw(able, bought[kept], taken[kept], purchases, num_candidates, seed)
    return rows[kept], candidates, features[:, candidates]


def _draw(able: Ints, own: Ints, taken: Booleans, keys: Keys, count: int, seed: int) -> Ints:
    """(n, count) of the assets `able` (A,): each row's own (n,), the others those with the lowest lots, none taken.

    A lot hangs on seed, key (n,) and asset, and so does the place: whatever is a row's own asset, the others stand in
    the same order.
    """
    lots = mix(seed, _DRAW_LOT, keys[:, None], able[None])
    lots = np.where(taken, _LAST_LOT, lots)
    lots = np.where(able == own[:, None], _FIRST_LOT, lots)
    picked = able[np.argsort(lots, axis=1, kind="stable")[:, :count]]
    places = np.argsort(mix(seed, _PLACE_LOT, keys[:, None], picked), axis=1, kind="stable")
    return np.take_along_axis(picked, places, axis=1)


# ---- tastes ----


class Tastes(NamedTuple):
    """λ and γ of N customers on N dates."""

    variance: Floats  # (N,) λ
    drawdown: Floats  # (N,) γ
    num_choices: Ints  # (N,) of the customer before the date
    own: Booleans  # (N,) fitted to these; otherwise to the choices of all customers before the date


def fit_tastes(choices: Choices, customer_ids: Sequence[str], cutoffs: Sequence[int], fewest: int) -> Tastes:
    """The taste of each customer on each date (seconds), fitted to the choices strictly before it.

    With fewer than `fewest` choices a customer has the taste that fits all customers' choices before the date; where
    nobody has chosen yet λ = γ = 0, and utility is momentum.
    """
    owners = pl.DataFrame({"customer_id": choices.customer_ids}, schema={"customer_id": pl.String})
    groups = owners.with_row_index("row").group_by("customer_id").agg("row")
    rows = {name: np.array(mine, dtype=np.int64) for name, mine in groups.iter_rows()}
    fitted: dict[tuple[str | None, int], Taste] = {}
    found = []
    for name, cutoff in zip(customer_ids, cutoffs):
        past = rows.get(name, np.zeros(0, dtype=np.int64))
        past = past[: np.searchsorted(choices.cutoffs[past], cutoff)]
        own = len(past) >= fewest
        key = (name, len(past)) if own else (None, cutoff)
        if key not in fitted:
            fitted[key] = _fit(choices, past if own else slice(0, int(np.searchsorted(choices.cutoffs, cutoff))))
        found.append((*fitted[key], len(past), own))
    lam, gamma, counts, owned = np.array(found, dtype=np.float64).reshape(-1, 4).T
    return Tastes(lam, gamma, counts.astype(np.int64), owned.astype(bool))


def _fit(choices: Choices, rows: Ints | slice) -> Taste:
    return fit_taste(choices.mean[rows], choices.variance[rows], choices.drawdown[rows], choices.chosen[rows])


# ---- examples ----


@dataclass(frozen=True)
class Rankings:
    """N examples with C candidates each.

    Columns of `table`: example_id, customer_id; cutoff, window_end (s); history_end: the customer's first
    `history_end` transactions precede the date; candidates (asset numbers), mean, variance, drawdown (lists of C);
    chosen: the column of the candidate that was bought first; taste_variance (λ), taste_drawdown (γ), num_choices and
    own_taste as in `Tastes`.
    """

    table: pl.DataFrame

    def matrix(self, name: str) -> npt.NDArray:
        """A column of lists, (N, C)."""
        lists = self.table[name]
        return lists.explode().to_numpy().reshape(len(lists), -1)

    @property
    def chosen(self) -> Ints:
        """(N,) columns."""
        return self.table["chosen"].to_numpy()

    def views(self) -> Views:
        """What the advisers think of the candidates, by each customer's taste."""
        tastes = [Taste(*row) for row in self.table.select("taste_variance", "taste_drawdown").iter_rows()]
        return views(self.matrix("mean"), self.matrix("variance"), self.matrix("drawdown"), tastes)

    def taught(self) -> Ints:
        """(N, C) the candidates by falling utility: what a completion lists. Equal ones stand as in the prompt."""
        order = np.argsort(-self.views().utility, axis=1, kind="stable")
        return np.take_along_axis(self.matrix("candidates"), order, axis=1)


def build_rankings(
    data: FarTrans, cutoffs: Sequence[int], choices: Choices, section: FinanceSection, drawn: CandidatesSection
) -> Rankings:
    """Examples of every cut-off (a day) and every customer who has a history before it and a choice in its window.

    On offer is what has at least three prices in the `lookback_days` before the date. The choice is the asset on offer
    that the customer bought first in the window; of one day the first in the bank's file. The other candidates are
    drawn uniformly, by a hash of (drawn.seed, customer, date, asset), from what is on offer and was not bought in the
    window. Tastes are those of `fit_tastes` from `choices` (`draw_choices` of the same data).

    Raises:
        UserError: a window that passes the last day of data, fewer than `drawn.count` assets on offer, a customer who
            bought so many that too few are left, no example at all.
    """
    parts = []
    for cutoff in cutoffs:
        if cutoff + section.window_days > data.last_day + 1:
            raise UserError(
                f"the window of {date_of(cutoff)} ends on {date_of(cutoff + section.window_days - 1)}, the data on "
                f"{date_of(data.last_day)}: take earlier cut-offs or a shorter window"
            )
        known = price_features(data.prices, cutoff - section.lookback_days, cutoff)
        features = np.stack([known.mean, known.variance, known.drawdown])
        buyers = _buyers(data.transactions, cutoff, np.flatnonzero(~np.isnan(known.mean)), section)
        if buyers.height:
            parts.append(_examples_on(buyers, cutoff, features, section, drawn))
    if not sum(part.height for part in parts):
        raise UserError(
            f"{len(cutoffs)} cut-offs give no example: no customer with a history then buys an asset that has prices "
            f"in the {section.lookback_days} days before. Take later cut-offs, or a longer window or lookback"
        )
    table = pl.concat(parts)
    tastes = fit_tastes(choices, table["customer_id"].to_list(), table["cutoff"].to_list(), section.min_choices)
    return Rankings(
        table.with_columns(
            pl.Series("taste_variance", tastes.variance),
            pl.Series("taste_drawdown", tastes.drawdown),
            pl.Series("num_choices", tastes.num_choices),
            pl.Series("own_taste", tastes.own),
        )
    )


def _buyers(transactions: pl.DataFrame, cutoff: int, able: Ints, section: FinanceSection) -> pl.DataFrame:
    """customer_id, history_end, bought (in the window, any order), choice (null: nothing on offer); by customer."""
    day = pl.col("day")
    past = transactions.filter(day < cutoff).group_by("customer_id").agg(pl.len().cast(pl.Int64).alias("history_end"))
    buys = transactions.filter((day >= cutoff) & (day < cutoff + section.window_days) & (pl.col("side") == BUY))
    offered = pl.col("asset").is_in(able.tolist())
    lists = buys.group_by("customer_id").agg(
        pl.col("asset").unique().alias("bought"), pl.col("asset").filter(offered).first().alias("choice")
    )
    return past.filter(pl.col("history_end") >= section.min_history).join(lists, on="customer_id").sort("customer_id")


def _examples_on(
    buyers: pl.DataFrame, cutoff: int, features: Floats, section: FinanceSection, drawn: CandidatesSection
) -> pl.DataFrame:
    """One date's rows of `Rankings.table`, without the tastes; features (3, A)."""
    able = np.flatnonzero(~np.isnan(features[0]))
    if len(able) < drawn.count:
        raise UserError(
            f"on {date_of(cutoff)} {len(able)} assets have three prices in the {section.lookback_days} days before, "
            f"the task rank_assets asks for {drawn.count} candidates: lower protocol.candidates.count, lengthen "
            "finance.lookback_days, or begin later with finance.train_from"
        )
    asked = buyers.filter(pl.col("choice").is_not_null())
    own = asked["choice"].to_numpy()
    taken = np.zeros((asked.height, features.shape[1]), dtype=bool)
    taken[np.repeat(np.arange(asked.height), asked["bought"].list.len()), asked["bought"].explode()] = True
    taken = taken[:, able]
    left = (~taken).sum(axis=1)
    if left.min(initial=len(able)) < drawn.count - 1:
        row = int(left.argmin())
        raise UserError(
            f'customer "{asked["customer_id"][row]}" buys {int(taken[row].sum())} of the {len(able)} assets on offer '
            f"on {date_of(cutoff)} within {section.window_days} days, which leaves {left[row]} for {drawn.count - 1} "
            f"others: set protocol.candidates.count to {left[row] + 1} or less, or shorten finance.window_days"
        )
    keys = mix(drawn.seed, text_keys(asked["customer_id"].to_list()), np.array([cutoff]))
    candidates = _draw(able, own, taken, keys, drawn.count, drawn.seed)
    mean, variance, drawdown = (_lists(values) for values in features[:, candidates])
    stamps = {"cutoff": cutoff * DAY_S, "window_end": (cutoff + section.window_days) * DAY_S}
    return asked.select(
        pl.format("{}/{}", "customer_id", pl.lit(date_of(cutoff))).alias("example_id"),
        "customer_id",
        *(pl.lit(value, pl.Int64).alias(name) for name, value in stamps.items()),
        "history_end",
        _lists(candidates).alias("candidates"),
        mean.alias("mean"),
        variance.alias("variance"),
        drawdown.alias("drawdown"),
        pl.Series("chosen", (candidates == own[:, None]).argmax(axis=1).astype(np.int64)),
    )


def _lists(matrix: npt.NDArray) -> pl.Series:
    return pl.Series(matrix).arr.to_list()
