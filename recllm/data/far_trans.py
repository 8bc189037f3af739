"""Reads data of the FAR-Trans schema: customers, assets, close prices and transactions of a bank.

A folder of CSV files enters; a `FarTrans` leaves, with dates as days since the epoch. Source of the schema: the README
of FAR-Trans (Sanz-Cruzado, Droukas & McCreadie 2024, arXiv 2407.08692; doi.org/10.5525/gla.researchdata.1658).
`far_trans_synthetic` writes files of the same schema.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from recllm.data.prices import Prices
from recllm.data.tables import natural_sort
from recllm.errors import UserError

CUSTOMERS, ASSETS, PRICES, TRANSACTIONS, MARKETS, LIMITS = (
    "customer_information", "asset_information", "close_prices", "transactions", "markets", "limit_prices",
)  # fmt: skip
COLUMNS = {
    CUSTOMERS: ("customerID", "customerType", "riskLevel", "investmentCapacity", "lastQuestionnaireDate", "timestamp"),
    ASSETS: ("ISIN", "assetName", "assetShortName", "assetCategory", "assetSubCategory", "marketID", "sector",
             "industry", "timestamp"),
    PRICES: ("ISIN", "timestamp", "closePrice"),
    TRANSACTIONS: ("customerID", "ISIN", "transactionID", "transactionType", "timestamp", "totalValue", "units",
                   "channel", "marketID"),
    MARKETS: ("exchangeID", "marketID", "name", "description", "country", "tradingDays", "tradingHours",
              "marketClass"),
    LIMITS: ("ISIN", "minDate", "maxDate", "priceMinDate", "priceMaxDate", "profitability"),
}  # fmt: skip
BUY, SELL = "Buy", "Sell"


@dataclass(frozen=True)
class FarTrans:
    """What a bank knows; A assets, numbered by the natural order of their ISINs."""

    isins: list[str]  # (A,)
    titles: list[str]  # (A,) a name that several assets have is followed by the ISIN
    asset_versions: pl.DataFrame  # asset, day, and category, sub_category, market, sector, industry; oldest first
    customer_versions: pl.DataFrame  # customer_id, day, customer_type, risk_level, investment_capacity; oldest first
    transactions: pl.DataFrame  # customer_id, asset, day, side, value, units, transaction_id; by customer, oldest first
    prices: Prices
    markets: dict[str, str]  # name of each market
    counts: dict[str, int]

    @property
    def last_day(self) -> int:
        """The newest day of prices or transactions."""
        newest = self.transactions["day"].max()
        return max(int(self.prices.days[-1]), int(newest) if isinstance(newest, int) else -1)

    def until(self, day: int) -> "FarTrans":
        """The same without anything of `day` or later; assets keep their numbers."""
        frames = {
            name: getattr(self, name).filter(pl.col("day") < day)
            for name in ("asset_versions", "customer_versions", "transactions")
        }
        kept = self.prices.days < day
        prices = Prices(self.prices.days[kept], self.prices.close[kept])
        return FarTrans(self.isins, self.titles, prices=prices, markets=self.markets, counts=self.counts, **frames)


def read_far_trans(folder: Path) -> FarTrans:
    """Read customer_information, asset_information, close_prices and transactions, and markets.csv where it is there.

    Blank prices and prices of 0 or less are dropped, as days on which nothing was collected (the authors' own loader
    drops the whole asset, which looks at its future), and of two prices of an asset on one day the later line counts. A
    transaction's value and units may be blank. Assets that only prices or transactions name have no attributes.

    Raises:
        UserError: missing file or column, blank id, broken date or number, unknown transaction type; names the line.
    """
    folder = Path(folder)
    assets, prices = _assets(folder), _prices(folder)
    transactions, customers = _transactions(folder), _customers(folder)
    ids = pl.concat([frame.select("isin") for frame in (assets, prices, transactions)]).unique()
    isins = natural_sort(ids, "isin")["isin"].to_list()
    number = pl.DataFrame({"isin": isins, "asset": np.arange(len(isins), dtype=np.int64)})
    numbered = [frame.join(number, on="isin", maintain_order="left") for frame in (assets, prices, transactions)]
    table, dropped = _matrix(numbered[1], len(isins))
    return FarTrans(
        isins=isins,
        titles=_titles(isins, assets),
        asset_versions=numbered[0].sort("asset", "day", maintain_order=True).drop("isin", "name", "short_name"),
        customer_versions=customers.sort("customer_id", "day", maintain_order=True),
        transactions=numbered[2].drop("isin").sort("customer_id", "day", maintain_order=True),
        prices=table,
        markets=_markets(folder),
        counts={
            "customers": transactions["customer_id"].n_unique(),
            "assets": len(isins),
            "transactions": transactions.height,
            "prices": int(np.isfinite(table.close).sum()),
            "prices dropped": dropped,
        },
    )


def _assets(folder: Path) -> pl.DataFrame:
    frame = _read(folder, ASSETS, ("ISIN", "timestamp"))
    names = {
        "ISIN": "isin", "assetName": "name", "assetShortName": "short_name", "assetCategory": "category",
        "assetSubCategory": "sub_category", "marketID": "market", "sector": "sector", "industry": "industry",
    }  # fmt: skip
    frame = _dated(frame, folder / f"{ASSETS}.csv")
    return frame.select("day", *(pl.col(old).alias(new) for old, new in names.items()))


def _customers(folder: Path) -> pl.DataFrame:
    frame = _dated(_read(folder, CUSTOMERS, ("customerID", "timestamp")), folder / f"{CUSTOMERS}.csv")
    return frame.select(
        pl.col("customerID").alias("customer_id"),
        "day",
        pl.col("customerType").alias("customer_type"),
        pl.col("riskLevel").alias("risk_level"),
        pl.col("investmentCapacity").alias("investment_capacity"),
    )


def _prices(folder: Path) -> pl.DataFrame:
    path = folder / f"{PRICES}.csv"
    frame = _dated(_read(folder, PRICES, ("ISIN", "timestamp")), path)
    return _numbered(frame, path, "closePrice").select(pl.col("ISIN").alias("isin"), "day", "closePrice")


def _transactions(folder: Path) -> pl.DataFrame:
    path = folder / f"{TRANSACTIONS}.csv"
    needed = ("customerID", "ISIN", "transactionType", "timestamp")
    frame = _dated(_read(folder, TRANSACTIONS, needed), path)
    for column in ("totalValue", "units"):
        frame = _numbered(frame, path, column)
    side = pl.col("transactionType")
    _refuse(frame, path, "transactionType", ~side.is_in([BUY, SELL]), f"{BUY} or {SELL}")
    return frame.select(
        pl.col("customerID").alias("customer_id"),
        pl.col("ISIN").alias("isin"),
        "day",
        side.alias("side"),
        pl.col("totalValue").alias("value"),
        "units",
        pl.col("transactionID").alias("transaction_id"),
    )


def _markets(folder: Path) -> dict[str, str]:
    if not (folder / f"{MARKETS}.csv").is_file():
        return {}
    frame = _read(folder, MARKETS, ("marketID",))
    names = frame.select(pl.col("name").fill_null(pl.col("marketID")))["name"]
    return dict(zip(frame["marketID"].to_list(), names.to_list()))


def _titles(isins: Sequence[str], assets: pl.DataFrame) -> list[str]:
    """Of an asset's oldest version the name, or the short name, or the ISIN."""
    oldest = assets.sort("day", maintain_order=True).unique("isin", keep="first", maintain_order=True)
    name = pl.coalesce("name", "short_name", "isin").str.replace_all(r"\s+", " ")
    found = dict(oldest.select("isin", name).iter_rows())
    texts = [found.get(isin, isin) for isin in isins]
    seen, twice = set(isins), set[str]()
    for isin, text in zip(isins, texts):
        (twice if text in seen and text != isin else seen).add(text)
    return [f"{text} ({isin})" if text in twice and text != isin else text for isin, text in zip(isins, texts)]


def _matrix(prices: pl.DataFrame, num_assets: int) -> tuple[Prices, int]:
    kept = prices.filter(pl.col("closePrice") > 0).unique(("asset", "day"), keep="last", maintain_order=True)
    if kept.is_empty():
        raise UserError(f"{PRICES}.csv holds no price above 0: at least one is needed")
    days = np.unique(kept["day"].to_numpy())
    close = np.full((len(days), num_assets), np.nan)
    close[np.searchsorted(days, kept["day"].to_numpy()), kept["asset"].to_numpy()] = kept["closePrice"].to_numpy()
    return Prices(days, close), prices.height - kept.height


# ---- one file ----


def _read(folder: Path, name: str, needed: Sequence[str]) -> pl.DataFrame:
    """The schema's columns as text without blanks around it, blank is null; a value that is needed is there."""
    path = folder / f"{name}.csv"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: FAR-Trans (doi.org/10.5525/gla.researchdata.1658) has it; "
            "recllm.data.far_trans_synthetic.write_far_trans writes a synthetic folder"
        )
    try:
        frame = pl.read_csv(path, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: cannot be read ({reason}): a CSV file with a header in UTF-8 is expected") from None
    for column in COLUMNS[name]:
        if column not in frame.columns:
            near = difflib.get_close_matches(column, frame.columns, 1) or frame.columns
            raise UserError(f'{path}: no column "{column}", did you mean "{near[0]}"?')
    text = pl.col(COLUMNS[name]).str.strip_chars()
    frame = frame.select(text).with_columns(pl.when(pl.all() != "").then(pl.all()))
    for column in needed:
        _refuse(frame, path, column, pl.col(column).is_null(), "a value")
    return frame


def _dated(frame: pl.DataFrame, path: Path) -> pl.DataFrame:
    """With `day`, days since the epoch, from the date in `timestamp`; a time of day behind it does not matter."""
    date = pl.col("timestamp").str.extract(r"^(\d{4}-\d\d-\d\d)(?:[T ].*)?$").str.to_date("%Y-%m-%d", strict=False)
    frame = frame.with_columns(date.to_physical().cast(pl.Int64).alias("day"))
    _refuse(frame, path, "timestamp", pl.col("day").is_null(), "a date YYYY-MM-DD")
    return frame


def _numbered(frame: pl.DataFrame, path: Path, column: str) -> pl.DataFrame:
    """The column as a number, null where it is blank."""
    number = pl.col(column).cast(pl.Float64, strict=False)
    number = pl.when(number.is_finite()).then(number)
    _refuse(frame, path, column, number.is_null() & pl.col(column).is_not_null(), "a number")
    return frame.with_columns(number.alias(column))


def _refuse(frame: pl.DataFrame, path: Path, column: str, bad: pl.Expr, expected: str) -> None:
    found = frame.with_row_index("row").filter(bad)
    if found.height:
        value = found[column][0]
        shown = "blank" if value is None else f'"{value}"'
        more = f" ({found.height} such rows)" if found.height > 1 else ""
        raise UserError(
            f"{path}, line {found['row'][0] + 2}: {column} is {shown}, expected {expected}: mend or drop the line{more}"
        )
