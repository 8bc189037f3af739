"""Temperature scaling: log-likelihoods of a few labels become probabilities that mean what they say.

Scores of validation examples enter, with their right labels; one temperature leaves, which is applied to test scores.
What is scored must never be among what it is fitted on. Imports without torch.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from recllm.errors import UserError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

BOUNDS = (0.01, 1000.0)  # of a temperature: beyond, probabilities are 0 and 1, or all alike


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


def fit_temperature(scores: Floats, label: Integers) -> float:
    """The temperature T with the fewest nats, −mean log softmax(scores / T)[label] (Guo et al. 2017, §4.2).

    The nats are convex in 1 / T, so a bounded search over log T within BOUNDS finds the only minimum; where there is
    none (labels that are always the likeliest) it stops where nothing changes any more, or at a bound. scores (N, C)
    are log-likelihoods of validation examples; rows with a NaN are left out.

    Raises:
        UserError: no row without NaN.
    """
    scores, label = np.asarray(scores, np.float64), np.asarray(label)
    known = ~np.isnan(scores).any(axis=1)
    if not known.any():
        raise UserError("no example has scores to fit a temperature on: set protocol.actions.calibration_examples to 0")
    scores, label = scores[known], label[known]
    own = scores[np.arange(len(scores)), label]

    def nats(log_temperature: float) -> float:
        scale = np.exp(-log_temperature)
        return float(np.mean(np.logaddexp.reduce(scores * scale, axis=1) - own * scale))

    low, high = np.log(BOUNDS)
    found = minimize_scalar(nats, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))
