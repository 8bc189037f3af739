"""Temperature scaling: log-likelihoods of a few labels become probabilities that mean what they say.

Scores of validation examples enter, with their right labels; one temperature leaves, which is applied to test scores.
What is scored must never be among what it is fitted on. Imports without torch.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

BOUNDS = (0.01, 1000.0)  # of a temperature: beyond, probabilities are 0 and 1, or all alike
AT_BOUND = 1e-3  # of log T: a search that ends so near to a bound has found no minimum


class Fitted(NamedTuple):
    """A temperature, or why there is none."""

    temperature: float | None
    num_examples: int  # with scores: on which it was fitted, or was to be
    reason: str = ""  # half a sentence where there is none


def probabilities(scores: Floats, temperature: float = 1.0) -> Floats:
    """softmax(scores / temperature) of each row (N, C); a row with a NaN (invalid output) is NaN.

    >>> probabilities(np.log([[0.8, 0.2]]), 2.0).round(3).tolist() == [[0.667, 0.333]]  # √0.8 : √0.2 = 2 : 1
    True
    """
    scaled = np.asarray(scores, np.float64) / temperature
    invalid = np.isnan(scaled).any(axis=1, keepdims=True)
    filled = np.where(invalid, 0, scaled)
    shifted = np.exp(filled - filled.max(axis=1, keepdims=True, initial=-np.inf))
    return np.where(invalid, np.nan, shifted / shifted.sum(axis=1, keepdims=True))


def fit_temperature(scores: Floats, label: Integers) -> Fitted:
    """The temperature T with the fewest `mean_nats` of validation examples (Guo et al. 2017, §4.2).

    scores (N, C) are log-likelihoods; rows with one that is no finite number are left out. The nats are convex in
    1 / T, so a bounded search over log T within BOUNDS finds the only minimum. There is none where each right label is
    the likeliest already (the sharper the better: a single wrong test example would cost without bound), nor at a bound
    (the flatter the better); and no rows, no temperature.
    """
    scores, label = np.asarray(scores, np.float64), np.asarray(label)
    known = np.asarray(np.isfinite(scores).all(axis=1))
    scores, label, count = scores[known], label[known], int(known.sum())
    if not count:
        return Fitted(None, 0, f"none of the {len(known)} validation examples has scores that are numbers")
    if (scores[np.arange(count), label] >= scores.max(axis=1)).all():
        reason = f"the right label of each of the {count} validation examples is the likeliest already, so that no"
        return Fitted(None, count, f"{reason} temperature is sharp enough")
    low, high = np.log(BOUNDS)
    found = minimize_scalar(
        lambda place: mean_nats(scores, label, np.exp(place)),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-6},
    )
    if min(found.x - low, high - found.x) < AT_BOUND:
        return Fitted(None, count, f"no temperature between {BOUNDS[0]:g} and {BOUNDS[1]:g} is the best one")
    return Fitted(float(np.exp(found.x)), count)


def mean_nats(scores: Floats, label: Integers, temperature: float = 1.0) -> float:
    """−mean log softmax(scores / T)[label] of scores (N, C) and labels (N,), from the scores: nothing underflows.

    >>> mean_nats(np.array([[0.0, 900.0]]), np.array([0]))
    900.0
    """
    scaled = np.asarray(scores, np.float64) / temperature
    own = scaled[np.arange(len(scaled)), np.asarray(label)]
    return float(np.mean(np.logaddexp.reduce(scaled, axis=1) - own))
