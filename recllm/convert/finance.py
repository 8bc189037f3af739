"""The task assets: on which dates a bank's customers are asked, what they had done, and what is good to answer.

The recipe and its log as it was prepared enter. Two further columns of the sequences leave, the ledger and the dates,
which the converter's workers turn into examples, and the dataset's folder finance/: for each split examples, windows
and completions (data/finance.py): answers are judged by the former, the latter are for preference training elsewhere.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from recllm import files
from recllm.convert.targets import DATES_TYPE
from recllm.data import offline
from recllm.data.far_trans import FarTrans, read_far_trans
from recllm.data.finance import Task, build_task, completions, ledger, schedule
from recllm.data.prices import date_of, day_of
from recllm.data.sequences import Prepared
from recllm.data.stored import DATES, LEDGER
from recllm.errors import UserError
from recllm.recipe import FinanceSection, Recipe, SplitSection
from recllm.schema import ITEM_ID, SPLIT_CODES, USER_ID

FOLDER = "finance"  # of a dataset
NOTHING = "[]"  # the answer where no asset is good; nothing to learn from


def ask_customers(
    recipe: Recipe, prepared: Prepared, texts: Sequence[str], folder: Path
) -> tuple[dict[str, pa.Array], dict[str, Any]]:
    """The columns LEDGER and DATES, in user_index order, and what the manifest says; writes into the dataset `folder`.

    Args:
        texts: (num_items,) what prompts and answers call the assets.

    Raises:
        UserError: a log that is not the bank's, windows that do not fit between the dates, no example.
    """
    section = recipe.finance
    assert section is not None  # asked by the pipeline's load_tasks
    data = read_far_trans(offline.resolve(section.folder))
    _check_log(data, prepared)
    cutoffs = _cutoffs(section, recipe.protocol.split, data)
    tasks = {
        split: build_task(data, days, section.window_days, section.keep, section.min_history)
        for split, days in cutoffs.items()
    }
    learnt = _write(folder / FOLDER, data, tasks, texts, recipe.seed, section.max_assets)
    users = pl.read_parquet(prepared.sequences.path, columns=[USER_ID]).rename({USER_ID: "customer_id"})
    dates = pl.concat(_dates(task, split, learnt[split]) for split, task in tasks.items())
    columns = {
        LEDGER: _column(users, ledger(data, texts), "lines", pa.list_(pa.string())),
        DATES: _column(users, dates.group_by("customer_id", maintain_order=True).agg(DATES), DATES, DATES_TYPE),
    }
    return columns, _entry(section, tasks, cutoffs)


def _check_log(data: FarTrans, prepared: Prepared) -> None:
    found, expected = int(prepared.sequences.lengths.sum()), data.transactions.height
    if found != expected or prepared.items[ITEM_ID].to_list() != data.isins:
        raise UserError(
            f"the interactions are {found} of {prepared.items.height} items, the bank has {expected} transactions of "
            f"{len(data.isins)} assets: the task assets needs them all, leave `filter` and `data` out of the recipe"
        )


def _cutoffs(section: FinanceSection, split: SplitSection, data: FarTrans) -> dict[str, list[int]]:
    assert split.valid_from is not None  # of the method dates both are there
    assert split.test_from is not None
    first = int(data.prices.days[0]) if section.train_from is None else day_of(section.train_from.isoformat())
    valid, test = (day_of(date.isoformat()) for date in (split.valid_from, split.test_from))
    return schedule(first, valid, test, data.last_day, section.every_days, section.window_days)


def _write(
    folder: Path, data: FarTrans, tasks: Mapping[str, Task], texts: Sequence[str], seed: int, most: int
) -> dict[str, dict[str, str]]:
    """Each split's examples, windows and completions as files; of each split the good answer of each example."""
    good: dict[str, dict[str, str]] = {}
    folder.mkdir()
    for split, task in tasks.items():
        table = completions(data, task, seed, most, texts=texts)
        for name, frame in (("examples", task.examples), ("windows", task.windows), ("completions", table)):
            frame.write_parquet(folder / f"{split}_{name}.parquet")
        good[split] = dict(table.filter("label").select("example_id", "completion").iter_rows())
    return good


def _dates(task: Task, split: str, good: Mapping[str, str]) -> pl.DataFrame:
    """customer_id and a struct of DATES_TYPE; without the training examples that have nothing good to answer."""
    answers = [good.get(name, NOTHING) for name in task.examples["example_id"].to_list()]
    frame = task.examples.with_columns(
        pl.lit(SPLIT_CODES[split], pl.Int8).alias("split"), pl.Series("answer", answers, pl.String)
    )
    if split == "train":
        frame = frame.filter(pl.col("answer") != NOTHING)
    return frame.select("customer_id", pl.struct(field.name for field in DATES_TYPE.value_type).alias(DATES))


def _column(users: pl.DataFrame, lists: pl.DataFrame, name: str, kind: pa.DataType) -> pa.Array:
    """A list for each user, empty where there is none."""
    joined = users.join(lists, on="customer_id", how="left", maintain_order="left")
    return joined[name].fill_null([]).to_arrow(compat_level=pl.CompatLevel.oldest()).cast(kind)


def _entry(section: FinanceSection, tasks: Mapping[str, Task], cutoffs: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Of each split its dates, and how many of its examples have assets that are bought, that rise, that do both."""
    splits = {}
    for split, task in tasks.items():
        hits = {name: int(found.any(axis=1).sum()) for name, found in task.labels().items()}
        dates = {"dates": len(cutoffs[split]), "first": date_of(cutoffs[split][0]), "last": date_of(cutoffs[split][-1])}
        splits[split] = dates | {"examples": task.examples.height} | hits
    folder = offline.resolve(section.folder)
    return {"inputs": {section.folder: files.sha256_of(folder)}, "keep": section.keep, "splits": splits}
