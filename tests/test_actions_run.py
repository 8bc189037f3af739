"""The whole line with actions on a tiny model: from a made-up event log to the report."""

import contextlib
import csv
import io
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from recllm import stages
from recllm.cli import main
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.evaluate.action_systems import ActionSystems, check_packages
from recllm.evaluate.calibration import mean_nats, probabilities
from recllm.evaluate.compare import compare
from recllm.evaluate.evaluation import calibration_tasks, check_beams, check_protocol, evaluate
from recllm.evaluate.tasks import load_tasks
from recllm.recipe import load_recipe

USERS, ITEMS = 24, 30
WORDS = {"view": "view", "cart": "add to cart", "buy": "buy", "search": "search", "leave": "leave"}
WITH_ITEM = ("view", "cart", "buy")
TASKS = [
    {"task": "next_action", "template": "next_action/events", "max_train_targets": 4},
    {
        "task": "next_event",
        "template": "next_event/events",
        "fields": {"item": "item", "text": "text"},
        "max_train_targets": 2,
    },
    {"task": "outcome", "template": "outcome/sessions", "positive": ["buy"], "after": 2},
    {"task": "action_on_item", "template": "action_on_item/items", "max_train_targets": 2},
    {
        "task": "next_item",
        "template": "next_item/sessions",
        "within_session": True,
        "max_train_targets": 2,
    },
    {"task": "next_action", "template": "next_action/events", "rationale": "reason", "max_train_targets": 2},
]
NAMES = ["next_action", "next_event", "outcome", "action_on_item", "next_item", "next_action.2"]


def write_log(path: Path) -> list[dict]:
    """Users who view before they put something into the cart; then even ones buy, and odd ones leave."""
    draw, rows = random.Random(0), []
    for user in range(USERS):
        for session in range(4):
            start = 100_000 * session + 1000 * user
            item = draw.randrange(ITEMS)
            events = ["search", "view", "view", "cart", "buy" if user % 2 == 0 else "leave"]
            events = events[draw.randrange(2) :] if session % 2 else events
            for step, action in enumerate(events):
                has_item = action in WITH_ITEM
                rows.append(
                    {
                        "user_id": f"u{user}",
                        "session_id": f"s{session}",
                        "timestamp": start + 10 * step,
                        "action": action,
                        "item_id": f"i{(item + step) % ITEMS}" if has_item else "",
                        "text": f"film {item}" if action == "search" else "",
                        "reason": f"because of {action}",
                    }
                )
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


class Run(NamedTuple):
    """A finished run."""

    recipe: Path
    output: Path
    metrics: dict
    printed: str

    def systems(self, task: str) -> dict[str, dict]:
        return {system["name"]: system for system in self.metrics["systems"] if system["task"] == task}

    def predictions(self, task: str, system: str) -> list[dict]:
        table = pq.read_table(self.output / "report" / "predictions.parquet")
        return [row for row in table.to_pylist() if (row["task"], row["system"]) == (task, system)]

    def examples(self, split: str, task: str) -> list[dict]:
        folder = self.output / "dataset" / split
        rows = [row for part in sorted(folder.glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
        return [row for row in rows if row["example_id"].startswith(f"{task}/")]


@pytest.fixture(scope="module")
def run(tmp_path_factory, long_model_folder) -> Run:
    folder = tmp_path_factory.mktemp("actions")
    write_log(folder / "log.csv")
    (folder / "items.csv").write_text("item_id,title\n" + "".join(f"i{n},Film {n}\n" for n in range(ITEMS)))
    recipe = folder / "recipe.yaml"
    document = {
        "name": "actions",
        "output_dir": str(folder / "run"),
        "data": {
            "interactions": {"path": str(folder / "log.csv")},
            "items": {"path": str(folder / "items.csv")},
        },
        "actions": {
            "words": WORDS,
            "without_item": ["search", "leave"],
            "attributes": ["text", "reason"],
        },
        "protocol": {
            "name": "sessions",
            "split": {
                "method": "session_holdout",
                "targets": "all",
                "valid_fraction": 0.25,
                "test_fraction": 0.25,
            },
            "candidates": {"count": 4},
            "ranking": {"k": [1, 3], "exclude_history": False},
            "decoding": {"max_new_tokens": 24},
            "actions": {
                "calibration_examples": 20,
                "otto_k": 5,
                "otto_weights": {"view": 0.1, "cart": 0.3, "buy": 0.6},
                "otto_next": ["view"],
            },
            "bootstrap": {"samples": 100},
        },
        "prompt": {"max_items": 4},
        "tasks": TASKS,
        "encoder": {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "max_epochs": 2},
        "model": {"name_or_path": str(long_model_folder), "dtype": "float32"},
        "adapter": {"r": 4, "num_experts": 2},
        "train": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "logging_steps": 2,
            "report_to": "none",
        },
        "evaluate": {"max_examples": 12, "batch_size": 8, "controls": ["uniform"]},
    }
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["run", str(recipe)]) == 0
    output = load_recipe(recipe).output
    metrics = json.loads((output / "report" / "metrics.json").read_text())
    return Run(recipe, output, metrics, printed.getvalue())


CLOSED = ["next_action", "outcome", "action_on_item", "next_action.2"]
MODELS = ["ilora", "ilora_uniform", "base_model"]


def test_every_task_is_in_the_report(run):
    assert run.metrics["tasks"] == NAMES
    text = (run.output / "report" / "report.md").read_text(errors="replace")
    for name in NAMES:
        assert f"## {name}: what the numbers say" in text


def test_the_baselines_that_make_sense_stand_beside_the_model(run):
    counting = {"constant", "user_most_frequent"}
    expected = {
        "next_action": {*MODELS, *counting, "last_action", "markov", "boosted_trees", "sasrec"},
        "next_event": {*MODELS, *counting, "last_action", "markov", "boosted_trees", "sasrec"},
        "outcome": {*MODELS, *counting, "markov", "boosted_trees"},
        "action_on_item": {*MODELS, *counting, "item_most_frequent", "last_action", "markov", "boosted_trees"},
        "next_item": {*MODELS, "sasrec", "item_to_item", "popularity", "random"},
    }
    for task, names in expected.items():
        assert set(run.systems(task)) == names, task


def test_exact_match_is_the_mean_of_session_means(run):
    for system in ("ilora", "constant", "boosted_trees"):
        of_session: dict[int, list[bool]] = {}
        for row in run.predictions("next_action", system):
            of_session.setdefault(row["session"], []).append(row["predicted"] == row["label"])
        expected = sum(sum(right) / len(right) for right in of_session.values()) / len(of_session)
        assert run.systems("next_action")[system]["metrics"]["exact_match"]["value"] == pytest.approx(expected)
        assert run.systems("next_action")[system]["num_sessions"] == len(of_session)


def test_the_constant_answer_is_the_most_frequent_one_of_all_training_targets(run):
    """Not of the examples, of which max_train_targets keeps some."""
    rows = pq.read_table(run.output / "dataset" / "sequences.parquet").to_pylist()
    counts = Counter(
        action
        for row in rows
        for place, (action, split) in enumerate(zip(row["actions"], row["splits"], strict=True))
        if split == 1 and row["sessions"][place] in row["sessions"][:place]
    )
    answers = {row["predicted"] for row in run.predictions("next_action", "constant")}
    assert answers == {counts.most_common(1)[0][0]}
    assert counts.total() > len(run.examples("train", "next_action"))


def test_outcomes_of_training_are_those_that_convert_writes(run):
    """The baselines find their questions by themselves: the same as convert's, which here leaves none out."""
    from recllm.evaluate.action_baselines import Log, training_of
    from recllm.recipe import TaskSection

    log = Log.of(Dataset.open(run.output / "dataset"))
    found = training_of(log, TaskSection(**TASKS[2]), ["yes", "no"])
    ends = (found.asked.flat - log.sequences.offsets[found.asked.user]).tolist()
    ours = {(user, end, label) for user, end, label in zip(found.asked.user.tolist(), ends, found.label.tolist())}
    rows = run.examples("train", "outcome")
    assert ours == {(row["user_index"], row["history_end"], ["yes", "no"].index(row["label"])) for row in rows}


def test_temperatures_are_fitted_on_valid_alone(run):
    recipe, dataset = load_recipe(run.recipe), Dataset.open(run.output / "dataset")
    tasks = load_tasks(dataset, "test", 12, 0)
    held, notes = calibration_tasks(recipe, dataset, tasks)
    assert list(held) == CLOSED
    assert notes == []
    for name, task in held.items():
        valid = {row["example_id"] for row in run.examples("valid", name)}
        assert set(task.examples.example_ids) <= valid
        assert not set(task.examples.example_ids) & {row["example_id"] for row in run.examples("test", name)}
        for system in run.systems(name).values():
            said = [note for note in run.metrics["notes"] if note.startswith(f"{name}: no calibration of ")]
            if system["kind"] == "control":
                assert system["calibration"] is None
            elif system["calibration"] is not None:
                assert system["calibration"]["num_examples"] == len(task.examples.example_ids)
                assert system["calibration"]["temperature"] > 0
            elif system["name"] != "last_action":
                assert any(system["name"] in note.split(": ")[1].replace(",", "").split() for note in said)
    assert run.systems("next_action")["markov"]["calibration"] is not None
    assert "calibration" not in run.systems("next_item")["ilora"]
    on_valid = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"split": "valid"})})
    held, notes = calibration_tasks(on_valid, dataset, tasks)
    assert held == {}
    assert "which is what this report is about" in notes[0]


def test_calibration_changes_no_answer_and_fits_better_on_valid(run):
    recipe, dataset = load_recipe(run.recipe), Dataset.open(run.output / "dataset")
    held, _ = calibration_tasks(recipe, dataset, load_tasks(dataset, "test", 12, 0))
    task = held["next_action"]
    on_valid = {one.name: one for one in ActionSystems(recipe, dataset, run.output / "encoder", [task]).systems({})}
    checked = 0
    for name, system in run.systems("next_action").items():
        found = system["calibration"]
        if found is None:
            continue
        assert set(found["before"]) == {"multiclass_brier", "top_label_calibration_error", "label_nats"}
        rows = run.predictions("next_action", name)
        scores = np.array([row["scores"] for row in rows])
        after = probabilities(scores, found["temperature"])
        assert [list(WORDS)[place] for place in after.argmax(axis=1)] == [row["predicted"] for row in rows]
        assert (after.argmax(axis=1) == probabilities(scores).argmax(axis=1)).all()
        if name in on_valid:
            known = on_valid[name].predictions[task.name].scores
            nats = [mean_nats(known, task.right_column, at) for at in (found["temperature"], 1.0)]
            assert nats[0] < nats[1]
            checked += 1
    assert checked >= 2


def test_sessions_have_the_same_numbers_whichever_examples_are_chosen(run):
    """Each user has four sessions, 0 to 3: user u's session s is 4 u + s."""
    dataset = Dataset.open(run.output / "dataset")
    sessions = {
        row["example_id"]: 4 * row["user_index"] + row["session"] for row in run.examples("test", "next_action")
    }
    for count in (1, 2, 3, 5, None):
        (task,) = [one for one in load_tasks(dataset, "test", count, 0) if one.name == "next_action"]
        assert task.clusters.tolist() == [sessions[name] for name in task.examples.example_ids]


def test_the_constant_answer_is_looked_at_though_nobody_asked_for_it(run, tmp_path):
    dataset = narrowed(run, tmp_path / "dataset", "next_action")
    asked = ["evaluate.baselines=[base_model]", "evaluate.action_baselines=[]"]
    document = evaluate(load_recipe(run.recipe, asked), dataset, run.output / "encoder", None, tmp_path / "report")
    assert [system["name"] for system in document["systems"]] == ["base_model"]
    wanted = [
        one for one in run.metrics["below_constant"] if (one["task"], one["system"]) == ("next_action", "base_model")
    ]
    assert [one["constant"] for one in document["below_constant"]] == [one["constant"] for one in wanted] != []


@pytest.mark.parametrize("package", ["sklearn", "xgrammar"])
def test_a_missing_package_is_found_before_the_first_stage(run, monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    recipe = load_recipe(run.recipe, [f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r'pip install "recllm\[actions\]"'):
        stages.run(recipe)
    assert not (tmp_path / "run").exists()
    on_items = recipe.model_copy(update={"tasks": recipe.tasks[4:5]})  # next_item needs neither
    check_packages(on_items, [task.task for task in on_items.tasks], writes=True)


def test_scikit_learn_is_missed_before_anything_is_fitted(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    dataset = Dataset.open(run.output / "dataset")
    tasks = load_tasks(dataset, "test", 2, 0)
    recipe = load_recipe(run.recipe)
    with pytest.raises(UserError, match="boosted_trees needs scikit-learn"):
        ActionSystems(recipe, dataset, run.output / "encoder", tasks)
    others = load_recipe(run.recipe, ["evaluate.action_baselines=[constant]"])
    ActionSystems(others, dataset, run.output / "encoder", tasks)


def test_evaluate_alone_misses_xgrammar_before_any_long_work(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    monkeypatch.setattr("recllm.evaluate.evaluation.make_scorers", lambda *_: pytest.fail("baselines were made ready"))
    asked = load_recipe(run.recipe, ["evaluate.baselines=[base_model]"])
    with pytest.raises(UserError, match="next_event under a JSON schema needs xgrammar"):
        evaluate(asked, run.output / "dataset", run.output / "encoder", None, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_beams_that_are_narrower_than_what_is_looked_at_are_refused(run, tmp_path):
    recipe = load_recipe(run.recipe, ["evaluate.baselines=[base_model]", "evaluate.beam_width=4"])
    with pytest.raises(
        UserError, match=r"beam_width=4 finds 4 items at most, recall@5 by action of next_item looks at"
    ):
        evaluate(recipe, run.output / "dataset", run.output / "encoder", None, tmp_path / "report")
    dataset = Dataset.open(run.output / "dataset")
    tasks = load_tasks(dataset, "test", 2, 0)
    for fine in (["evaluate.beam_width=5"], ["evaluate.beam_width=4", "evaluate.exhaustive=true"]):
        check_beams(load_recipe(run.recipe, fine), dataset, tasks)


def test_observed_attributes_reach_the_baselines_from_the_dataset(run, tmp_path):
    from recllm.convert.pipeline import convert

    document = yaml.safe_load(run.recipe.read_text())
    document["actions"] |= {"observed": ["text"]}
    document["tasks"] = TASKS[:1]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    convert(recipe, tmp_path / "dataset", workers=1)
    dataset = Dataset.open(tmp_path / "dataset")
    made = ActionSystems(recipe, dataset, run.output / "encoder", load_tasks(dataset, "test", 12, 0))
    assert made.log is not None
    column, rows = made.log.observed["text"], pq.read_table(tmp_path / "dataset" / "sequences.parquet").to_pylist()
    texts = [text for row in rows for text in row["attribute:text"]]
    assert len(column) == len(texts)
    assert [place < 0 for place in column] == [text == "" for text in texts]
    assert len(set(column.tolist())) > 5
    described = {name: made._description(name) for name in ("markov", "sequence_encoder", "boosted_trees")}
    assert described["markov"].endswith("; it does not see text")
    assert described["sequence_encoder"].endswith("; it does not see text")
    assert "text" not in described["boosted_trees"]


def test_events_are_held_to_their_schema_and_free_ones_are_counted(run):
    rows = run.predictions("next_event", "ilora")
    assert len(rows) == 12
    begins = '{"action": "'
    assert all(row["text"].startswith(begins) for row in rows)
    words = {row["text"].removeprefix(begins).split('"')[0] for row in rows}
    assert all(any(full.startswith(part) for full in WORDS.values()) for part in words)
    free = run.systems("next_event")["ilora"]["generation"]
    assert free["num_examples"] == 12
    assert free["valid_ratio"]["value"] == 0  # a model with random weights
    assert run.systems("next_event")["ilora_uniform"]["generation"] is None
    for row in run.predictions("next_event", "markov"):
        assert row["valid"]
        assert json.loads(row["text"])["action"] == WORDS[row["predicted"]]


def test_answers_with_a_rationale_stand_behind_the_one_that_was_written(run):
    rows = run.predictions("next_action.2", "ilora")
    assert all(row["rationale"] is not None for row in rows)
    assert all(row["rationale"] is None for row in run.predictions("next_action", "ilora"))
    assert all(row["rationale"] is None for row in run.predictions("next_action.2", "markov"))
    with_reason, without = (run.systems(name)["ilora"]["metrics"] for name in ("next_action.2", "next_action"))
    assert with_reason["nats"] != without["nats"]
    assert 0 <= with_reason["rationale_finished"]["value"] <= 1
    completion = run.examples("test", "next_action.2")[0]["completion"][-1]["content"]
    assert completion.startswith("because of ")


def test_items_to_come_are_found_by_action(run):
    found = run.systems("next_item")
    for name in ("sasrec", "item_to_item", "popularity", "random"):
        otto = found[name]["otto"]
        assert otto["k"] == 5
        recalls = {label: one["value"] for label, one in otto["recall"].items()}
        assert recalls["search"] is None  # without items
        expected = sum(weight * recalls[label] for label, weight in {"view": 0.1, "cart": 0.3, "buy": 0.6}.items())
        assert otto["score"]["value"] == pytest.approx(expected)
        assert otto["possible"] == found["random"]["otto"]["possible"]
    assert found["ilora"]["otto"] is None
    assert any("no recall@5 by action of ilora" in note for note in run.metrics["notes"])
    assert "recall@5 cart" in run.printed


def test_the_report_opens_with_what_is_below_the_constant(run):
    below = run.metrics["below_constant"]
    assert below  # a model with random weights
    main = [one["system"] == "ilora" for one in below]
    assert main == sorted(main, reverse=True)  # main systems before others, of whichever task
    assert {one["system"] for one in below} == {"ilora", "base_model"}
    for one in below:
        constant, model = (run.systems(one["task"])[name]["metrics"] for name in ("constant", one["system"]))
        assert one["value"] == model[one["metric"]]["value"] < constant[one["metric"]]["value"]
    first = f"Below the constant answer: on {below[0]['task']}, ilora has an "
    assert (
        (run.output / "report" / "report.md").read_text(errors="replace").splitlines()[0].startswith(f"> ▼ **{first}")
    )
    page = (run.output / "report" / "report.html").read_text(errors="replace")
    body = page[page.index("<main>") :]
    assert body.index(first) < body.index("<header>")
    told = run.printed[run.printed.index(first.split(":")[0]) :]
    assert told.startswith(first)
    assert run.printed.index(first) < run.printed.index("next_action, split test")


def test_a_class_that_no_example_has_is_warned_of(run):
    supports = {one["label"]: one["support"] for one in run.systems("next_action")["ilora"]["classes"]["per_class"]}
    assert supports["search"] == 0  # only ever the first event of a session
    said = 'next_action: none of the 12 evaluated examples has the label "search"'
    assert f"note: {said}" in run.printed
    assert any(note.startswith(said) for note in run.metrics["notes"])
    assert run.systems("next_action")["ilora"]["metrics"]["macro_f1"]["value"] is not None


def test_a_second_run_is_up_to_date(run, capsys):
    assert main(["run", str(run.recipe)]) == 0
    assert capsys.readouterr().out.count("up to date") == len(stages.STAGES)


def test_two_reports_are_compared_by_sessions(run, tmp_path):
    """Baselines alone, of which the constant answer leads, against the whole run."""
    recipe = load_recipe(run.recipe, ["evaluate.baselines=[]", "evaluate.action_baselines=[constant]", "name=other"])
    recipe = recipe.model_copy(update={"tasks": recipe.tasks[:1]})
    folder = tmp_path / "report"
    dataset = narrowed(run, tmp_path / "dataset", "next_action")
    evaluate(recipe, dataset, run.output / "encoder", None, folder)
    text = compare([run.output / "report", folder])
    assert "next_action, exact_match: a - b, 95% interval over sessions" in text
    assert "12 of 12 and 12" in text


def narrowed(run: Run, folder: Path, task: str) -> Path:
    """The dataset with the examples of one task."""
    import shutil

    shutil.copytree(run.output / "dataset", folder)
    for part in folder.glob("*/part-*.parquet"):
        table = pq.read_table(part)
        kept = [name.startswith(f"{task}/") for name in table["example_id"].to_pylist()]
        pq.write_table(table.filter(kept), part)
    return folder


def test_an_action_that_the_log_does_not_have_is_refused(run):
    recipe = load_recipe(run.recipe, ["protocol.actions.otto_weights={clicks: 1.0}"])
    with pytest.raises(UserError, match=r'protocol\.actions names the action "clicks"'):
        check_protocol(recipe, Dataset.open(run.output / "dataset"))


def test_a_task_that_nothing_scores_is_refused(run, tmp_path):
    recipe = load_recipe(run.recipe, ["evaluate.baselines=[]", "evaluate.action_baselines=[]"])
    with pytest.raises(UserError, match=r"no system scores the task next_action: name evaluate\.action_b"):
        evaluate(recipe, run.output / "dataset", run.output / "encoder", None, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_task_that_no_named_baseline_answers_is_refused(run, tmp_path):
    dataset = narrowed(run, tmp_path / "dataset", "next_action")
    recipe = load_recipe(run.recipe, ["evaluate.baselines=[]", "evaluate.action_baselines=[item_most_frequent]"])
    with pytest.raises(UserError, match="no system scores the task next_action"):
        evaluate(recipe, dataset, run.output / "encoder", None, tmp_path / "report")


def test_a_language_model_finds_items_to_come_by_beams_as_by_every_title(run, tmp_path):
    dataset = narrowed(run, tmp_path / "dataset", "next_item")
    asked = ["evaluate.baselines=[base_model]", "evaluate.max_examples=4"]
    found = {}
    for way in ("exhaustive=true", f"beam_width={ITEMS}"):
        recipe = load_recipe(run.recipe, [*asked, f"evaluate.{way}"])
        document = evaluate(recipe, dataset, run.output / "encoder", None, tmp_path / way)
        (system,) = document["systems"]
        assert system["beam"] is None or (system["beam"]["exact"], system["beam"]["k"]) == (1, 5)
        found[way] = system["otto"]
    assert found["exhaustive=true"] == found[f"beam_width={ITEMS}"]
    assert found["exhaustive=true"]["possible"]["view"] > 0


def test_a_report_on_valid_has_no_temperatures(run, tmp_path):
    dataset = narrowed(run, tmp_path / "dataset", "next_action")
    asked = ["evaluate.split=valid", "evaluate.baselines=[]", "evaluate.action_baselines=[constant, markov]"]
    document = evaluate(load_recipe(run.recipe, asked), dataset, run.output / "encoder", None, tmp_path / "report")
    assert [system["calibration"] for system in document["systems"]] == [None, None]
    assert document["main_system"] == {"next_action": "constant"}
    assert document["below_constant"] == []


def test_a_log_without_items_has_an_empty_catalogue(run, tmp_path):
    """What is asked is about actions alone: convert, fit, train and report do without an item."""
    document = yaml.safe_load(run.recipe.read_text())
    rows = list(csv.DictReader((run.recipe.parent / "log.csv").open(encoding="utf-8")))
    with (tmp_path / "log.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "item_id"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    document |= {
        "output_dir": str(tmp_path / "run"),
        "data": {"interactions": {"path": str(tmp_path / "log.csv")}},
        "tasks": [TASKS[0], TASKS[1] | {"fields": {"text": "text"}}],
        "actions": document["actions"] | {"without_item": "*"},
        "train": document["train"] | {"max_steps": 2},
    }
    document["evaluate"] |= {"max_examples": 4}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    assert main(["run", str(recipe)]) == 0
    metrics = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
    assert metrics["counts"]["items"] == 0
    assert {"ilora", "base_model", "constant", "sasrec"} <= {system["name"] for system in metrics["systems"]}
    assert any(example["history"][-1] in WORDS.values() for example in metrics["examples"])
