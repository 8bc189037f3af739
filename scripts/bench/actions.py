#!/usr/bin/env python
"""Speed of action prediction: events converted a second, and how many forwards a batch of closed questions takes.

    python scripts/bench/actions.py [--model offline://smollm2-135m-instruct]
    python scripts/bench/actions.py --parts conversion     # without a model

The last line is one JSON object. `events_per_cpu_s`: events of a made-up log over the seconds of user and system time
that `recllm convert` needs in one process, from the Parquet file of the log to the dataset. Every event but the first
of a session becomes a prompt (next_action) that shows the session so far, 4 events on average.
`events_per_cpu_s_as_json`: the same for next_event, whose answers are JSON objects with item and query. Making the log
is not counted.

`forward_passes_per_step`: forwards of the real model for one batch of prompts that are asked for one of 19 actions,
counted by a hook; 1 is what it has to be. `prompts_per_cpu_s` by way and length of the prompt: prompt and actions in
one forward, in two (the prompt's keys and values are kept), and one row for each action.
The ways take turns within each round, and `one_forward_speedup` are ratios of their medians; on a busy machine compare
these and not the seconds. The dear way, a row an action, runs in one round.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recllm.infer.transformers_engine import TransformersEngine
from recllm.model.base_model import load_base_model
from recllm.model.chat import prompt_ids
from recllm.recipe import ModelSection

PARTS = ("conversion", "scoring")
EVENTS_PER_USER, NUM_ITEMS = 100, 20_000
PROMPT_TOKENS = (80, 250)
ACTIONS = [
    "home page", "promotion", "catalogue", "search", "filter", "view product", "read reviews", "compare",
    "add to wishlist", "add to cart", "view cart", "enter shipping", "enter payment", "buy", "payment error",
    "checkout error", "error page", "support chat", "account",
]  # fmt: skip


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    line: dict[str, Any] = {"bench": "actions"}
    for part in arguments.parts:
        line |= {"conversion": conversion, "scoring": scoring}[part](arguments)
    print(json.dumps(line))


# ---- conversion ----


def conversion(arguments: argparse.Namespace) -> dict[str, Any]:
    """Events a second of CPU time, for words and for JSON as answers."""
    from recllm.data.synthetic import write_events

    tasks: dict[str, dict[str, Any]] = {
        "events_per_cpu_s": {"task": "next_action", "template": "next_action/events"},
        "events_per_cpu_s_as_json": {
            "task": "next_event",
            "template": "next_event/events",
            "fields": {"item": "item", "query": "query"},
        },
    }
    events, line = int(float(arguments.events)), dict[str, Any]()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        log = write_events(Path(folder) / "log", events, max(events // EVENTS_PER_USER, 1), NUM_ITEMS, seed=0)
        for name, task in tasks.items():
            cpu_s, converted, examples = convert_log(log, task, Path(folder) / name)
            line["events"] = converted
            line |= {name: round(converted / cpu_s), name.replace("events_per_cpu_s", "examples"): examples}
            print(f"{task['task']}: {cpu_s:.2f} s for {converted} events, {examples} examples", flush=True)
    return line


def convert_log(log: Path, task: dict[str, Any], output: Path) -> tuple[float, int, int]:
    """Seconds of user and system time of this process, and how many events it kept and examples it wrote."""
    from recllm.convert.pipeline import convert
    from recllm.recipe import Recipe

    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "data": {
                "interactions": {"path": str(log / "interactions.parquet")},
                "items": {"path": str(log / "items.parquet")},
            },
            "actions": {
                "words": {"view": "view", "search": "search", "save": "save", "cart": "add to cart", "buy": "buy"},
                "without_item": ["search"],
                "attributes": ["query"],
            },
            "protocol": "action_by_time",
            "prompt": {"max_items": 10, "event": "{{ action }}: {{ item or query }}"},
            "tasks": [task],
            "model": {"name_or_path": "none"},
        }
    )
    with contextlib.redirect_stdout(sys.stderr):  # the last line is ours
        started = time.process_time()
        manifest = convert(recipe, output, workers=1)
        cpu_s, counts = time.process_time() - started, manifest["counts"]
        return cpu_s, counts["interactions"], sum(counts["examples"].values())


# ---- closed-set scoring ----


def scoring(arguments: argparse.Namespace) -> dict[str, Any]:
    """Forwards a batch, and the cost of the three ways."""
    section = ModelSection(name_or_path=arguments.model, dtype=arguments.dtype)
    model, tokenizer = load_base_model(section)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    engine = TransformersEngine(model, tokenizer, arguments.batch_size)
    cases = {}
    for tokens in PROMPT_TOKENS:
        cases[f"{tokens}_tokens"] = measure_case(engine, tokens, arguments)
        print(f"{tokens} tokens: {cases[f'{tokens}_tokens']}", flush=True)
    return {
        "forward_passes_per_step": max(case["forward_passes_per_step"] for case in cases.values()),
        "model": arguments.model,
        "dtype": arguments.dtype,
        "batch_size": arguments.batch_size,
        "actions": len(ACTIONS),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "scoring": cases,
    }


def measure_case(engine: TransformersEngine, tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prompts of one length."""
    rng = np.random.default_rng(0)
    prompts = [make_prompt(engine.tokenizer, tokens, rng) for _ in range(arguments.batch_size)]
    answers = [ACTIONS] * len(prompts)
    separate = TransformersEngine(engine.model, engine.tokenizer, arguments.batch_size, share_prompts=False)
    ways: dict[str, Callable[[], np.ndarray]] = {
        "one_forward": lambda: engine.score(prompts, answers, one_forward=True),
        "two_forwards": lambda: engine.score(prompts, answers),
    }
    if not arguments.quick:
        ways["one_an_action"] = lambda: separate.score(prompts, answers)
    count = count_forwards(engine.model, ways["one_forward"])
    seconds = measure(ways, arguments.rounds)
    return {
        "forward_passes_per_step": count,
        "prompt_tokens": round(float(np.mean([len(prompt_ids(engine.tokenizer, prompt)) for prompt in prompts])), 1),
        "prompts_per_cpu_s": {way: round(len(prompts) / value, 3) for way, value in seconds.items()},
        "one_forward_speedup": {
            way: round(value / seconds["one_forward"], 3) for way, value in seconds.items() if way != "one_forward"
        },
    }


def count_forwards(model: Any, work: Callable[[], np.ndarray]) -> int:
    """How often the model is run."""
    seen: list[None] = []
    hook = model.register_forward_hook(lambda *_: seen.append(None))
    try:
        work()
    finally:
        hook.remove()
    return len(seen)


def make_prompt(tokenizer: Any, tokens: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """A session of random actions that is long enough, and the question."""
    lines: list[str] = []
    while True:
        shown = "\n".join(lines)
        question = f"My session so far, oldest first:\n{shown}\n\nWhat do I do next? Answer with one of my actions."
        prompt = [{"role": "user", "content": question}]
        if len(prompt_ids(tokenizer, prompt)) >= tokens:
            return prompt
        lines.append(f"{rng.choice(ACTIONS)} (after {rng.integers(1, 300)} s)")


def measure(ways: dict[str, Callable[[], np.ndarray]], rounds: int) -> dict[str, float]:
    """Median seconds of each: CPU time on a CPU, which neighbours disturb less."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first warms up
        for name, work in ways.items():
            if name == "one_an_action" and turn != 1:
                continue
            started = clock()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--model", default="offline://smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="leave out a row an action")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--events", default="3e5", help="of the log that is converted")
    parser.add_argument("--folder", default=None, help="where the temporary log and datasets go")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
