"""Intervals and tests over users, in NumPy; of the tasks about actions over sessions, which then stand for "users".

Per-example values and the user of each example enter; estimates with intervals and p-values leave. Examples of one user
depend on each other, so users are what is resampled (cluster bootstrap; Davison & Hinkley 1997, §3.8), never examples.
Randomness comes in as a generator: the same seed gives every system the same resamples.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, chi2

Floats = NDArray[np.float64]

FEW_USERS = 5  # with fewer users nothing is tested, and with fewer sessions that hold a class it has no intervals
_CHUNK = 4_000_000  # entries of a resampling matrix held at once: 32 MB


class Estimate(NamedTuple):
    """A figure and its interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """A − B on the same examples, its interval and the two-sided p-value of "no difference"; NaN where undefined."""

    difference: float
    low: float
    high: float
    p_value: float


def as_json(estimate: Estimate) -> dict[str, float | None]:
    """{"value", "low", "high"}; what is undefined is null.

    >>> as_json(Estimate(0.5, np.nan, 0.75))
    {'value': 0.5, 'low': None, 'high': 0.75}
    """
    return {name: float(value) if np.isfinite(value) else None for name, value in estimate._asdict().items()}


def bootstrap_means(
    values: Floats, users: NDArray, rng: np.random.Generator, samples: int = 2000, confidence: float = 0.95
) -> list[Estimate]:
    """Mean over examples and percentile interval (Efron 1979) of each column of values (N, M), resampling users.

    One resample's mean is Σ_u c_u Σ_{i of u} v_i / Σ_u c_u n_u, with c_u the times that user u was drawn. Users are
    drawn once for all columns: stack whatever is about the same examples.

    A column of zeros or of ones only is a rate that no resample can move. Its interval ends in the exact bound over the
    U users (Clopper & Pearson 1934): [0, 1 − (α/2)^(1/U)] of zeros, [(α/2)^(1/U), 1] of ones, α = 1 − confidence; it
    holds for the mean of anything within [0, 1]. Fewer than two users have no interval: NaN.

    >>> bootstrap_means(np.array([[1.0], [1.0]]), np.array([7, 8]), np.random.default_rng(0), confidence=0.5)
    [Estimate(value=1.0, low=0.5, high=1.0)]
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return [Estimate(np.nan, np.nan, np.nan)] * values.shape[1]
    num_users = len(np.unique(users))
    means = _resampled_means(values, users, rng, samples)
    return [
        _rate_bound(column[0], num_users, confidence)
        if num_users > 1 and column[0] in (0, 1) and (column == column[0]).all()
        else _estimate(value, resampled, confidence)
        for value, column, resampled in zip(values.mean(axis=0), values.T, means.T, strict=True)
    ]


def bootstrap_statistics(
    statistics: Sequence[Callable[[Floats], Floats]],
    users: NDArray,
    rng: np.random.Generator,
    samples: int = 2000,
    confidence: float = 0.95,
) -> list[Estimate]:
    """Percentile intervals of any figures that `statistics` compute from weights of examples (S, N) → (S,).

    Resamples in which a figure is undefined (NaN: a label that was not drawn) are left out of its interval. A figure
    that is the same in every resample has no interval, as none of them says how far it may move; nor have fewer than
    two users.
    """
    columns = [functools.partial(_as_column, statistic) for statistic in statistics]
    return [found for (found,) in bootstrap_columns(columns, users, rng, samples, confidence)]


def bootstrap_columns(
    statistics: Sequence[Callable[[Floats], Floats]],
    users: NDArray,
    rng: np.random.Generator,
    samples: int = 2000,
    confidence: float = 0.95,
) -> list[list[Estimate]]:
    """The same where each of `statistics` computes several figures at once, (S, N) → (S, M): M estimates of each."""
    members, sizes = clusters_of(users)

    def compute(counts: Floats) -> list[Floats]:
        weights = counts[:, members]
        return [statistic(weights) for statistic in statistics]

    return _bootstrap(compute, len(sizes), len(members), rng, samples, confidence)


def bootstrap_counts(
    statistics: Sequence[Callable[[Floats], Floats]],
    users: NDArray,
    rng: np.random.Generator,
    samples: int = 2000,
    confidence: float = 0.95,
    width: int = 0,
) -> list[list[Estimate]]:
    """The same, of figures that are computed from how often each user was drawn, (S, U) → (S, M).

    Users are in the order of `clusters_of`. There are fewer of them than examples: what can be summed up by user
    beforehand is many times faster so, and the same figure of the same resamples. `width`: numbers that a statistic
    makes of one resample, where that is more than U; it bounds how many resamples are in memory together.
    """
    clusters = len(clusters_of(users)[1])
    width = max(clusters, width)
    return _bootstrap(lambda counts: [one(counts) for one in statistics], clusters, width, rng, samples, confidence)


def _bootstrap(
    compute: Callable[[Floats], list[Floats]],
    clusters: int,
    width: int,
    rng: np.random.Generator,
    samples: int,
    confidence: float,
) -> list[list[Estimate]]:
    """Estimates of what `compute` makes of counts (S, U), a list of (S, M); `width` as in `_counts`."""
    values = [found[0] for found in compute(np.ones((1, clusters)))]  # (M,) each
    parts: list[list[Floats]] = [[] for _ in values]
    for counts in _counts(clusters if clusters > 1 else 0, samples, rng, width):
        for part, found in zip(parts, compute(counts), strict=True):
            part.append(found)
    estimates = []
    for value, part in zip(values, parts, strict=True):
        resampled = np.concatenate(part) if part else np.empty((0, len(value)))
        estimates.append([_moving(one, column, confidence) for one, column in zip(value, resampled.T, strict=True)])
    return estimates


def _as_column(statistic: Callable[[Floats], Floats], weights: Floats) -> Floats:
    return statistic(weights)[:, None]


def _moving(value: float, resampled: Floats, confidence: float) -> Estimate:
    """`_estimate`, without an interval where resamples are all alike but for their last bits."""
    estimate = _estimate(float(value), resampled, confidence)
    stuck = estimate.high - estimate.low <= 1e-12
    return Estimate(estimate.value, np.nan, np.nan) if stuck else estimate


def paired_difference(
    a: Floats,
    b: Floats,
    users: NDArray,
    rng: np.random.Generator,
    samples: int = 2000,
    confidence: float = 0.95,
) -> Difference:
    """Mean of a − b over the same examples: `paired_differences` of one pair.

    >>> paired_difference(np.ones(5), np.ones(5), np.arange(5), np.random.default_rng(0)).p_value
    1.0
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.shape != np.shape(users):
        raise ValueError(f"a {a.shape}, b {b.shape} and users {np.shape(users)}: the same examples are expected")
    return paired_differences((a - b)[:, None], users, rng, samples, confidence)[0]


def paired_differences(
    gaps: Floats, users: NDArray, rng: np.random.Generator, samples: int = 2000, confidence: float = 0.95
) -> list[Difference]:
    """Mean of each column of gaps (N, M), a − b by example, with percentile interval and p-value over users.

    p = (1 + #{s : |d*_s − d| ≥ |d|}) / (1 + samples): the resampled differences, moved to mean 0, show what chance
    alone gives (Davison & Hinkley 1997, §4.4). No difference anywhere gives p = 1. Fewer than two users have no
    interval, fewer than FEW_USERS no p-value (NaN): so few resamples differ that the smallest p would mean nothing.
    """
    gaps = np.asarray(gaps, dtype=np.float64)
    if not len(gaps):
        return [Difference(np.nan, np.nan, np.nan, np.nan)] * gaps.shape[1]
    few = len(np.unique(users)) < FEW_USERS
    means, found = _resampled_means(gaps, users, rng, samples), []
    for value, resampled in zip(gaps.mean(axis=0), means.T, strict=True):
        # A hair of tolerance: |d* − d| that equals |d| in arithmetic must not fail for its last bit.
        extreme = np.abs(resampled - value) >= abs(value) * (1 - 1e-9)
        p_value = np.nan if few or np.isnan(value) else (1 + extreme.sum()) / (1 + samples)
        found.append(Difference(*_estimate(value, resampled, confidence), float(p_value)))
    return found


def bootstrap_lifts(
    weights: Floats, shares: Floats, rng: np.random.Generator, samples: int = 2000, confidence: float = 0.95
) -> list[list[Estimate]]:
    """How much more of each group there is where a weight is large: lift (G, K) with simultaneous intervals.

        lift(g, k) = (Σ_u w_uk s_ug / Σ_u w_uk) / (Σ_u s_ug / U)

    with weights (U, K) ≥ 0 and shares (U, G) of each user, a row a user; users are what is resampled. There are G · K
    lifts, of which a twentieth would leave a 95% interval by chance: so all intervals together hold with `confidence`.
    They are exp(log lift ± c · se), se the deviation of the resampled logarithms and c the quantile of their largest
    studentised distance over all lifts (max-t bootstrap; Davison & Hinkley 1997, §4.4; Westfall & Young 1993).

    A lift that is undefined or zero (a group without any weight) has no interval; nor have fewer than FEW_USERS users.

    >>> bootstrap_lifts(np.ones((6, 1)), np.eye(6)[:, :1], np.random.default_rng(0))[0][0].value
    1.0
    """
    weights, shares = np.asarray(weights, dtype=np.float64), np.asarray(shares, dtype=np.float64)
    (users, experts), groups = weights.shape, shares.shape[1]
    if not users or not groups:
        return [[Estimate(np.nan, np.nan, np.nan)] * experts for _ in range(groups)]
    products = (shares[:, :, None] * weights[:, None, :]).reshape(users, groups * experts)
    columns = np.concatenate([products, weights, shares, np.ones((users, 1))], axis=1)
    value = _log_lifts(columns.sum(axis=0)[None], groups, experts)[0]  # (G · K,)
    parts = [_log_lifts(c @ columns, groups, experts) for c in _counts(users, samples, rng, columns.shape[1])]
    half = (
        _simultaneous(value, np.concatenate(parts), confidence) if users >= FEW_USERS else np.full_like(value, np.nan)
    )
    found = [Estimate(*map(float, np.exp([v, v - h, v + h]))) for v, h in zip(value, half, strict=True)]
    return [found[place : place + experts] for place in range(0, groups * experts, experts)]


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


def clustered_mcnemar(gaps: Floats) -> float:
    """McNemar's test of two systems' hits where clusters hold several examples each: p-value, two-sided.

    gaps (K,) hold each cluster's mean difference d_k = (b_k − c_k) / n_k, with b_k the examples that only the first
    system hits, c_k those that only the second does. Under the hypothesis that both are alike

        T = (Σ_k d_k)² / Σ_k d_k²  ~  χ² with one degree of freedom          (Durkalski et al. 2003, Stat. Med. 22:2417)

    which takes clusters as independent, and is McNemar's own (b − c)² / (b + c) where each has one example. No
    disagreement gives 1.

    >>> gaps = np.array([1.0, 1, 1, 1, 1, 1, 1, 1, 1, -1])  # b = 9, c = 1
    >>> clustered_mcnemar(gaps) == float(chi2.sf((9 - 1) ** 2 / (9 + 1), 1))
    True
    """
    gaps = np.asarray(gaps, dtype=np.float64)
    squares = float((gaps**2).sum())
    return float(chi2.sf(gaps.sum() ** 2 / squares, 1)) if squares else 1.0


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


def clusters_of(users: NDArray) -> tuple[NDArray, NDArray]:
    """Number of each example's user (N,), counted from 0 in ascending order, and the examples of each user (U,).

    >>> [found.tolist() for found in clusters_of(np.array([9, 4, 9]))]
    [[1, 0, 1], [1, 2]]
    """
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
    """Means of resamples, (samples, M); none (0, M) of fewer than two users, who are the same in every resample."""
    members, sizes = clusters_of(users)
    if len(sizes) < 2:
        return np.empty((0, values.shape[1]))
    starts = np.cumsum(sizes) - sizes
    sums = np.add.reduceat(values[np.argsort(members, kind="stable")], starts, axis=0)  # (U, M)
    parts = [(counts @ sums) / (counts @ sizes)[:, None] for counts in _counts(len(sizes), samples, rng, len(sizes))]
    return np.concatenate(parts)


def _log_lifts(sums: Floats, groups: int, experts: int) -> Floats:
    """log lift (S, G · K) of the sums (S, …) over users of products, weights, shares and ones."""
    products, weights, shares, count = np.split(sums, np.cumsum([groups * experts, experts, groups]), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        within = products.reshape(-1, groups, experts) / weights[:, None, :]
        return np.asarray(np.log(within / (shares / count)[:, :, None]).reshape(len(sums), -1))


def _simultaneous(value: Floats, resampled: Floats, confidence: float) -> Floats:
    """Half widths (M,) about value (M,) that hold for all at once; NaN where a resample is undefined, 0 where fixed."""
    known = np.isfinite(value) & np.isfinite(resampled).all(axis=0)
    half = np.where(known, 0.0, np.nan)
    deviation = np.zeros(len(value))
    deviation[known] = resampled[:, known].std(axis=0)
    # a hair of tolerance: a lift of exactly 1 for everybody moves by its last bits only
    moving = known & (deviation > 1e-9)
    if moving.any():
        distance = np.abs(resampled[:, moving] - value[moving]) / deviation[moving]
        half[moving] = np.quantile(distance.max(axis=1), confidence) * deviation[moving]
    return half


def _estimate(value: float, resampled: Floats, confidence: float) -> Estimate:
    defined = resampled[~np.isnan(resampled)]
    if np.isnan(value) or not len(defined):
        return Estimate(float(value), np.nan, np.nan)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(defined, [tail, 100 - tail])
    return Estimate(float(value), float(low), float(high))


def _rate_bound(rate: float, num_users: int, confidence: float) -> Estimate:
    """A rate of exactly 0 or 1 with its Clopper–Pearson bound over users."""
    bound = float(((1 - confidence) / 2) ** (1 / num_users))
    return Estimate(1.0, bound, 1.0) if rate else Estimate(0.0, 0.0, 1 - bound)
