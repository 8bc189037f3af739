"""Real DDP, DeepSpeed and FSDP2 engines on CPU processes over gloo. For tests only; as a script a server, or train.py.

Without a GPU accelerate does not join the processes; asked for a CPU (train.use_cpu) it does, but trains as DDP where
FSDP was asked for, and says nothing. Here it is told that gloo over CPUs is a device of its own. Whoever uses this must
still assert the class of the engine that wrapped the model, which every rank reports.

A job is a JSON line on standard input, its result a JSON line on standard output:

    recipe, dataset, encoder, output    what `finetune.train` takes, as paths
    config, processes                   an accelerate config file, and how many ranks
    kill_at                             rank 0 kills itself (SIGKILL) after this optimizer step, null: never
    kill_rank                           another rank than 0 kills itself
    command_at                          a step, and the words of a command that rank 0 runs after it
    machine                             of several machines, each with a server of its own that forks `processes` ranks:
                                        its number, the count of them, address and port of the first one
    overrides                           of the recipe, as `load_recipe` takes them
    shim                                false: accelerate as it is

The server imports everything once and forks the ranks of each job, so that a world starts in a second; the environment
of the ranks is what `accelerate launch --config_file` sets.

With arguments the script stands in for scripts/train.py in a real `accelerate launch`: it runs that with the shim and
leaves a report in $RECLLM_TEST_REPORTS/RANK.json. $RECLLM_TEST_KILL, RANK:STEP, kills this rank's machine (it and its
launcher, by SIGKILL) after that optimizer step.
"""

import faulthandler
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock
from zlib import crc32

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "DS_SKIP_CUDA_CHECK": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
LIMIT_S = 200  # of one job, or one launch


def environment() -> dict[str, str]:
    """Of a process that trains on CPUs, whatever an earlier training of this one has set for accelerate."""
    kept = {k: v for k, v in os.environ.items() if k != "CUDA_HOME" and not k.startswith("ACCELERATE_")}
    return kept | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}


class Worlds:
    """Starts worlds of ranks, one after the other, in a server process of its own. Use it as a context."""

    def __init__(self, prefix: Sequence[str] = (), **variables: str) -> None:
        """The server is started by `prefix` (ip netns exec …), with these variables beside its own."""
        self.prefix, self.variables = prefix, variables

    def __enter__(self) -> "Worlds":
        self.server = subprocess.Popen(
            [*self.prefix, sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment() | self.variables, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=LIMIT_S)

    def run(self, **job: Any) -> dict[str, Any]:
        """`codes`: exit code of each rank (-9: killed); `ranks`: what each reported; `log`: what they printed.

        `ended_s`: when the last of them had ended, by the clock time.monotonic of the machine.
        """
        self.start(**job)
        return self.finish()

    def start(self, **job: Any) -> None:
        """As `run`, without waiting for the end."""
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(job, default=str) + "\n")
        self.server.stdin.flush()

    def finish(self) -> dict[str, Any]:
        """What `run` returns, of the job that was started."""
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, "the server of test worlds has died: see its standard error"
        return json.loads(line)


# ---- the shim ----


def allow_engines_on_cpu() -> None:
    """Before the first Accelerator: gloo over CPU ranks may be wrapped by DeepSpeed and FSDP2."""
    import torch
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    prepare_backend, set_device, start = (
        PartialState._prepare_backend,
        PartialState.set_device,
        AcceleratorState.__init__,
    )

    def gloo_when_distributed(self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None):
        chosen, kind = prepare_backend(self, cpu, sagemaker_dp, backend)
        if kind == DistributedType.NO and not cpu and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            return "gloo", DistributedType.MULTI_CPU
        return chosen, kind

    def cpu_device(self: Any) -> None:
        if getattr(self, "device", None) is None and self.distributed_type == DistributedType.MULTI_CPU:
            self.device = torch.device("cpu")
        else:
            set_device(self)

    def with_fsdp(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    PartialState._prepare_backend, PartialState.set_device = gloo_when_distributed, cpu_device
    AcceleratorState.__init__ = with_fsdp


# ---- the server ----


def launch_environment(config: str, processes: int, machine: dict[str, Any] | None = None) -> dict[str, str]:
    """What `accelerate launch --config_file config --num_processes processes` sets, from its own code."""
    import torch.distributed.run
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    found: dict[str, str] = {}
    arguments = ["--config_file", config, "--num_processes", str(processes)]
    if machine is None:
        arguments += ["--num_machines", "1", "--main_process_port", "0"]
    else:
        arguments += ["--num_machines", str(machine["count"]), "--machine_rank", str(machine["number"])]
        arguments += ["--main_process_ip", machine["address"], "--main_process_port", str(machine["port"])]
    arguments += ["script.py"]

    def run(_: Any) -> None:
        found.update(os.environ)

    def simple(parsed: Any) -> None:
        found.update(prepare_simple_launcher_cmd_env(parsed)[1])

    with mock.patch.object(torch.distributed.run, "run", run), mock.patch.object(launch, "simple_launcher", simple):
        launch.launch_command(launch.launch_command_parser().parse_args(arguments))
    return found


def compile_nothing() -> None:
    """DeepSpeed's shared-memory op would be compiled for minutes."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    """Answer jobs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print to standard output
    compile_nothing()
    import recllm.train.finetune  # noqa: F401  # imported once, before the ranks are forked

    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            answers.write(json.dumps(run_world(job, Path(folder))) + "\n")
        answers.flush()


def run_world(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fork the ranks and wait for them; when one dies the others are killed, as the launchers do."""
    processes, machine = job.get("processes", 1), job.get("machine")
    world = processes * (machine["count"] if machine else 1)
    environment = launch_environment(str(ROOT / "accelerate_configs" / job["config"]), world, machine)
    if world > 1:
        address, port = (machine["address"], str(machine["port"])) if machine else ("localhost", free_port())
        environment |= {"WORLD_SIZE": str(world), "MASTER_ADDR": address, "MASTER_PORT": port}
    first = processes * machine["number"] if machine else 0
    children, here = {}, range(first, first + processes)
    for rank in here:
        own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank - first)} if world > 1 else {})
        child = os.fork()
        if not child:
            run_rank(job, rank, own, folder)
        children[child] = rank
    codes = wait(children)
    ended_s = time.monotonic()
    ranks = [json.loads(p.read_text()) if (p := folder / f"{rank}.json").exists() else {} for rank in here]
    lines = [line for rank in here for line in (folder / f"{rank}.log").read_text().splitlines()]
    log = "\n".join(line for line in lines if "c10d_logger" not in line and "return func(*args" not in line)
    return {"codes": [codes[rank] for rank in here], "ranks": ranks, "log": log[-20_000:], "ended_s": ended_s}


def free_port(address: str = "localhost") -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return str(probe.getsockname()[1])


def wait(children: dict[int, int]) -> dict[int, int]:
    """Exit code of each rank."""
    left, codes, end = dict(children), {}, time.monotonic() + LIMIT_S
    while left:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[left.pop(child)] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end or any(codes.values()):
            for other in left:
                os.kill(other, signal.SIGKILL)
        if not child:
            time.sleep(0.02)
    return codes


def run_rank(job: dict[str, Any], rank: int, environment: dict[str, str], folder: Path) -> None:
    """One process of a world; never returns."""
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(environment)
    faulthandler.enable()
    code = 1
    try:
        if job.get("shim", True):
            allow_engines_on_cpu()
        train(job, rank, folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train(job: dict[str, Any], rank: int, folder: Path) -> None:
    """finetune.train, watched."""
    from recllm.recipe import load_recipe
    from recllm.train import finetune

    def kill(step: int) -> None:
        if rank == job.get("kill_rank", 0) and step == job.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0 and "command_at" in job and step == job["command_at"][0]:
            subprocess.run(job["command_at"][1:], check=True)

    report = watch(kill)
    recipe = load_recipe(job["recipe"], job.get("overrides", ()))
    paths = (Path(job[name]) for name in ("dataset", "encoder", "output"))
    started = time.monotonic()
    finetune.train(recipe, *paths)
    report["wall_s"] = round(time.monotonic() - started, 2)
    (folder / f"{rank}.json").write_text(json.dumps(report))


def watch(after_step: Callable[[int], None]) -> dict[str, Any]:
    """What the next training of this process will fill in: which engine wrapped the model, and what rows it saw."""
    from transformers import TrainerCallback

    from recllm.train import finetune

    make = finetune.make_trainer
    report: dict[str, Any] = {"engine": None, "losses": [], "rows": []}

    class Watch(TrainerCallback):
        trainer: Any

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report.update(describe(self.trainer))
            after_step(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            report["losses"] += [logs["loss"]] if "loss" in logs else []
            report["logs"] = [*report.get("logs", []), {k: v for k, v in logs.items() if isinstance(v, (int, float))}]

    def watched(*args: Any, **kwargs: Any) -> Any:
        trainer = make(*args, **kwargs)
        report["forwards"] = count_forwards(trainer.model)
        watch = Watch()
        watch.trainer = trainer
        trainer.add_callback(watch)
        collate = trainer.data_collator

        def collator(rows: Any) -> Any:
            report["rows"].append([identity(row) for row in rows if row.completion_tokens])
            return collate(rows)

        trainer.data_collator = collator
        return trainer

    finetune.make_trainer = watched
    return report


def count_forwards(model: Any) -> dict[str, int]:
    """Counts, from now on, forwards with gradients of the embedding, one a micro-batch, and of the first decoder layer.

    With gradient checkpointing a layer runs once more in each backward pass, and the embedding does not. Counted before
    they run: a recomputation ends as soon as it has what backward needs, before the layer returns.
    """
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    layer = next(module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    found = {"embedding": 0, "layer": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(module: Any, _: Any) -> None:
            found[name] += module.training and torch.is_grad_enabled()

        return hook

    model.get_input_embeddings().register_forward_pre_hook(count("embedding"))
    layer.register_forward_pre_hook(count("layer"))
    return found


def identity(row: Any) -> list[int]:
    """What tells an example from every other one."""
    return [int(row.user_index), int(row.gate_end), crc32(row.input_ids)]


def describe(trainer: Any) -> dict[str, Any]:
    """The engine that wrapped the model, and of DeepSpeed the stage and where its states lie."""
    wrapped = trainer.model_wrapped
    found: dict[str, Any] = {"engine": type(wrapped).__name__, "bases": [c.__name__ for c in type(wrapped).__mro__]}
    if found["engine"] == "DeepSpeedEngine":
        found["stage"] = wrapped.zero_optimization_stage()
        found["optimizer"] = type(wrapped.optimizer).__name__
        found["offload"] = str(getattr(wrapped.zero_offload_param(), "device", None))
    return found


# ---- scripts/train.py ----


def train_script() -> None:
    """scripts/train.py with this process's arguments and the shim, watched; ends in SystemExit as it does."""
    faulthandler.dump_traceback_later(0.75 * LIMIT_S, exit=True)  # a rank that hangs says where, before it is stopped
    rank = os.environ.get("RANK", "0")

    def kill(step: int) -> None:
        if f"{rank}:{step}" == os.environ.get("RECLLM_TEST_KILL"):
            for process in (os.getppid(), os.getpid()):  # of a machine nothing is left that could clean up
                os.kill(process, signal.SIGKILL)

    compile_nothing()
    allow_engines_on_cpu()
    report = watch(kill)
    try:
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
    finally:
        (Path(os.environ["RECLLM_TEST_REPORTS"]) / f"{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    train_script() if sys.argv[1:] else main()
