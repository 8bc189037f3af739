import numpy as np
import pytest

from recllm.evaluate import calibration


def test_a_temperature_that_was_divided_away_is_found_again():
    """Labels drawn from softmax(logits); scores that are three times too sure need T = 3."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 4))
    gumbel = rng.gumbel(size=logits.shape)
    label = (logits + gumbel).argmax(axis=1)
    found = calibration.fit_temperature(3 * logits, label)
    assert found.temperature == pytest.approx(3, rel=0.05)
    assert (found.num_examples, found.reason) == (20_000, "")


def test_the_minimum_in_closed_form():
    """Two classes with scores 0 and s: of ten, seven are the second, so that softmax must say 0.7: s / T = log 7/3."""
    scores = np.tile([0.0, 5.0], (10, 1))
    label = np.array([1] * 7 + [0] * 3)
    assert calibration.fit_temperature(scores, label).temperature == pytest.approx(5 / np.log(7 / 3), rel=1e-4)


def test_scores_that_are_always_right_or_always_wrong_have_no_temperature():
    """Always wrong: the flattest is the best. Always right: the sharper the better."""
    scores = np.tile([0.0, 5.0], (4, 1))
    wrong = calibration.fit_temperature(scores, np.array([0, 0, 0, 0]))
    right = calibration.fit_temperature(scores, np.array([1, 1, 1, 1]))
    assert wrong == (None, 4, "no temperature between 0.01 and 1000 is the best one")
    assert right.temperature is None
    assert right.reason.startswith("the right label of each of the 4 validation examples is the likeliest already")


@pytest.mark.parametrize(("gap", "found"), [(1e-5, None), (1.0, 1 / np.log(7 / 3)), (1e4, None)])
def test_a_best_temperature_outside_the_bounds_is_none(gap, found):
    """It is gap / log(7/3): far below 0.01, within, far above 1000."""
    fitted = calibration.fit_temperature(np.tile([0.0, gap], (10, 1)), np.array([1] * 7 + [0] * 3))
    assert fitted.temperature == (None if found is None else pytest.approx(found, rel=1e-4))
    assert bool(fitted.reason) == (found is None)


def test_invalid_rows_are_left_out_and_stay_nan():
    scores = np.array([[0.0, 5.0]] * 10 + [[np.nan, 1.0]])
    label = np.array([1] * 7 + [0] * 3 + [0])
    fitted = calibration.fit_temperature(scores, label)
    assert fitted.temperature == pytest.approx(5 / np.log(7 / 3), rel=1e-4)
    assert fitted.num_examples == 10
    infinite = calibration.fit_temperature(np.vstack([scores, [[-np.inf, 0.0]]]), np.append(label, 0))
    assert infinite == fitted
    found = calibration.probabilities(scores, 2.0)
    assert np.isnan(found[-1]).all()
    assert found[:-1].sum(axis=1) == pytest.approx(np.ones(10))
    reason = "none of the 1 validation examples has scores that are numbers"
    assert calibration.fit_temperature(scores[-1:], label[-1:]) == (None, 0, reason)


def test_nats_are_finite_where_probabilities_underflow():
    """exp(−900) is 0 in a double; the nats are 900, and at T = 0.5 twice that."""
    scores, label = np.array([[0.0, 900.0], [0.0, 900.0]]), np.array([0, 1])
    assert calibration.mean_nats(scores, label) == 900 / 2
    assert calibration.mean_nats(scores, label, 0.5) == 1800 / 2


def test_a_temperature_changes_no_order():
    scores = np.random.default_rng(1).normal(size=(50, 5)) * 30
    found = calibration.probabilities(scores, 7.0)
    assert (found.argmax(axis=1) == scores.argmax(axis=1)).all()
    assert calibration.probabilities(np.full((1, 3), -900.0)).tolist() == [[1 / 3] * 3]
