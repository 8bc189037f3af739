"""Cost of scoring 20 titles against the cost of reading the prompt alone.

    python scripts/bench/score.py [--model offline://smollm2-135m-instruct] [--prompt-tokens 300] [--candidates 20]

Prints one JSON line: seconds of prefilling one batch of prompts (logits of the last token only), of scoring all
titles of each prompt with the prompt shared, and of scoring every (prompt, title) by itself; and the two ratios to
prefilling. Titles are MovieLens-100K's; `--years` writes their year behind, as the quick start does, which doubles
their tokens. Each figure is the median of several rounds, taken in turn.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch

from recllm.data import offline
from recllm.infer.transformers_engine import TransformersEngine
from recllm.model.base_model import load_base_model
from recllm.model.chat import prompt_ids
from recllm.recipe import ModelSection


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    section = ModelSection(name_or_path=arguments.model, dtype=arguments.dtype)
    model, tokenizer = load_base_model(section)
    engine = TransformersEngine(model, tokenizer, batch_size=arguments.batch_size)
    rng = np.random.default_rng(0)
    titles = movielens_titles(arguments.years)
    prompts = [make_prompt(tokenizer, titles, arguments.prompt_tokens, rng) for _ in range(arguments.batch_size)]
    answers = [[f"{title}\n" for title in rng.choice(titles, arguments.candidates, False)] for _ in prompts]
    separate = TransformersEngine(model, tokenizer, arguments.batch_size, share_prompts=False)
    tasks = {
        "prefill_s": lambda: prefill(engine, prompts),
        "score_s": lambda: engine.score(prompts, answers),
        "separate_s": lambda: separate.score(prompts, answers),
    }
    seconds = measure(tasks, arguments.rounds)
    lengths = engine.num_tokens(answers)
    line = {
        "bench": "score",
        "model": arguments.model,
        "dtype": arguments.dtype,
        "batch_size": arguments.batch_size,
        "prompt_tokens": float(np.mean([len(prompt_ids(tokenizer, prompt)) for prompt in prompts])),
        "candidates": arguments.candidates,
        "years": arguments.years,
        "answer_tokens": float(lengths.sum() / len(lengths)),
        **{name: round(value, 4) for name, value in seconds.items()},
        "score_to_prefill": round(seconds["score_s"] / seconds["prefill_s"], 3),
        "separate_to_prefill": round(seconds["separate_s"] / seconds["prefill_s"], 3),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(line))


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
def prefill(engine: TransformersEngine, prompts: list[list[dict[str, str]]]) -> None:
    """One forward over the prompts, logits of the last token only: what any answer costs at the least."""
    rows = [prompt_ids(engine.tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, rows))
    input_ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for line, seen, row in zip(input_ids, mask, rows, strict=True):
        line[longest - len(row) :], seen[longest - len(row) :] = torch.tensor(row), 1
    engine.model(
        input_ids=input_ids.to(engine.device),
        attention_mask=mask.to(engine.device),
        logits_to_keep=1,
        use_cache=False,
    )


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
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--years", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
