"""Cost of scoring 20 titles against the cost of reading the prompt alone.

    python scripts/bench/score.py [--model offline://smollm2-135m-instruct] [--candidates 20]

Each case prints a line; the last line is one JSON object with all of them: seconds of prefilling one batch of prompts
as the engine does it (`prefill_s`), of scoring all titles of each prompt with the prompt shared (`score_s`), of scoring
every (prompt, title) by itself (`separate_s`, left out with --quick), and the ratios to prefilling. Cases: prompts of
about 300 tokens and of about 84, as in the quick start; titles plain and with their years, which doubles their tokens.
Titles are MovieLens-100K's. `tokens_to_prefill` is what no engine can beat at equal cost a token: the tokens that must
be read, prompt and titles with shared beginnings merged, over those of the prompt. Each figure is the median of several
rounds, taken in turn.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch

from recllm.data import offline
from recllm.infer.transformers_engine import TransformersEngine, build_trie
from recllm.model.base_model import load_base_model
from recllm.model.chat import answer_ids, prompt_ids
from recllm.recipe import ModelSection

PROMPT_TOKENS = (300, 84)


def main() -> None:
    """Measure every case and print."""
    arguments = _arguments()
    section = ModelSection(name_or_path=arguments.model, dtype=arguments.dtype)
    model, tokenizer = load_base_model(section)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    engine = TransformersEngine(model, tokenizer, batch_size=arguments.batch_size)
    cases = {}
    for tokens in PROMPT_TOKENS:
        for years in (False, True):
            name = f"{tokens}_tokens_{'years' if years else 'plain'}"
            cases[name] = measure_case(engine, tokens, years, arguments)
            ratios = [cases[name][ratio] for ratio in ("score_to_prefill", "tokens_to_prefill")]
            print(f"{name}: score / prefill {ratios[0]}, tokens read / tokens of the prompt {ratios[1]}", flush=True)
    line = {
        "bench": "score",
        "model": arguments.model,
        "dtype": arguments.dtype,
        "batch_size": arguments.batch_size,
        "candidates": arguments.candidates,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "cases": cases,
    }
    print(json.dumps(line))


def measure_case(
    engine: TransformersEngine, prompt_tokens: int, years: bool, arguments: argparse.Namespace
) -> dict[str, float]:
    """One sort of prompts and titles: seconds and ratios."""
    rng, titles = np.random.default_rng(0), movielens_titles(years)
    prompts = [make_prompt(engine.tokenizer, titles, prompt_tokens, rng) for _ in range(arguments.batch_size)]
    answers = [[f"{title}\n" for title in rng.choice(titles, arguments.candidates, False)] for _ in prompts]
    rows = [prompt_ids(engine.tokenizer, prompt) for prompt in prompts]
    tasks = {"prefill_s": lambda: prefill(engine, rows), "score_s": lambda: engine.score(prompts, answers)}
    if not arguments.quick:
        separate = TransformersEngine(engine.model, engine.tokenizer, arguments.batch_size, share_prompts=False)
        tasks["separate_s"] = lambda: separate.score(prompts, answers)
    seconds = measure(tasks, arguments.rounds)
    ratios = {
        f"{name.removesuffix('_s')}_to_prefill": round(value / seconds["prefill_s"], 3)
        for name, value in seconds.items()
        if name != "prefill_s"
    }
    return {
        "prompt_tokens": float(np.mean([len(row) for row in rows])),
        "answer_tokens": float(engine.num_tokens(answers).sum() / len(prompts)),
        **{name: round(value, 4) for name, value in seconds.items()},
        **ratios,
        "tokens_to_prefill": round(tokens_read(engine, rows, answers) / sum(map(len, rows)), 3),
    }


def tokens_read(engine: TransformersEngine, rows: list[list[int]], answers: list[list[str]]) -> int:
    """Tokens of all prompts and of their titles' tries (whose roots are the prompts' last tokens)."""
    tries = [
        build_trie(row[-1], [answer_ids(engine.tokenizer, text) for text in texts])
        for row, texts in zip(rows, answers, strict=True)
    ]
    return sum(len(row) - 1 + len(trie.tokens) for row, trie in zip(rows, tries, strict=True))


def movielens_titles(years: bool) -> list[str]:
    """The catalogue's titles, with their year where asked."""
    lines = (offline.resolve("offline://movielens-100k") / "ml-100k.item").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    return [f"{row[1]} ({row[2]})" if years else row[1] for row in rows]


def make_prompt(tokenizer, titles: list[str], tokens: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """A dense prompt: an instruction and titles until it has at least `tokens` tokens."""
    shown = ""
    while True:
        prompt = [{"role": "user", "content": "List the films that one viewer watched."}]
        prompt.append({"role": "assistant", "content": shown})
        if len(prompt_ids(tokenizer, prompt)) >= tokens:
            return prompt
        shown += f"{rng.choice(titles)}\n"


@torch.inference_mode()
def prefill(engine: TransformersEngine, rows: list[list[int]]) -> None:
    """One forward over the prompts exactly as the engine reads them: what any answer costs at the least."""
    engine._prefill(rows, max(map(len, rows)) - 1, {})


def measure(tasks: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each: CPU time on a CPU, which neighbours disturb less. The dear one runs once."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):  # the first warms up
        for name, task in tasks.items():
            if name == "separate_s" and turn != 1:
                continue
            started = clock()
            task()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--model", default="offline://smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="leave out scoring every pair by itself")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
