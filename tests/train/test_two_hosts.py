"""Two hosts, a rank each: network namespaces with addresses of their own, against one process.

A converted log enters; of each run an adapter, exit codes, and what every rank reported leave. Where there can be no
namespaces both "hosts" are this machine, and what is about the network is skipped.

Most runs are forked by a server in each host (on_cpu.py), which imports once. The commands in the header of a file of
accelerate_configs run as they stand, with real launchers; only scripts/train.py is replaced, by on_cpu.py.
"""

import datetime
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.recipe import EncoderSection
from recllm.train import engines
from recllm.train.encoder import fit_encoder

from . import on_cpu
from .conftest import recipe_of
from .hosts import Host, Hosts, machine, reason_against
from .on_cpu import Worlds, free_port
from .test_distributed import CONFIGS, assert_same_losses, assert_same_weights, flat, logged, names, tensors

ENGINES = {"multinode_ddp": ("DistributedDataParallel", None), "multinode_zero2": ("DeepSpeedEngine", 2)}
STEPS = 6
TIMEOUT_S = 8  # train.ddp_timeout: how long a host waits for one that says nothing
PATIENCE_S = 60  # within which a host must stop when the other has died
LOST = r"process {rank} of 2 lost another one, and stops"


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed, which `make test` installs")
    if reason_against():
        yield [Host.here(), Host.here()]
        return
    with Hosts() as hosts:
        yield hosts


@pytest.fixture
def networks(hosts: list[Host]) -> list[Host]:
    """The hosts, where each has a network of its own."""
    if reason := reason_against():
        pytest.skip(reason)
    return hosts


class Runs:
    """Trainings of one recipe; hosts see the same folders."""

    def __init__(self, hosts: list[Host], worlds: list[Worlds], folder: Path, job: dict[str, Any]) -> None:
        self.hosts, self.worlds, self.folder, self.job = hosts, worlds, folder, job
        self.kept: dict[str, tuple[dict[str, Any], Path]] = {}

    def one_process(self) -> tuple[dict[str, Any], Path]:
        """The result and the adapter's folder; run once."""
        if "single" not in self.kept:
            output = self.folder / "single" / "adapter"
            job = self.job | {"config": "single.yaml", "output": output, "overrides": [rows(4)]}
            self.kept["single"] = (self.worlds[0].run(**job), output)
        return self.kept["single"]

    def uninterrupted(self, config: str) -> tuple[dict[str, Any], Path]:
        """Of both hosts; run once an engine."""
        if config not in self.kept:
            output = self.folder / config / "adapter"
            self.kept[config] = (self.both(config, output), output)
        return self.kept[config]

    def both(self, config: str, output: Path, *overrides: str, **options: Any) -> dict[str, Any]:
        """Both at once: `codes`, `ranks` and `logs` of each; `lag_s`: from the end of the one to that of the other."""
        port = free_port()
        job = self.job | {"config": f"{config}.yaml", "output": output, "overrides": [rows(2), *overrides]} | options
        for number, world in enumerate(self.worlds):
            world.start(**job, machine=machine(self.hosts, number, port))
        found = [world.finish() for world in self.worlds]
        return {
            "codes": [code for result in found for code in result["codes"]],
            "ranks": [rank for result in found for rank in result["ranks"]],
            "logs": [result["log"] for result in found],
            "lag_s": abs(found[0]["ended_s"] - found[1]["ended_s"]),
        }


def rows(count: int) -> str:
    """Of each process, so that a step of two accumulated batches has 8."""
    return f"train.per_device_train_batch_size={count}"


@pytest.fixture(scope="module")
def runs(hosts: list[Host], dataset: Dataset, log_folder: Path, tiny_model_folder: Path, tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("hosts")
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as launched runs fit theirs: sums of other threads end in other digits
    try:
        fit_encoder(dataset, EncoderSection(**encoder), 12, 0, folder / "encoder")
    finally:
        torch.set_num_threads(threads)
    job = {"recipe": folder / "recipe.yaml", "dataset": dataset.folder, "encoder": folder / "encoder"}
    with ExitStack() as stack:
        worlds = [stack.enter_context(Worlds(host.prefix, **host.environment)) for host in hosts]
        yield Runs(hosts, worlds, folder, job)


def assert_engine(result: dict[str, Any], config: str) -> None:
    """accelerate trains as DDP, silently, where it has no DeepSpeed: so by class, on every rank."""
    assert result["codes"] == [0, 0], "\n".join(result["logs"])
    assert [(rank["engine"], rank.get("stage")) for rank in result["ranks"]] == [ENGINES[config]] * 2


def test_each_host_has_a_network_of_its_own(networks: list[Host]):
    """Else the tests below would say nothing about addresses: the other's port is reached by its address alone."""
    serve = "import socket; s = socket.create_server(('', 5000)); print('up', flush=True); s.accept(); s.accept()"
    reach = "import socket, sys; socket.create_connection((sys.argv[1], 5000), 5)"
    first, second = networks
    with subprocess.Popen([*first.prefix, sys.executable, "-c", serve], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"up\n"
            assert first.run(sys.executable, "-c", reach, "127.0.0.1").returncode == 0
            assert "refused" in second.run(sys.executable, "-c", reach, "127.0.0.1").stderr
            assert second.run(sys.executable, "-c", reach, first.address).returncode == 0
        finally:
            server.kill()


@pytest.mark.parametrize("config", ENGINES)
def test_two_hosts_train_to_the_losses_of_one_process(runs: Runs, config: str):
    single, expected = runs.one_process()
    assert single["codes"] == [0], single["log"]
    assert single["ranks"][0]["engine"] == "PeftModelForCausalLM"
    result, adapter = runs.uninterrupted(config)
    assert_engine(result, config)
    # two accumulated batches are a step; what follows is read ahead, or checks the saved adapter
    first, second, alone = (flat(rank["rows"][: STEPS * 2]) for rank in [*result["ranks"], *single["ranks"]])
    assert len(first) == len(second) == STEPS * 4
    assert not set(first) & set(second)
    assert sorted(first + second) == sorted(alone)
    assert_same_losses(adapter, expected)
    assert [entry["loss"] for entry in logged(adapter)] == result["ranks"][0]["losses"]
    assert_same_weights(adapter, expected, atol=2e-4)  # Adam turns rounding of tiny gradients into more
    assert {"gate.safetensors", "adapter_model.safetensors", "ilora.json", "items.parquet"} <= set(names(adapter))
    gates = [value for name, value in tensors(adapter).items() if name.startswith("gate.safetensors:")]
    assert gates
    assert all(value.any() for value in gates)  # it was trained: it starts at zero


@pytest.mark.parametrize("config", ENGINES)
def test_a_host_that_dies_is_told_of_and_the_restart_ends_with_the_same_weights(runs: Runs, config: str):
    """First the second host is lost, by SIGKILL, then the first one, behind whose address the ranks meet."""
    _, whole = runs.uninterrupted(config)
    output = runs.folder / f"{config}-killed" / "adapter"
    for killed, step in [(1, 3), (0, 5)]:
        broken = runs.both(config, output, kill_rank=killed, kill_at=step)
        assert broken["codes"][killed] == -signal.SIGKILL
        assert broken["codes"][1 - killed] == 1
        assert re.search(LOST.format(rank=1 - killed), broken["logs"][1 - killed]), broken["logs"][1 - killed]
        assert "the run goes on from its last checkpoint" in broken["logs"][1 - killed]
        assert broken["lag_s"] < TIMEOUT_S
        assert not output.exists()
        assert (output.parent / "checkpoints" / f"checkpoint-{step - 1}" / "checkpoint.json").is_file()
    resumed = runs.both(config, output)
    assert_engine(resumed, config)
    assert re.search(r"going on from \S+checkpoint-4", resumed["logs"][0])
    assert len(resumed["ranks"][0]["losses"]) == STEPS - 4
    assert_same_losses(output, whole)
    assert_same_weights(output, whole, atol=1e-5)


@pytest.mark.parametrize("config", ENGINES)
def test_a_network_that_falls_silent_is_told_of_within_the_timeout(runs: Runs, networks: list[Host], config: str):
    """A pulled plug closes no connection: nothing but the timeout ends the wait."""
    output = runs.folder / f"{config}-silent" / "adapter"
    started = time.monotonic()
    try:
        patience = f"train.ddp_timeout={TIMEOUT_S}"
        result = runs.both(config, output, patience, command_at=[3, *networks[0].cut()])
    finally:
        networks[0].mend()
    assert result["codes"] == [1, 1]
    for rank, log in enumerate(result["logs"]):
        assert re.search(LOST.format(rank=rank), log), log[-4000:]
    assert time.monotonic() - started < TIMEOUT_S + PATIENCE_S
    assert (output.parent / "checkpoints" / "checkpoint-2" / "checkpoint.json").is_file()


def test_a_launch_that_waited_for_days_does_not_wait_so_long_in_training(tmp_path: Path):
    """`recllm train` begins so, for the ranks that wait until the first one has fitted the encoder."""
    days, limit = datetime.timedelta(days=2), datetime.timedelta(seconds=1800)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'met'}", timeout=days, rank=0, world_size=1)
    try:
        groups = [torch.distributed.group.WORLD, torch.distributed.new_group([0], timeout=days)]
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        assert [backend.options._timeout for backend in backends] == [days, days]
        engines.limit_waiting(limit)
        assert [backend.options._timeout for backend in backends] == [limit, limit]
    finally:
        torch.distributed.destroy_process_group()


NCCL = "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:93, {}, NCCL version 2.27.5\n{}\nLast error:\n{}"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (RuntimeError, "CUDA out of memory"),
        (RuntimeError, "shapes cannot be multiplied"),
        (torch.distributed.DistNetworkError, "address already in use"),
        (
            torch.distributed.DistBackendError,
            NCCL.format(
                "invalid usage (run with NCCL_DEBUG=WARN for details)",
                "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
                "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000",
            ),
        ),
        (
            torch.distributed.DistBackendError,
            NCCL.format(
                "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
                "ncclUnhandledCudaError: Call to CUDA function failed.",
                "Cuda failure 2 'out of memory'",
            ),
        ),
        (
            RuntimeError,
            "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] "
            "op.preamble.length <= op.nbytes. 24 vs 8",
        ),
    ],
)
def test_errors_of_our_own_stay_what_they_are(monkeypatch: pytest.MonkeyPatch, kind: type[RuntimeError], text: str):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=re.escape(text)) as raised, engines.telling_of_lost_processes():
        raise kind(text)
    assert raised.type is kind
    monkeypatch.setenv("WORLD_SIZE", "1")  # nobody is there who could be lost
    with pytest.raises(RuntimeError, match="Connection closed"), engines.telling_of_lost_processes():
        raise RuntimeError("Connection closed by peer")


def test_what_nccl_said_last_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = NCCL.format("unhandled system error", "ncclSystemError: System call failed.", "Bootstrap : no interface")
    frames = "\nException raised from f at NCCLUtils.cpp:93 (most recent call first):\nframe #0: c10::Error"
    with pytest.raises(UserError, match=LOST.format(rank=0)) as raised, engines.telling_of_lost_processes():
        raise torch.distributed.DistBackendError(text + frames)
    assert "ncclSystemError: System call failed. Last error: Bootstrap : no interface)" in str(raised.value)


# ---- the commands in the headers ----


def documented_commands(config: str) -> list[list[str]]:
    """Of the first machine and of the second, as the file's header has them."""
    lines = [line.removeprefix("#").strip() for line in (CONFIGS / f"{config}.yaml").read_text().splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("accelerate launch")]


def launch(runs: Runs, config: str, output: Path, reports: Path, kill: str = "") -> dict[str, Any]:
    """The documented commands at this size and address, each in its host, run to their ends."""
    arguments = [str(runs.job["recipe"]), f"output_dir={output}", rows(2)]
    options = ["--num_machines", "2", "--num_processes", "2", "--main_process_port", free_port()]
    environment = on_cpu.environment() | {"RECLLM_TEST_REPORTS": str(reports), "RECLLM_TEST_KILL": kill}
    reports.mkdir()
    machines: list[subprocess.Popen] = []
    try:
        for number, (command, host) in enumerate(zip(documented_commands(config), runs.hosts, strict=True)):
            script = command.index("scripts/train.py")
            assert command[script:] == ["scripts/train.py", "RECIPE"]
            launcher = [word.replace("ADDRESS", runs.hosts[0].address) for word in command[1:script]]
            accelerate = str(Path(sys.executable).with_name("accelerate"))
            words = [*host.prefix, accelerate, *launcher, *options, on_cpu.__file__, *arguments]
            with (reports / f"{number}.log").open("w") as log:
                own = environment | host.environment
                machines.append(subprocess.Popen(words, cwd=on_cpu.ROOT, env=own, stdout=log, stderr=log))
        end = time.monotonic() + on_cpu.LIMIT_S
        while any(one.poll() is None for one in machines) and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        for one in machines:
            stop(one)
    ranks = [json.loads(path.read_text()) for path in sorted(reports.glob("*.json"))]
    logs = [path.read_text() for path in sorted(reports.glob("*.log"))]
    return {"codes": [one.returncode for one in machines], "ranks": ranks, "logs": logs}


def stop(process: subprocess.Popen) -> None:
    """A launcher takes its processes with it, if it is asked to end and not killed."""
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.mark.parametrize("config", [*ENGINES, "multinode_zero3"])
def test_the_header_has_a_command_for_each_machine(config: str):
    commands = documented_commands(config)
    assert [command[command.index("--machine_rank") + 1] for command in commands] == ["0", "1"]
    for command in commands:
        assert command[2:4] == ["--config_file", f"accelerate_configs/{config}.yaml"]


def test_the_commands_in_the_header_train_and_go_on_when_a_machine_has_died(runs: Runs):
    """Of the second machine nothing is left, launcher and rank: the first one's launcher must end, too."""
    config, output = "multinode_zero2", runs.folder / "launched"
    _, whole = runs.uninterrupted(config)
    shutil.copytree(runs.job["dataset"], output / "dataset")
    broken = launch(runs, config, output, runs.folder / "launched-broken", kill="1:3")
    assert broken["codes"] == [1, -signal.SIGKILL], "\n".join(broken["logs"])[-8000:]
    assert re.search(LOST.format(rank=0), broken["logs"][0]), broken["logs"][0][-4000:]
    assert not (output / "adapter").exists()
    resumed = launch(runs, config, output, runs.folder / "launched-resumed")
    assert_engine(resumed, config)
    assert "== encoder: up to date" in resumed["logs"][0]
    assert re.search(r"going on from \S+checkpoint-2", resumed["logs"][0])
    assert_same_losses(output / "adapter", whole)
    assert_same_weights(output / "adapter", whole, atol=1e-5)
