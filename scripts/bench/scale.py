#!/usr/bin/env python
"""How the cost of `recllm convert` grows with the log, and what the cluster's engine costs beside the local one.

    python scripts/bench/scale.py                                   # 1e6 and 1e7 interactions, both engines at 1e7
    python scripts/bench/scale.py --sizes 1e6 1e7 1e8 --folder DISK # some 8 GB of free disk at 1e8
    python scripts/bench/scale.py --sizes 1e5 1e6 --ray-size 1e6

Each size is made by a generator that holds half a million rows at a time, and converted in a fresh process. Task:
windows of ten titles, every training position a target (--task next_item_among --dense-window 0 lists 20 candidates in
each prompt and costs five times as much). scripts/bench/convert.py says what a line holds. One JSON line a run, then
one with

time_ratio_per_10x             largest growth of wall time between neighbouring sizes, per factor of ten
cpu_ratio_per_10x              the same of CPU time: what counts on a machine that does other things too
peak_rss_mib                   largest of all local runs
disk_bytes_per_interaction     of the dataset, at the largest size; peak_disk_… with scratch files
ray_over_local                 tree_cpu_s of Ray, of all its processes and their start, over the local engine's
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import convert as bench


def main() -> None:
    """Run every size and print its line."""
    arguments = parse()
    lines = {size: run(arguments, size, "local") for size in sorted({*arguments.sizes, *arguments.ray_size})}
    ray = {size: run(arguments, size, "ray") for size in arguments.ray_size}
    local = [lines[size] for size in sorted(arguments.sizes)]
    largest = local[-1]
    print(
        json.dumps(
            {
                "bench": "scale",
                "sizes": [line["interactions"] for line in local],
                "time_ratio_per_10x": growth(local, "wall_s"),
                "cpu_ratio_per_10x": growth(local, "cpu_s"),
                "peak_rss_mib": max(line["peak_rss_mib"] for line in local),
                "disk_bytes_per_interaction": round(largest["disk_mib"] * 2**20 / largest["interactions"], 1),
                "peak_disk_bytes_per_interaction": round(largest["peak_disk_mib"] * 2**20 / largest["interactions"], 1),
                "ray_over_local": {
                    f"{size:.0e}": round(line["tree_cpu_s"] / lines[size]["tree_cpu_s"], 3)
                    for size, line in ray.items()
                },
                "runs": [*local, *ray.values()],
            }
        )
    )


def parse() -> argparse.Namespace:
    """The command line; what it shares with the other script has the same name and default."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=whole, default=[10**6, 10**7], help="interactions")
    parser.add_argument("--ray-size", nargs="*", type=whole, default=[10**7], help="for both engines; none: not Ray")
    parser.add_argument("--folder", default=None, help="where the temporary logs and datasets go")
    parser.add_argument("--workers", type=int, default=None, help="processes of the local engine")
    parser.add_argument("--task", choices=sorted(bench.TEMPLATES), default="next_item")
    parser.add_argument("--dense-window", type=int, default=10)
    parser.add_argument("--files", type=int, default=1, help="of each log; Ray's tasks read several")
    return parser.parse_args()


def whole(text: str) -> int:
    """1e6 as 1000000."""
    return int(float(text))


def run(arguments: argparse.Namespace, size: int, engine: str) -> dict[str, Any]:
    """One size on one engine, and its line."""
    arguments = argparse.Namespace(**{**vars(arguments), "engine": engine})
    if engine == "ray":
        arguments.workers = None
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        line = {"engine": engine, **bench.run_size(arguments, size, Path(folder))}
    print(json.dumps(line), flush=True)
    return line


def growth(lines: list[dict[str, Any]], name: str) -> float | None:
    """The largest ratio of neighbouring sizes, raised to what it would be for a factor of ten; None of one size."""
    ratios = [
        (later[name] / earlier[name]) ** (1 / math.log10(later["interactions"] / earlier["interactions"]))
        for earlier, later in itertools.pairwise(lines)
    ]
    return round(max(ratios), 2) if ratios else None


if __name__ == "__main__":
    main()
