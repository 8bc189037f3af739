"""What a beam search over all titles finds of the exhaustive ranking, and what it costs, by its width.

    python scripts/bench/beam.py [--model offline://smollm2-135m-instruct] [--prompts 8] [--widths 1 5 10 20 50]

Each width prints a line; the last line is one JSON object with all of them. Prompts show what MovieLens-100K's users
watched last; these items are excluded. The reference scores every title of the catalogue by itself. `recall`: the share
of its best k titles that the search returns, mean over the prompts; `top_1`: the share of prompts whose best title is
found; `exact`: the share of prompts whose best k the search knows to be the exhaustive ones; `s_per_prompt`: seconds of
CPU time, or of the clock on a GPU; `times_faster`: than the reference.

The default is float32: bfloat16 rounds a title's score by tenths of a nat, differently in tensors of another shape,
which changes the best k too.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from score import movielens_titles

from recllm.data import offline
from recllm.infer.item_trie import ItemTrie, catalogue_trie
from recllm.infer.transformers_engine import TransformersEngine
from recllm.model.base_model import load_base_model
from recllm.recipe import ModelSection

SHOWN = 10  # titles in a prompt

Prompts = list[list[dict[str, str]]]


def main() -> None:
    """Rank exhaustively, then by every width, and print."""
    arguments = _arguments()
    model, tokenizer = load_base_model(ModelSection(name_or_path=arguments.model, dtype=arguments.dtype))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    engine = TransformersEngine(model, tokenizer, arguments.batch_size)
    titles = movielens_titles(years=False)
    trie = catalogue_trie(tokenizer, titles, "\n")
    histories = newest_items(arguments.prompts, np.random.default_rng(arguments.seed))
    prompts = [make_prompt([titles[item] for item in items]) for items in histories]
    engine.rank_titles(prompts[:1], trie, 1)  # warms up
    best, seconds = timed(lambda: exhaustive(engine, prompts, titles, trie, histories, arguments.k))
    line = {
        "bench": "beam",
        "model": arguments.model,
        "dtype": arguments.dtype,
        "prompts": len(prompts),
        "titles": trie.num_titles,
        "nodes": trie.num_nodes,
        "k": arguments.k,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "exhaustive_s_per_prompt": round(seconds / len(prompts), 3),
        "widths": {},
    }
    for width in arguments.widths:
        found, taken = timed(lambda: engine.rank_titles(prompts, trie, width, arguments.k, histories))  # noqa: B023  # called at once
        line["widths"][width] = compare([one.titles for one in found], best) | {
            "exact": round(float(np.mean([one.is_exact for one in found])), 3),
            "s_per_prompt": round(taken / len(prompts), 3),
            "times_faster": round(seconds / taken, 1),
        }
        print(f"width {width}: {json.dumps(line['widths'][width])}", flush=True)
    print(json.dumps(line))


def exhaustive(
    engine: TransformersEngine,
    prompts: Prompts,
    titles: list[str],
    trie: ItemTrie,
    histories: list[np.ndarray],
    k: int,
) -> np.ndarray:
    """(N, k): the best titles by the score of every one."""
    texts = np.array([f"{titles[item]}\n" for item in trie.representatives()], dtype=object)
    order = np.argsort(texts)  # a part's titles share their beginnings
    scores = np.empty((len(prompts), len(texts)))
    for part in engine.parts(texts[order].tolist()):
        asked = texts[order[part]].tolist()
        scores[:, order[part]] = engine.score(prompts, [asked] * len(prompts))
    for row, items in zip(scores, histories, strict=True):
        row[np.isin(trie.leaf, trie.excluding(items))] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def compare(found: list[np.ndarray], best: np.ndarray) -> dict[str, float]:
    """Recall of the best titles, and how often the very best is there."""
    shares = [len(np.intersect1d(titles, row)) / len(row) for titles, row in zip(found, best, strict=True)]
    first = [row[0] in titles for titles, row in zip(found, best, strict=True)]
    return {"recall": round(float(np.mean(shares)), 3), "top_1": round(float(np.mean(first)), 3)}


def newest_items(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The newest items of some users, oldest first; item i is line i of the items file."""
    folder = offline.resolve("offline://movielens-100k")
    ids = [line.split("\t", 1)[0] for line in (folder / "ml-100k.item").read_text(encoding="utf-8").splitlines()[1:]]
    number = {item: i for i, item in enumerate(ids)}
    rows = [line.split("\t") for line in (folder / "ml-100k.inter").read_text(encoding="utf-8").splitlines()[1:]]
    rows.sort(key=lambda row: float(row[3]))
    users = rng.choice(sorted({row[0] for row in rows}), count, replace=False)
    return [np.array([number[row[1]] for row in rows if row[0] == user][-SHOWN:]) for user in users]


def make_prompt(shown: list[str]) -> list[dict[str, str]]:
    """A dense prompt: an instruction and an unfinished list."""
    return [
        {"role": "user", "content": "List the films that one viewer watched."},
        {"role": "assistant", "content": "".join(f"{title}\n" for title in shown)},
    ]


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and its seconds."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    result = run()
    return result, clock() - started  # scores come as numpy arrays, so a GPU is done


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--model", default="offline://smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 5, 10, 20, 50])
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
