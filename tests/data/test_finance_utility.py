import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.data.finance_utility import LARGEST_TASTE, Taste, fit_taste, standardise, views


def test_the_three_views_by_hand():
    mean, variance, drawdown = (np.array([row]) for row in ([1.0, 2.0, 3.0], [4.0, 4.0, 4.0], [0.0, 0.3, 0.0]))
    seen = views(mean, variance, drawdown, [Taste(5.0, 2.0)])
    z_mean = [-1 / math.sqrt(2 / 3), 0, 1 / math.sqrt(2 / 3)]
    spread = math.sqrt((2 * 0.1**2 + 0.2**2) / 3)
    z_drawdown = [-0.1 / spread, 0.2 / spread, -0.1 / spread]
    assert seen.utility[0] == pytest.approx([m - 2 * d for m, d in zip(z_mean, z_drawdown)])
    assert seen.safety[0] == pytest.approx([-2 * d for d in z_drawdown])
    assert seen.momentum.tolist() == mean.tolist()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), st.floats(0.1, 100), st.floats(-100, 100))
def test_standardised_rows_have_mean_zero_and_deviation_one(row, scale, shift):
    z = standardise(np.array([row]))[0]
    assert z.mean() == pytest.approx(0, abs=1e-9)
    assert z.std() == pytest.approx(1, abs=1e-6) or (z == 0).all()
    if np.ptp(row) > 1e-3:
        assert standardise(scale * np.array([row]) + shift)[0] == pytest.approx(z, abs=1e-3)


def loss(taste, features, chosen):
    """The objective, one choice after the other."""
    total = 0.01 * (taste[0] ** 2 + taste[1] ** 2)
    for mean, variance, drawdown, choice in zip(*(standardise(part).tolist() for part in features), chosen):
        utility = [m - taste[0] * v - taste[1] * d for m, v, d in zip(mean, variance, drawdown)]
        total += math.log(sum(math.exp(u) for u in utility)) - utility[choice]
    return total


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_no_point_of_a_grid_fits_better(seed, count):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(3, count, 4))
    chosen = rng.integers(4, size=count)
    taste = fit_taste(*features, chosen)
    assert taste == fit_taste(*features, chosen)
    assert all(0 <= value <= LARGEST_TASTE for value in taste)
    best = loss(taste, features, chosen)
    around = [(max(0, taste[0] + a), max(0, taste[1] + b)) for a in (-0.01, 0, 0.01) for b in (-0.01, 0, 0.01)]
    grid = [(a, b) for a in (0, 0.3, 1, 3, 20) for b in (0, 0.3, 1, 3, 20)]
    assert best <= min(loss(point, features, chosen) for point in around + grid) + 1e-8


def test_a_taste_is_found_again():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(3, 4000, 6))
    true = Taste(1.5, 0.4)
    utility = views(*features, [true] * 4000).utility
    chosen = (utility + rng.gumbel(size=utility.shape)).argmax(axis=1)  # a multinomial logit, McFadden 1974
    assert fit_taste(*features, chosen) == pytest.approx(true, abs=0.1)


def test_who_seeks_risk_is_given_no_negative_taste():
    variance = np.tile([1.0, 2.0, 3.0], (20, 1))
    taste = fit_taste(np.zeros((20, 3)), variance, np.zeros((20, 3)), np.full(20, 2))
    assert taste == (0, 0)
    assert fit_taste(*np.zeros((3, 0, 3)), np.zeros(0, int)) == (0, 0)


def test_candidates_without_prices_are_refused():
    with pytest.raises(ValueError, match="prices before the cut-off"):
        standardise(np.array([[1.0, np.nan]]))
