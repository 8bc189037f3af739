"""What a bank's data says as triples with times, which `recllm.graph` reads: the market, and the customers.

A `FarTrans` enters; `Triples` leave. A triple carries the last second of the newest day that it tells of: whoever shows
triples of a time < a cut-off shows nothing of the cut-off's day or later. After FLARKO's market and transaction graphs
(Spadea & Seneviratne 2025, arXiv 2511.11583), whose price summaries are of ten weeks too.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm.data.far_trans import BUY, FarTrans
from recllm.data.prices import Features, date_of, known_at, price_features
from recllm.errors import UserError

Floats = npt.NDArray[np.float64]

SUMMARY_WEEKS = 10
_MONDAY = 4  # 1970-01-05: summaries end on Sundays, whatever the data's first day
_TRADING_DAYS = 252  # a year
CATEGORIES = {"MTF": "mutual fund", "Stock": "stock", "Bond": "bond"}
_CAPACITIES = {
    "LT30K": "under 30,000 EUR",
    "30K_80K": "30,000 to 80,000 EUR",
    "80K_300K": "80,000 to 300,000 EUR",
    "GT300K": "over 300,000 EUR",
}


class Triples(NamedTuple):
    """What the graph room reads: times in seconds since the epoch."""

    triples: pl.DataFrame  # head, relation, tail, timestamp
    names: pl.DataFrame  # entity_id, name; no two ids are equal


_TRIPLES = {"head": pl.String, "relation": pl.String, "tail": pl.String, "timestamp": pl.Int64}


def market_triples(data: FarTrans, weeks: int = SUMMARY_WEEKS, every_weeks: int | None = None) -> Triples:
    """What is known of assets: category, sector, industry and market, and a summary of every `weeks` weeks of prices.

    An asset's entity is its ISIN. Summaries end on Sundays, every `every_weeks` weeks (as a rule `weeks`; smaller is
    fresher and larger), counted from 1970: the same periods whatever the data's end. Each gives the return from the
    period's first to its last price, the yearly volatility √(252 σ²), the drawdown and the last price; a period with
    fewer than three prices gives none. A number is an entity of its own, with its digits as its name, so that two
    assets are not linked by a chance equality.
    """
    facts, fact_names = _facts(data)
    summaries, value_names = _summaries(data, weeks, every_weeks or weeks)
    assets = pl.DataFrame({"entity_id": data.isins, "name": data.titles})
    names = pl.concat([assets, fact_names, value_names])
    return Triples(pl.concat([facts, summaries]), names.unique("entity_id", keep="first", maintain_order=True))


def _facts(data: FarTrans) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Attributes, each from the first version of an asset that has it."""
    relations = {
        "category": "is a", "sub_category": "of kind", "sector": "in sector", "industry": "in industry",
        "market": "traded on",
    }  # fmt: skip
    said = {"category": CATEGORIES, "market": data.markets}
    versions = data.asset_versions.with_columns(pl.Series("head", data.isins)[data.asset_versions["asset"]])
    parts, names = [], []
    for column, relation in relations.items():
        known = versions.filter(pl.col(column).is_not_null())
        tail = pl.concat_str(pl.lit(f"{column}:"), pl.col(column))
        parts.append(known.select("head", pl.lit(relation).alias("relation"), tail.alias("tail"), stamp()))
        text = pl.col(column).replace(said.get(column, {}))
        names.append(known.select(tail.alias("entity_id"), text.alias("name")))
    triples = pl.concat(parts).unique(["head", "relation", "tail"], keep="first", maintain_order=True)
    return triples, pl.concat(names)


def stamp() -> pl.Expr:
    """The last second of `day`."""
    return known_at(pl.col("day")).cast(pl.Int64).alias("timestamp")


def _summaries(data: FarTrans, weeks: int, every_weeks: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    if weeks < 1 or every_weeks < 1:
        raise UserError(f"summaries of {weeks} weeks, every {every_weeks}: at least 1 week each is expected")
    step, days = every_weeks * 7, data.prices.days
    newest = int(days[-1]) if len(days) else -1
    oldest = int(days[0]) if len(days) else 0
    first = _MONDAY + -(-(oldest + 1 - _MONDAY) // step) * step  # the first end behind the oldest price
    heads, relations, tails, times, texts = [], [], [], [], []
    for end in range(first, newest + weeks * 7 + 1, step):
        found = price_features(data.prices, end - weeks * 7, end)
        kept = np.flatnonzero(~np.isnan(found.mean))
        for what, values, text in _said(found, weeks):
            heads += [data.isins[asset] for asset in kept]
            relations += [what] * len(kept)
            tails += [f"{data.isins[asset]}/{what}/{date_of(end - 1)}" for asset in kept]
            times += [known_at(end - 1)] * len(kept)
            texts += [text(values[asset]) for asset in kept]
    triples = pl.DataFrame([heads, relations, tails, times], schema=_TRIPLES)
    return triples, pl.DataFrame([tails, texts], schema={"entity_id": pl.String, "name": pl.String})


def _said(found: Features, weeks: int) -> list[tuple[str, Floats, Callable[[float], str]]]:
    return [
        (f"{weeks}-week return", found.last / found.first - 1, lambda value: f"{value:+.1%}"),
        (f"{weeks}-week volatility", np.sqrt(_TRADING_DAYS * found.variance), lambda value: f"{value:.0%} a year"),
        (f"{weeks}-week drawdown", found.drawdown, lambda value: f"{value:.1%}"),
        ("last price", found.last, lambda value: f"{value:.2f} EUR" if value >= 1 else f"{value:.3g} EUR"),
    ]


def personal_triples(data: FarTrans, values: bool = False) -> Triples:
    """What is known of customers: risk level, type and capacity as they were updated, and every transaction.

    A customer's entity is "customer:" and the id, and is called "customer", for an id says nothing. A transaction is
    (customer, bought or sold, asset) with its time; with `values` it is an entity that says what it was worth, between
    the two: (customer, bought, transaction), (transaction, of, asset).
    """
    profile, profile_names = _profiles(data)
    stamped = data.transactions.with_columns(
        _customer(),
        pl.when(pl.col("side") == BUY).then(pl.lit("bought")).otherwise(pl.lit("sold")).alias("relation"),
        pl.Series("isin", data.isins)[data.transactions["asset"]],
        stamp(),
    ).with_row_index("row")
    people = pl.concat([profile.select("head"), stamped.select("head")])
    names = [profile_names, people.select(pl.col("head").alias("entity_id"), pl.lit("customer").alias("name"))]
    if not values:
        parts = [stamped.select("head", "relation", pl.col("isin").alias("tail"), "timestamp")]
    else:
        node = pl.format("transaction:{}", pl.coalesce("transaction_id", pl.col("row").cast(pl.String)))
        parts = [
            stamped.select("head", "relation", node.alias("tail"), "timestamp"),
            stamped.select(
                node.alias("head"), pl.lit("of").alias("relation"), pl.col("isin").alias("tail"), "timestamp"
            ),
        ]
        worth = pl.Series("name", [_worth(value) for value in stamped["value"].to_list()], dtype=pl.String)
        names.append(stamped.select(node.alias("entity_id"), worth))
    assets = pl.DataFrame({"entity_id": data.isins, "name": data.titles})
    named = pl.concat([assets, *names]).unique("entity_id", keep="first", maintain_order=True)
    return Triples(pl.concat([profile, *parts]), named)


def _worth(value: float | None) -> str:
    return "unknown value" if value is None else f"{value:,.0f} EUR"


def _customer() -> pl.Expr:
    return pl.concat_str(pl.lit("customer:"), pl.col("customer_id")).alias("head")


def _profiles(data: FarTrans) -> tuple[pl.DataFrame, pl.DataFrame]:
    relations = {"risk_level": "risk level", "customer_type": "customer type", "investment_capacity": "can invest"}
    parts, names = [], []
    for column, relation in relations.items():
        known = data.customer_versions.filter(pl.col(column).is_not_null() & (pl.col(column) != "Not_Available"))
        tail = pl.concat_str(pl.lit(f"{column}:"), pl.col(column))
        parts.append(known.select(_customer(), pl.lit(relation).alias("relation"), tail.alias("tail"), stamp()))
        texts = pl.Series("name", [_level(value) for value in known[column].to_list()], dtype=pl.String)
        names.append(known.select(tail.alias("entity_id"), texts))
    return pl.concat(parts), pl.concat(names)


def _level(value: str) -> str:
    """
    >>> _level("Predicted_CAP_30K_80K"), _level("Income")
    ('30,000 to 80,000 EUR (predicted)', 'Income')
    """
    plain = value.removeprefix("Predicted_")
    text = _CAPACITIES.get(plain.removeprefix("CAP_").replace("LT_", "LT").replace("GT_", "GT"), plain)
    return text if plain == value else f"{text} (predicted)"
