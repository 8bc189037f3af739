"""Utilities of assets, fitted to what a customer chose: U = z(μ) − λ z(σ²) − γ z(drawdown).

Price features of C candidates (prices.py) and choices among them enter; each customer's λ and γ leave, and what three
advisers think of the candidates. N examples, T choices.

Source: Conv-FinRe (Wang et al. 2026, arXiv 2602.16990), after its released calibration (The-FinAI/Conv-FinRe); the
paper's text was not at hand.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

PENALTY, LARGEST_TASTE = 0.01, 20.0  # of Conv-FinRe's fit


class Views(NamedTuple):
    """What three advisers think of C candidates: scores (N, C), higher is better."""

    utility: Floats
    momentum: Floats
    safety: Floats


class Taste(NamedTuple):
    """What a user's choices say of risk: U = z(μ) − λ z(σ²) − γ z(drawdown)."""

    variance: float  # λ
    drawdown: float  # γ


def standardise(values: Floats) -> Floats:
    """z of each row of (N, C): (x − mean) / population deviation; 0 where a row is constant.

    >>> standardise(np.array([[1.0, 3.0], [2.0, 2.0]])).tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """
    values = finite(values)
    centred = values - values.mean(axis=1, keepdims=True)
    widest = np.abs(centred).max(axis=1, keepdims=True)
    flat = widest <= 1e-12 * np.abs(values).max(axis=1, keepdims=True)
    scaled = np.where(flat, 0.0, centred / np.where(flat, 1.0, widest))  # first, for squares of tiny numbers are 0
    return scaled / np.where(flat, 1.0, scaled.std(axis=1, keepdims=True))


def views(mean: Floats, variance: Floats, drawdown: Floats, tastes: Sequence[Taste]) -> Views:
    """The three orders of Conv-FinRe, from features (N, C) of prices before the cut-off and each example's taste (N).

    utility = z(μ) − λ z(σ²) − γ z(drawdown); momentum = μ; safety = −(λ z(σ²) + γ z(drawdown)), the same risk terms. A
    user whose λ and γ are both 0 fears nothing: all are equally safe.

    >>> one = views(*np.array([[[1.0, 3.0]], [[2.0, 4.0]], [[0.0, 0.0]]]), [Taste(0.5, 1.0)])
    >>> one.utility.tolist(), one.safety.tolist()
    ([[-0.5, 0.5]], [[0.5, -0.5]])
    """
    lam, gamma = np.array(tastes, dtype=np.float64).reshape(-1, 2).T[:, :, None]  # (N, 1) each
    safety = -(lam * standardise(variance) + gamma * standardise(drawdown))
    return Views(standardise(mean) + safety, finite(mean), safety)


def fit_taste(mean: Floats, variance: Floats, drawdown: Floats, chosen: Integers) -> Taste:
    """λ and γ of one user from T choices among C candidates: features (T, C), chosen columns (T,).

    Minimises −Σ_t log softmax(U_t)[chosen_t] + 0.01 (λ² + γ²) within 0 ≤ λ, γ ≤ 20 by L-BFGS-B from (1, 1): a
    multinomial logit on standardised features, as in Conv-FinRe's released calibration. The objective is strictly
    convex: the minimum is one, and no generator has a part in it. Without choices both are 0.

    The released calibration reads the very choices that are scored afterwards. Give this the choices before an
    example's cut-off, or say that the utility is fitted in hindsight.

    >>> steady = np.array([[0.0, 0.0]] * 9), np.array([[1.0, 2.0]] * 9), np.array([[0.0, 0.0]] * 9)
    >>> taste = fit_taste(*steady, np.zeros(9, int))
    >>> taste.variance > 1, round(taste.drawdown, 6)
    (True, 0.0)
    """
    if not len(chosen):
        return Taste(0.0, 0.0)
    base = standardise(mean)
    risks = np.stack([standardise(variance), standardise(drawdown)])  # (2, T, C)
    rows, chosen = np.arange(len(chosen)), np.asarray(chosen)

    def loss(taste: Floats) -> tuple[float, Floats]:
        utility = base - np.tensordot(taste, risks, 1)
        shifted = utility - utility.max(axis=1, keepdims=True)
        total = np.exp(shifted).sum(axis=1, keepdims=True)
        share = np.exp(shifted) / total
        gradient = (risks[:, rows, chosen] - (share * risks).sum(axis=2)).sum(axis=1) + 2 * PENALTY * taste
        nats = float((np.log(total[:, 0]) - shifted[rows, chosen]).sum())
        return nats + PENALTY * float(taste @ taste), gradient

    from scipy.optimize import minimize  # its import takes half a second of every process that converts

    options = {"ftol": 1e-14, "gtol": 1e-9, "maxiter": 1000}
    found = minimize(loss, np.ones(2), jac=True, method="L-BFGS-B", bounds=[(0.0, LARGEST_TASTE)] * 2, options=options)
    return Taste(float(found.x[0]), float(found.x[1]))


def finite(values: Floats) -> Floats:
    """The values, all of them numbers.

    Raises:
        ValueError: a candidate without prices: a defect of whoever chose the candidates.
    """
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("a candidate has no price features (NaN): candidates need prices before the cut-off")
    return values
