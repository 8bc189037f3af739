"""A small log with structure, converted: what the tests of this room train on; and event datasets made by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recllm import schema
from recllm.convert.pipeline import convert
from recllm.data.dataset import Dataset, Sequences
from recllm.recipe import Recipe
from recllm.train.collator import WEIGHED, TokenizedExamples, tokenize

NUM_ITEMS, NUM_USERS = 24, 48


def write_log(folder: Path) -> None:
    """Every user walks round one of two rings of 12 items: the next item follows from the last one."""
    generator = np.random.default_rng(0)
    items = "item_id,title\n" + "".join(f"i{n:02d},Film {chr(65 + n)}\n" for n in range(NUM_ITEMS))
    lines = []
    for user in range(NUM_USERS):
        ring, at = 12 * (user % 2), int(generator.integers(12))
        for step in range(int(generator.integers(8, 20))):
            lines.append(f"u{user:02d},i{ring + at:02d},{1000 * step + user}\n")
            at = (at + 1) % 12
    (folder / "items.csv").write_text(items)
    (folder / "log.csv").write_text("user_id,item_id,timestamp\n" + "".join(lines))


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    """A recipe over that log; `changes` replace whole sections."""
    document: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "data": {
            "interactions": {"path": str(folder / "log.csv")},
            "items": {"path": str(folder / "items.csv")},
        },
        "protocol": {
            "name": "loo",
            "split": {"method": "leave_one_out", "min_history": 1},
            "candidates": {"count": 5},
            "ranking": {"exclude_history": False},
        },
        "history": {"max_items": 12},
        "prompt": {"max_items": 4},
        "tasks": [{"task": "next_item", "template": "next_item/films", "dense_window": 4}],
        "encoder": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "batch_size": 16, "max_epochs": 3},
        "model": {"name_or_path": "unused", "dtype": "float32"},
        "adapter": {"r": 4, "num_experts": 2, "gate": {"learning_rate": 0.05}},
        "train": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "report_to": "none",
        },
    }
    return Recipe.model_validate(document | changes)


def event_dataset(
    rows: list[list[tuple[int, int]]], labels: list[str], num_items: int, valid: int = 1, folder: Path = Path("unused")
) -> Dataset:
    """An event dataset without examples: each user's (item, action number) oldest first, the last `valid` are VALID."""
    ids = [f"i{number}" for number in range(num_items)]
    columns = {"item_index": pa.array(range(num_items), pa.int32()), "item_id": pa.array(ids, pa.string())}
    items = pa.table(columns | {"title": columns["item_id"], "text": columns["item_id"]})
    manifest = {"events": True, "items_sha256": schema.vocabulary_sha256(ids)}
    manifest["actions"] = {"labels": labels, "words": {label: label for label in labels}}
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    splits = [schema.VALID if place >= len(row) - valid else schema.TRAIN for row in rows for place in range(len(row))]
    dataset = Dataset(folder, manifest, items)
    dataset.__dict__["sequences"] = Sequences(
        offsets=offsets,
        items=np.array([item for row in rows for item, _ in row], dtype=np.int32),
        timestamps=np.arange(offsets[-1]),
        splits=np.array(splits, dtype=np.int8),
        user_ids=pa.chunked_array([[f"u{user}" for user in range(len(rows))]]),
        user_keys=np.arange(len(rows), dtype=np.uint64),
        actions=np.array([action for row in rows for _, action in row], dtype=np.int32),
        sessions=np.zeros(offsets[-1], dtype=np.int32),
    )
    return dataset


def tokenized(rows: list[dict[str, Any]], tokenizer: Any) -> TokenizedExamples:
    """Examples with an `answer`, and where the row says so another task, prompt or label, and a rationale."""
    columns: dict[str, list[Any]] = {name: [] for name in WEIGHED}
    for number, row in enumerate(rows):
        rationale = row.get("rationale")
        text = row["answer"] if rationale is None else f"{rationale}\n{row['answer']}"
        values = {
            "example_id": f"e{number}",
            "user_index": 0,
            "gate_end": 0,
            "prompt": [{"role": "user", "content": row.get("prompt", "next?")}],
            "completion": [{"role": "assistant", "content": row.get("text", text)}],
            "task": row.get("task", "next_action"),
            "label": row.get("label", row["answer"]),
            "rationale": rationale,
        }
        for name, value in values.items():
            columns[name].append(value)
    fields = [schema.EXAMPLES.field(name) for name in WEIGHED]
    return tokenize(pa.table(columns, schema=pa.schema(fields)).to_batches(), tokenizer, 512)


def answers(*labels: str, **more: Any) -> list[dict[str, Any]]:
    return [{"answer": label, **more} for label in labels]


@pytest.fixture(scope="session")
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CSV files."""
    folder = tmp_path_factory.mktemp("log")
    write_log(folder)
    return folder


@pytest.fixture(scope="session")
def dataset(log_folder: Path) -> Dataset:
    """The converted log."""
    recipe = recipe_of(log_folder)
    convert(recipe, recipe.output / "dataset", workers=1)
    return Dataset.open(recipe.output / "dataset")
