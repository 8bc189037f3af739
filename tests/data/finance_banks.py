"""Small banks: written by hand from rows, or drawn."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from recllm.data.far_trans import COLUMNS, FarTrans, read_far_trans
from recllm.data.far_trans_synthetic import Bank, write_far_trans
from recllm.data.prices import Prices, date_of

ASSET = {"assetName": "", "assetShortName": "", "assetCategory": "Stock", "assetSubCategory": "", "marketID": "M",
         "sector": "", "industry": "", "timestamp": "2020-01-01"}  # fmt: skip
CUSTOMER = {"customerType": "Mass", "riskLevel": "Income", "investmentCapacity": "CAP_LT30K",
            "lastQuestionnaireDate": "2019-01-01", "timestamp": "2020-01-01"}  # fmt: skip
TRANSACTION = {"transactionType": "Buy", "totalValue": 10.0, "units": 1.0, "channel": "Branch", "marketID": "M"}


def write(folder: Path, **tables: list[dict]) -> Path:
    """CSV files of the schema from rows; what a row leaves out has the defaults above."""
    defaults = {"asset_information": ASSET, "customer_information": CUSTOMER, "transactions": TRANSACTION}
    for name, rows in tables.items():
        full = [
            {column: "" for column in COLUMNS[name]} | defaults.get(name, {}) | row | _number(name, place)
            for place, row in enumerate(rows)
        ]
        schema = {column: pl.String for column in COLUMNS[name]}
        texts = [{column: str(row[column]) for column in schema} for row in full]
        pl.DataFrame(texts, schema=schema).write_csv(folder / f"{name}.csv")
    return folder


def _number(name: str, place: int) -> dict:
    return {"transactionID": place + 1} if name == "transactions" else {}


def bank_of(num_assets: int, prices: dict[tuple[int, int], float], transactions: list[tuple]) -> FarTrans:
    """prices by (asset, day); transactions (customer, asset, day, side). Assets are A0, A1, …; no attributes."""
    days = np.unique([day for _, day in prices])
    close = np.full((len(days), num_assets), np.nan)
    for (asset, day), price in prices.items():
        close[np.searchsorted(days, day), asset] = price
    names = [f"A{asset}" for asset in range(num_assets)]
    frame = pl.DataFrame(
        transactions,
        schema={"customer_id": pl.String, "asset": pl.Int64, "day": pl.Int64, "side": pl.String},
        orient="row",
    )
    frame = frame.with_columns(value=pl.lit(5.0), units=pl.lit(1.0), transaction_id=pl.lit(None, pl.String))
    texts = {name: pl.String for name in ("category", "sub_category", "market", "sector", "industry")}
    people = {name: pl.String for name in ("customer_type", "risk_level", "investment_capacity")}
    return FarTrans(
        isins=names,
        titles=names,
        asset_versions=pl.DataFrame(schema={"day": pl.Int64, **texts, "asset": pl.Int64}),
        customer_versions=pl.DataFrame(schema={"customer_id": pl.String, "day": pl.Int64, **people}),
        transactions=frame.sort("customer_id", "day", maintain_order=True),
        prices=Prices(days, close),
        markets={},
        counts={},
    )


@functools.cache
def drawn_bank(**arguments: float) -> FarTrans:
    """A small drawn bank: 60 customers, 25 assets, three years."""
    sizes = {"num_customers": 60, "num_assets": 25, "first": "2019-01-01", "last": "2021-12-31", "purchases": 12.0}
    with tempfile.TemporaryDirectory() as folder:
        return read_far_trans(write_far_trans(Path(folder) / "bank", Bank(**(sizes | arguments))))


def replaced(data: FarTrans, **changes: object) -> FarTrans:
    """The same bank with other parts."""
    return FarTrans(**(vars(data) | changes))


def dates(*days: int) -> list[str]:
    return [date_of(day) for day in days]
