"""Train an adapter on the workers of a Ray cluster; on each the same run as `recllm train RECIPE`.

python scripts/cluster/ray_train.py RECIPE [section.key=value …] --workers 16
python scripts/cluster/ray_train.py RECIPE --workers 2 --cpu

RAY_ADDRESS names the cluster (unset: a Ray of this machine alone). Needs `pip install "recllm[ray]"` on every node, and
this folder, RECIPE, its base model and its output_dir under the same names on all: a shared file system. Each worker is
one process of a DDP training with one GPU, or with --cpu one core over gloo. For ZeRO and FSDP2 over several machines
take `accelerate launch` (accelerate_configs/multinode_*.yaml, scripts/cluster/train.sbatch).

When a worker or its node dies Ray Train starts all workers anew, --retries times, and the run goes on from its last
checkpoint (train.save_steps). What the workers say goes to output_dir/logs/worker-*.txt. The last line is the adapter's
folder.
"""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recllm import cluster
from recllm.errors import UserError
from recllm.recipe import Recipe, load_recipe

WHAT = "scripts/cluster/ray_train.py"
PATIENCE_S = 3600.0  # for all workers to have a place, at first and after a lost node
FIT_S = 24 * 3600  # how long workers wait for the first one to fit the encoder; in training train.ddp_timeout holds


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, and tell errors as `recllm` does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", help="path or shipped name")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--workers", type=int, required=True, metavar="N", help="processes, each with a GPU")
    parser.add_argument("--cpu", action="store_true", help="each with a core instead, joined by gloo")
    parser.add_argument(
        "--retries", type=int, default=3, metavar="N", help="new starts after a lost worker (default 3)"
    )
    parsed = parser.parse_intermixed_args(arguments)
    try:
        overrides = [*parsed.overrides, *(["train.use_cpu=true"] if parsed.cpu else [])]
        print(train(load_recipe(parsed.recipe, overrides), parsed.workers, not parsed.cpu, parsed.retries))
    except UserError as error:
        print(f"recllm: {error}", file=sys.stderr)
        return 1
    return 0


def train(recipe: Recipe, workers: int, use_gpu: bool, retries: int = 3) -> Path:
    """Train the recipe on so many workers of the cluster at RAY_ADDRESS; returns the adapter's folder.

    Raises:
        UserError: what a worker refused, after all retries; no cluster, another recllm on a node, a node that does not
            see the output folder; fewer GPUs or cores than workers; no place for all workers within PATIENCE_S.
    """
    if workers < 1 or retries < 0:
        raise UserError(f"--workers {workers} --retries {retries}: at least 1 worker and 0 retries are expected")
    recipe.output.mkdir(parents=True, exist_ok=True)
    with cluster.connected(WHAT, recipe.output.resolve()) as ray, cluster.own_errors():
        _check_resources(ray, workers, "GPU" if use_gpu else "CPU")
        from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
        from ray.train.torch import TorchConfig, TorchTrainer

        trainer = TorchTrainer(
            work,
            train_loop_config={"recipe": recipe.model_dump(mode="json"), "folder": os.getcwd()},
            torch_config=TorchConfig(timeout_s=FIT_S),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
            run_config=RunConfig(
                name="ray",  # of a folder beside the adapter, with what Ray Train writes about the run
                storage_path=str(recipe.output.resolve()),
                failure_config=FailureConfig(
                    max_failures=retries,
                    controller_failure_limit=_attempts(),  # type: ignore[call-arg]  # mypy sees the older Ray Train's
                ),
            ),
        )
        try:
            trainer.fit()
        except WorkerGroupError as error:
            raise _first_cause(error) from error
        except ControllerError as error:
            said = str(error.controller_failure).strip().splitlines() or [type(error.controller_failure).__name__]
            raise UserError(
                f"Ray Train has no {workers} workers that run ({said[0]}): see `ray status` for what they wait for, "
                "then give the same command again: the run goes on from its last checkpoint"
            ) from error
    return recipe.output / "adapter"


def _attempts() -> int:
    """How often Ray Train tries again to place all workers until PATIENCE_S are over; by itself it tries for ever."""
    return math.ceil(PATIENCE_S / float(os.environ.get("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", 60)))


def _first_cause(error: Any) -> Exception:
    """What recllm refused on one of the workers, or all that Ray tells where one of them failed otherwise.

    The others, who then miss that one, say so too: that is told where nobody knows more (a process that was killed).
    """
    failures = [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()]
    refused = [failure for failure in failures if isinstance(failure, UserError)]
    first = min(refused, key=lambda failure: "lost another one" in str(failure), default=error)
    of_work = [one for one in failures if one not in refused and not type(one).__module__.startswith("ray.")]
    return error if of_work and "lost another one" in str(first) else first


def _check_resources(ray: Any, workers: int, kind: str) -> None:
    """Ray Train would wait for them, without end."""
    if (there := ray.cluster_resources().get(kind, 0)) < workers:
        raise UserError(f"{workers} workers need a {kind} each, the Ray cluster has {there:g}: lower --workers")


def work(config: dict[str, Any]) -> None:
    """One process of the training; Ray Train has joined it with the others as torch.distributed's launchers do."""
    from recllm import stages

    os.chdir(config["folder"])  # relative paths of the recipe mean what they meant to the user
    recipe = Recipe.model_validate(config["recipe"])
    with saying_to(recipe.output / "logs" / f"worker-{os.environ['RANK']}.txt"):
        stages.fine_tune(recipe)


@contextlib.contextmanager
def saying_to(path: Path) -> Iterator[None]:
    """What this process writes to its standard output and error is added to a file: nobody looks at a worker's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = [os.dup(number) for number in (1, 2)]
    with path.open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), before, strict=True):
            os.dup2(old, number)
            os.close(old)


if __name__ == "__main__":
    sys.exit(main())
