"""In what order examples are trained on: shuffled, with those of like length together.

The lengths of some examples enter; their numbers leave in an order that hangs on the generator alone.
"""

import numpy as np


def order_of(lengths: np.ndarray, group_size: int, generator: np.random.Generator, longest_first: bool) -> list[int]:
    """The numbers of examples with `lengths` (N,), shuffled; with a group size those of like length stand together.

    With `longest_first` the group of the longest is the first one: a run that lacks memory stops at once.
    """
    order = generator.permutation(len(lengths))
    if not group_size:
        return order.tolist()
    whole = len(order) - len(order) % group_size  # the remainder is a random choice, not the shortest
    groups = generator.permutation(_groups(order[:whole], lengths, group_size))
    if longest_first and len(groups):
        longest = lengths[groups].max(axis=1).argmax()
        groups[[0, longest]] = groups[[longest, 0]]
    return groups.ravel().tolist() + order[whole:].tolist()


def _groups(order: np.ndarray, lengths: np.ndarray, group_size: int) -> np.ndarray:
    """(N / group_size, group_size): sorted by length within stretches of 50 groups, fewer where data are few."""
    stretch = group_size * max(1, min(len(lengths) // (group_size * 4), 50))
    parts = [order[start : start + stretch] for start in range(0, len(order), stretch)]
    arranged = [part[np.argsort(-lengths[part], kind="stable")] for part in parts]
    return np.concatenate([np.empty(0, np.int64), *arranged]).reshape(-1, group_size)
