"""The commands of multinode_zero2.yaml, run: two launchers that share a folder and an address, against one process.

A converted log enters; of each run an adapter, the launchers' exit codes, and what every rank reported leave. Each
"machine" is an `accelerate launch` of its own with one process; only scripts/train.py is replaced, by on_cpu.py, which
runs it on CPUs.
"""

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from recllm.data.dataset import Dataset

from . import on_cpu
from .conftest import recipe_of
from .test_distributed import CONFIGS, assert_same_losses, assert_same_weights, flat, logged, names, tensors

CONFIG = CONFIGS / "multinode_zero2.yaml"
STEPS = 6
PATIENCE_S = 60  # within which a machine must stop when the other has died


def documented_commands() -> list[list[str]]:
    """Of the first machine and of the second, as the file's header has them."""
    lines = [line.lstrip("# ") for line in CONFIG.read_text().splitlines() if line.startswith("#")]
    return [shlex.split(line) for line in lines if line.startswith("accelerate launch")]


def machine_commands(port: int, *arguments: Any) -> list[list[str]]:
    """The documented commands at this size and address; the recipe and its overrides are `arguments`."""
    options = ["--num_machines", "2", "--num_processes", "2", "--main_process_port", str(port)]
    found = []
    for command in documented_commands():
        script = command.index("scripts/train.py")
        assert command[script:] == ["scripts/train.py", "RECIPE"]
        launcher = [word.replace("ADDRESS", "127.0.0.1") for word in command[1:script]]
        accelerate = str(Path(sys.executable).with_name("accelerate"))
        found.append([accelerate, *launcher, *options, on_cpu.__file__, *map(str, arguments)])
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Runs:
    """Trainings of one recipe; each has an output_dir of its own, which all of its processes see."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.folder, self.dataset = folder, dataset

    def output(self, name: str) -> Path:
        """The folder of a run, which begins with the dataset alone; as it is if it is there."""
        if not (output := self.folder / name).exists():
            shutil.copytree(self.dataset, output / "dataset")
        return output

    def one_process(self, name: str) -> dict[str, Any]:
        command = [sys.executable, on_cpu.__file__, *self.arguments(name, rows=4)]
        return self.finish(name, [command])

    def two_machines(self, name: str, kill: str = "") -> dict[str, Any]:
        return self.finish(name, machine_commands(free_port(), *self.arguments(name, rows=2)), kill)

    def arguments(self, name: str, rows: int) -> list[str]:
        """Of the training script; `rows` of each process, so that a step has 8."""
        batch = f"train.per_device_train_batch_size={rows}"
        return [str(self.folder / "recipe.yaml"), f"output_dir={self.output(name)}", batch]

    def finish(self, name: str, commands: list[list[str]], kill: str = "") -> dict[str, Any]:
        """Run all commands to their ends.

        Returns `codes`: exit code of each; `ranks`: their reports; `log`: what they printed; `lag_s`: from the end of
        the first to the end of the last.
        """
        reports = self.folder / f"{name}-reports"
        shutil.rmtree(reports, ignore_errors=True)
        reports.mkdir()
        environment = on_cpu.environment() | {"RECLLM_TEST_REPORTS": str(reports), "RECLLM_TEST_KILL": kill}
        machines, ended = [], {}
        try:
            for number, command in enumerate(commands):
                with (reports / f"{number}.log").open("w") as log:
                    machines.append(subprocess.Popen(command, cwd=on_cpu.ROOT, env=environment, stdout=log, stderr=log))
            end = time.monotonic() + on_cpu.LIMIT_S
            while len(ended) < len(machines) and time.monotonic() < end:
                time.sleep(0.1)
                for number, machine in enumerate(machines):
                    if number not in ended and machine.poll() is not None:
                        ended[number] = time.monotonic()
        finally:
            for machine in machines:
                stop(machine)
        log = "\n".join(path.read_text() for path in sorted(reports.glob("*.log")))
        assert len(ended) == len(machines), f"still running after {on_cpu.LIMIT_S} s:\n{log[-8000:]}"
        ranks = [json.loads(path.read_text()) for path in sorted(reports.glob("*.json"))]
        lag = max(ended.values()) - min(ended.values())
        return {"codes": [machine.returncode for machine in machines], "ranks": ranks, "log": log, "lag_s": lag}


def stop(machine: subprocess.Popen) -> None:
    """A launcher takes its processes with it, if it is asked to end and not killed."""
    machine.terminate()
    try:
        machine.wait(timeout=20)
    except subprocess.TimeoutExpired:
        machine.kill()
        machine.wait()


@pytest.fixture(scope="module")
def runs(dataset: Dataset, log_folder: Path, tiny_model_folder: Path, tmp_path_factory) -> Runs:
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed, which `make test` installs")
    folder = tmp_path_factory.mktemp("machines")
    train = {
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
    }
    encoder = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "batch_size": 16, "max_epochs": 3, "dropout": 0.0}
    model = {"name_or_path": str(tiny_model_folder), "dtype": "float32"}
    recipe = recipe_of(log_folder, train=train, model=model, encoder=encoder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return Runs(folder, dataset.folder)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> dict[str, Any]:
    """Two machines, uninterrupted; the first one fits the encoder while the second one waits."""
    return runs.two_machines("whole")


def assert_trained_under_zero2(result: dict[str, Any]) -> None:
    """accelerate trains as DDP, silently, where it has no DeepSpeed: so by class, on every rank."""
    assert result["codes"] == [0, 0], result["log"][-8000:]
    assert [rank["engine"] for rank in result["ranks"]] == ["DeepSpeedEngine", "DeepSpeedEngine"]
    assert [rank["stage"] for rank in result["ranks"]] == [2, 2]


def copy_encoder(runs: Runs, name: str) -> None:
    """Of the run `whole`, with the record that says that it is up to date."""
    for part in ("encoder", "stages"):
        shutil.copytree(runs.output("whole") / part, runs.output(name) / part)


def test_the_header_has_a_command_for_each_machine():
    ranks = [command[command.index("--machine_rank") + 1] for command in documented_commands()]
    assert ranks == ["0", "1"]


def test_two_machines_train_to_the_losses_of_one_process(runs: Runs, whole: dict[str, Any]):
    assert_trained_under_zero2(whole)
    copy_encoder(runs, "single")
    single = runs.one_process("single")
    assert single["codes"] == [0], single["log"]
    assert single["ranks"][0]["engine"] == "PeftModelForCausalLM"
    assert "== encoder: up to date" in single["log"]
    # two accumulated batches are a step; what follows is read ahead, or checks the saved adapter
    first, second, alone = (flat(rank["rows"][: STEPS * 2]) for rank in [*whole["ranks"], *single["ranks"]])
    assert len(first) == len(second) == STEPS * 4
    assert not set(first) & set(second)
    assert sorted(first + second) == sorted(alone)
    adapter, expected = (runs.output(name) / "adapter" for name in ("whole", "single"))
    assert_same_losses(adapter, expected)
    assert [entry["loss"] for entry in logged(adapter)] == whole["ranks"][0]["losses"]
    assert_same_weights(adapter, expected, atol=2e-4)  # Adam turns rounding of tiny gradients into more
    assert {"gate.safetensors", "adapter_model.safetensors", "ilora.json", "items.parquet"} <= set(names(adapter))
    assert all(value.any() for value in gate_of(adapter).values())  # it was trained: it starts at zero


def gate_of(adapter: Path) -> dict[str, Any]:
    found = {name: value for name, value in tensors(adapter).items() if name.startswith("gate.safetensors:")}
    assert found
    return found


def test_a_killed_machine_stops_the_other_and_the_same_commands_go_on(runs: Runs, whole: dict[str, Any]):
    """Of a machine nothing is left that could say goodbye: first the second one is lost so, then the first one."""
    assert_trained_under_zero2(whole)
    copy_encoder(runs, "killed")
    output = runs.output("killed")
    for killed, step in [(1, 3), (0, 5)]:
        broken = runs.two_machines("killed", kill=f"{killed}:{step}")
        assert broken["codes"][killed] == -9, broken["log"][-8000:]
        assert broken["codes"][1 - killed] == 1, broken["log"][-8000:]
        assert broken["lag_s"] < PATIENCE_S
        assert not (output / "adapter").exists()
        assert (output / "checkpoints" / f"checkpoint-{step - 1}" / "checkpoint.json").is_file()
    assert re.search(r"going on from \S+checkpoint-2", broken["log"])
    resumed = runs.two_machines("killed")
    assert_trained_under_zero2(resumed)
    assert re.search(r"going on from \S+checkpoint-4", resumed["log"])
    assert len(resumed["ranks"][0]["losses"]) == STEPS - 4
    assert_same_losses(output / "adapter", runs.output("whole") / "adapter")
    assert_same_weights(output / "adapter", runs.output("whole") / "adapter", atol=1e-5)
