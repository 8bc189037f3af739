import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.evaluate import statistics


def generator(seed=0):
    return np.random.default_rng(seed)


def test_equal_values_have_no_spread():
    (found,) = statistics.bootstrap_means(np.full((10, 1), 0.25), np.arange(10), generator())
    assert found == (0.25, 0.25, 0.25)


def test_one_user_with_many_examples_has_a_mean_and_no_interval():
    (found,) = statistics.bootstrap_means(np.arange(8.0)[:, None], np.zeros(8), generator())
    assert found == pytest.approx((3.5, np.nan, np.nan), nan_ok=True)
    (rate,) = statistics.bootstrap_means(np.ones((8, 1)), np.zeros(8), generator())
    assert rate == pytest.approx((1, np.nan, np.nan), nan_ok=True)
    difference = statistics.paired_difference(np.ones(8), np.zeros(8), np.zeros(8), generator())
    assert difference == pytest.approx((1, np.nan, np.nan, np.nan), nan_ok=True)
    (other,) = statistics.bootstrap_statistics([lambda w: w @ np.arange(8.0) / w.sum(1)], np.zeros(8), generator())
    assert other == pytest.approx((3.5, np.nan, np.nan), nan_ok=True)


@pytest.mark.parametrize(("num_users", "tested"), [(2, False), (4, False), (5, True)])
def test_fewer_than_five_users_are_not_tested(num_users, tested):
    gap = np.arange(1.0, 1 + num_users)
    found = statistics.paired_difference(gap, np.zeros(num_users), np.arange(num_users), generator())
    assert found.low < found.difference < found.high
    assert np.isfinite(found.p_value) == tested


def test_a_rate_of_zero_or_one_has_the_exact_bound_over_users():
    users = np.repeat(np.arange(50), 2)
    values = np.stack([np.ones(100), np.zeros(100), np.full(100, 0.5)], axis=1)
    one, zero, other = statistics.bootstrap_means(values, users, generator())
    # all of 50 users at a true rate q happen with q^50: q^50 = α / 2
    assert one == pytest.approx((1, 0.025 ** (1 / 50), 1))
    assert zero == pytest.approx((0, 0, 1 - 0.025 ** (1 / 50)))
    assert other == (0.5, 0.5, 0.5)


def test_a_statistic_that_never_leaves_its_bound_has_no_interval():
    found = statistics.bootstrap_statistics([lambda w: np.ones(len(w))], np.arange(9), generator(), 50)
    assert found[0] == pytest.approx((1, np.nan, np.nan), nan_ok=True)


def test_stacked_columns_have_the_figures_of_each_alone():
    values, users = generator(1).random((50, 3)), generator(2).integers(20, size=50)
    together = statistics.bootstrap_means(values, users, generator(3), 200)
    alone = [statistics.bootstrap_means(values[:, [m]], users, generator(3), 200)[0] for m in range(3)]
    assert np.allclose(together, alone)
    both = statistics.paired_differences(values[:, :2], users, generator(3), 200)
    single = [statistics.paired_difference(values[:, m], np.zeros(50), users, generator(3), 200) for m in range(2)]
    assert np.allclose(both, single)


def test_users_are_resampled_whole():
    values, users = np.array([1.0, 1.0, 1.0, 0.0]), np.array([7, 7, 7, 9])
    (found,) = statistics.bootstrap_means(values[:, None], users, generator(), samples=4000)
    # two users drawn of two: (7, 7) → 1, (9, 9) → 0, mixed → 3/4
    assert found == (3 / 4, 0.0, 1.0)
    (narrow,) = statistics.bootstrap_means(values[:, None], users, generator(), 4000, confidence=0.4)
    assert (narrow.low, narrow.high) == (3 / 4, 3 / 4)


def test_the_same_seed_gives_the_same_interval_and_chunks_do_not_matter(monkeypatch):
    values, users = generator(1).random((50, 2)), generator(2).integers(20, size=50)
    before = statistics.bootstrap_means(values, users, generator(3), 500)
    monkeypatch.setattr(statistics, "_CHUNK", 20 * 7)
    assert np.allclose(statistics.bootstrap_means(values, users, generator(3), 500), before)
    assert not np.allclose(statistics.bootstrap_means(values, users, generator(4), 500), before)


def test_no_examples_give_no_figure():
    (found,) = statistics.bootstrap_means(np.empty((0, 1)), np.empty(0), generator())
    assert np.isnan(found).all()
    assert np.isnan(statistics.paired_difference(np.empty(0), np.empty(0), np.empty(0), generator())).all()


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, covered, runs, truth = generator(0), 0, 300, 0.3
    for _ in range(runs):
        users = np.repeat(np.arange(80), rng.integers(1, 4, size=80))
        taste = rng.beta(3, 7, size=80)  # mean 0.3; examples of a user depend on each other
        values = (rng.random(len(users)) < taste[users]).astype(float)
        (found,) = statistics.bootstrap_means(values[:, None], users, rng, samples=300)
        covered += found.low <= truth <= found.high
    assert 0.90 <= covered / runs <= 0.98


def test_a_statistic_of_weights_has_the_interval_of_the_mean():
    values, users = generator(1).random(60), np.arange(60)
    (mean,) = statistics.bootstrap_means(values[:, None], users, generator(5), 400)
    found = statistics.bootstrap_statistics([lambda w: (w @ values) / w.sum(axis=1)], users, generator(5), 400)[0]
    assert found == pytest.approx(mean)


def test_resamples_without_a_figure_are_left_out():
    def needs_two(weights):
        """Share of the first user, of resamples with the first two: of three draws one or two."""
        return np.where((weights[:, :2] > 0).all(axis=1), weights[:, 0] / weights.sum(axis=1), np.nan)

    assert statistics.bootstrap_statistics([needs_two], np.arange(3), generator(), 200) == [(1 / 3, 1 / 3, 2 / 3)]


def test_a_figure_that_no_resample_moves_has_no_interval():
    """Half of each user's examples are right, whoever is drawn: that is no certainty."""
    half = np.array([1.0, 0, 1, 0, 1, 0])
    (found,) = statistics.bootstrap_statistics([lambda w: w @ half / w.sum(axis=1)], np.arange(6) // 2, generator(), 50)
    assert found.value == 1 / 2
    assert np.isnan([found.low, found.high]).all()


def test_the_p_value_of_the_paired_bootstrap_by_hand():
    a, b, users = np.array([1.0, 1.0, 0.0, 0.0, 0.0]), np.zeros(5), np.arange(5)
    found = statistics.paired_difference(a, b, users, generator(), samples=999)
    # d = 2/5; a resample's d* is n/5, n the draws of users 0 and 1: |d* − d| ≥ d for n = 0, 4 and 5
    drawn = np.random.default_rng(0).integers(5, size=(999, 5))
    extreme = np.isin((drawn < 2).sum(axis=1), (0, 4, 5)).sum()
    assert (found.difference, found.p_value) == (2 / 5, (1 + extreme) / (1 + 999))


def test_a_clear_difference_is_seen_and_none_is_not():
    noise = generator(1).normal(size=200)
    far = statistics.paired_difference(noise + 1, noise, np.arange(200), generator())
    assert (far.difference, far.p_value) == pytest.approx((1, 1 / 2001))
    other = statistics.paired_difference(noise, generator(2).normal(size=200), np.arange(200), generator())
    assert other.low < 0 < other.high
    assert other.p_value > 0.05


def test_pairs_must_be_pairs():
    with pytest.raises(ValueError, match="the same examples"):
        statistics.paired_difference(np.zeros(2), np.zeros(3), np.zeros(2), generator())


def test_mcnemar_counts_disagreements_only():
    a, b = np.array([1] * 6 + [0] * 2 + [1] * 50), np.array([0] * 6 + [1] * 2 + [1] * 50)
    # 6 against 2 of 8: twice the tail P(X ≥ 6) = (28 + 8 + 1) / 2^8
    assert statistics.mcnemar(a, b) == pytest.approx(2 * (28 + 8 + 1) / 2**8)
    assert statistics.mcnemar(a, a) == 1


def test_holm_by_hand():
    # sorted .005 .01 .03 .04 → ×4, ×3, ×2, ×1, never below the one before
    found = statistics.holm([0.01, 0.04, 0.03, 0.005])
    assert found == pytest.approx([3 * 0.01, 2 * 0.03, 2 * 0.03, 4 * 0.005])
    assert statistics.holm([0.6, 0.7]) == pytest.approx([1, 1])
    assert statistics.holm([]).tolist() == []


def test_holm_leaves_undefined_tests_out():
    assert statistics.holm([np.nan, 0.02]) == pytest.approx([np.nan, 0.02], nan_ok=True)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_only_raises_and_keeps_the_order(p_values):
    found = statistics.holm(p_values)
    assert (found >= np.array(p_values) - 1e-12).all()
    assert (np.diff(found[np.argsort(p_values, kind="stable")]) >= 0).all()


# ---- lifts ----


def test_a_lift_is_the_weighted_share_over_the_share_of_all():
    weights = np.array([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9], [0.6, 0.4], [0.3, 0.7]])
    shares = np.array([[1.0], [0.0], [0.5], [0.25], [0.0]])
    ((first, second),) = statistics.bootstrap_lifts(weights, shares, np.random.default_rng(0))
    assert first.value == pytest.approx((0.8 + 0.05 + 0.15) / 2.3 / 0.35)
    assert second.value == pytest.approx((0.2 + 0.45 + 0.1) / 2.7 / 0.35)


def test_lifts_of_an_even_gate_are_one_without_any_doubt():
    shares = np.random.default_rng(1).random((30, 4))
    found = statistics.bootstrap_lifts(np.full((30, 3), 1 / 3), shares, np.random.default_rng(0))
    for lift in (lift for row in found for lift in row):
        assert lift == pytest.approx((1, 1, 1))


def test_intervals_of_lifts_hold_for_all_at_once():
    # independent weights and shares: no lift is off 1, so an interval that leaves it out is wrong; there are 40 a run
    wrong = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        found = statistics.bootstrap_lifts(rng.dirichlet([3] * 4, 100), rng.random((100, 10)), rng, samples=200)
        wrong += any(lift.low > 1 or lift.high < 1 for row in found for lift in row)
    assert wrong / 40 <= 0.15  # one by one, nine runs in ten would have such an interval


def test_what_cannot_be_resampled_has_no_interval():
    rng = np.random.default_rng(0)
    ((few,),) = statistics.bootstrap_lifts(np.ones((4, 1)), np.ones((4, 1)), rng)
    assert few.value == 1
    assert np.isnan(few.low)
    one_user, nobody = np.eye(20)[:, :1], np.zeros((20, 1))
    rare, never = statistics.bootstrap_lifts(rng.random((20, 1)), np.concatenate([one_user, nobody], axis=1), rng)
    assert np.isnan(rare[0].low)  # missing from many resamples
    assert np.isnan(never[0].value)


def test_no_groups_have_no_lifts():
    assert statistics.bootstrap_lifts(np.ones((1, 4)), np.empty((1, 0)), np.random.default_rng(0)) == []


# ---- clusters ----


def test_mcnemar_of_clusters_is_mcnemars_own_where_each_has_one_example():
    from scipy.stats import chi2

    gaps = np.array([1.0] * 7 + [-1.0] * 3 + [0.0] * 40)
    assert statistics.clustered_mcnemar(gaps) == pytest.approx(chi2.sf((7 - 3) ** 2 / (7 + 3), 1))
    assert statistics.clustered_mcnemar(np.zeros(5)) == 1


def test_mcnemar_of_clusters_rejects_as_often_as_it_says():
    """No difference in mean, examples of a cluster alike: 5% of runs are rejected; one example at a time it is more."""
    rng, clustered, plain, runs = generator(0), 0, 0, 600
    for _ in range(runs):
        lean = rng.choice([-0.4, 0.4], size=60)[:, None]  # of a cluster, towards a or b
        a, b = (rng.random((60, 8)) < 0.5 + lean / 2), (rng.random((60, 8)) < 0.5 - lean / 2)
        clustered += statistics.clustered_mcnemar(a.mean(axis=1) - b.mean(axis=1)) < 0.05
        plain += statistics.mcnemar(a.ravel(), b.ravel()) < 0.05
    assert 0.03 <= clustered / runs <= 0.08
    assert plain / runs > 0.1


def test_several_figures_at_once_are_those_one_by_one():
    values, users = generator(1).random((60, 2)), np.arange(60) // 2
    ((first, second),) = statistics.bootstrap_columns(
        [lambda w: (w @ values) / w.sum(axis=1, keepdims=True)], users, generator(5), 300
    )
    alone = statistics.bootstrap_statistics(
        [lambda w, c=c: (w @ values[:, c]) / w.sum(axis=1) for c in (0, 1)], users, generator(5), 300
    )
    for ours, one in zip((first, second), alone, strict=True):
        assert ours == pytest.approx(one)
