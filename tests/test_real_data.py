"""The shipped recipes on real logs, from the files to the report, with a tiny model in place of the real one."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recllm.cli import main

pytestmark = pytest.mark.shared


def _run(recipe: str, output: Path, model: Path, *overrides: str) -> tuple[dict, dict]:
    """Run a recipe in small; returns the manifest and the metrics."""
    small = [
        f"output_dir={output}",
        f"model={{name_or_path: {model}, dtype: float32}}",
        "tasks.0.dense_window=3",
        "prompt.max_items=3",
        "encoder={hidden_size: 8, num_layers: 1, num_heads: 1, max_epochs: 1}",
        "adapter={r: 4, num_experts: 2}",
        "train={max_steps: 2, per_device_train_batch_size: 4, report_to: none}",
        "evaluate.max_examples=20",
    ]
    assert main(["run", recipe, *small, *overrides]) == 0
    return tuple(json.loads((output / name).read_text()) for name in ("dataset/manifest.json", "report/metrics.json"))


def test_movielens_100k_from_its_recbole_files(shared_data: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    files = shared_data / "ml-100k"
    manifest, metrics = _run(
        "movielens/next_item_ilora",
        tmp_path / "run",
        tiny_model_folder,
        f"data.interactions.path={files}/ml-100k.inter",
        f"data.items.path={files}/ml-100k.item",
        f"data.users={{path: {files}/ml-100k.user}}",
        'prompt.user="{{ age }} years old, {{ occupation }}"',
    )
    assert (manifest["counts"]["users"], manifest["counts"]["items"]) == (938, 1682)
    assert manifest["audit"]["train_histories_with_test_targets"] == 0
    assert {system["num_examples"] for system in metrics["systems"]} == {20}


def test_movielens_1m_through_a_column_mapping(shared_data: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    files = shared_data / "ml-1m-dbpedia"
    logs = ",".join(f"{files}/mapping/{part}.txt" for part in ("train", "valid", "test"))
    manifest, metrics = _run(
        "movielens_1m/next_item_ilora",
        tmp_path / "run",
        tiny_model_folder,
        f"data.interactions.path=[{logs}]",
        f"data.items.path={files}/products.txt",
        f"data.items.id_map.path={files}/mapping/product_mapping.txt",
    )
    assert (manifest["counts"]["users"], manifest["counts"]["items"]) == (6040, 2983)
    assert metrics["counts"]["evaluated"]["next_item"]["examples"] == 20


def test_movielens_1m_with_the_graph_that_comes_with_it(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").symlink_to(shared_data)  # the recipe's own paths
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "movielens_1m/next_item_kg_ilora", "tasks.0.max_train_targets=1"]) == 0
    manifest = json.loads((tmp_path / "runs" / "ml-1m-kg" / "dataset" / "manifest.json").read_text())
    graph = manifest["graph"]
    assert (graph["counts"]["triples"], graph["counts"]["linked_items"]) == (193_089, 2977)
    shown = graph["shown"]["test/next_item"]
    assert shown["with_graph"] + shown["without_graph"] == manifest["counts"]["examples"]["test/next_item"] == 1206
    assert shown["with_graph"] > 0.99 * 1206  # all but those whose whole history is of one second
    assert 0.9 * 200 < shown["tokens"] / shown["with_graph"] <= 200
    asked = json.dumps(pq.read_table(tmp_path / "runs" / "ml-1m-kg" / "dataset" / "test")["prompt"].to_pylist())
    assert "starred by actor" in asked
    assert "related to wikipage" not in asked  # the recipe denies it
    assert "Monty Python's Life of Brian (1979)" in asked  # an entity is called what its item is called


def test_the_rows_of_llara_and_ilora(shared_data: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    files, log = shared_data / "ilora-movielens", shared_data / "ml-100k"
    manifest, metrics = _run(
        "movielens/ilora_rows",
        tmp_path / "run",
        tiny_model_folder,
        f"data.interactions.path={log}/ml-100k.inter",
        f"data.items.path={log}/ml-100k.item",
        f"protocol.split.given.valid={files}/val.jsonl",
        f"protocol.split.given.test={files}/test.jsonl",
        "evaluate.max_examples=95",
    )
    given = manifest["audit"]["given"]
    assert {name: (rows["rows"], rows["history_equal"]) for name, rows in given.items()} == {
        "valid": (94, 94),
        "test": (95, 95),
    }
    sasrec = next(system for system in metrics["systems"] if system["name"] == "sasrec")
    assert sasrec["num_examples"] == 95
    interval = sasrec["metrics"]["hit_rate@1"]
    assert interval["low"] < interval["value"] < interval["high"]
