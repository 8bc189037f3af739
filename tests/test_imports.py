"""Imports run one way, and the light rooms stay light (ARCHITECTURE.md, "The house")."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "recllm"

# A room may import from rooms of a lower rank only; the same rank means: never from one another.
RANK = {
    "errors": 0, "files": 1, "schema": 1, "assets": 1, "cluster": 1, "recipe": 2,
    "data": 3, "graph": 4, "convert": 5, "model": 6, "train": 7, "infer": 7, "evaluate": 8, "serve": 8, "stages": 9,
    "cli": 10,
}  # fmt: skip
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "vllm", "deepspeed", "bitsandbytes", "trl", "ray",
         "fastapi", "httpx", "uvicorn", "prometheus_client"}  # fmt: skip


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def _imported_rooms(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            names |= {f"{node.module}.{alias.name}" if node.module == "recllm" else node.module for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("recllm.")}


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    room = _room(path)
    for imported in _imported_rooms(ast.parse(path.read_text())) - {room, "__version__"}:
        assert RANK[imported] < RANK[room], f"{room} imports {imported}: the data runs the other way"


def test_a_wrong_direction_would_be_seen() -> None:
    assert _imported_rooms(ast.parse("def f():\n    from recllm.train.trainer import X")) == {"train"}
    assert _imported_rooms(ast.parse("from recllm import stages\nimport recllm.infer.engine")) == {"stages", "infer"}


@pytest.mark.parametrize(
    "module",
    ["recllm", "recllm.cli", "recllm.stages", "recllm.recipe", "recllm.data.sequences", "recllm.data.dataset",
     "recllm.graph.build", "recllm.convert.pipeline", "recllm.evaluate.finance", "recllm.evaluate.metrics",
     "recllm.evaluate.statistics", "recllm.evaluate.action_figures", "recllm.evaluate.action_systems",
     "recllm.evaluate.calibration", "recllm.evaluate.next_events"],
)  # fmt: skip
def test_light_modules_do_not_load_heavy_packages(module: str) -> None:
    code = f"import sys, {module}; print(' '.join(sorted({HEAVY!r} & set(sys.modules))))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.split() == []


def test_load_adapter_is_there_without_being_loaded() -> None:
    import recllm

    assert "load_adapter" in dir(recllm)
    from recllm.model.adapter import load_adapter

    assert recllm.load_adapter is load_adapter
    with pytest.raises(AttributeError, match="no attribute 'laod_adapter'"):
        recllm.laod_adapter  # noqa: B018


def test_every_package_is_in_the_wheel() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert on_disk <= set(listed)
