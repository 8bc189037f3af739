"""Flat arrays of segments: rows of many prompts, sorted and chosen prompt by prompt without a loop over prompts."""

import numpy as np
import numpy.typing as npt

from recllm.graph.subgraphs import Floats, Ints

Flags = npt.NDArray[np.bool_]


def ranges(begins: npt.NDArray[np.integer], counts: npt.NDArray[np.integer], step: int = 1) -> Ints:
    """begin, begin + step, … of each count, one behind the other.

    >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(begins - step * (ends - counts), counts) + np.arange(0, step * total, step)


def starts(*columns: npt.NDArray[np.generic]) -> Flags:
    """(M,) where a row of sorted columns differs from the one before it."""
    new = np.ones(len(columns[0]), dtype=bool)
    new[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return new


def is_in(keys: Ints, sorted_keys: Ints) -> Flags:
    """Which keys are among some that are sorted."""
    if not len(sorted_keys):
        return np.zeros(len(keys), dtype=bool)
    return sorted_keys[np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)] == keys


def stable_order(keys: Ints) -> Ints:
    """The order that sorts keys, equals as they stand.

    Where key and place fit into one integer they are sorted as one, which processors do many at a time.
    """
    if not len(keys):
        return np.empty(0, dtype=np.int64)
    bits = int(len(keys) - 1).bit_length()
    if keys.min() < 0 or int(keys.max()).bit_length() + bits > 63:
        return np.argsort(keys, kind="stable")
    return np.sort((keys << bits) | np.arange(len(keys))) & ((1 << bits) - 1)


def packed(*columns: Ints) -> list[Ints]:
    """Columns (M,) as fewer ones, in which the same rows are equal: a sort by each of them puts equal rows together.

    Small numbers share an integer, as long as the row's place fits in beside them (`stable_order`); a column of one
    value alone is none.

    >>> [column.tolist() for column in packed(np.array([7, 7]), np.array([1, 0]), np.array([2, 3]))]
    [[6, 3]]
    """
    found, free = list[Ints](), 0
    place_bits = max(len(columns[0]) - 1, 0).bit_length()
    for column in columns:
        low, high = (int(column.min()), int(column.max())) if len(column) else (0, 0)
        if low == high:
            continue
        bits = high.bit_length()
        if low < 0:
            found, free = [*found, column], 0
        elif bits <= free:
            found[-1], free = (found[-1] << bits) | column, free - bits
        else:
            found, free = [*found, column], 63 - place_bits - bits
    return found or [columns[0]]


def by_prompt_and_score(prompts: Ints, scores: Floats) -> Ints:
    """The order that sorts by prompt, then by falling score; equals as they stand. Scores of 0 and above."""
    # bits of floats of 0 and above rise as the floats do
    falling = 0x7FFFFFFF - (scores + np.float32(0)).view(np.int32).astype(np.int64)
    return stable_order((prompts << 31) | falling)


def best_places(prompts: Ints, scores: Floats, num_prompts: int, count: int) -> tuple[Ints, Ints]:
    """(offsets (N + 1,), places) of each prompt's `count` highest scores, falling; equals as they stand.

    Scores of 0 and above.
    """
    order = by_prompt_and_score(prompts, scores)
    counts = np.bincount(prompts, minlength=num_prompts)
    kept = order[ranges(np.zeros(num_prompts, dtype=np.int64), counts) < count]
    return np.concatenate([[0], np.cumsum(np.minimum(counts, count))]), kept
