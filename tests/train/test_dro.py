import json
import math

import numpy as np
import pytest

from recllm.errors import UserError
from recllm.train.dro import GroupDro, Groups


def two_groups(share: float = 0.9, step_size: float = 0.5) -> GroupDro:
    return GroupDro(Groups(["frequent", "rare"], np.array([share, 1 - share])), step_size)


def test_it_begins_with_equal_weights_which_are_balanced_ones():
    dro = two_groups()
    assert dro.weights.tolist() == pytest.approx([0.5, 0.5])
    assert dro.factors.tolist() == pytest.approx([0.5 / 0.9, 0.5 / 0.1])  # N / (C · n_c)


def test_a_step_by_hand():
    """q ← q exp(η ℓ) / Z with η = 0.5 and losses of 2 and 6 nats, which are means over 4 and 1 tokens."""
    dro = two_groups()
    dro.update(np.array([8.0, 6.0]), np.array([4.0, 1.0]))
    frequent, rare = 0.5 * math.exp(0.5 * 2), 0.5 * math.exp(0.5 * 6)
    assert dro.weights.tolist() == pytest.approx([frequent / (frequent + rare), rare / (frequent + rare)])
    dro.update(np.array([1.0, 1.0]), np.array([1.0, 1.0]))  # equal losses change nothing
    assert dro.weights.tolist() == pytest.approx([frequent / (frequent + rare), rare / (frequent + rare)])


def test_a_group_that_a_step_lacks_grows_by_what_is_known_of_it():
    """Nine steps without the rare group, which does worse: it must not lose weight for being rare."""
    dro = two_groups()
    dro.update(np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    for _ in range(9):
        dro.update(np.array([1.0, 0.0]), np.array([1.0, 0.0]))
    odds = math.exp(0.5 * 10 * 3) / math.exp(0.5 * 10 * 1)
    assert dro.weights[1] == pytest.approx(odds / (1 + odds))


def test_a_group_that_was_never_met_keeps_its_place():
    dro = GroupDro(Groups(["a", "b", "c"], np.array([0.5, 0.4, 0.1])), 1.0)
    dro.update(np.zeros(3), np.zeros(3))  # a step in which nothing counted
    assert dro.weights.tolist() == pytest.approx([1 / 3] * 3)
    dro.update(np.array([1.0, 3.0, 0.0]), np.array([1.0, 1.0, 0.0]))
    total = math.exp(1) + math.exp(3) + math.exp(2)  # c grows by the mean of the others
    assert dro.weights.tolist() == pytest.approx([math.exp(1) / total, math.exp(3) / total, math.exp(2) / total])


def test_a_weight_that_has_all_but_vanished_comes_back():
    dro = two_groups(step_size=1.0)
    for _ in range(100):
        dro.update(np.array([0.0, 20.0]), np.array([1.0, 1.0]))
    assert dro.weights.tolist() == [0.0, 1.0]  # e^-2000
    for _ in range(101):
        dro.update(np.array([20.0, 0.0]), np.array([1.0, 1.0]))
    assert dro.weights.tolist() == pytest.approx([1.0, math.exp(-20)])


def test_what_is_logged_is_a_mean_since_the_last_log():
    dro = two_groups()
    dro.update(np.array([8.0, 6.0]), np.array([4.0, 1.0]))
    dro.update(np.array([4.0, 0.0]), np.array([2.0, 0.0]))
    logged = dro.logged()
    assert logged["dro_loss/frequent"] == pytest.approx((8 + 4) / (4 + 2))
    assert logged["dro_loss/rare"] == pytest.approx(6)
    assert logged["dro_weight/frequent"] + logged["dro_weight/rare"] == pytest.approx(1)
    assert set(dro.logged()) == {"dro_weight/frequent", "dro_weight/rare"}  # nothing was met since


def test_a_document_brings_everything_back_to_the_last_bit():
    dro, other = two_groups(), two_groups()
    dro.update(np.array([0.1, 0.0]), np.array([0.3, 0.0]))
    other.restore(json.loads(json.dumps(dro.document())), "here")
    assert np.array_equal(other.log_weights, dro.log_weights)
    assert np.array_equal(other.losses, dro.losses, equal_nan=True)
    third = GroupDro(Groups(["frequent", "other"], np.array([0.5, 0.5])), 0.5)
    with pytest.raises(UserError, match=r"here has the groups \['frequent', 'rare'\], this run has"):
        third.restore(dro.document(), "here")
