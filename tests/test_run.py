"""The whole line on a tiny model: real processes, real files; what is unchanged is skipped."""

import datetime
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from recllm import assets, stages
from recllm.cli import main
from recllm.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent


def _edit(recipe: Path, **changes: object) -> None:
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | changes))


def test_run_goes_from_the_log_to_the_report_and_skips_what_has_not_changed(tiny_recipe, capsys) -> None:
    assert main(["run", str(tiny_recipe)]) == 0
    first = capsys.readouterr().out
    run = load_recipe(tiny_recipe).output
    for name in ("dataset/manifest.json", "encoder", "adapter/gate.safetensors", "report/report.html"):
        assert (run / name).exists(), name
    assert "report.html" in first

    assert main(["run", str(tiny_recipe)]) == 0
    assert capsys.readouterr().out.count("up to date") == len(stages.STAGES)

    _edit(tiny_recipe, evaluate={"max_examples": 6, "batch_size": 4})
    assert main(["run", str(tiny_recipe)]) == 0
    assert capsys.readouterr().out.count("up to date") == len(stages.STAGES) - 1

    log = tiny_recipe.parent / "interactions.csv"
    log.write_text(log.read_text() + "u0,i3,99999\n")
    assert main(["run", str(tiny_recipe)]) == 0
    assert capsys.readouterr().out.count("up to date") == 0


def test_an_output_that_somebody_emptied_is_made_again(tiny_recipe, capsys) -> None:
    recipe = load_recipe(tiny_recipe)
    assert stages.run_stage(recipe, "convert")
    assert not stages.run_stage(recipe, "convert")
    next((recipe.output / "dataset" / "train").iterdir()).unlink()
    assert stages.run_stage(recipe, "convert")


def test_a_file_that_somebody_added_to_an_output_stays(tiny_recipe) -> None:
    recipe = load_recipe(tiny_recipe)
    stages.run_stage(recipe, "convert")
    (recipe.output / "dataset" / "notes.md").write_text("mine")
    assert not stages.run_stage(recipe, "convert")


def test_a_broken_record_makes_a_stage_run_again(tiny_recipe) -> None:
    recipe = load_recipe(tiny_recipe)
    stages.run_stage(recipe, "convert")
    (recipe.output / "stages" / "convert.json").write_text("[]")
    assert stages.run_stage(recipe, "convert")


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("filter.user_core=2", {"convert"}),
        ("prompt.max_items=3", {"convert", "train"}),
        ("protocol.candidates.count=10", {"convert", "evaluate"}),
        ("protocol.bootstrap.samples=500", {"evaluate"}),
        ("protocol.ranking.exclude_history=false", {"encoder", "evaluate"}),
        ("encoder.hidden_size=4", {"encoder"}),
        ("encoder.joint_learning_rate=1e-3", {"train"}),
        ("adapter.r=2", {"train"}),
        ("train.max_steps=2", {"train"}),
        ("evaluate.batch_size=2", {"evaluate"}),
        ("evaluate.replicas=2", set()),  # the numbers are the same
        ("seed=1", {"convert", "encoder", "train", "evaluate"}),
        ("description=other", set()),
    ],
)
def test_a_fingerprint_changes_with_what_the_stage_reads(tiny_recipe, monkeypatch, override: str, changed: set) -> None:
    fixed = tiny_recipe.parent / "fixed"  # outputs of earlier stages, the same for both recipes
    for folder in stages.OUTPUTS.values():
        (fixed / folder).mkdir(parents=True)
    (fixed / "dataset" / "manifest.json").write_text("{}")
    monkeypatch.setattr(stages, "require", lambda recipe, stage: fixed / stages.OUTPUTS[stage])
    always = ["evaluate.engine=ray-vllm"]  # replicas are of it alone
    before, after = load_recipe(tiny_recipe, always), load_recipe(tiny_recipe, [*always, override])
    differing = {name for name in stages.STAGES if stages.fingerprint(before, name) != stages.fingerprint(after, name)}
    assert differing == changed


def test_a_fingerprint_changes_with_template_tokens_and_base_model(tiny_recipe, tiny_model_folder) -> None:
    template = tiny_recipe.parent / "films.yaml"
    template.write_text(assets.find("prompts", "next_item/films").read_text())
    _edit(tiny_recipe, tasks=[{"task": "next_item", "template": str(template), "dense_window": 4}])
    first = stages.fingerprint(load_recipe(tiny_recipe), "convert")
    template.write_text(template.read_text() + "\n")
    second = stages.fingerprint(load_recipe(tiny_recipe), "convert")
    model = tiny_recipe.parent / "model"
    shutil.copytree(tiny_model_folder, model)
    _edit(tiny_recipe, model={"name_or_path": str(model), "dtype": "float32"})
    assert stages.fingerprint(load_recipe(tiny_recipe), "convert") == second
    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|endoftext|>", "<|other|>"))
    third = stages.fingerprint(load_recipe(tiny_recipe), "convert")
    assert len({first, second, third}) == 3


def test_overrides_may_stand_around_options(tiny_recipe, capsys) -> None:
    order = ["convert", str(tiny_recipe), "prompt.max_items=3", "--workers", "1", "filter.user_core=2"]
    assert main(order) == 0
    manifest = json.loads((load_recipe(tiny_recipe).output / "dataset" / "manifest.json").read_text())
    assert (manifest["recipe"]["prompt"]["max_items"], manifest["recipe"]["filter"]["user_core"]) == (3, 2)
    with pytest.raises(SystemExit):
        main(["convert", str(tiny_recipe), "--unknown", "a=1"])


def test_a_full_disk_is_said_in_one_line(tiny_recipe, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stages, "run", full)
    assert main(["run", str(tiny_recipe)]) == 2
    assert "the disk is full" in capsys.readouterr().err


def test_plain_lora_runs_the_same_line(tiny_recipe) -> None:
    _edit(tiny_recipe, adapter={"method": "lora", "r": 4})
    assert main(["run", str(tiny_recipe)]) == 0
    run = load_recipe(tiny_recipe).output
    assert not (run / "adapter" / "gate.safetensors").exists()
    systems = {system["name"] for system in json.loads((run / "report" / "metrics.json").read_text())["systems"]}
    assert {"random", "popularity", "item_to_item", "sasrec"} <= systems


def test_several_tasks_go_down_one_line(tiny_recipe) -> None:
    log = tiny_recipe.parent / "interactions.csv"
    header, *rows = log.read_text().splitlines()
    rated = [f"{row},{1 + 2 * (number % 3)}" for number, row in enumerate(rows)]
    log.write_text("\n".join([f"{header},rating", *rated]) + "\n")
    _edit(
        tiny_recipe,
        filter={"like_at": 4},
        tasks=[
            {"task": "next_item", "template": "next_item/items"},
            {"task": "next_item_among", "template": "next_item_among/items", "max_train_targets": 2},
            {"task": "like", "template": "like/items", "max_train_targets": 2},
        ],
        protocol={"name": "few", "candidates": {"count": 5}, "split": {"min_history": 3}},
    )
    assert main(["run", str(tiny_recipe)]) == 0
    metrics = json.loads((load_recipe(tiny_recipe).output / "report" / "metrics.json").read_text())
    assert metrics["tasks"] == ["next_item", "next_item_among", "like"]
    found = {(system["task"], system["name"]): system["metrics"] for system in metrics["systems"]}
    for name in ("ilora", "ilora_uniform", "base_model", "constant", "user_most_frequent"):
        assert 0 <= found["like", name]["accuracy"]["value"] <= 1
    for task in ("next_item", "next_item_among"):
        assert {"ilora", "random", "popularity", "sasrec"} <= {name for of, name in found if of == task}


def test_every_example_is_scored_by_every_system_on_the_frozen_candidates(tiny_recipe) -> None:
    assert main(["run", str(tiny_recipe)]) == 0
    recipe = load_recipe(tiny_recipe)
    predictions = pq.read_table(recipe.output / "report" / "predictions.parquet").to_pylist()
    by_system: dict[str, set[str]] = {}
    for row in predictions:
        by_system.setdefault(row["system"], set()).add(row["example_id"])
        assert 1 <= row["rank"] <= recipe.protocol.candidates.count
        assert len(row["scores"]) == recipe.protocol.candidates.count
    assert len({frozenset(examples) for examples in by_system.values()}) == 1
    assert {len(examples) for examples in by_system.values()} == {12}


def test_a_stage_without_its_input_says_which_command_makes_it(tiny_recipe, capsys) -> None:
    assert main(["train", str(tiny_recipe)]) == 2
    assert "run `recllm convert`" in capsys.readouterr().err
    assert main(["evaluate", str(tiny_recipe)]) == 2


def test_preview_writes_nothing(tiny_recipe, capsys) -> None:
    before = set(tiny_recipe.parent.rglob("*"))
    assert main(["convert", str(tiny_recipe), "--preview", "2"]) == 0
    assert "tokens" in capsys.readouterr().out
    assert set(tiny_recipe.parent.rglob("*")) == before


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['recllm', '--help']\n"
    code += "from recllm.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'numpy', 'polars', 'pyarrow', 'pydantic', 'torch', 'transformers'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "convert" in shown
    assert shown.strip().endswith("[]")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "nowhere"],
        ["run", "movielens/next_item_ilora", "evl=1"],
        ["run", "movielens/next_item_ilora", "data.interactions.path=nowhere.inter"],
        ["compare", "nowhere/report", "nowhere/else"],
    ],
)
def test_an_error_of_the_user_is_one_line_and_status_2(arguments: list[str], capsys) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("recllm: ")
    assert "Traceback" not in shown


@pytest.mark.parametrize(("is_main", "expected"), [(True, ["encoder", "wait", "train"]), (False, ["wait", "train"])])
def test_one_process_of_a_launch_decides_about_the_encoder(monkeypatch, tiny_recipe, is_main, expected):
    """On another machine the base model's files have other times: it would fit the shared encoder again."""
    seen = []
    state = SimpleNamespace(is_main_process=is_main, wait_for_everyone=lambda: seen.append("wait"))
    monkeypatch.setattr("accelerate.PartialState", lambda **_: state)
    monkeypatch.setattr(stages, "run_stage", lambda _, name, **__: seen.append(name))
    stages.fine_tune(load_recipe(str(tiny_recipe)))
    assert seen == expected


@pytest.mark.parametrize(("ddp_timeout", "hours"), [(None, 24), (60, 24), (100 * 3600, 100)])
def test_the_limit_of_training_does_not_cut_short_the_wait_for_the_encoder(
    monkeypatch, tiny_recipe, ddp_timeout, hours
):
    waits = []

    def state(timeout: datetime.timedelta, **_: Any) -> SimpleNamespace:
        waits.append(timeout)
        return SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None)

    monkeypatch.setattr("accelerate.PartialState", state)
    monkeypatch.setattr(stages, "run_stage", lambda *_, **__: None)
    override = [] if ddp_timeout is None else [f"train.ddp_timeout={ddp_timeout}"]
    stages.fine_tune(load_recipe(str(tiny_recipe), override))
    assert waits == [datetime.timedelta(hours=hours)]


def test_whoever_reads_the_output_may_stop_reading() -> None:
    command = [sys.executable, "-c", "import sys; from recllm.cli import main; sys.exit(main(['list']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.close()  # before it has written
        said = process.communicate()[1]
    assert (process.returncode, said) == (1, "")
