"""Metrics of rankings and of closed answers, in NumPy.

Scores or ranks enter; one value an example leaves (N,), so that its mean is the figure and its users can be resampled.
Figures that are no mean of examples (balanced accuracy, F1, AUC, calibration error) take weights (S, N), one row a
resample, and give (S,).

Every ranking metric follows the same rules. A hit is by item index. Ties rank pessimistically: the target stands below
every equal score. An example whose output is invalid or unparsable has rank `NO_RANK`: it is a miss and stays in the
denominator. An empty input gives an empty array, whose mean is undefined (NaN, written as null).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

NO_RANK = 0  # invalid output: no k is large enough for a hit


def ranks(scores: Floats, target_column: Integers, excluded: Booleans | None = None) -> Integers:
    """1-based rank of each target: 1 + the number of other items whose score is at least the target's. (N,)

    scores (N, C); target_column (N,) is the target's column; excluded (N, C) marks items that are not ranked (the
    target always is). Ties are pessimistic; a NaN score is the worst possible, and a target that scores NaN is last.

    >>> ranks(np.array([[0.1, 0.7, 0.7], [0.3, np.nan, 0.2]]), np.array([1, 2])).tolist()
    [2, 2]
    """
    scores, target_column = np.asarray(scores), np.asarray(target_column)
    if scores.ndim != 2 or target_column.shape != scores.shape[:1]:
        raise ValueError(f"scores {scores.shape} and target_column {target_column.shape}: (N, C) and (N,) are expected")
    rows = np.arange(len(scores))
    filled = np.where(np.isnan(scores), -np.inf, scores)
    above = filled >= filled[rows, target_column][:, None]  # (N, C), the target itself included
    if excluded is not None:
        above &= ~excluded
    above[rows, target_column] = True
    return above.sum(axis=1).astype(np.int64)


def hit_rate(rank: Integers, k: int) -> Floats:
    """hit_rate@k: 1 where the target is among the first k, else 0 (recall@k with one relevant item; Deshpande & Karypis
    2004). Invalid output is 0.

    >>> hit_rate(np.array([1, 3, NO_RANK]), 2).tolist()
    [1.0, 0.0, 0.0]
    """
    rank = np.asarray(rank)
    return ((rank >= 1) & (rank <= _positive(k))).astype(np.float64)


def ndcg(rank: Integers, k: int) -> Floats:
    """ndcg@k: 1 / log2(1 + rank) within the first k, else 0 (Järvelin & Kekäläinen 2002; the ideal DCG of one relevant
    item is 1, so nothing is divided). Invalid output is 0.

    >>> ndcg(np.array([1, 2, 3]), 2).tolist() == [1.0, 1 / np.log2(3), 0.0]
    True
    """
    rank = np.asarray(rank)
    return hit_rate(rank, k) / np.log2(1 + np.maximum(rank, 1))


def mrr(rank: Integers, k: int | None = None) -> Floats:
    """mrr@k: 1 / rank within the first k, else 0; k None is uncut (Voorhees 1999, TREC-8). Invalid output is 0.

    >>> mrr(np.array([1, 4, NO_RANK])).tolist(), mrr(np.array([1, 4]), 3).tolist()
    ([1.0, 0.25, 0.0], [1.0, 0.0])
    """
    rank = np.asarray(rank)
    inside = (rank >= 1) if k is None else hit_rate(rank, k) > 0
    return inside / np.maximum(rank, 1).astype(np.float64)


def valid_ratio(valid: Booleans) -> Floats:
    """valid_ratio: 1 where the output could be read as an item or a label, else 0; reported beside every hit rate.

    >>> valid_ratio(np.array([True, False])).tolist()
    [1.0, 0.0]
    """
    return np.asarray(valid, dtype=np.float64)


def ranking(rank: Integers, valid: Booleans, cutoffs: Sequence[int]) -> dict[str, Floats]:
    """All ranking metrics, by name and in the order of the report; each (N,).

    >>> sorted(ranking(np.array([2]), np.array([True]), [5]))
    ['hit_rate@5', 'mrr', 'mrr@5', 'ndcg@5', 'valid_ratio']
    """
    rank = np.where(valid, rank, NO_RANK)
    table = {f"hit_rate@{k}": hit_rate(rank, k) for k in cutoffs}
    table |= {f"ndcg@{k}": ndcg(rank, k) for k in cutoffs}
    table |= {f"mrr@{k}": mrr(rank, k) for k in cutoffs}
    return table | {"mrr": mrr(rank), "valid_ratio": valid_ratio(valid)}


# Closed answers. `label` and `predicted` are (N,) integers, positions in the list of answers; predicted -1 is invalid.


def accuracy(label: Integers, predicted: Integers) -> Floats:
    """accuracy: 1 where the predicted label is the right one; invalid output (-1) is 0 and stays in the denominator.

    >>> accuracy(np.array([0, 1, 1]), np.array([0, 1, -1])).tolist()
    [1.0, 1.0, 0.0]
    """
    return (np.asarray(label) == np.asarray(predicted)).astype(np.float64)


def balanced_accuracy(label: Integers, predicted: Integers, weights: Floats | None = None) -> Floats:
    """Mean over the labels that occur of recall = right / occurring (Brodersen et al. 2010). (S,)

    Invalid output lowers the recall of its label. NaN where there are no examples.

    >>> balanced_accuracy(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])).tolist() == [(2 / 3 + 1) / 2]
    True
    """
    label, predicted = np.asarray(label), np.asarray(predicted)
    weights = _weights(weights, len(label))
    recalls = []
    for value in np.unique(label):
        mine = label == value
        recalls.append(_ratio(weights @ (mine & (predicted == value)), weights @ mine))
    return _mean_of_defined(recalls, len(weights))


def f1(label: Integers, predicted: Integers, value: int, weights: Floats | None = None) -> Floats:
    """F1 of one label: 2 TP / (2 TP + FP + FN) (van Rijsbergen 1979). (S,)

    Invalid output is a false negative of its label and no false positive. NaN where the label neither occurs nor is
    predicted.

    >>> f1(np.array([1, 1, 0]), np.array([1, 0, 1]), 1).tolist() == [2 * 1 / (2 * 1 + 1 + 1)]
    True
    """
    label, predicted = np.asarray(label), np.asarray(predicted)
    weights = _weights(weights, len(label))
    both = weights @ ((label == value) & (predicted == value))
    return _ratio(2 * both, weights @ (label == value) + weights @ (predicted == value))


def auc(score: Floats, positive: Booleans, weights: Floats | None = None) -> Floats:
    """Area under the ROC curve: P(a positive scores above a negative) + P(equal) / 2 (Hanley & McNeil 1982). (S,)

    A NaN score (invalid output) ranks below all others. NaN where one of the two classes is absent.

    >>> auc(np.array([0.9, 0.5, 0.5]), np.array([True, True, False])).tolist() == [(1 + 1 / 2) / 2]
    True
    """
    score = np.where(np.isnan(score), -np.inf, np.asarray(score, dtype=np.float64))
    positive, weights = np.asarray(positive), _weights(weights, len(score))
    if not len(score):
        return np.full(len(weights), np.nan)
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(differs(score[order]))  # the first of each group of equal scores
    ordered = weights[:, order]
    up, down = (sums_of(ordered * mine, starts) for mine in (positive[order], ~positive[order]))  # (S, groups)
    below = np.cumsum(down, axis=1) - down
    return _ratio((up * (below + down / 2)).sum(axis=1), up.sum(axis=1) * down.sum(axis=1))


def brier(probability: Floats, positive: Booleans) -> Floats:
    """Brier score: (probability − outcome)², lower is better (Brier 1950); an invalid output (NaN) costs 1.

    >>> brier(np.array([0.75, np.nan]), np.array([True, False])).tolist()
    [0.0625, 1.0]
    """
    error = (np.asarray(probability) - np.asarray(positive, dtype=np.float64)) ** 2
    return np.where(np.isnan(error), 1.0, error)


def calibration_error(probability: Floats, positive: Booleans, weights: Floats | None = None, bins: int = 10) -> Floats:
    """Expected calibration error over equal-width bins of the positive's probability, lower is better. (S,)

    Σ_bin share(bin) · |mean outcome − mean probability| (Naeini et al. 2015, the binary form). Invalid outputs (NaN)
    are left out, as they carry no probability: read it beside valid_ratio. NaN where there are none.

    >>> calibration_error(np.array([0.75, 0.75]), np.array([True, False])).tolist()
    [0.25]
    """
    probability, positive = np.asarray(probability, dtype=np.float64), np.asarray(positive)
    weights = _weights(weights, len(probability))
    known = ~np.isnan(probability)
    place = np.minimum((np.where(known, probability, 0) * bins).astype(np.int64), bins - 1)
    gap = np.where(known, positive - np.where(known, probability, 0), 0)
    total = sum(np.abs(weights @ np.where(place == b, gap, 0)) for b in range(bins))
    return _ratio(np.asarray(total), weights @ known)


def differs(values: NDArray) -> Booleans:
    """Whether each of sorted values (N,) is another than the one before it; the first is. −∞ equals −∞.

    >>> differs(np.array([-np.inf, -np.inf, 2.0])).tolist()
    [True, False, True]
    """
    return np.concatenate([np.ones(min(1, len(values)), bool), values[1:] != values[:-1]])


def sums_of(table: Floats, starts: Integers) -> Floats:
    """Sums (S, G) of the columns of (S, N) in groups that begin at `starts` (G,); alone, a column is its own sum.

    >>> sums_of(np.array([[1.0, 2.0, 4.0]]), np.array([0, 2])).tolist()
    [[3.0, 4.0]]
    """
    return table if len(starts) == table.shape[1] else np.add.reduceat(table, starts, axis=1)


def _positive(k: int) -> int:
    if k < 1:
        raise ValueError(f"k is {k}: at least 1 is expected")
    return k


def _weights(weights: Floats | None, count: int) -> Floats:
    return np.ones((1, count)) if weights is None else np.asarray(weights, dtype=np.float64)


def _ratio(above: Floats, below: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)


def _mean_of_defined(rows: list[Floats], count: int) -> Floats:
    if not rows:
        return np.full(count, np.nan)
    table = np.stack(rows)
    defined = ~np.isnan(table)
    return _ratio(np.where(defined, table, 0).sum(axis=0), defined.sum(axis=0))
