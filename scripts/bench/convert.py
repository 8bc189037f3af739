#!/usr/bin/env python
"""Speed and memory of `recllm convert` on synthetic logs of growing size.

    python scripts/bench/convert.py                       # 1e5, 1e6 and 1e7 interactions
    python scripts/bench/convert.py --sizes 1e5 --workers 1
    python scripts/bench/convert.py --sizes 1e6 --engine ray

Task: next_item_among, every training position a target, 10-item histories, 20 candidates listed in the prompt and
stored (--task next_item --dense-window 10 measures others). Each size runs in a fresh process. One JSON line a size,
then one with all of them. cpu_s: user and system time of all processes of the run, reading and writing included, making
the log and the first imports excluded (of the local engine; Ray's processes are not the driver's to count). tree_cpu_s:
the same over the whole process tree, sampled, with all imports and with Ray's own processes. driver_cpu_s: of the first
process alone, and of it before_examples_cpu_s until the log is numbered, sorted and split: on any engine the part that
one process does. peak_rss_mib: largest sum over the process tree, sampled (memory shared by processes counts for each);
with the second worker it is flat: only users and items are held whole. disk_mib: size of the dataset; peak_disk_mib:
largest size of all that the run had on disk beside its log, sampled.
"""

import argparse
import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recllm.convert import pipeline

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a checkout that is not installed

INTERACTIONS_PER_USER, NUM_ITEMS, LOG = 100, 20_000, "interactions.parquet"
TEMPLATES = {"next_item": "next_item/items", "next_item_among": "next_item_among/items"}


def main() -> None:
    """Run every size and print its line."""
    arguments = parse()
    if arguments.measure:
        print(json.dumps(measure(arguments, Path(arguments.measure))))
        return
    lines = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            lines.append(run_size(arguments, int(float(size)), Path(folder)))
        print(json.dumps(lines[-1]), flush=True)
    pairs = list(itertools.pairwise(lines))
    ratios = {
        f"{name}_ratios": [round(later[f"{name}_s"] / earlier[f"{name}_s"], 2) for earlier, later in pairs]
        for name in ("wall", "cpu")
    }
    print(json.dumps({"task": arguments.task, "sizes": lines, **ratios}))


def parse() -> argparse.Namespace:
    """The command line; --measure is for the processes that this script starts itself."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["1e5", "1e6", "1e7"], help="interactions")
    parser.add_argument("--workers", type=int, default=None, help="processes; the cores, at most 8, if not given")
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--task", choices=sorted(TEMPLATES), default="next_item_among")
    parser.add_argument("--dense-window", type=int, default=0)
    parser.add_argument("--files", type=int, default=1, help="of the log; Ray's tasks read several")
    parser.add_argument("--folder", default=None, help="where the temporary log and dataset go")
    parser.add_argument("--measure", default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_size(arguments: argparse.Namespace, size: int, folder: Path) -> dict[str, float]:
    """Make the log in one process, convert it in another and watch that one's memory."""
    make = (
        "import sys; from pathlib import Path; from recllm.data.synthetic import write_interactions; "
        f"write_interactions(Path(sys.argv[1]), {size}, {max(size // INTERACTIONS_PER_USER, 1)}, {NUM_ITEMS}, 0)"
    )
    subprocess.run([sys.executable, "-c", make, str(folder / "log")], check=True, cwd=ROOT)
    if arguments.files > 1:
        cut(folder / "log" / LOG, arguments.files)
    options = ["--task", arguments.task, "--dense-window", str(arguments.dense_window), "--engine", arguments.engine]
    if arguments.workers:
        options += ["--workers", str(arguments.workers)]
    command = [sys.executable, __file__, "--measure", str(folder), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        peak = watch(process, folder)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"converting {size} interactions failed, see above")
    return {"interactions": size, **json.loads(output.splitlines()[-1]), **peak}


def cut(log: Path, count: int) -> None:
    """A log in one file becomes one in several, of as many rows."""
    import polars as pl

    frame = pl.scan_parquet(log)
    rows = frame.select(pl.len()).collect().item()
    each = -(-rows // count)
    for number in range(count):
        frame.slice(number * each, each).sink_parquet(log.with_name(f"{log.stem}-{number:03d}.parquet"))
    log.unlink()


def watch(process: subprocess.Popen[str], folder: Path) -> dict[str, float]:
    """What is seen of a process and its descendants until it ends, and of its folder (Linux; elsewhere 0)."""
    rss = disk = looks = 0
    cpu = dict[int, float]()
    while process.poll() is None:
        rss = max(rss, tree_rss(process.pid))
        if looks % 10 == 0:
            cpu |= tree_cpu(process.pid)
            disk = max(disk, size_of(folder) - size_of(folder / "log"))
        looks += 1
        time.sleep(0.05)
    mib = {"peak_rss_mib": round(rss / 2**20), "peak_disk_mib": round(disk / 2**20)}
    return {**mib, "tree_cpu_s": round(sum(cpu.values()), 2)}


def size_of(folder: Path) -> int:
    """Bytes of its files now."""
    total = 0
    for place, _, names in os.walk(folder):  # which passes over folders that went between two looks
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def tree_cpu(pid: int) -> dict[int, float]:
    """Seconds of user and system time of a process and its descendants so far, by pid."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a name may hold blanks
    except OSError:
        return {}
    found = {pid: (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")}
    for child in children(pid):
        found |= tree_cpu(child)
    return found


def children(pid: int) -> list[int]:
    """Of all its threads."""
    found = list[int]()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def tree_rss(pid: int) -> int:
    """Bytes: resident memory of a process and its descendants now."""
    try:
        status = Path(f"/proc/{pid}/statm").read_text()
    except OSError:  # it ended between two looks
        return 0
    return int(status.split()[1]) * resource.getpagesize() + sum(map(tree_rss, children(pid)))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Convert the log in `folder` in this process and its workers."""
    from recllm.convert import pipeline
    from recllm.recipe import Recipe

    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "data": {
                "interactions": {"path": [str(path) for path in sorted((folder / "log").glob(f"{Path(LOG).stem}*"))]},
                "items": {"path": str(folder / "log" / "items.parquet")},
            },
            "protocol": "temporal_20",
            "prompt": {"max_items": 10},
            "tasks": [
                {
                    "task": arguments.task,
                    "template": TEMPLATES[arguments.task],
                    "dense_window": arguments.dense_window,
                }
            ],
            "model": {"name_or_path": "none"},
        }
    )
    output = folder / "dataset"
    engine = Noted(engine_of(arguments, output))
    wall, cpu, own = time.perf_counter(), cpu_seconds(), time.process_time()
    manifest = pipeline.convert(recipe, output, engine=engine)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    examples = sum(manifest["counts"]["examples"].values())
    disk = sum(path.stat().st_size for path in (folder / "dataset").rglob("*") if path.is_file())
    return {
        "examples": examples,
        "examples_per_cpu_s": round(examples / cpu),
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 2),
        "driver_cpu_s": round(time.process_time() - own, 2),
        "before_examples_cpu_s": round(engine.written_at - own, 2),
        "disk_mib": round(disk / 2**20),
    }


def engine_of(arguments: argparse.Namespace, output: Path) -> "pipeline.Engine":
    """The one that is asked for."""
    from recllm.convert import pipeline

    if arguments.engine == "ray":
        from recllm.convert.ray_engine import RayEngine

        return RayEngine(output, "bench")
    return pipeline.Local(arguments.workers or min(pipeline.available_cores(), pipeline.MOST_WORKERS))


class Noted:
    """An engine, and when it was first asked for examples."""

    def __init__(self, engine: "pipeline.Engine") -> None:
        self.engine, self.written_at = engine, 0.0
        self.opened, self.scan, self.prepared = engine.opened, engine.scan, engine.prepared

    def write(self, *given: Any) -> Any:
        """The engine's; `written_at` is this process's CPU time at its beginning."""
        self.written_at = time.process_time()
        return self.engine.write(*given)


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
