"""Areas of many resamples at once, against pairs counted by hand and scikit-learn with weights, ties included."""

import numpy as np
import pytest

from recllm.evaluate import action_ranks, metrics, statistics
from recllm.evaluate.action_ranks import Draws, Ranking


def test_by_hand():
    """Cluster 0 is drawn twice, 1 once: positives 0.9 (twice) and 0.5, negatives 0.5 (twice) and 0.1."""
    score, positive = np.array([0.9, 0.5, 0.5, 0.1]), np.array([True, True, False, False])
    members = np.array([0, 1, 0, 1])
    ranking = Ranking.of(score, positive, members)
    expected = (2 * (2 + 1) + 1 * (2 / 2 + 1)) / ((2 + 1) * (2 + 1))
    assert ranking.auc(Draws.of(np.array([[2.0, 1.0], [1.0, 0.0]]), members)).tolist() == [expected, 1.0]
    assert np.isnan(ranking.auc(Draws.of(np.zeros((1, 2)), members))).all()  # nothing was drawn


def test_nothing_to_rank():
    for positive in (np.zeros(0, bool), np.ones(2, bool), np.zeros(2, bool)):
        members = np.arange(len(positive))
        ranking = Ranking.of(np.zeros(len(positive)), positive, members, members)
        draws = Draws.of(np.ones((3, len(positive))), members)
        assert np.isnan(ranking.auc(draws)).all()
        assert np.isnan(ranking.grouped(draws)).all()


def draw(rng: np.random.Generator, kinds: int, count: int = 200):
    """Scores with ties if `kinds` is small, what is positive, users, and sessions within and across users."""
    score = rng.integers(kinds, size=count) / kinds
    score[rng.random(count) < 0.1] = np.nan
    users = rng.integers(12, size=count)
    within = np.unique(users * 3 + rng.integers(3, size=count), return_inverse=True)[1]
    return score, rng.random(count) < 0.3, users, {"users": users, "within": within, "across": within % 7}


@pytest.mark.parametrize("chunk", [1, 50, 2_000_000])  # entries a block: a level, some, all
@pytest.mark.parametrize("kinds", [4, 10**6])
@pytest.mark.parametrize("clusters", ["users", "within", "across"])
def test_scikit_learn_with_weights(monkeypatch, chunk, kinds, clusters):
    roc_auc_score = pytest.importorskip("sklearn.metrics").roc_auc_score
    monkeypatch.setattr(action_ranks, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    score, positive, users, members = draw(rng, kinds)
    members = members[clusters]
    counts = rng.poisson(1, size=(9, members.max() + 1)).astype(float)
    plain, grouped = Ranking.of(score, positive, members), Ranking.of(score, positive, members, users)
    draws = Draws.of(counts, members)
    assert draws.of_cluster.dtype == np.float32
    for row, ours, of_users in zip(counts, plain.auc(draws), grouped.grouped(draws), strict=True):
        weight, filled = row[members], np.nan_to_num(score, nan=-1.0)
        assert ours == pytest.approx(roc_auc_score(positive, filled, sample_weight=weight), rel=1e-12)
        areas, sizes = [], []
        for user in range(12):
            mine = (users == user) & (weight > 0)
            if len(np.unique(positive[mine])) == 2:
                areas.append(roc_auc_score(positive[mine], filled[mine], sample_weight=weight[mine]))
                sizes.append(weight[mine].sum())
        assert of_users == pytest.approx(np.average(areas, weights=sizes), rel=1e-12)


def test_weights_that_single_precision_does_not_hold():
    """Sums beyond 2²⁴, and weights that are no whole numbers, are summed in double precision."""
    score, positive, _, members = draw(np.random.default_rng(1), 50)
    rng = np.random.default_rng(2)
    for counts in (rng.integers(2**30, size=(4, 12)).astype(float), rng.random((4, 12))):
        draws = Draws.of(counts, members["users"])
        assert draws.of_cluster.dtype == np.float64
        ours = Ranking.of(score, positive, members["users"]).auc(draws)
        assert ours == pytest.approx(metrics.auc(score, positive, counts[:, members["users"]]), rel=1e-12)


def test_intervals_are_those_of_weights_of_examples():
    """The bootstrap over counts of clusters takes the same resamples as the one over weights of examples."""
    score, positive, _, members = draw(np.random.default_rng(3), 20)
    members, first, second = members["within"], np.random.default_rng(0), np.random.default_rng(0)
    ranking = Ranking.of(score, positive, members)
    (slow,) = statistics.bootstrap_statistics([lambda w: metrics.auc(score, positive, w)], members, first, 300)
    areas = [lambda counts: ranking.auc(Draws.of(counts, members))[:, None]]
    ((fast,),) = statistics.bootstrap_counts(areas, members, second, 300)
    assert fast == pytest.approx(slow, rel=1e-12)
