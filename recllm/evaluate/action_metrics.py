"""Metrics of predicted actions, in NumPy.

As in metrics.py: labels enter as class numbers (N,), predictions too, with -1 where the output could not be read; one
value an example leaves (N,), and figures that are no mean of examples take weights (S, N), one row a resample, and give
(S,) or (S, C). C is the number of classes. Nothing here imports torch.

Conventions, the same for every figure:

- Unparsable output (-1, or NaN probabilities) is wrong and stays in the denominator.
- A class without examples among those evaluated has no recall and no F1 (NaN) and is left out of every mean over
  classes; a class that occurs and is never predicted has F1 0. Where no class is left the mean is NaN.
- Of equal probabilities the first class is predicted; AUC counts ties as one half.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from recllm.evaluate.action_ranks import Draws, Ranking
from recllm.evaluate.metrics import Booleans, Floats, Integers

HEAD_SHARE = 0.5  # of the examples of training that head classes hold together


# ---- sessions ----


def session_means(values: Floats, sessions: NDArray) -> Floats:
    """The mean of values (N,) within each session, sessions in ascending order: (number of sessions,).

    Exact match (all of an action is right; Lu et al. 2025, arXiv:2503.20749) is the mean of these: averaged within a
    session first, then over sessions, so that a long session counts as much as a short one.

    >>> session_means(np.array([1.0, 0.0, 1.0]), np.array([7, 7, 9])).tolist()
    [0.5, 1.0]
    """
    _, members, sizes = np.unique(np.asarray(sessions), return_inverse=True, return_counts=True)
    return np.bincount(members, weights=np.asarray(values, np.float64), minlength=len(sizes)) / sizes


# ---- classes ----


class ClassFigures(NamedTuple):
    """Figures of each class, all (S, C); NaN where a class does not occur, precision also where nothing is it."""

    precision: Floats
    recall: Floats
    f1: Floats
    support: Floats


def confusion(label: Integers, predicted: Integers, classes: int, weights: Floats | None = None) -> Floats:
    """(S, C, C + 1): how often class i was answered with class j; the last column counts what could not be read.

    >>> confusion(np.array([0, 0, 1]), np.array([0, 1, -1]), 2)[0].tolist()
    [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    if weights is None:
        weights = np.ones((1, len(label)))
    return confusion_of(confusion_by_cluster(label, predicted, classes, np.arange(len(label))), weights)


def confusion_by_cluster(label: Integers, predicted: Integers, classes: int, members: Integers) -> csr_array:
    """(C · (C + 1), U): the cells of each cluster's confusion table; members (N,) number each example's cluster."""
    label, predicted = np.asarray(label), np.asarray(predicted)
    cell = label * (classes + 1) + np.where(predicted < 0, classes, predicted)
    shape = (classes * (classes + 1), int(np.max(members, initial=-1)) + 1)
    return coo_array((np.ones(len(label)), (cell, members)), shape=shape).tocsr()


def confusion_of(cells: csr_array, counts: Floats) -> Floats:
    """(S, C, C + 1): the confusion tables of resamples that drew clusters `counts` (S, U) times."""
    classes = (math.isqrt(4 * cells.shape[0] + 1) - 1) // 2  # of cells = C² + C
    return np.asarray((cells @ counts.T).T.reshape(len(counts), classes, classes + 1))


def class_figures(table: Floats) -> ClassFigures:
    """Precision, recall, F1 and support of each class (van Rijsbergen 1979), from a confusion table (S, C, C + 1).

        precision = TP / (TP + FP)     recall = TP / (TP + FN)     F1 = 2 TP / (2 TP + FP + FN)

    Output that cannot be read is a false negative of its class and a false positive of none. A class that does not
    occur has no recall and no F1, whatever was predicted; one that is never predicted has no precision.

    >>> found = class_figures(confusion(np.array([0, 0, 1]), np.array([0, 1, -1]), 2))
    >>> found.recall.tolist(), found.f1.tolist() == [[2 / (2 + 0 + 1), 0 / (0 + 1 + 1)]]
    ([[0.5, 0.0]], True)
    """
    right = np.diagonal(table[:, :, :-1], axis1=1, axis2=2)  # (S, C)
    support, answered = table.sum(axis=2), table[:, :, :-1].sum(axis=1)
    occurs = np.where(support > 0, support, np.nan)
    return ClassFigures(_ratio(right, answered), right / occurs, 2 * right / (occurs + answered), support)


def macro(values: Floats, chosen: Booleans | None = None, whole: Floats | None = None) -> Floats:
    """The mean over the classes that occur of values (S, C), each class alike: macro F1, macro recall. (S,)

    `chosen` (C,) looks at some of the classes only (head, tail). Macro recall of all classes is balanced accuracy.
    `whole` (C,) are the values of the full sample: they stand in for a class that a resample did not draw, so that all
    resamples average over the same classes. Without them a resample without a rare, hard class would be better for it,
    and an interval might leave out its own value.

    >>> macro(np.array([[0.5, 1.0, np.nan]])).tolist()
    [0.75]
    >>> macro(np.array([[0.5, np.nan]]), whole=np.array([0.75, 0.0])).tolist()
    [0.25]
    """
    if whole is not None:
        values = np.where(np.isnan(values), whole, values)
    mine = values if chosen is None else values[:, chosen]
    known = ~np.isnan(mine)
    return _ratio(np.where(known, mine, 0).sum(axis=1), known.sum(axis=1))


def weighted(values: Floats, support: Floats, chosen: Booleans | None = None) -> Floats:
    """The mean over classes of values (S, C), weighted by their support (S, C): weighted F1, weighted recall. (S,)

    Weighted recall of all classes is accuracy; of some of them it is the accuracy on their examples.

    >>> weighted(np.array([[0.5, 1.0]]), np.array([[3.0, 1.0]])).tolist() == [(3 * 0.5 + 1 * 1.0) / 4]
    True
    """
    if chosen is not None:
        values, support = values[:, chosen], support[:, chosen]
    counts = np.where(np.isnan(values), 0, support)
    return _ratio((np.where(np.isnan(values), 0, values) * counts).sum(axis=1), counts.sum(axis=1))


def head_classes(counts: Integers, share: float = HEAD_SHARE) -> Booleans:
    """Which classes (C,) are head: the most frequent ones of training that together hold `share` of its examples.

    The fewest that reach the share; of equally frequent ones the first. All others are tail. With half as the share two
    classes or more are never all head. Without any example in training there is no head.

    >>> head_classes(np.array([60, 25, 10, 5])).tolist(), head_classes(np.array([60, 25, 10, 5]), 0.8).tolist()
    ([True, False, False, False], [True, True, False, False])
    """
    counts = np.asarray(counts)
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    head = np.zeros(len(counts), dtype=bool)
    head[order] = (before < share * counts.sum()) & (counts[order] > 0)
    return head


# ---- probabilities ----


def one_vs_rest_auc(probability: Floats, label: Integers, weights: Floats | None = None) -> Floats:
    """The mean over classes of the AUC of each against all others (`class_aucs`), each class alike. (S,)

    Provost & Domingos (2000) weigh classes by how often they are; this is their mean without weights, scikit-learn's
    roc_auc_score(multi_class="ovr", average="macro"). It is not Hand & Till's M (2001), a mean over pairs of classes.

    >>> one_vs_rest_auc(np.array([[0.7, 0.3], [0.4, 0.6]]), np.array([0, 1])).tolist()
    [1.0]
    """
    return macro(class_aucs(probability, label, weights))


def class_aucs(probability: Floats, label: Integers, weights: Floats | None = None) -> Floats:
    """AUC of each class against all others (S, C), from probabilities (N, C).

    NaN of a class that does not occur, or that all examples have. A NaN row (invalid) ranks below all others, for every
    class.

    >>> class_aucs(np.array([[0.7, 0.3], [0.4, 0.6]]), np.array([0, 1])).tolist()
    [[1.0, 1.0]]
    """
    weights = np.ones((1, len(label))) if weights is None else weights
    each = np.arange(len(label))
    rankings, draws = rank_classes(probability, label, each), Draws.of(weights, each)
    return np.stack([ranking.auc(draws) for ranking in rankings], axis=1)


def rank_classes(
    probability: Floats, label: Integers, members: Integers, users: NDArray | None = None
) -> list[Ranking]:
    """Of each class against all others the examples ranked by its probability, for many resamples of clusters.

    members (N,) number each example's cluster; with `users` (N,) they are ranked within each user.
    """
    label = np.asarray(label)
    columns = enumerate(np.asarray(probability).T)
    return [Ranking.of(column, label == place, members, users) for place, column in columns]


def grouped_auc(score: Floats, positive: Booleans, users: NDArray, weights: Floats | None = None) -> Floats:
    """GAUC, the user-grouped AUC: Σ_u n_u AUC_u / Σ_u n_u (Zhou et al. 2018, DIN, §6.2). (S,)

    Over the users with positives and negatives, n_u the examples of a user (the paper's impressions). Users with one
    class only have no AUC and do not count, in a resample too. Ties are one half; a NaN score ranks below all others of
    its user. NaN where no user has both classes.

    >>> grouped_auc(np.array([0.9, 0.1, 0.2, 0.3]), np.array([1, 0, 1, 0], bool), np.array([1, 1, 2, 2])).tolist()
    [0.5]
    """
    positive = np.asarray(positive, dtype=bool)
    weights = np.ones((1, len(positive))) if weights is None else weights
    each = np.arange(len(positive))
    return Ranking.of(score, positive, each, np.asarray(users)).grouped(Draws.of(weights, each))


def grouped_one_vs_rest_auc(
    probability: Floats, label: Integers, users: NDArray, weights: Floats | None = None
) -> Floats:
    """The mean over classes of GAUC of each against all others; classes without a user who has both are left out. (S,)

    >>> probability = np.array([[0.9, 0.1], [0.2, 0.8]])
    >>> grouped_one_vs_rest_auc(probability, np.array([0, 1]), np.array([4, 4])).tolist()
    [1.0]
    """
    return macro(grouped_class_aucs(probability, label, users, weights))


def grouped_class_aucs(probability: Floats, label: Integers, users: NDArray, weights: Floats | None = None) -> Floats:
    """GAUC of each class against all others (S, C); NaN of a class without a user who has both.

    >>> grouped_class_aucs(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1]), np.array([4, 4])).tolist()
    [[1.0, 1.0]]
    """
    weights = np.ones((1, len(label))) if weights is None else weights
    each = np.arange(len(label))
    rankings, draws = rank_classes(probability, label, each, np.asarray(users)), Draws.of(weights, each)
    return np.stack([ranking.grouped(draws) for ranking in rankings], axis=1)


def multiclass_brier(probability: Floats, label: Integers) -> Floats:
    """Brier score: Σ_c (p_c − y_c)² (Brier 1950), between 0 and 2, lower is better. (N,)

    Of two classes it is twice the binary form of metrics.brier. An invalid output (NaN) costs the most, 2.

    >>> multiclass_brier(np.array([[0.5, 0.5, 0.0]]), np.array([0])).tolist() == [0.5**2 + 0.5**2]
    True
    """
    probability = np.asarray(probability, np.float64)
    right = np.eye(probability.shape[1])[np.asarray(label)]
    error = ((probability - right) ** 2).sum(axis=1)
    return np.where(np.isnan(error), 2.0, error)


def label_nats(probability: Floats, label: Integers) -> Floats:
    """−log p of the right class (N,), the logarithmic loss (Good 1952), lower is better; NaN where there is no p.

    A probability of 0 costs as much as the smallest one that a double holds in full, 708.4 nats: infinite ones would
    leave no mean and no interval. What predicts probabilities should leave some to every class.

    >>> label_nats(np.array([[0.25, 0.75]]), np.array([1])).tolist() == [-np.log(0.75)]
    True
    """
    probability = np.asarray(probability, np.float64)
    own = probability[np.arange(len(probability)), np.asarray(label)]
    return np.asarray(-np.log(np.maximum(own, np.finfo(np.float64).tiny)))


def top_label_calibration_error(
    probability: Floats, label: Integers, weights: Floats | None = None, bins: int = 10
) -> Floats:
    """Expected calibration error of the predicted class: Σ_b share(b) · |accuracy(b) − confidence(b)|. (S,)

    Over equal-width bins of the confidence, the largest probability (Guo et al. 2017, equation 3); a bin holds its
    lower edge, the last one both. Lower is better. Invalid outputs (NaN) have no confidence and are left out: read it
    beside valid_ratio. NaN where there is nothing left.

    >>> top_label_calibration_error(np.array([[0.75, 0.25], [0.75, 0.25]]), np.array([0, 1])).tolist()
    [0.25]
    """
    gaps = calibration_gaps(probability, label, bins)
    return calibration_error_of(gaps.sum(axis=0)[None] if weights is None else weights @ gaps)


def calibration_gaps(probability: Floats, label: Integers, bins: int) -> Floats:
    """(N, bins + 1): right − confidence in an example's bin, 0 in all others; then 1, or 0 of an invalid output.

    >>> calibration_gaps(np.array([[0.75, 0.25]]), np.array([0]), 2).tolist() == [[0, 1 - 0.75, 1]]
    True
    """
    confidence, right, place = _confidences(probability, label, bins)
    known = ~np.isnan(confidence)
    found = np.zeros((len(known), bins + 1))
    found[np.arange(len(known)), place] = np.where(known, right - np.where(known, confidence, 0), 0)
    found[:, bins] = known
    return found


def calibration_error_of(sums: Floats) -> Floats:
    """`top_label_calibration_error` (S,) from the weighted sums (S, bins + 1) of `calibration_gaps` over examples."""
    return _ratio(np.abs(sums[:, :-1]).sum(axis=1), sums[:, -1])


class ReliabilityBin(NamedTuple):
    """One bar of a reliability plot: confidences in [low, high), the mean of them, and how often they were right."""

    low: float
    high: float
    num_examples: int
    confidence: float
    accuracy: float


def reliability(probability: Floats, label: Integers, bins: int = 10) -> list[ReliabilityBin]:
    """The bins of `top_label_calibration_error` that hold an example (Guo et al. 2017, figure 1).

    >>> reliability(np.array([[0.75, 0.25], [0.75, 0.25]]), np.array([0, 1]), 2)
    [ReliabilityBin(low=0.5, high=1.0, num_examples=2, confidence=0.75, accuracy=0.5)]
    """
    confidence, right, place = _confidences(probability, label, bins)
    found = []
    for b in range(bins):
        mine = (place == b) & ~np.isnan(confidence)
        if mine.any():
            means = float(confidence[mine].mean()), float(right[mine].mean())
            found.append(ReliabilityBin(b / bins, (b + 1) / bins, int(mine.sum()), *means))
    return found


def _confidences(probability: Floats, label: Integers, bins: int) -> tuple[Floats, Floats, Integers]:
    """(N,) each: the largest probability (NaN: invalid), whether its class is right, and its bin."""
    probability = np.asarray(probability, np.float64)
    valid = np.asarray(~np.isnan(probability).any(axis=1))
    filled = np.where(valid[:, None], probability, 0)
    confidence = np.where(valid, filled.max(axis=1, initial=0), np.nan)
    right = (filled.argmax(axis=1) == np.asarray(label)).astype(np.float64)
    # a hair upwards: a confidence that is an edge in arithmetic must not fall below it for its last bit
    place = np.minimum((np.where(valid, confidence, 0) * bins + 1e-9).astype(np.int64), bins - 1)
    return confidence, right, place


# ---- items to come, by action ----


class Found(NamedTuple):
    """Of N examples and C actions: items to come that are among the first k, and those that could be; (N, C) each."""

    hits: Integers
    possible: Integers  # min(k, number of items to come)


def found_items(top: Integers, to_come: Sequence[Sequence[NDArray]], k: int = 20) -> Found:
    """What the first k of a ranking hold of the items to come, by example and action.

    top (N, ≥ k) item indices, best first, -1 behind the last; to_come[n][c] the items with action c that follow, of
    which each counts once.

    >>> found_items(np.array([[4, 7, -1]]), [[np.array([7]), np.array([1, 4, 4])]], 2)
    Found(hits=array([[1, 1]]), possible=array([[1, 2]]))
    """
    shape = (len(to_come), len(to_come[0]) if to_come else 0)
    hits, possible = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for n, (line, wanted) in enumerate(zip(np.asarray(top)[:, :k], to_come, strict=True)):
        for c, items in enumerate(wanted):
            different = np.unique(items)
            hits[n, c] = np.isin(different, line[line >= 0]).sum()
            possible[n, c] = min(k, len(different))
    return Found(hits, possible)


def recall_at_k(found: Found, weights: Floats | None = None) -> Floats:
    """recall@k of each action: Σ hits / Σ min(k, items to come), over all examples. (S, C)

    A ratio of sums and no mean of ratios (OTTO – Recommender Systems Challenge, Kaggle 2022; k = 20): an example with
    many items to come counts more, and one with more than k can still be found in full. NaN of an action that never
    comes.

    >>> recall_at_k(Found(np.array([[1, 0], [3, 0]]), np.array([[1, 0], [20, 0]]))).tolist()[0][0] == (1 + 3) / (1 + 20)
    True
    """
    if weights is None:
        weights = np.ones((1, len(found.hits)))
    return _ratio(weights @ found.hits, weights @ found.possible)


def otto_score(recalls: Floats, labels: Sequence[str], parts: Mapping[str, float]) -> Floats:
    """Σ weight · recall@k of the named actions; OTTO: 0.10 clicks, 0.30 carts, 0.60 orders. (S,)

    recalls (S, C). NaN where a named action never comes: the score is then that of another question.

    >>> weights = {"clicks": 0.1, "carts": 0.3, "orders": 0.6}
    >>> otto_score(np.array([[1.0, 0.5, 0.0]]), ["clicks", "carts", "orders"], weights).tolist() == [0.1 + 0.3 * 0.5]
    True
    """
    return np.asarray(sum(share * recalls[:, labels.index(label)] for label, share in parts.items()))


# ---- open fields ----


def rouge_l(written: str, right: str) -> float:
    """ROUGE-L: the F-measure of the longest common subsequence of words (Lin 2004, section 3, β = 1).

        P = LCS / words written      R = LCS / words of the right text      F = 2 P R / (P + R)

    Words are runs of letters and digits, case folded. If one text has no words, both must be equal: 1, else 0.

    >>> rouge_l("police kill the gunman", "police killed the gunman") == 3 / 4
    True
    """
    a, b = _words(written), _words(right)
    if not a or not b:
        return float(written == right)
    return 2 * longest_common_subsequence(a, b) / (len(a) + len(b))


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, in time |a| · |b| and memory |b| (Wagner & Fischer 1974).

    A row of the table never falls, so that max(above, left, diagonal + equal) is a running maximum: no inner loop, and
    no library for it.

    >>> longest_common_subsequence("abcde", "ace")
    3
    """
    kinds = {word: place for place, word in enumerate(dict.fromkeys(b))}
    numbers = np.array([kinds[word] for word in b], dtype=np.int64)
    row = np.zeros(len(b) + 1, dtype=np.int64)
    for word in a:
        equal = numbers == kinds.get(word, -1)
        row[1:] = np.maximum.accumulate(np.maximum(row[1:], row[:-1] + equal))
    return int(row[-1])


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def _ratio(above: Floats, below: Floats | Integers) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)
