"""In what order examples are trained on: shuffled, with those of like length together.

The lengths of some examples enter; their numbers leave in an order that hangs on the generators alone.
"""

import numpy as np


def order_of(
    lengths: np.ndarray,
    group_size: int,
    generator: np.random.Generator,
    longest_first: bool,
    *,
    groups_generator: np.random.Generator | None = None,
    num_groups: int | None = None,
) -> list[int]:
    """The numbers of examples with `lengths` (N,), shuffled; with a group size those of like length stand together.

    Processes that each order examples of their own and give the same `groups_generator` and `num_groups` have groups
    of like length at the same places.

    Args:
        lengths: of the examples, in tokens.
        group_size: examples of a group; 0: plainly shuffled.
        generator: of the order of the examples.
        longest_first: the group with the longest example is the first one, so that a run that lacks memory for it
            stops at its first step. Memory may still be lacking later: for a longer example that is not in `lengths`
            (of a later buffer), or once the optimizer holds its state.
        groups_generator: of the order of the groups; None: `generator`.
        num_groups: at most N / group_size; what is left stands at the end, shuffled. None: as many as there are.
    """
    order = generator.permutation(len(lengths))
    if not group_size:
        return order.tolist()
    possible = len(order) // group_size
    # the remainder is a random choice, not the shortest
    whole = group_size * (possible if num_groups is None else min(possible, num_groups))
    groups = (groups_generator or generator).permutation(_groups(order[:whole], lengths, group_size))
    if longest_first and len(groups):
        longest = lengths[groups].max(axis=1).argmax()
        groups[[0, longest]] = groups[[longest, 0]]
    return groups.ravel().tolist() + order[whole:].tolist()


def _groups(order: np.ndarray, lengths: np.ndarray, group_size: int) -> np.ndarray:
    """(G, group_size): sorted by length within stretches of 50 groups, fewer where data are few."""
    stretch = group_size * max(1, min(len(order) // (group_size * 4), 50))
    parts = [order[start : start + stretch] for start in range(0, len(order), stretch)]
    arranged = [part[np.argsort(-lengths[part], kind="stable")] for part in parts]
    return np.concatenate([np.empty(0, np.int64), *arranged]).reshape(-1, group_size)
