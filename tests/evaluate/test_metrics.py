from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from recllm.evaluate import metrics

NAN = np.nan


def test_ranks_count_what_stands_above():
    assert metrics.ranks(np.array([[3.0, 1.0, 2.0]] * 3), np.array([0, 1, 2])).tolist() == [1, 3, 2]


def test_ties_rank_the_target_below_every_equal_score():
    assert metrics.ranks(np.zeros((1, 20)), np.array([0])).tolist() == [20]


def test_nan_is_the_worst_score():
    scores = np.array([[NAN, 1.0, 2.0], [1.0, NAN, NAN], [NAN, NAN, NAN]])
    assert metrics.ranks(scores, np.array([0, 0, 0])).tolist() == [3, 1, 3]


def test_minus_infinity_of_the_target_is_below_everything():
    assert metrics.ranks(np.array([[-np.inf, NAN, -np.inf]]), np.array([0])).tolist() == [3]


def test_excluded_items_are_not_ranked_but_the_target_always_is():
    scores = np.array([[5.0, 4.0, 3.0, 2.0]])
    excluded = np.array([[True, False, True, True]])
    assert metrics.ranks(scores, np.array([3]), excluded).tolist() == [1 + 1]
    assert metrics.ranks(np.array([[5.0, NAN]]), np.array([1]), np.array([[True, True]])).tolist() == [1]


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(N, C\) and \(N,\)"):
        metrics.ranks(np.zeros((2, 3)), np.array([0]))


@given(
    hnp.arrays(np.float64, (4, 6), elements=st.sampled_from([0.0, 1.0, 2.0, NAN])),
    st.permutations(range(6)),
)
def test_ranks_do_not_hang_on_the_order_of_candidates(scores, order):
    shuffled = scores[:, order]
    target = np.array([order.index(0)] * 4)
    assert (metrics.ranks(scores, np.zeros(4, int)) == metrics.ranks(shuffled, target)).all()


def test_values_of_one_relevant_item():
    rank = np.array([1, 2, 3, 4])
    assert metrics.hit_rate(rank, 3).tolist() == [1, 1, 1, 0]
    assert metrics.ndcg(rank, 3) == pytest.approx([1 / log2(2), 1 / log2(3), 1 / log2(4), 0])
    assert metrics.mrr(rank, 3) == pytest.approx([1, 1 / 2, 1 / 3, 0])
    assert metrics.mrr(rank) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])


def test_invalid_output_is_a_miss_and_stays_in_the_denominator():
    table = metrics.ranking(np.array([1, 1, 1, 1]), np.array([True, False, True, False]), [1, 10])
    for name, values in table.items():
        assert len(values) == 4, name
        assert np.mean(values) == 2 / 4, name


def test_an_empty_list_has_no_mean():
    table = metrics.ranking(np.array([], int), np.array([], bool), [1])
    assert all(np.isnan(np.mean(values)) for values in table.values())


@pytest.mark.parametrize("k", [0, -1])
def test_cut_off_below_one_is_refused(k):
    with pytest.raises(ValueError, match="at least 1"):
        metrics.hit_rate(np.array([1]), k)


LABEL = np.array([0, 0, 0, 1])
PREDICTED = np.array([0, 0, -1, 1])  # the third is invalid


def test_closed_answers():
    assert np.mean(metrics.accuracy(LABEL, PREDICTED)) == 3 / 4
    assert metrics.balanced_accuracy(LABEL, PREDICTED) == pytest.approx([(2 / 3 + 1) / 2])
    assert metrics.f1(LABEL, PREDICTED, 0) == pytest.approx([2 * 2 / (2 * 2 + 0 + 1)])
    assert metrics.f1(LABEL, PREDICTED, 1) == pytest.approx([1])
    assert np.isnan(metrics.f1(LABEL, PREDICTED, 2)).all()


def test_weights_are_copies_of_examples():
    weights = np.array([[1, 1, 1, 1], [3, 0, 1, 2]])
    for metric in (metrics.balanced_accuracy, lambda a, b, w: metrics.f1(a, b, 0, w)):
        copied = np.repeat(np.arange(4), weights[1])
        alone = metric(LABEL[copied], PREDICTED[copied], None)
        assert metric(LABEL, PREDICTED, weights)[1] == pytest.approx(alone[0])


def test_auc_is_the_share_of_pairs_in_order():
    score, positive = np.array([0.1, 0.4, 0.4, 0.8, NAN]), np.array([False, True, False, True, True])
    pairs = [(1, 0, 1), (1, 2, 1 / 2), (3, 0, 1), (3, 2, 1), (4, 0, 0), (4, 2, 0)]
    assert metrics.auc(score, positive) == pytest.approx([sum(value for *_, value in pairs) / len(pairs)])
    copied = np.repeat(np.arange(5), [2, 1, 1, 3, 1])
    assert metrics.auc(score, positive, np.array([[2, 1, 1, 3, 1]])) == pytest.approx(
        metrics.auc(score[copied], positive[copied])
    )
    assert np.isnan(metrics.auc(np.array([0.1]), np.array([True]))).all()
    assert np.isnan(metrics.auc(np.array([]), np.array([], bool))).all()


def test_invalid_scores_tie_with_one_another():
    score, positive = np.array([NAN, NAN, 0.5]), np.array([True, False, False])
    expected = (1 / 2 + 0) / 2
    for order in ([0, 1, 2], [1, 0, 2]):
        assert metrics.auc(score[order], positive[order]) == pytest.approx([expected])


def test_probabilities():
    probability, positive = np.array([0.9, 0.15, 0.12, NAN]), np.array([True, False, True, True])
    assert metrics.brier(probability, positive) == pytest.approx([0.1**2, 0.15**2, 0.88**2, 1])
    expected = (abs(1 - 0.9) + abs((0 - 0.15) + (1 - 0.12))) / 3
    assert metrics.calibration_error(probability, positive) == pytest.approx([expected])
