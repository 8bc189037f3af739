"""What a bank's data says of the market as triples with times, which `recllm.graph` reads.

A `FarTrans` enters; `Triples` leave. A triple carries the last second of the newest day that it tells of: whoever shows
triples of a time < a cut-off shows nothing of the cut-off's day or later. After FLARKO's market graph (Spadea &
Seneviratne 2025, arXiv 2511.11583), whose price summaries are of ten weeks too.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm.data.far_trans import FarTrans
from recllm.data.prices import Features, date_of, known_at, price_features
from recllm.errors import UserError

Floats = npt.NDArray[np.float64]

SUMMARY_WEEKS = 10
_MONDAY = 4  # 1970-01-05: summaries end on Sundays, whatever the data's first day
_TRADING_DAYS = 252  # a year
CATEGORIES = {"MTF": "mutual fund", "Stock": "stock", "Bond": "bond"}


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
