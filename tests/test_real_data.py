"""The shipped recipes on real logs, from the files to the report, with a tiny model in place of the real one."""

import json
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recllm.cli import main
from recllm.convert.pipeline import convert
from recllm.recipe import load_recipe

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


@pytest.mark.parametrize("method", ["two_stage", "khop"])
def test_a_graph_of_ratings_shows_none_that_is_not_older(
    shared_data: Path, tmp_path: Path, tiny_model_folder: Path, method: str
) -> None:
    """Real times: the graph says who rated which film when, and an example's own rating is the answer that it asks."""
    rated_at = _write_ratings_and_their_graph(shared_data / "ml-100k" / "ml-100k.inter", tmp_path, users=150)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
name: ratings
data: {{interactions: {{path: {tmp_path}/log.csv}}, items: null}}
graph:
  triples: {{path: {tmp_path}/triples.csv}}
  links: {{path: {tmp_path}/links.csv}}
  retrieval: {{method: {method}, fan_out: 5, max_items: 10}}
  budget: 300
  format: lines
filter: {{like_at: 4}}
protocol: temporal_20
tasks:
  - {{task: next_item, template: next_item/films_graph, max_train_targets: 5}}
  - {{task: like, template: like/films_graph, max_train_targets: 5}}
model: {{name_or_path: {tiny_model_folder}}}
""")
    manifest = convert(load_recipe(recipe, []), tmp_path / "dataset", workers=1)
    users = pq.read_table(tmp_path / "dataset" / "sequences.parquet")["user_id"].to_pylist()
    items = pq.read_table(tmp_path / "dataset" / "items.parquet")["item_id"].to_pylist()
    shown = manifest["graph"]["shown"]
    assert set(shown) == {f"{split}/{task}" for split in ("train", "valid", "test") for task in ("next_item", "like")}
    for split in ("train", "valid", "test"):
        triples, around_the_asked = Counter[str](), 0
        for row in pq.read_table(tmp_path / "dataset" / split).to_pylist():
            user, item = users[row["user_index"]], items[row["target"]]
            told = re.findall(r"\(user (\d+), rated \d, (\d+)\)", row["prompt"][-1]["content"])
            assert all(rated_at[pair] < row["timestamp"] for pair in told)
            assert (user, item) not in told
            assert row["timestamp"] == rated_at[user, item]
            triples[row["task"]] += len(told)
            around_the_asked += row["task"] == "like" and any(film == item for _, film in told)
        for task in ("next_item", "like"):
            entry = shown[f"{split}/{task}"]
            assert entry["timed_triples"] == entry["triples"] == triples[task] > 0
            assert entry["not_older_than_cutoff"] == 0
        assert around_the_asked > 0.5 * shown[f"{split}/like"]["with_graph"]


def _write_ratings_and_their_graph(log: Path, folder: Path, users: int) -> dict[tuple[str, str], int]:
    """log.csv, triples.csv and links.csv of the first users of MovieLens-100K; when each pair of (user, item) was."""
    rows = [line.split("\t") for line in log.read_text().splitlines()[1:]]
    rows = [row for row in rows if int(row[0]) <= users]
    triples = [f"user {user},rated {rating},film {item},{time}" for user, item, rating, time in rows]
    links = [f"{item},film {item}" for item in {row[1] for row in rows}]
    for name, head, lines in (
        ("log", "user_id,item_id,rating,timestamp", map(",".join, rows)),
        ("triples", "head,relation,tail,timestamp", triples),
        ("links", "item_id,entity_id", links),
    ):
        (folder / f"{name}.csv").write_text("\n".join([head, *lines]) + "\n")
    found = {(user, item): int(time) for user, item, _, time in rows}
    assert len(found) == len(rows)  # nobody rates a film twice
    return found


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
