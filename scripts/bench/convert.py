#!/usr/bin/env python
"""Speed and memory of `recllm convert` on synthetic logs of growing size.

    python scripts/bench/convert.py                       # 1e5, 1e6 and 1e7 interactions
    python scripts/bench/convert.py --sizes 1e5 --workers 1

Task: next_item_among, every training position a target, 10-item histories, 20 candidates listed in the prompt and
stored (--task next_item --dense-window 10 measures others). Each size runs in a fresh process. One JSON line a size,
then one with all of them. cpu_s: user and system time of all processes of the run, reading and writing included, making
the log and the first imports excluded. peak_rss_mib: largest sum over the process tree, sampled (memory shared by
processes counts for each); with the second worker it is flat: only users and items are held whole. disk_mib:
size of the dataset.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a checkout that is not installed

INTERACTIONS_PER_USER, NUM_ITEMS = 100, 20_000
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
    parser.add_argument("--task", choices=sorted(TEMPLATES), default="next_item_among")
    parser.add_argument("--dense-window", type=int, default=0)
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
    options = ["--task", arguments.task, "--dense-window", str(arguments.dense_window)]
    if arguments.workers:
        options += ["--workers", str(arguments.workers)]
    command = [sys.executable, __file__, "--measure", str(folder), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        peak = watch(process)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"converting {size} interactions failed, see above")
    return {"interactions": size, **json.loads(output.splitlines()[-1]), "peak_rss_mib": round(peak / 2**20)}


def watch(process: subprocess.Popen[str]) -> int:
    """Bytes: the largest resident memory of the process and its descendants until it ends (Linux; elsewhere 0)."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_rss(process.pid))
        time.sleep(0.05)
    return peak


def tree_rss(pid: int) -> int:
    """Bytes: resident memory of a process and its descendants now."""
    try:
        status = Path(f"/proc/{pid}/statm").read_text()
        children = [text for path in Path(f"/proc/{pid}/task").glob("*/children") for text in path.read_text().split()]
    except OSError:  # it ended between two looks
        return 0
    return int(status.split()[1]) * resource.getpagesize() + sum(tree_rss(int(child)) for child in children)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Convert the log in `folder` in this process and its workers."""
    from recllm.convert.pipeline import convert
    from recllm.recipe import Recipe

    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "data": {
                "interactions": {"path": str(folder / "log" / "interactions.parquet")},
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
    wall, cpu = time.perf_counter(), cpu_seconds()
    manifest = convert(recipe, folder / "dataset", workers=arguments.workers)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    examples = sum(manifest["counts"]["examples"].values())
    disk = sum(path.stat().st_size for path in (folder / "dataset").rglob("*") if path.is_file())
    return {
        "examples": examples,
        "examples_per_cpu_s": round(examples / cpu),
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 2),
        "disk_mib": round(disk / 2**20),
    }


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
