"""The task of FLARKO: from a bank's data to examples, and completions for KTO.

A `FarTrans` enters. Leave, as tables: examples (a customer, a cut-off, what was bought and what rose in the window
behind it), and good and bad completions. "Which assets for the next six months?"

Cut-offs are midnights, the beginning of a day in UTC. What is shown for a cut-off is of days before it. Labels look
into the window [cut-off, cut-off + 180 days), and nothing else does.

Source: Spadea & Seneviratne 2025 (RAG-FLARKO, arXiv 2511.11583), after github.com/brains-group/FLARKO: windows of 180
days, and profit where the last price within the window is above the last one before it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm.data.far_trans import BUY, FarTrans, read_far_trans
from recllm.data.finance_triples import CATEGORIES, market_triples, stamp
from recllm.data.prices import DAY_S, date_of, rose
from recllm.data.randomness import mix, text_keys
from recllm.errors import UserError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

WINDOW_DAYS = 180
MOST_ASSETS = 20  # of a good or bad completion
_NUMBER, _TEXT, _LIST = pl.Int64(), pl.String(), pl.List(pl.Int64)
_WINDOWS: dict[str, pl.DataType] = {"cutoff": _NUMBER, "window_end": _NUMBER, "offered": _LIST, "profit": _LIST}
_COMPLETIONS: dict[str, pl.DataType] = {
    "example_id": _TEXT,
    "customer_id": _TEXT,
    "cutoff": _NUMBER,
    "label": pl.Boolean(),
    "assets": _LIST,
    "completion": _TEXT,
}


# ---- examples ----


def schedule(
    first: int, valid: int, test: int, last: int, every_days: int = 28, window_days: int = WINDOW_DAYS
) -> dict[str, list[int]]:
    """Cut-off days: of training from `first`, of validation from `valid`, of test from `test`, with data until `last`.

    Counted back from the latest that a split allows: no window reaches the next split's first cut-off, or passes the
    last day of data.

    >>> schedule(0, 100, 200, 299, every_days=50, window_days=60)
    {'train': [40], 'valid': [140], 'test': [240]}
    """
    ends = {"train": (first, valid), "valid": (valid, test), "test": (test, last + 1)}
    found = {}
    for split, (begin, end) in ends.items():
        newest = end - window_days
        found[split] = list(range(newest, begin - 1, -every_days))[::-1]
        if not found[split]:
            raise UserError(
                f"{split}: no window of {window_days} days fits between {date_of(begin)} and {date_of(end)}: "
                "shorten it or move the dates apart"
            )
    return found


@dataclass(frozen=True)
class Task:
    """Examples, and what the windows behind their cut-offs held; assets are numbers of the `FarTrans`."""

    examples: pl.DataFrame  # example_id, customer_id, cutoff, window_end (s), history_end, preference, both (lists)
    windows: pl.DataFrame  # cutoff, window_end (s), offered, profit (lists); a row a cut-off
    num_assets: int

    def labels(self) -> dict[str, Booleans]:
        """preference, profit, both and offered as matrices (N, A), for `evaluate.finance.recommendation`."""
        row = dict(zip(self.windows["cutoff"].to_list(), range(self.windows.height)))
        window = np.array([row[cutoff] for cutoff in self.examples["cutoff"].to_list()], dtype=np.int64)
        own = {name: _matrix(self.examples[name], self.num_assets) for name in ("preference", "both")}
        return own | {name: _matrix(self.windows[name], self.num_assets)[window] for name in ("profit", "offered")}


def _matrix(lists: pl.Series, width: int) -> Booleans:
    table = np.zeros((len(lists), width), dtype=bool)
    lengths = lists.list.len().to_numpy()
    table[np.repeat(np.arange(len(lists)), lengths), lists.explode(empty_as_null=False).to_numpy()] = True
    return table


def build_task(
    data: FarTrans,
    cutoffs: Sequence[int],
    window_days: int = WINDOW_DAYS,
    keep: Literal["both", "preference", "all"] = "both",
    min_history: int = 1,
) -> Task:
    """Examples of every cut-off (a day) and every customer with `min_history` transactions before it.

    preference: bought in the window. profit: the price rose (`rose`), of all assets. both: bought and rose. offered:
    has a price before the cut-off. history_end: the customer's first `history_end` transactions precede the cut-off.

    keep "both" is FLARKO's choice: only customers who then buy something that rises, so that every label can be hit. It
    chooses by the future; "all" does not.

    Raises:
        UserError: a window that passes the last day of data, or no example at all.
    """
    parts, windows = [], []
    for cutoff in cutoffs:
        end = cutoff + window_days
        if end > data.last_day + 1:
            raise UserError(
                f"the window of {date_of(cutoff)} ends on {date_of(end - 1)}, the data on {date_of(data.last_day)}: "
                "take earlier cut-offs or a shorter window"
            )
        up = np.flatnonzero(rose(data.prices, cutoff, end))
        priced = np.flatnonzero(~np.isnan(data.prices.before(cutoff)))
        stamps = {"cutoff": cutoff * DAY_S, "window_end": end * DAY_S}
        windows.append({**stamps, "offered": priced.tolist(), "profit": up.tolist()})
        part = _examples_of(data.transactions, cutoff, end, up, keep, min_history)
        parts.append(part.with_columns(pl.lit(value, pl.Int64).alias(name) for name, value in stamps.items()))
    if not parts or not sum(part.height for part in parts):
        raise UserError(f'{len(cutoffs)} cut-offs give no example: take later ones, or keep "preference" or "all"')
    examples = pl.concat(parts).select(
        "example_id", "customer_id", "cutoff", "window_end", "history_end", "preference", "both"
    )
    return Task(examples, pl.DataFrame(windows, schema=_WINDOWS), len(data.isins))


def _examples_of(
    transactions: pl.DataFrame, cutoff: int, end: int, up: Ints, keep: str, min_history: int
) -> pl.DataFrame:
    day = pl.col("day")
    past = transactions.filter(day < cutoff).group_by("customer_id").agg(pl.len().cast(pl.Int64).alias("history_end"))
    bought = transactions.filter((day >= cutoff) & (day < end) & (pl.col("side") == BUY))
    gains = pl.col("asset").is_in(up.tolist())
    lists = bought.group_by("customer_id").agg(
        pl.col("asset").unique().sort().alias("preference"),
        pl.col("asset").filter(gains).unique().sort().alias("both"),
    )
    found = past.filter(pl.col("history_end") >= min_history).join(lists, on="customer_id", how="left")
    found = found.with_columns(pl.col("preference", "both").fill_null([]))
    if keep != "all":
        found = found.filter(pl.col(keep).list.len() > 0)
    name = pl.format("{}/{}", "customer_id", pl.lit(date_of(cutoff)))
    return found.sort("customer_id").with_columns(name.alias("example_id"))


def ledger(data: FarTrans, texts: Sequence[str] | None = None) -> pl.DataFrame:
    """Each customer's transactions as lines, oldest first: customer_id, lines (a list).

    The first `history_end` lines are those before an example's cut-off. texts: what assets are called, (A,).
    """
    texts = data.titles if texts is None else texts
    lines = [
        f"{date_of(row['day'])} {row['side']} {texts[row['asset']]}" + _amount(row["units"], row["value"])
        for row in data.transactions.iter_rows(named=True)
    ]
    named = data.transactions.select("customer_id").with_columns(pl.Series("lines", lines, pl.String))
    return named.group_by("customer_id", maintain_order=True).agg("lines")


def _amount(units: float | None, value: float | None) -> str:
    said = [f"{units:g} units"] if units is not None else []
    said += [f"{value:,.2f} EUR"] if value is not None else []
    return f": {', '.join(said)}" if said else ""


# ---- good and bad completions ----


def completions(
    data: FarTrans,
    task: Task,
    seed: int,
    most: int = MOST_ASSETS,
    same_length: bool = True,
    texts: Sequence[str] | None = None,
) -> pl.DataFrame:
    """A good and a bad completion of each example, for KTO: example_id, customer_id, cutoff, label, assets, completion.

    Good lists assets that were bought and rose; bad lists offered assets that are not among them, as in FLARKO, which
    draws from all assets. At most `most` each, drawn and ordered by a hash of (seed, customer, cut-off, asset). A bad
    list is as long as the good one, or its length alone would tell them apart; `same_length` False fills it up to
    `most`, as FLARKO does. An example without a good asset has neither. completion is the JSON list that
    `evaluate.finance.read_answers` reads, of the `texts` of the assets (A,), or of their ISINs.
    """
    texts = data.isins if texts is None else texts
    offered = dict(zip(task.windows["cutoff"].to_list(), task.windows["offered"].to_list()))
    rows = []
    keys = text_keys(task.examples["customer_id"].to_list())
    for key, example in zip(keys, task.examples.iter_rows(named=True)):
        good = _drawn(example["both"], seed, key, example["cutoff"], most)
        if not good:
            continue
        others = sorted(set(offered[example["cutoff"]]) - set(example["both"]))
        bad = _drawn(others, seed, key, example["cutoff"], len(good) if same_length else most)
        for label, assets in ((True, good), (False, bad)):
            completion = json.dumps([texts[asset] for asset in assets], ensure_ascii=False)
            rows.append((example["example_id"], example["customer_id"], example["cutoff"], label, assets, completion))
    return pl.DataFrame(rows, schema=_COMPLETIONS, orient="row")


def _drawn(assets: Sequence[int], seed: int, key: np.uint64, cutoff: int, most: int) -> list[int]:
    numbers = np.asarray(assets, dtype=np.int64)
    order = np.argsort(mix(seed, np.array([key]), np.array([cutoff]), numbers), kind="stable")
    return [int(asset) for asset in numbers[order[:most]]]


# ---- files ----


def write_tables(folder: Path, source: Path) -> None:
    """What is made of a bank's data for the rooms that read logs and graphs, into an empty `folder`.

    interactions.parquet (user_id, item_id, timestamp, action), items.parquet (item_id, title, category, sector),
    triples.parquet and entities.parquet (`market_triples`), links.parquet (item_id, entity_id).

    Raises:
        UserError: see `read_far_trans`.
    """
    data = read_far_trans(source)
    market = market_triples(data)
    _interactions(data).write_parquet(folder / "interactions.parquet")
    _items(data).write_parquet(folder / "items.parquet")
    market.triples.write_parquet(folder / "triples.parquet")
    market.names.write_parquet(folder / "entities.parquet")
    pl.DataFrame({"item_id": data.isins, "entity_id": data.isins}).write_parquet(folder / "links.parquet")


def _interactions(data: FarTrans) -> pl.DataFrame:
    return data.transactions.select(
        pl.col("customer_id").alias("user_id"),
        pl.Series("item_id", data.isins)[data.transactions["asset"]],
        stamp(),
        pl.col("side").alias("action"),
    )


def _items(data: FarTrans) -> pl.DataFrame:
    oldest = data.asset_versions.unique("asset", keep="first", maintain_order=True)
    items = pl.DataFrame({"asset": np.arange(len(data.isins)), "item_id": data.isins, "title": data.titles})
    joined = items.join(oldest.select("asset", "category", "sector"), on="asset", how="left", maintain_order="left")
    return joined.drop("asset").with_columns(pl.col("category").replace(CATEGORIES)).fill_null("")
