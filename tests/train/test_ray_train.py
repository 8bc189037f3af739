"""scripts/cluster/ray_train.py on a Ray of this machine: two workers on CPUs, one of which is killed in the middle."""

import importlib.util
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from recllm import stages
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.recipe import load_recipe
from recllm.stages import fine_tune

from . import on_cpu
from .conftest import recipe_of
from .test_distributed import assert_same_losses, assert_same_weights, logged

pytest.importorskip("ray", reason="needs the extra ray, which `make test` installs")
SCRIPT = on_cpu.ROOT / "scripts" / "cluster" / "ray_train.py"
STEPS = 40


@pytest.fixture(scope="module")
def ray_train(monkeypatch_module: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, and a Ray of two cores that it finds itself connected to."""
    import ray

    for name, value in on_cpu.ENVIRONMENT.items():
        monkeypatch_module.setenv(name, value)
    monkeypatch_module.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch_module.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    spec = importlib.util.spec_from_file_location("ray_train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.work.__module__ = "__main__"  # as when it is started: Ray then sends the function itself
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield module
    ray.shutdown()


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def recipe_path(dataset: Dataset, log_folder: Path, tiny_model_folder: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ray-train")
    encoder = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "batch_size": 16, "max_epochs": 1, "dropout": 0.0}
    train = {"max_steps": STEPS, "learning_rate": 0.01, "logging_steps": 1, "save_steps": 4, "report_to": "none"}
    model = {"name_or_path": str(tiny_model_folder), "dtype": "float32"}
    recipe = recipe_of(log_folder, train=train, model=model, encoder=encoder, output_dir=str(folder / "ray"))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    for name in ("ray", "single"):
        shutil.copytree(dataset.folder, folder / name / "dataset")
    return folder / "recipe.yaml"


def kill_one_after(checkpoint: Path, killed: list[int]) -> None:
    """SIGKILL for one of the two workers, which are processes below this one, as soon as there is a checkpoint."""
    psutil = pytest.importorskip("psutil")
    end = time.monotonic() + on_cpu.LIMIT_S
    while not checkpoint.exists() and time.monotonic() < end:
        time.sleep(0.01)
    below = psutil.Process().children(recursive=True)
    workers = [one.pid for one in below if "TrainWorker" in (one.cmdline() or [""])[0]]
    if len(workers) == 2:
        os.kill(workers[1], signal.SIGKILL)
        killed.append(workers[1])


def test_two_workers_train_as_one_process_though_one_of_them_is_killed(ray_train: ModuleType, recipe_path: Path):
    output, alone, killed = recipe_path.parent / "ray", recipe_path.parent / "single", list[int]()
    checkpoint = output / "checkpoints" / "checkpoint-4" / "checkpoint.json"
    killer = threading.Thread(target=kill_one_after, args=(checkpoint, killed))
    killer.start()
    code = ray_train.main([str(recipe_path), "train.per_device_train_batch_size=4", "--workers", "2", "--cpu"])
    killer.join()
    said = (output / "logs" / "worker-0.txt").read_text()
    assert code == 0, said[-8000:]
    assert killed
    assert re.search(r"going on from \S+checkpoint-\d+", said), said[-8000:]
    for part in ("encoder", "stages"):
        shutil.copytree(output / part, alone / part)
    single = ["train.use_cpu=true", "train.per_device_train_batch_size=8", f"output_dir={alone}"]
    fine_tune(load_recipe(recipe_path, single))
    assert len(logged(output / "adapter")) == STEPS
    assert_same_losses(output / "adapter", alone / "adapter")
    assert_same_weights(output / "adapter", alone / "adapter", atol=2e-3)  # Adam turns rounding into more, in 40 steps


def test_what_is_refused_is_said(ray_train: ModuleType, recipe_path: Path, capfd: pytest.CaptureFixture[str]):
    wrong = [str(recipe_path), "train.learning_rat=0.1", "--workers", "1", "--cpu", "--retries", "0"]
    assert ray_train.main(wrong) == 1
    assert re.search(r"^recllm: train.learning_rat: .*did you mean \"learning_rate\"", capfd.readouterr().err, re.M)
    assert ray_train.main([str(recipe_path), "--workers", "3", "--cpu"]) == 1
    assert "3 workers need a CPU each, the Ray cluster has 2: lower --workers" in capfd.readouterr().err
    assert ray_train.main([str(recipe_path), "--workers", "1"]) == 1
    assert "1 workers need a GPU each, the Ray cluster has 0" in capfd.readouterr().err


def test_the_cause_is_told_and_not_what_others_missed(ray_train: ModuleType):
    from ray.exceptions import RayActorError
    from ray.train import WorkerGroupError

    lost, refused = UserError("process 0 of 2 lost another one, and stops"), UserError("train.learning_rate=-1")
    memory, died = RuntimeError("CUDA out of memory"), RayActorError()

    def told(*failures: Exception) -> Exception:
        error = WorkerGroupError("all of it", dict(enumerate(failures)))
        found = ray_train._first_cause(error)
        return memory if found is error else found

    assert told(lost, refused) is refused
    assert told(lost, memory) is memory  # what Ray tells has it
    assert told(lost, died) is told(died, lost) is lost


def test_workers_that_find_no_place_are_an_error(ray_train, recipe_path, monkeypatch, capfd):
    import ray

    @ray.remote(num_cpus=2)
    class Other:
        def hold(self) -> None:
            pass

    other = Other.remote()
    ray.get(other.hold.remote())
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "0.5")
    monkeypatch.setattr(ray_train, "PATIENCE_S", 1.0)
    assert ray_train.main([str(recipe_path), "--workers", "2", "--cpu"]) == 1
    said = capfd.readouterr().err
    assert re.search(r"^recllm: Ray Train has no 2 workers that run \(.*startup timed out after 0\.5 s", said, re.M)
    ray.kill(other)


def test_workers_wait_for_the_encoder_as_long_as_those_of_other_launches(ray_train, recipe_path, monkeypatch):
    """Ray joins them before recllm.stages can ask for more than Ray's own half an hour."""
    import ray.train.torch

    made = {}

    class Trainer:
        def __init__(self, _: Any, **options: Any) -> None:
            made.update(options)

        def fit(self) -> None:
            pass

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    ray_train.train(load_recipe(recipe_path, ["train.use_cpu=true"]), 2, use_gpu=False)
    assert made["torch_config"].timeout_s == stages.FIT_S == 24 * 3600
    assert made["run_config"].failure_config.controller_failure_limit == 60
