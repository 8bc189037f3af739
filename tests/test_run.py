"""The whole line on a tiny model: real processes, real files; what is unchanged is skipped."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from recllm import stages
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


def test_plain_lora_runs_the_same_line(tiny_recipe) -> None:
    _edit(tiny_recipe, adapter={"method": "lora", "r": 4})
    assert main(["run", str(tiny_recipe)]) == 0
    run = load_recipe(tiny_recipe).output
    assert not (run / "adapter" / "gate.safetensors").exists()
    systems = {system["name"] for system in json.loads((run / "report" / "metrics.json").read_text())["systems"]}
    assert {"random", "popularity", "item_to_item", "sasrec"} <= systems


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
