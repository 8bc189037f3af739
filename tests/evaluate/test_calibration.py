import numpy as np
import pytest

from recllm.errors import UserError
from recllm.evaluate import calibration


def test_a_temperature_that_was_divided_away_is_found_again():
    """Labels drawn from softmax(logits); scores that are three times too sure need T = 3."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 4))
    gumbel = rng.gumbel(size=logits.shape)
    label = (logits + gumbel).argmax(axis=1)
    assert calibration.fit_temperature(3 * logits, label) == pytest.approx(3, rel=0.05)


def test_the_minimum_in_closed_form():
    """Two classes with scores 0 and s: of ten, seven are the second, so that softmax must say 0.7: s / T = log 7/3."""
    scores = np.tile([0.0, 5.0], (10, 1))
    label = np.array([1] * 7 + [0] * 3)
    assert calibration.fit_temperature(scores, label) == pytest.approx(5 / np.log(7 / 3), rel=1e-4)


def test_scores_that_are_always_right_or_always_wrong_stay_within_the_bounds():
    """Always wrong: the flattest is the best. Always right: the sharper the better, until nothing changes any more."""
    scores = np.tile([0.0, 5.0], (4, 1))
    wrong = calibration.fit_temperature(scores, np.array([0, 0, 0, 0]))
    right = calibration.fit_temperature(scores, np.array([1, 1, 1, 1]))
    assert wrong == pytest.approx(calibration.BOUNDS[1], rel=1e-2)
    assert calibration.BOUNDS[0] < right
    assert calibration.probabilities(scores, right)[:, 1] == pytest.approx(np.ones(4), abs=1e-12)


def test_invalid_rows_are_left_out_and_stay_nan():
    scores = np.array([[0.0, 5.0]] * 10 + [[np.nan, 1.0]])
    label = np.array([1] * 7 + [0] * 3 + [0])
    assert calibration.fit_temperature(scores, label) == pytest.approx(5 / np.log(7 / 3), rel=1e-4)
    found = calibration.probabilities(scores, 2.0)
    assert np.isnan(found[-1]).all()
    assert found[:-1].sum(axis=1) == pytest.approx(np.ones(10))
    with pytest.raises(UserError, match="calibration_examples to 0"):
        calibration.fit_temperature(scores[-1:], label[-1:])


def test_a_temperature_changes_no_order():
    scores = np.random.default_rng(1).normal(size=(50, 5)) * 30
    found = calibration.probabilities(scores, 7.0)
    assert (found.argmax(axis=1) == scores.argmax(axis=1)).all()
    assert calibration.probabilities(np.full((1, 3), -900.0)).tolist() == [[1 / 3] * 3]
