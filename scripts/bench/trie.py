"""Cost of the item trie of a large catalogue: building it, holding it, and excluding what one user had.

    python scripts/bench/trie.py [--titles 1000000]

The last line is one JSON object. `build_s`: from flat token ids to the trie, in seconds of the process's CPU time;
`peak_mib`: the most memory that this process has held, interpreter and token ids included; `before_mib`: the same just
before building; `nodes` and `mib`: of the trie; `root_children`: what the first step of a search chooses among;
`exclude_ms`: blocking the items of one history; `choose_ms`: naming the children of a frontier of 50 nodes.

Titles are made up: as many tokens as product names have (4 to 40, about 11), tokens by Zipf's law, a newline at the
end, and half of them begin as another title does (series, brands). Tokenising them is not part of it; that takes some
40 µs a title.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from recllm.infer.item_trie import ItemTrie

VOCABULARY, NEWLINE, LONGEST = 49_152, 198, 40
CHUNK = 100_000  # titles made at once


def main() -> None:
    """Build one trie and print."""
    arguments = _arguments()
    rng = np.random.default_rng(arguments.seed)
    tokens, offsets = make_titles(arguments.titles, rng)
    before = peak_mib()
    started = time.process_time()
    trie = ItemTrie.build(tokens, offsets)
    seconds = time.process_time() - started
    history = rng.choice(arguments.titles, min(arguments.history, arguments.titles), replace=False)
    leaf = trie.leaf[rng.choice(trie.num_titles, 50)]
    line = {
        "bench": "trie",
        "titles": arguments.titles,
        "tokens": len(tokens),
        "build_s": round(seconds, 2),
        "before_mib": before,
        "peak_mib": peak_mib(),
        "nodes": trie.num_nodes,
        "mib": round(trie.nbytes / 2**20, 1),
        "different_titles": trie.num_titles,
        "depth": trie.depth,
        "root_children": len(trie.children(0)[0]),
        "history": len(history),
        "exclude_ms": median_ms(lambda: trie.excluding(history)),
        "choose_ms": median_ms(lambda: trie.children_of(trie.parent[leaf])),
    }
    print(json.dumps(line))


def make_titles(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Flat token ids and offsets of made-up titles."""
    parts, lengths = [], []
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        ranks = np.exp(rng.uniform(0, np.log(VOCABULARY - NEWLINE - 1), (size, LONGEST)))  # p(rank) ∝ 1 / rank
        table = (ranks + NEWLINE).astype(np.int32)
        length = np.clip(3 + rng.geometric(1 / 8, size), 4, LONGEST)
        column = np.arange(LONGEST)
        follows = rng.random(size) < 0.5
        shared = follows[:, None] & (column < length[:, None] // 2)
        table = np.where(shared, table[rng.integers(0, size, size)], table)
        table[np.arange(size), length - 1] = NEWLINE
        parts.append(table[column < length[:, None]])
        lengths.append(length)
    return np.concatenate(parts), np.concatenate([[0], np.cumsum(np.concatenate(lengths))])


def peak_mib() -> int:
    """MiB that this process has held at the most."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def median_ms(run: Callable[[], Any], rounds: int = 21) -> float:
    """Median milliseconds of CPU time of a call."""
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        run()
        taken.append(1000 * (time.process_time() - started))
    return round(float(np.median(taken)), 3)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--titles", type=int, default=1_000_000)
    parser.add_argument("--history", type=int, default=200, help="items that one user has had")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
