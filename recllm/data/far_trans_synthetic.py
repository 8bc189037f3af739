"""Writes data of the FAR-Trans schema of a known process: markets with trends, customers who follow or oppose them.

Sizes, a seed and how far behaviour and profit conflict enter (`Bank`); a folder with the CSV files that
`far_trans.read_far_trans` reads leaves. Columns and value sets are those of FAR-Trans, and shares are near its own;
names, ids, prices and transactions are drawn. ISINs have the country code ZZ, which is nobody's.

Prices: the log return of an asset on a trading day is drift + market + sector + own noise. The drift is a trend that
dies away with a half-life of about 250 trading days, so that past returns say something of the next six months.
Purchases: a customer buys an asset by a softmax of Zipf popularity, taste for sectors, risk level, and
(1 − 2 · conflict) · strength · trend: at conflict 0 what is rising, at 0.5 without regard to it, at 1 what is falling.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm import files
from recllm.data.far_trans import (
    ASSETS,
    BUY,
    COLUMNS,
    CUSTOMERS,
    LIMITS,
    MARKETS,
    PRICES,
    SELL,
    TRANSACTIONS,
)
from recllm.data.prices import date_of, day_of
from recllm.errors import UserError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Generator = np.random.Generator

# Values and about their shares in FAR-Trans.
_CATEGORIES = {"MTF": 0.38, "Stock": 0.35, "Bond": 0.27}
_SUB_CATEGORIES = {
    "MTF": {"Bond": 0.34, "Equity": 0.34, "Other": 0.23, "Money Market": 0.06, "Balanced": 0.03},
    "Stock": {"": 0.92, "Large Cap": 0.08},
    "Bond": {"Corporate": 0.76, "Government": 0.24},
}
_INDUSTRIES = {
    "Industrials": ("Engineering & Construction", "Airlines"),
    "Consumer Cyclical": ("Apparel Retail", "Auto Manufacturers"),
    "Technology": ("Semiconductors", "Software - Application"),
    "Financial Services": ("Banks - Regional", "Insurance - Life"),
    "Basic Materials": ("Steel", "Chemicals"),
    "Consumer Defensive": ("Packaged Foods", "Discount Stores"),
    "Healthcare": ("Biotechnology", "Medical Devices"),
    "Energy": ("Oil & Gas Integrated", "Solar"),
    "Utilities": ("Utilities - Renewable", "Utilities - Regulated Electric"),
}
_TYPES = {"Mass": 0.61, "Premium": 0.31, "Professional": 0.06, "Legal Entity": 0.005, "Inactive": 0.015}
_RISKS = {
    "Income": 0.31, "Balanced": 0.27, "Aggressive": 0.1, "Conservative": 0.09, "Predicted_Conservative": 0.09,
    "Predicted_Income": 0.08, "Predicted_Balanced": 0.04, "Predicted_Aggressive": 0.01, "Not_Available": 0.01,
}  # fmt: skip
_CAPACITIES = {
    "CAP_LT30K": 0.43, "CAP_30K_80K": 0.17, "Predicted_CAP_LT30K": 0.17, "CAP_80K_300K": 0.13,
    "Predicted_CAP_80K_300K": 0.03, "Predicted_CAP_30K_80K": 0.03, "CAP_GT300K": 0.03, "Not_Available": 0.01,
}  # fmt: skip
_CHANNELS = {"Internet Banking": 0.6, "Branch": 0.3, "Phone Banking": 0.1}
_LEVELS = ("Conservative", "Income", "Balanced", "Aggressive")  # from lower to higher risk
_MARKETS = (
    ("ZZATH", "First Exchange", "Greece", ("Stock", "Bond")),
    ("ZZETR", "Second Exchange", "Germany", ("Stock", "Bond")),
    ("ZZNYS", "Third Exchange", "USA", ("Stock",)),
    ("ZZFND", "Fund Platform", "Luxembourg", ("MTF",)),
)
_HOLIDAYS = ("01-01", "01-06", "03-25", "05-01", "08-15", "10-28", "12-25", "12-26")
_FIRST = ("Aegean", "Alpine", "Baltic", "Cedar", "Delta", "Ember", "Falcon", "Granite", "Harbour", "Ionian")
_SECOND = ("Capital", "Energy", "Foods", "Growth", "Holdings", "Income", "Materials", "Networks", "Reserve", "Systems")

_HALF_LIFE = 250.0  # trading days, of a trend
_RISK_OF = {"MTF": 0.4, "Bond": 0.1, "Stock": 1.0}  # what a risk level is held against
_VOLATILITY = {"MTF": 0.12, "Bond": 0.05, "Stock": 0.3}  # a year
_TREND = {"MTF": 0.12, "Bond": 0.04, "Stock": 0.3}  # deviation of the yearly drift
_TRADING_DAYS = 252
_SIZES = {"LT30K": 1_000.0, "30K_80K": 3_000.0, "80K_300K": 8_000.0, "GT300K": 25_000.0}  # median purchase, euros


@dataclass(frozen=True)
class Bank:
    """How large, how long and how contrary."""

    num_customers: int = 500
    num_assets: int = 120
    first: str = "2018-01-02"
    last: str = "2022-11-29"
    purchases: float = 20.0  # mean number a customer
    conflict: float = 0.5  # 0: customers buy what rises; 1: what falls
    strength: float = 1.5  # of trends in a purchase at conflict 0 or 1, in nats a deviation
    seed: int = 0


class _Assets(NamedTuple):
    isins: list[str]
    categories: npt.NDArray[np.str_]
    sectors: npt.NDArray[np.str_]  # "" without one
    listed: Ints  # (A,) first row of prices; 0 for the first asset
    markets: list[str]


def write_far_trans(path: Path, bank: Bank | None = None) -> Path:
    """Write a synthetic bank; the folder is complete or absent, and the same for the same `Bank`.

    Returns:
        The folder `path` with the six CSV files of the schema and bank.json, the arguments.

    Raises:
        UserError: fewer than 2 assets or 1 customer, fewer than 10 trading days, a conflict outside 0 to 1.
    """
    bank = bank or Bank()
    days = _trading_days(bank)
    _check(bank, days)
    generator = np.random.default_rng([bank.seed, 7])
    assets = _draw_assets(generator, bank, len(days))
    close, trends = _draw_prices(generator, assets, len(days))
    customers = _draw_customers(generator, bank, days)
    transactions = _draw_transactions(generator, bank, assets, customers, close, trends, days)
    tables = {
        ASSETS: _asset_table(generator, assets, days),
        CUSTOMERS: customers,
        MARKETS: _market_table(),
        PRICES: _price_table(assets, close, days),
        TRANSACTIONS: transactions,
    }
    tables[LIMITS] = _limit_table(tables[PRICES])
    with files.replacing_folder(Path(path)) as folder:
        for name, table in tables.items():
            table.select(COLUMNS[name]).write_csv(folder / f"{name}.csv")
        files.write_json(folder / "bank.json", dataclasses.asdict(bank))
    return Path(path)


def _check(bank: Bank, days: Ints) -> None:
    if bank.num_assets < 2 or bank.num_customers < 1 or len(days) < 10 or bank.purchases <= 0:
        raise UserError(
            f"{bank.num_customers} customers with {bank.purchases:g} purchases, {bank.num_assets} assets and "
            f"{len(days)} trading days: at least 1 customer, some purchases, 2 assets and 10 trading days are expected"
        )
    if not 0 <= bank.conflict <= 1:
        raise UserError(f"conflict is {bank.conflict}: 0 (behaviour follows profit) to 1 (opposes it) is expected")


def _trading_days(bank: Bank) -> Ints:
    """Monday to Friday, but holidays."""
    days = np.arange(day_of(bank.first), day_of(bank.last) + 1)
    weekday = (days + 3) % 7  # 1970-01-01 was a Thursday
    open_day = np.array([date_of(day)[5:] not in _HOLIDAYS for day in days.tolist()], dtype=np.bool_)
    return days[(weekday < 5) & open_day]


def _pick(generator: Generator, shares: dict[str, float], count: int) -> npt.NDArray[np.str_]:
    weights = np.array(list(shares.values()))
    return generator.choice(np.array(list(shares)), count, p=weights / weights.sum())


# ---- assets and prices ----


def _draw_assets(generator: Generator, bank: Bank, num_days: int) -> _Assets:
    count = bank.num_assets
    categories = _pick(generator, _CATEGORIES, count)
    sectors = np.where(categories == "Stock", generator.choice(np.array(list(_INDUSTRIES)), count), "")
    bonds = np.where(generator.random(count) < 0.77, "Corporate", "Sovereign")
    sectors = np.where(categories == "Bond", bonds, sectors)
    late = generator.random(count) < 0.3  # listed after the first day
    late[0] = False
    listed = np.where(late, generator.integers(1, max(2, int(num_days * 0.7)), count), 0)
    offered = [[market for market, *_, sold in _MARKETS if category in sold] for category in categories]
    markets = [str(generator.choice(names)) for names in offered]
    return _Assets([_isin(number) for number in range(count)], categories, sectors, listed, markets)


def _isin(number: int) -> str:
    """ZZ, nine digits and their check digit.

    >>> _isin(0)
    'ZZ1000000006'
    """
    body = f"ZZ{100_000_000 + number * 7919 % 900_000_000}"
    return f"{body}{check_digit(body)}"


def check_digit(body: str) -> int:
    """The last sign of an ISIN (ISO 6166): Luhn's check digit, over letters written as 10 to 35.

    >>> check_digit("US037833100")
    5
    """
    digits = [int(digit) for digit in "".join(str(int(sign, 36)) for sign in body)]
    doubled = [digit * 2 if place % 2 == 0 else digit for place, digit in enumerate(reversed(digits))]
    return -sum(digit // 10 + digit % 10 for digit in doubled) % 10


def _draw_prices(generator: Generator, assets: _Assets, num_days: int) -> tuple[Floats, Floats]:
    """Close prices (D, A), NaN before an asset is listed and on about 1% of its days, and trends (D, A), deviations."""
    count = len(assets.isins)
    spread = np.array([_VOLATILITY[category] for category in assets.categories]) / np.sqrt(_TRADING_DAYS)
    drift = np.array([_TREND[category] for category in assets.categories]) / _TRADING_DAYS
    keep = 0.5 ** (1 / _HALF_LIFE)
    trends = np.empty((num_days, count))
    trends[0] = generator.normal(size=count)
    pushes = generator.normal(size=(num_days, count)) * np.sqrt(1 - keep**2)
    for day in range(1, num_days):
        trends[day] = keep * trends[day - 1] + pushes[day]
    market = generator.normal(size=(num_days, 1))
    names, sector = np.unique(assets.sectors, return_inverse=True)
    sectors = generator.normal(size=(num_days, len(names)))[:, sector]
    own = generator.normal(size=(num_days, count))
    steps = drift * trends + spread * (0.5 * market + 0.4 * sectors + np.sqrt(1 - 0.5**2 - 0.4**2) * own)
    steps -= spread**2 / 2  # without a trend a price is expected to stay as it is
    close = np.exp(generator.normal(2.5, 1.0, count) + np.cumsum(steps, axis=0))
    missing = generator.random((num_days, count)) < 0.01
    missing[assets.listed, np.arange(count)] = False
    missing[:, 0] = False  # something to buy on every day
    close[missing | (np.arange(num_days)[:, None] < assets.listed)] = np.nan
    return np.maximum(close, 1e-4).round(6), trends


def _asset_table(generator: Generator, assets: _Assets, days: Ints) -> pl.DataFrame:
    """One row an asset, a second one for a few that were updated; some names are blank or shared, as in FAR-Trans."""
    count = len(assets.isins)
    names = [f"{_FIRST[n % 10]} {_SECOND[n // 10 % 10]}" + (f" {n // 100 + 1}" if n > 99 else "") for n in range(count)]
    blank, shared = generator.random(count) < 0.03, generator.random(count) < 0.03
    names = ["" if blank[n] else names[n // 2] if shared[n] else names[n] for n in range(count)]
    categories = [str(category) for category in assets.categories]
    industries = [str(generator.choice(_INDUSTRIES[s])) if s in _INDUSTRIES else "" for s in assets.sectors]
    table = pl.DataFrame(
        {
            "ISIN": assets.isins,
            "assetName": names,
            "assetShortName": [f"ZZ_{number}" for number in range(count)],
            "assetCategory": categories,
            "assetSubCategory": [str(_pick(generator, _SUB_CATEGORIES[c], 1)[0]) for c in categories],
            "marketID": assets.markets,
            "sector": [str(sector) for sector in assets.sectors],
            "industry": industries,
            "timestamp": [date_of(days[row]) for row in assets.listed],
        }
    )
    later = table.filter(pl.Series(generator.random(count) < 0.04))
    moved = [date_of(day) for day in generator.choice(days, later.height)]
    update = later.with_columns(pl.Series("timestamp", moved, dtype=pl.String))
    return _blank_as_null(pl.concat([table, update.join(table, on=("ISIN", "timestamp"), how="anti")]))


def _blank_as_null(table: pl.DataFrame) -> pl.DataFrame:
    texts = pl.col(pl.String)
    return table.with_columns(pl.when(texts != "").then(texts))


def _market_table() -> pl.DataFrame:
    rows = [
        (name, name, title, f"{title} of a bank that does not exist", country, "Mon,Tue,Wed,Thu,Fri", "08:00-16:30",
         "Public Securities")
        for name, title, country, _ in _MARKETS
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=COLUMNS[MARKETS], orient="row")


def _price_table(assets: _Assets, close: Floats, days: Ints) -> pl.DataFrame:
    asset, row = np.nonzero(np.isfinite(close.T))
    dates = np.array([date_of(day) for day in days])
    columns = {"ISIN": np.array(assets.isins)[asset], "timestamp": dates[row], "closePrice": close[row, asset]}
    return pl.DataFrame(columns)


def _limit_table(prices: pl.DataFrame) -> pl.DataFrame:
    first, last = pl.col("closePrice").first(), pl.col("closePrice").last()
    return prices.group_by("ISIN", maintain_order=True).agg(
        pl.col("timestamp").first().alias("minDate"),
        pl.col("timestamp").last().alias("maxDate"),
        first.alias("priceMinDate"),
        last.alias("priceMaxDate"),
        (last / first - 1).alias("profitability"),
    )


# ---- customers and transactions ----


def _draw_customers(generator: Generator, bank: Bank, days: Ints) -> pl.DataFrame:
    """One row a customer, known before the first day, and a second one, with another risk level, for every tenth."""
    count = bank.num_customers
    table = pl.DataFrame(
        {
            "customerID": [f"{(n + 1) * 0x9E3779B97F4A7C15 % 2**80:020X}" for n in range(count)],
            "customerType": _pick(generator, _TYPES, count),
            "riskLevel": _pick(generator, _RISKS, count),
            "investmentCapacity": _pick(generator, _CAPACITIES, count),
            "lastQuestionnaireDate": [date_of(days[0] - back) for back in generator.integers(1, 1500, count)],
            "timestamp": [date_of(days[0] - 1)] * count,
        }
    )
    again = table.filter(pl.Series(generator.random(count) < 0.1))
    moved = [date_of(day) for day in generator.choice(days, again.height)]
    update = again.with_columns(
        pl.Series("riskLevel", _pick(generator, _RISKS, again.height), dtype=pl.String),
        pl.Series("timestamp", moved, dtype=pl.String),
        pl.Series("lastQuestionnaireDate", moved, dtype=pl.String),
    )
    return pl.concat([table, update])


def _draw_transactions(
    generator: Generator,
    bank: Bank,
    assets: _Assets,
    customers: pl.DataFrame,
    close: Floats,
    trends: Floats,
    days: Ints,
) -> pl.DataFrame:
    """Purchases day by day, a sale of half of them later; only on days on which the asset has a price."""
    people = customers.head(bank.num_customers)
    appeal = _appeal(generator, bank, assets, people)  # (U, A)
    rates = generator.gamma(1.0, bank.purchases, bank.num_customers)  # a few customers buy most, as banks see
    counts = np.maximum(1, generator.poisson(rates))
    buyers = np.repeat(np.arange(bank.num_customers), counts)
    rows = generator.integers(0, len(days), len(buyers))
    order = np.lexsort((buyers, rows))
    buyers, rows = buyers[order], rows[order]
    bought = np.empty(len(buyers), dtype=np.int64)
    pull = (1 - 2 * bank.conflict) * bank.strength
    for row in np.unique(rows):
        mine = slice(*np.searchsorted(rows, [row, row + 1]))
        logits = appeal[buyers[mine]] + np.where(np.isfinite(close[row]), pull * trends[row], -np.inf)
        bought[mine] = (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)  # one draw of the softmax
    return _orders(generator, assets, people, close, days, buyers, rows, bought)


def _appeal(generator: Generator, bank: Bank, assets: _Assets, people: pl.DataFrame) -> Floats:
    """(U, A) nats: Zipf popularity (exponent 1), two favourite sectors, and distance from the customer's risk level."""
    count, users = bank.num_assets, bank.num_customers
    popularity = -np.log(1 + generator.permutation(count))
    names, sector = np.unique(assets.sectors, return_inverse=True)
    favourite = generator.random((users, len(names))).argsort(axis=1)[:, :2]  # (U, 2)
    taste = 1.5 * (favourite[:, :, None] == sector).any(axis=1)
    levels = [level.removeprefix("Predicted_") for level in people["riskLevel"].to_list()]
    risk = np.array([_LEVELS.index(level) / 3 if level in _LEVELS else 0.5 for level in levels])
    distance = np.abs(risk[:, None] - np.array([_RISK_OF[category] for category in assets.categories]))
    return popularity + taste - 2.5 * distance


def _orders(
    generator: Generator,
    assets: _Assets,
    people: pl.DataFrame,
    close: Floats,
    days: Ints,
    buyers: Ints,
    rows: Ints,
    bought: Ints,
) -> pl.DataFrame:
    """Purchases and sales, by day; a sale is of all or half of one purchase, on a later day with a price."""
    capacity = [text.removeprefix("Predicted_").removeprefix("CAP_") for text in people["investmentCapacity"]]
    typical = np.array([_SIZES.get(name, 2_000.0) for name in capacity])[buyers]
    units = np.maximum(1.0, np.round(typical * generator.lognormal(0, 0.8, len(buyers)) / close[rows, bought]))
    later = np.minimum(rows + 1 + generator.exponential(180, len(rows)).astype(np.int64), len(days))
    part = np.where(generator.random(len(rows)) < 0.5, 1.0, 0.5)
    sold = np.flatnonzero((generator.random(len(rows)) < 0.5) & (later < len(days)))
    sold = sold[np.isfinite(close[later[sold], bought[sold]])]
    who, when = np.concatenate([buyers, buyers[sold]]), np.concatenate([rows, later[sold]])
    what = np.concatenate([bought, bought[sold]])
    shares = np.concatenate([units, np.maximum(1.0, np.floor(units[sold] * part[sold]))])
    side = np.array([BUY, SELL])[(np.arange(len(who)) >= len(buyers)).astype(np.int64)]
    order = np.lexsort((np.arange(len(who)), when))
    return _transaction_table(
        generator, assets, people, days, close, *(a[order] for a in (who, when, what, shares, side))
    )


def _transaction_table(
    generator: Generator,
    assets: _Assets,
    people: pl.DataFrame,
    days: Ints,
    close: Floats,
    who: Ints,
    when: Ints,
    what: Ints,
    shares: Floats,
    side: Any,
) -> pl.DataFrame:
    dates: Sequence[str] = [date_of(days[row]) for row in when]
    return pl.DataFrame(
        {
            "customerID": people["customerID"].to_numpy()[who],
            "ISIN": np.array(assets.isins)[what],
            "transactionID": np.arange(1, len(who) + 1),
            "transactionType": side,
            "timestamp": dates,
            "totalValue": (shares * close[when, what]).round(2),
            "units": shares,
            "channel": _pick(generator, _CHANNELS, len(who)),
            "marketID": np.array(assets.markets)[what],
        }
    )
