"""A bank's tasks: on which dates its customers are asked, what they had done, and what is good to answer.

The recipe and its log as it was prepared enter. Two further columns of the sequences leave, the ledger and the dates,
which the converter's workers turn into examples, and the dataset's folder finance/, a file a split. Of the task assets
examples, windows and completions (data/finance.py): answers are judged by the former, the latter are for preference
training elsewhere. Of rank_assets rankings (data/finance_choices.py), by which answers are judged.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from recllm import files
from recllm.convert.targets import DATES_TYPE
from recllm.convert.templates import ASSETS, RANK_ASSETS
from recllm.data import offline
from recllm.data.far_trans import FarTrans, read_far_trans
from recllm.data.finance import Task, build_task, completions, ledger, schedule
from recllm.data.finance_choices import Rankings, build_rankings, draw_choices
from recllm.data.prices import date_of, day_of
from recllm.data.sequences import Prepared
from recllm.data.stored import DATES, LEDGER
from recllm.errors import UserError
from recllm.recipe import FinanceSection, Recipe, SplitSection
from recllm.schema import ITEM_ID, SPLIT_CODES, USER_ID

FOLDER = "finance"  # of a dataset
NOTHING = "[]"  # the answer where no asset is good; nothing to learn from


def ask_customers(
    recipe: Recipe, prepared: Prepared, texts: Sequence[str], folder: Path, tasks: Collection[str]
) -> tuple[dict[str, pa.Array], dict[str, Any]]:
    """The columns LEDGER and DATES, in user_index order, and what the manifest says; writes into the dataset `folder`.

    Args:
        texts: (num_items,) what prompts and answers call the assets.
        tasks: ASSETS, RANK_ASSETS or both.

    Raises:
        UserError: a log that is not the bank's, windows that do not fit between the dates, no example; of rank_assets
            too few assets on offer.
    """
    section = recipe.finance
    assert section is not None  # asked by the pipeline's load_tasks
    data = read_far_trans(offline.resolve(section.folder))
    _check_log(data, prepared, tasks)
    (folder / FOLDER).mkdir()
    entry: dict[str, Any] = {"inputs": {section.folder: files.sha256_of(offline.resolve(section.folder))}}
    dates = []
    if ASSETS in tasks:
        found, entry[ASSETS] = _assets(recipe, section, data, texts, folder / FOLDER)
        dates += found
    if RANK_ASSETS in tasks:
        found, entry[RANK_ASSETS] = _rankings(recipe, section, data, texts, folder / FOLDER)
        dates += found
    users = pl.read_parquet(prepared.sequences.path, columns=[USER_ID]).rename({USER_ID: "customer_id"})
    lists = pl.concat(dates).group_by("customer_id", maintain_order=True).agg(DATES)
    columns = {
        LEDGER: _column(users, ledger(data, texts), "lines", pa.list_(pa.string())),
        DATES: _column(users, lists, DATES, DATES_TYPE),
    }
    return columns, entry


def _check_log(data: FarTrans, prepared: Prepared, tasks: Collection[str]) -> None:
    found, expected = int(prepared.sequences.lengths.sum()), data.transactions.height
    if found != expected or prepared.items[ITEM_ID].to_list() != data.isins:
        raise UserError(
            f"the interactions are {found} of {prepared.items.height} items, the bank has {expected} transactions of "
            f"{len(data.isins)} assets: the task {min(tasks)} needs them all, leave `filter` and `data` out of the "
            "recipe"
        )


def _cutoffs(section: FinanceSection, split: SplitSection, data: FarTrans, lead_days: int = 0) -> dict[str, list[int]]:
    """The dates of each split; without finance.train_from those of training begin `lead_days` after the first price."""
    assert split.valid_from is not None  # of the method dates both are there
    assert split.test_from is not None
    begun = int(data.prices.days[0]) + lead_days
    first = begun if section.train_from is None else day_of(section.train_from.isoformat())
    valid, test = (day_of(date.isoformat()) for date in (split.valid_from, split.test_from))
    return schedule(first, valid, test, data.last_day, section.every_days, section.window_days)


# ---- assets ----


def _assets(
    recipe: Recipe, section: FinanceSection, data: FarTrans, texts: Sequence[str], folder: Path
) -> tuple[list[pl.DataFrame], dict[str, Any]]:
    """Frames of `_dates`, and the manifest's entry."""
    cutoffs = _cutoffs(section, recipe.protocol.split, data)
    tasks = {
        split: build_task(data, days, section.window_days, section.keep, section.min_history)
        for split, days in cutoffs.items()
    }
    learnt = _write(folder, data, tasks, texts, recipe.seed, section.max_assets)
    dates = [_dates(task, split, learnt[split]) for split, task in tasks.items()]
    return dates, {"keep": section.keep, "splits": _entry(tasks, cutoffs)}


def _write(
    folder: Path, data: FarTrans, tasks: Mapping[str, Task], texts: Sequence[str], seed: int, most: int
) -> dict[str, dict[str, str]]:
    """Each split's examples, windows and completions as files; of each split the good answer of each example."""
    good: dict[str, dict[str, str]] = {}
    for split, task in tasks.items():
        table = completions(data, task, seed, most, texts=texts)
        for name, frame in (("examples", task.examples), ("windows", task.windows), ("completions", table)):
            frame.write_parquet(folder / f"{split}_{name}.parquet")
        good[split] = dict(table.filter("label").select("example_id", "completion").iter_rows())
    return good


def _dates(task: Task, split: str, good: Mapping[str, str]) -> pl.DataFrame:
    """customer_id and a struct of DATES_TYPE; without the training examples that have nothing good to answer."""
    answers = [good.get(name, NOTHING) for name in task.examples["example_id"].to_list()]
    frame = task.examples.with_columns(pl.Series("answer", answers, pl.String))
    if split == "train":
        frame = frame.filter(pl.col("answer") != NOTHING)
    nothing = {"target": pl.Int64(), "candidates": pl.List(pl.Int64), "shown": pl.String()}
    return _asking(frame.with_columns(pl.lit(None, kind).alias(name) for name, kind in nothing.items()), ASSETS, split)


def _asking(frame: pl.DataFrame, task: str, split: str) -> pl.DataFrame:
    """customer_id and a struct of DATES_TYPE, of a frame with all of its fields but task and split."""
    frame = frame.with_columns(pl.lit(SPLIT_CODES[split], pl.Int8).alias("split"), pl.lit(task).alias("task"))
    return frame.select("customer_id", pl.struct(field.name for field in DATES_TYPE.value_type).alias(DATES))


def _entry(tasks: Mapping[str, Task], cutoffs: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Of each split its dates, and how many of its examples have assets that are bought, that rise, that do both."""
    return {
        split: _span(cutoffs[split])
        | {"examples": task.examples.height}
        | {name: int(found.any(axis=1).sum()) for name, found in task.labels().items()}
        for split, task in tasks.items()
    }


def _span(cutoffs: Sequence[int]) -> dict[str, Any]:
    return {"dates": len(cutoffs), "first": date_of(cutoffs[0]), "last": date_of(cutoffs[-1])}


# ---- rank_assets ----


def _rankings(
    recipe: Recipe, section: FinanceSection, data: FarTrans, texts: Sequence[str], folder: Path
) -> tuple[list[pl.DataFrame], dict[str, Any]]:
    """Frames of `_dates`, and the manifest's entry: how many customers have a taste of their own."""
    drawn = recipe.protocol.candidates
    cutoffs = _cutoffs(section, recipe.protocol.split, data, section.lookback_days)
    choices = draw_choices(data, drawn.count, section.lookback_days, drawn.seed)
    dates, splits = [], {}
    for split, days in cutoffs.items():
        rankings = build_rankings(data, days, choices, section, drawn)
        rankings.table.write_parquet(folder / f"{split}_rankings.parquet")
        dates.append(_asking(_asked_to_rank(rankings, texts), RANK_ASSETS, split))
        own = int(rankings.table["own_taste"].sum())
        splits[split] = _span(days) | {"examples": rankings.table.height, "own_taste": own}
    said = {"candidates": drawn.count, "lookback_days": section.lookback_days, "min_choices": section.min_choices}
    return dates, said | {"splits": splits}


def _asked_to_rank(rankings: Rankings, texts: Sequence[str]) -> pl.DataFrame:
    """The rankings with the choice, the lines of the candidates and the answer: all of them by falling utility."""
    candidates, features = rankings.matrix("candidates"), ("mean", "variance", "drawdown")
    rows = zip(candidates.tolist(), *(rankings.matrix(name).tolist() for name in features))
    shown = ["\n".join(candidate_line(texts[asset], *said) for asset, *said in zip(*row)) for row in rows]
    answers = [json.dumps([texts[asset] for asset in row], ensure_ascii=False) for row in rankings.taught().tolist()]
    return rankings.table.with_columns(
        pl.Series("target", candidates[range(len(candidates)), rankings.chosen]),
        pl.Series("shown", shown, pl.String),
        pl.Series("answer", answers, pl.String),
    )


def candidate_line(text: str, mean: float, variance: float, drawdown: float) -> str:
    """How a prompt shows a candidate: of its daily returns the mean in percent and the variance in squared percent.

    >>> candidate_line("Fund", 0.0012, 0.0004, 0.081)
    'Fund: mean +0.120%, variance 4.00, drawdown 8.1%'
    """
    return f"{text}: mean {mean:+.3%}, variance {variance * 1e4:.2f}, drawdown {drawdown:.1%}"


# ---- the columns ----


def _column(users: pl.DataFrame, lists: pl.DataFrame, name: str, kind: pa.DataType) -> pa.Array:
    """A list for each user, empty where there is none."""
    joined = users.join(lists, on="customer_id", how="left", maintain_order="left")
    return joined[name].fill_null([]).to_arrow(compat_level=pl.CompatLevel.oldest()).cast(kind)
