"""Small logs in every format that the readers know."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recllm.data.sequences import Prepared, prepare
from recllm.recipe import DataSection, FilterSection, InteractionsSource, ItemsSource, SplitSection

Rows = list[dict[str, Any]]


def _write(path: Path, rows: Rows, types: dict[str, str] | None = None) -> Path:
    """Rows as the file that the ending of `path` asks for; a folder without an ending is a saved HF dataset."""
    frame = pl.DataFrame(rows, infer_schema_length=None)
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix in (".inter", ".item"):
        header = "\t".join(f"{name}:{(types or {}).get(name, 'token')}" for name in frame.columns)
        lines = ["\t".join("" if value is None else str(value) for value in row) for row in frame.rows()]
        path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    elif path.suffix == "":
        from datasets import Dataset

        Dataset.from_list(rows).save_to_disk(str(path))
    else:
        frame.write_csv(path, separator="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.fixture
def prepare_rows(tmp_path: Path) -> Callable[..., Prepared]:
    """prepare() of rows given as dicts; items are those of the rows unless given."""

    def run(
        interactions: Rows,
        items: Rows | None = None,
        filters: FilterSection | None = None,
        split: SplitSection | None = None,
        seed: int = 0,
        **source: Any,
    ) -> Prepared:
        if items is None:
            items = [
                {"item_id": i, "title": f"Film {i}"} for i in dict.fromkeys(row["item_id"] for row in interactions)
            ]
        data = DataSection(
            interactions=InteractionsSource(path=str(_write(tmp_path / "log.jsonl", interactions)), **source),
            items=ItemsSource(path=str(_write(tmp_path / "items.jsonl", items))),
        )
        split = split or SplitSection(method="leave_one_out")
        return prepare(data, filters or FilterSection(), split, seed, tmp_path)

    return run


def _log_of(*sequences: str) -> Rows:
    """ "abc", "bd" → user 1 has a, b, c at times 1, 2, 3; user 2 has b, d."""
    return [
        {"user_id": str(user), "item_id": item, "timestamp": time}
        for user, sequence in enumerate(sequences, 1)
        for time, item in enumerate(sequence, 1)
    ]


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    """write(path, rows): see _write."""
    return _write


@pytest.fixture(scope="session")
def log_of() -> Callable[..., Rows]:
    """log_of("abc", "bd"): see _log_of."""
    return _log_of
