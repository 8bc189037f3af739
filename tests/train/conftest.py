"""A small log with structure, converted: what the tests of this room train on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recllm.convert.pipeline import convert
from recllm.data.dataset import Dataset
from recllm.recipe import Recipe

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
