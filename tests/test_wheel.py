"""An installed wheel runs a recipe by its shipped name, away from any checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source") / "recllm"
    # a copy: setuptools leaves a build/ behind, and would pack what an older one still holds
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_all_shipped_folders(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("recipes", "prompts", "eval", "accelerate_configs"):
        for path in (ROOT / kind).rglob("*.yaml"):
            assert f"recllm/shipped/{kind}/{path.relative_to(ROOT / kind)}" in names


def test_a_shipped_recipe_runs_from_the_installed_wheel(wheel: Path, tmp_path: Path, tiny_recipe: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    data = tiny_recipe.parent
    import yaml

    model = yaml.safe_load(tiny_recipe.read_text())["model"]["name_or_path"]
    overrides = [
        f"data.interactions.path={data}/interactions.csv",
        f"data.items={{path: {data}/items.csv}}",
        "prompt={max_items: 4}",
        "filter={}",
        "encoder.max_epochs=2",
        f"model={{name_or_path: {model}, dtype: float32}}",
        "adapter={r: 4, num_experts: 2}",
        "train={max_steps: 2, per_device_train_batch_size: 4, report_to: none}",
        "evaluate={max_examples: 6}",
    ]
    code = "import recllm, sys; assert 'site' in recllm.__file__, recllm.__file__\n"
    code += "from recllm.cli import main; sys.exit(main())"
    # -P and PYTHONPATH: the installed copy, not this checkout's editable install
    run = subprocess.run(
        [sys.executable, "-P", "-c", code, "run", "movielens/next_item_ilora", *overrides],
        cwd=elsewhere, env={"PATH": "", "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (elsewhere / "runs" / "quickstart" / "report" / "report.html").is_file()
