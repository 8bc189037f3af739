"""Cost of encoding a history against its length: time, memory, and what the cache saves.

    python scripts/bench/encode.py [--lengths 200 1000 10000] [--window 64]

Each encoder and length prints a line; the last line is one JSON object with all of them. Encoders: `sasrec` (attention
over the whole history), `windowed` (SASRec within --window) and `gru4rec`, of the recipe's default sizes, untrained.
For one history of each length: `representation_s`, encoding it as the gate and serving do (`encode_histories`);
`states_s`, the state after every item, which is what training computes; `states_peak_mib`, the most memory that the
latter holds in tensors beyond the encoder; `hit_s`, the same history from the cache. Ratios are between neighbouring
lengths; `per_tenfold` is the growth for ten times the length by the longest two: 10 is linear, 100 quadratic. A
windowed SASRec reads `reach` items for its representation, so that costs the same from there on; its states are
linear. Each time is the median of several rounds, in seconds of the process's CPU time, or of the clock on a GPU.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from recllm.model.sequence_encoder import RepresentationCache, SequenceEncoder, encode_histories, make_encoder
from recllm.recipe import EncoderSection

MEASURES = ("representation_s", "states_s", "states_peak_mib")


def main() -> None:
    """Measure every encoder and print."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    found = {name: measure(name, arguments) for name in sections(arguments)}
    line = {
        "bench": "encode",
        "num_items": arguments.num_items,
        "lengths": arguments.lengths,
        "window": arguments.window,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "encoders": found,
    }
    print(json.dumps(line))


def sections(arguments: argparse.Namespace) -> dict[str, EncoderSection]:
    """The encoders by name."""
    return {
        "sasrec": EncoderSection(type="sasrec"),
        "windowed": EncoderSection(type="sasrec", window=arguments.window),
        "gru4rec": EncoderSection(type="gru4rec"),
    }


def build(name: str, arguments: argparse.Namespace) -> SequenceEncoder:
    """A fresh encoder that reads histories of every length that is measured."""
    torch.manual_seed(0)
    encoder = make_encoder(sections(arguments)[name], arguments.num_items, arguments.lengths[-1])
    return encoder.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def history(length: int, arguments: argparse.Namespace) -> np.ndarray:
    """Random items (L,)."""
    return np.random.default_rng(length).integers(0, arguments.num_items, length).astype(np.int32)


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One encoder at every length, and how its costs grow."""
    encoder, cache = build(name, arguments), RepresentationCache()
    cases: dict[str, dict[str, float]] = {}
    for length in arguments.lengths:
        items = history(length, arguments)
        padded = torch.from_numpy(items).long()[None].to(encoder.device)
        encode_histories(encoder, [items], cache=cache)
        cases[str(length)] = {
            "representation_s": median_s(partial(encode_histories, encoder, [items]), arguments.rounds),
            "states_s": median_s(partial(_states, encoder, padded), arguments.rounds),
            "states_peak_mib": peak_mib(encoder, padded),
            "hit_s": median_s(partial(encode_histories, encoder, [items], cache=cache), 20),
        }
        print(f"{name} {length}: {json.dumps(cases[str(length)])}", flush=True)
    return {"reach": encoder.reach, "cases": cases} | growth(arguments.lengths, cases)


def growth(lengths: list[int], cases: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Ratios between neighbouring lengths, and the growth for a tenfold length by the longest two."""
    ratios, per_tenfold = {}, {}
    for measure in MEASURES:
        values = [cases[str(length)][measure] for length in lengths]
        steps = [after / before if before else None for before, after in itertools.pairwise(values)]
        ratios[measure] = [step and round(step, 2) for step in steps]
        if steps and steps[-1]:
            power = math.log(steps[-1]) / math.log(lengths[-1] / lengths[-2])
            per_tenfold[measure] = round(10**power, 2)
    return {"ratios": ratios, "per_tenfold": per_tenfold}


@torch.no_grad()
def _states(encoder: SequenceEncoder, items: torch.Tensor) -> None:
    encoder.states(items)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_s(run: Callable[[], Any], rounds: int) -> float:
    """Median seconds of a call, after one that warms up."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time  # whoever else uses the machine
    run()
    taken = []
    for _ in range(rounds):
        started = clock()
        run()
        taken.append(clock() - started)
    return round(statistics.median(taken), 6)


def peak_mib(encoder: SequenceEncoder, items: torch.Tensor) -> float:
    """MiB of tensors that computing all states holds at once, beyond what was there before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _states(encoder, items)
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        _states(encoder, items)
    events: Any = watched.profiler.kineto_results.events()  # type: ignore[union-attr]  # set once it has run
    steps = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return round(max(itertools.accumulate(size for _, size in steps)) / 2**20, 2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[200, 1000, 10_000])
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--num-items", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    arguments.lengths = sorted(arguments.lengths)
    return arguments


if __name__ == "__main__":
    main()
