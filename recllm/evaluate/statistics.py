"""Intervals and tests over users, in NumPy.

Per-example values and the user of each example enter; estimates with intervals and p-values leave. Examples of one user
depend on each other, so users are what is resampled (cluster bootstrap; Davison & Hinkley 1997, §3.8), never examples.
Randomness comes in as a generator: the same seed gives every system the same resamples.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

Floats = NDArray[np.float64]

_CHUNK = 4_000_000  # entries of a resampling matrix held at once: 32 MB


class Estimate(NamedTuple):
    """A figure and its interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """A − B on the same examples, its interval and the two-sided p-value of "no difference"."""

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap_means(
    values: Floats, users: NDArray, rng: np.random.Generator, samples: int = 2000, confidence: float = 0.95
) -> list[Estimate]:
    """Mean over examples and percentile interval (Efron 1979) of each column of values (N, M), resampling users.

    One resample's mean is Σ_u c_u Σ_{i of u} v_i / Σ_u c_u n_u, with c_u the times that user u was drawn.

    >>> bootstrap_means(np.array([[1.0], [1.0]]), np.array([7, 8]), np.random.default_rng(0))
    [Estimate(value=1.0, low=1.0, high=1.0)]
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return [Estimate(np.nan, np.nan, np.nan)] * values.shape[1]
    means = _resampled_means(values, users, rng, samples)
    return [_estimate(value, column, confidence) for value, column in zip(values.mean(axis=0), means.T, strict=True)]


def bootstrap_statistic(
    statistic: Callable[[Floats], Floats],
    users: NDArray,
    rng: np.random.Generator,
    samples: int = 2000,
    confidence: float = 0.95,
) -> Estimate:
    """Percentile interval of any figure that `statistic` computes from weights of examples (S, N) → (S,).

    Resamples in which the figure is undefined (NaN: a label that was not drawn) are left out of the interval.
    """
    members, sizes = _clusters(users)
    value = float(statistic(np.ones((1, len(members))))[0])
    parts = [statistic(counts[:, members]) for counts in _counts(len(sizes), samples, rng, width=len(members))]
    return _estimate(value, np.concatenate(parts) if parts else np.array([]), confidence)


def paired_difference(
    a: Floats,
    b: Floats,
    users: NDArray,
    rng: np.random.Generator,
    samples: int = 2000,
    confidence: float = 0.95,
) -> Difference:
    """Mean of a − b over the same examples, percentile interval and p-value of the paired bootstrap over users.

    p = (1 + #{s : |d*_s − d| ≥ |d|}) / (1 + samples): the resampled differences, moved to mean 0, show what chance
    alone gives (Davison & Hinkley 1997, §4.4). No difference anywhere gives p = 1.

    >>> paired_difference(np.ones(4), np.ones(4), np.arange(4), np.random.default_rng(0)).p_value
    1.0
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.shape != np.shape(users):
        raise ValueError(f"a {a.shape}, b {b.shape} and users {np.shape(users)}: the same examples are expected")
    if not len(a):
        return Difference(np.nan, np.nan, np.nan, np.nan)
    gap = a - b
    resampled = _resampled_means(gap[:, None], users, rng, samples)[:, 0]
    estimate = _estimate(gap.mean(), resampled, confidence)
    # A hair of tolerance: |d* − d| that equals |d| in arithmetic must not fail for its last bit.
    extreme = np.abs(resampled - estimate.value) >= abs(estimate.value) * (1 - 1e-9)
    p_value = np.nan if np.isnan(estimate.value) else (1 + extreme.sum()) / (1 + samples)
    return Difference(*estimate, float(p_value))


def mcnemar(hit_a: NDArray, hit_b: NDArray) -> float:
    """Exact McNemar test of two systems' hits on the same examples (McNemar 1947): p-value, two-sided.

    The binomial test of n_ab, the examples that only a hits, among the n_ab + n_ba on which they disagree, at 1/2. It
    takes examples as independent: one example a user. No disagreement gives 1.

    >>> mcnemar(np.array([1, 1, 1, 0]), np.array([0, 0, 0, 0])) == 2 * (1 / 2) ** 3
    True
    """
    hit_a, hit_b = np.asarray(hit_a, dtype=bool), np.asarray(hit_b, dtype=bool)
    if hit_a.shape != hit_b.shape:
        raise ValueError(f"hits {hit_a.shape} and {hit_b.shape}: pairs of the same examples are expected")
    only_a, only_b = int((hit_a & ~hit_b).sum()), int((hit_b & ~hit_a).sum())
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def holm(p_values: Sequence[float] | Floats) -> Floats:
    """p-values adjusted for several comparisons (Holm 1979): max over the smaller ones of (m − i) · p_(i), at most 1.

    NaN (an undefined test) stays NaN and does not count among the m.

    >>> holm([0.01, 0.04, 0.03]).tolist() == [3 * 0.01, 2 * 0.03, 2 * 0.03]
    True
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p_values.shape, np.nan)
    order = [i for i in np.argsort(p_values) if not np.isnan(p_values[i])]
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _clusters(users: NDArray) -> tuple[NDArray, NDArray]:
    """Number of each example's user (N,), counted from 0, and the examples of each user (U,)."""
    _, members, sizes = np.unique(np.asarray(users), return_inverse=True, return_counts=True)
    return members, sizes


def _counts(users: int, samples: int, rng: np.random.Generator, width: int) -> Iterator[Floats]:
    """How often each user is drawn in each resample, in chunks (s, U); `width` is what a caller widens a row to."""
    step = max(1, _CHUNK // max(1, users, width))
    for start in range(0, samples if users else 0, step):
        rows = min(step, samples - start)
        drawn = rng.integers(users, size=(rows, users)) + users * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * users).reshape(rows, users).astype(np.float64)


def _resampled_means(values: Floats, users: NDArray, rng: np.random.Generator, samples: int) -> Floats:
    """Means of resamples, (samples, M)."""
    members, sizes = _clusters(users)
    sums = np.zeros((len(sizes), values.shape[1]))
    np.add.at(sums, members, values)
    parts = [(counts @ sums) / (counts @ sizes)[:, None] for counts in _counts(len(sizes), samples, rng, len(sizes))]
    return np.concatenate(parts)


def _estimate(value: float, resampled: Floats, confidence: float) -> Estimate:
    defined = resampled[~np.isnan(resampled)]
    if np.isnan(value) or not len(defined):
        return Estimate(float(value), np.nan, np.nan)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(defined, [tail, 100 - tail])
    return Estimate(float(value), float(low), float(high))
