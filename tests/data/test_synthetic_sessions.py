import json
from math import log

import numpy as np
import polars as pl
import pytest

from recllm.data import synthetic_sessions
from recllm.data.synthetic_sessions import (
    Log,
    SessionClusters,
    bayes_answers,
    best_score,
    draw_sessions,
    macro_recall,
    prompt_score,
    write_sessions,
)
from recllm.errors import UserError


def at(conflict, **changes):
    return SessionClusters(
        **{"num_clusters": 2, "num_actions": 3, "num_categories": 5, "exit_rate": 0.6, "noise": 0.2, "seed": 4}
        | {"conflict": conflict, **changes}
    )


# ---- the process ----


@pytest.mark.parametrize("conflict", [0.0, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.2, 1.0])
def test_popularity_gains_nothing_beyond_the_exit_rate(conflict, noise):
    world = at(conflict, noise=noise)
    policies = world.policies
    assert np.allclose(policies.sum(-1), 1)
    for policy in policies:  # contexts are equally frequent, and remain so: each action is drawn with its share
        assert np.allclose(policy.mean((0, 1)), [0.4 / 3, 0.4 / 3, 0.4 / 3, 0.6])
        assert np.allclose(policy[..., -1].mean(1), 0.6)  # whatever the last action was
        assert np.allclose(policy[..., :-1].sum((0, 1)), 5 * 0.4)  # from all actions together to each equally often
    assert world.own == int(conflict * 2)  # of two categories at which a cluster stays


@pytest.mark.parametrize(("conflict", "own"), [(0.0, 0), (0.4, 1), (0.5, 1), (2 / 3, 2), (1.0, 3)])
def test_the_knob_is_the_share_of_contexts_in_which_clusters_differ(conflict, own):
    world = SessionClusters(num_clusters=4, num_actions=4, num_categories=12, exit_rate=0.75, conflict=conflict)
    assert world.own == own  # of three
    differing = (world.preferred != world.preferred[:1]).any(0)  # (A, K)
    assert differing.mean() == pytest.approx(own / 3)
    staying = (world.preferred < 4).sum(0)  # (A, K) clusters that stay
    assert sorted(set(staying[differing])) == [1] * (own > 0)
    assert sorted(set(staying[~differing])) == [0, 4] * (own < 3)


@pytest.mark.parametrize("shape", [(2, 5, 0.6), (3, 10, 0.7), (4, 8, 0.75), (6, 20, 0.85)])
def test_clusters_in_full_conflict_never_stay_in_the_same_context(shape):
    clusters, categories, exit_rate = shape
    world = at(1.0, num_clusters=clusters, num_categories=categories, exit_rate=exit_rate)
    staying = (world.preferred < world.num_actions).sum(0)  # (A, K) clusters that stay
    assert staying.max() == 1  # what one of them does, the others do not: they leave
    assert staying.sum() == clusters * world.stays * world.num_actions
    same = at(0.0, num_clusters=clusters, num_categories=categories, exit_rate=exit_rate).preferred
    assert (same == same[:1]).all()


def test_without_conflict_the_cluster_is_worth_nothing():
    for noise in (0.0, 0.1, 0.3):
        world = at(0.0, noise=noise)
        for shown in (1, 2, 4):
            assert prompt_score(world, shown) == pytest.approx(best_score(world))
        drawn = draw_sessions(world, 40, 5, seed=0)
        known = bayes_answers(world, drawn, clusters=drawn.clusters)
        for other in (bayes_answers(world, drawn), bayes_answers(world, drawn, shown=2)):
            assert other.nats == pytest.approx(known.nats)
            assert other.hits == pytest.approx(known.hits)


# ---- scores by hand ----


def test_scores_of_one_who_knows_the_cluster():
    # where a cluster stays (0.4 of the contexts) its action has 0.8 + 0.2 · 0.4 / 3, where it leaves 0.8 + 0.2 · 0.6
    other, leave = 0.2 * 0.4 / 3, 0.2 * 0.6
    stay = -(0.8 + other) * log(0.8 + other) - 2 * other * log(other) - leave * log(leave)
    gone = -(0.8 + leave) * log(0.8 + leave) - 3 * other * log(other)
    for conflict in (0.0, 0.5, 1.0):
        score = best_score(at(conflict))
        assert score.nats == pytest.approx(0.4 * stay + 0.6 * gone)
        assert score.accuracy == pytest.approx(0.4 * (0.8 + other) + 0.6 * (0.8 + leave))
        # of all targets "leave" are 0.6, and 0.6 · (0.8 + leave) are answered so and right; others alike
        assert score.macro_recall == pytest.approx((3 * (0.8 + other) + (0.8 + leave)) / 4)


def test_scores_of_one_who_sees_the_context_alone():
    # 4 clusters that stay at 2 of 8 categories each: in every context one stays, and its action is known
    world = SessionClusters(num_clusters=4, num_actions=4, num_categories=8, exit_rate=0.75, noise=0.2)
    other = 0.2 * 0.25 / 4
    stay = 0.8 / 4 + other
    blind = -0.75 * log(0.75) - stay * log(stay) - 3 * other * log(other)
    score = prompt_score(world, 1)
    assert score.nats == pytest.approx(blind)
    assert score.accuracy == pytest.approx(0.75)  # the constant "leave"
    assert score.macro_recall == pytest.approx(1 / 5)
    assert best_score(world).accuracy > 0.75


def test_scores_of_one_who_sees_a_step_of_the_session():
    # without noise the first step that does not leave names the cluster; a quarter of the targets have one before them
    world = SessionClusters(num_clusters=4, num_actions=4, num_categories=8, exit_rate=0.75, noise=0.0)
    assert best_score(world) == pytest.approx((0, 1, 1))
    blind = -0.75 * log(0.75) - 0.25 * log(0.25)
    for shown in (2, 3):
        score = prompt_score(world, shown)
        assert score.nats == pytest.approx(0.75 * blind)
        assert score.accuracy == pytest.approx(0.75 * 0.75 + 0.25)
        assert score.macro_recall == pytest.approx((4 * 0.25 + 1) / 5)


def test_noise_alone_leaves_the_exit_rate():
    world = at(1.0, noise=1.0)
    entropy = -0.6 * log(0.6) - 0.4 * log(0.4 / 3)
    for score in (best_score(world), prompt_score(world, 3)):
        assert score == pytest.approx((entropy, 0.6, 1 / 4))


def test_equally_probable_actions_share_the_answer():
    world = SessionClusters(num_clusters=2, num_actions=1, num_categories=2, exit_rate=0.5, noise=0.0)
    # in every context one of two clusters stays
    assert prompt_score(world, 1) == pytest.approx((log(2), 0.5, 0.5))


def test_the_posterior_of_the_whole_history_by_hand():
    """Two sessions of one user: what the first says of the cluster counts in the second."""
    world = at(1.0)
    policies = world.policies
    context = (0, int(np.flatnonzero(world.preferred[0, 0] < 3)[0]))  # after action 0, where cluster 0 stays
    item = context[1] * world.items_per_category
    stays = int(world.preferred[0][context])
    log_ = Log(
        clusters=np.array([0]),
        users=np.array([0] * 5),
        sessions=np.array([0, 0, 0, 1, 1]),
        actions=np.array([0, stays, 3, 0, stays]),
        items=np.array([item, item, -1, item, item]),
    )
    assert log_.targets.tolist() == [1, 2, 4]
    likelihood = np.array([0.8 + 0.2 * 0.4 / 3, 0.2 * 0.4 / 3])  # of the first step: cluster 0 stays, 1 would leave
    first = likelihood.mean()
    second = policies[:, stays, context[1], 3]  # of leaving after it
    posterior = likelihood * second / (likelihood @ second)
    answers = bayes_answers(world, log_)
    expected = [first, likelihood @ second / likelihood.sum(), posterior @ likelihood]
    assert answers.nats == pytest.approx([-log(value) for value in expected])
    assert answers.labels.tolist() == [stays, 3, stays]
    alone = bayes_answers(world, log_, shown=5)  # of its session it has seen nothing but the context
    assert alone.nats == pytest.approx([-log(first), answers.nats[1], -log(first)])
    assert bayes_answers(world, log_, shown=1).nats[1] == pytest.approx(-log(second.mean()))
    known = bayes_answers(world, log_, clusters=log_.clusters)
    assert known.nats[[0, 2]] == pytest.approx([-log(likelihood[0])] * 2)
    assert known.hits[[0, 2]].tolist() == [1, 1]
    assert answers.hits[0] == 0  # without the cluster "leave" is more probable: 0.4 + 0.2 · 0.6 against 0.4 + …


def test_macro_recall_counts_actions_alike():
    assert macro_recall([1, 0.5, 0, 1], [2, 2, 0, 0]) == (0.75 + 0.5) / 2
    assert macro_recall([1, 1], [3, 3]) == 1  # of the actions that occur


# ---- agreement with samples ----


@pytest.mark.parametrize("conflict", [0.5, 1.0])
def test_exact_scores_agree_with_a_monte_carlo_estimate(conflict):
    world = SessionClusters(conflict=conflict, num_clusters=3, noise=0.15, exit_rate=0.75)
    drawn = draw_sessions(world, 3000, 10, seed=1)
    known = bayes_answers(world, drawn, clusters=drawn.clusters).score()
    assert known == pytest.approx(best_score(world), abs=0.01)
    for shown in (1, 2, 3):
        assert bayes_answers(world, drawn, shown=shown).score() == pytest.approx(prompt_score(world, shown), abs=0.01)
    scores = [prompt_score(world, shown).nats for shown in (1, 2, 3)]
    assert scores == sorted(scores, reverse=True)  # more seen, fewer nats
    assert known.nats < bayes_answers(world, drawn).score().nats < scores[-1]


def test_the_whole_history_comes_to_know_the_cluster():
    world = at(1.0)
    drawn = draw_sessions(world, 1500, 30, seed=2)
    number = drawn.sessions[drawn.targets] % 30
    first, late = number == 0, number >= 20
    answers = bayes_answers(world, drawn)
    assert answers.nats[late].mean() == pytest.approx(best_score(world).nats, abs=0.01)
    assert answers.nats[first].mean() > answers.nats[late].mean() + 0.2
    parts = bayes_answers(world, drawn, step=1000)
    assert np.array_equal(parts.nats, answers.nats)


def test_a_predictor_of_other_tables_is_worse():
    """The bound is one: another cluster's policy, or noise that is believed to be less, costs nats."""
    world = at(1.0)
    drawn = draw_sessions(world, 500, 10, seed=0)
    best = bayes_answers(world, drawn, clusters=drawn.clusters).nats.mean()
    for believed in (at(1.0, noise=0.1), at(1.0, noise=0.4), at(0.0)):
        assert bayes_answers(believed, drawn, clusters=drawn.clusters).nats.mean() > best + 0.005
    assert bayes_answers(world, drawn, clusters=1 - drawn.clusters).nats.mean() > best + 0.5


# ---- what is drawn and written ----


def test_a_drawn_log_follows_the_policies():
    world = at(1.0)
    drawn = draw_sessions(world, 4000, 5, seed=0)
    assert np.bincount(drawn.clusters).tolist() == [2000, 2000]
    targets = drawn.targets
    shares = np.bincount(drawn.actions[targets], minlength=4) / len(targets)
    assert shares == pytest.approx(world.popularity, abs=0.01)
    ends = np.flatnonzero(np.diff(drawn.sessions, append=-1))
    assert np.array_equal(ends, np.flatnonzero(drawn.actions == 3))  # "leave" ends a session, and nothing else does
    assert np.array_equal(drawn.actions == 3, drawn.items < 0)
    lengths = np.bincount(drawn.sessions) - 1  # steps
    assert [(lengths == n).mean() for n in (1, 2, 3)] == pytest.approx([0.6, 0.4 * 0.6, 0.16 * 0.6], abs=0.015)
    contexts = drawn.actions[targets - 1], drawn.items[targets - 1] // world.items_per_category
    counts = np.zeros((2, 3, 5, 4))
    np.add.at(counts, (drawn.clusters[drawn.users[targets]], *contexts, drawn.actions[targets]), 1)
    assert counts.sum(-1) / len(targets) == pytest.approx(np.full((2, 3, 5), 1 / 30), abs=0.005)
    assert counts / counts.sum(-1, keepdims=True) == pytest.approx(world.policies, abs=0.06)


def test_write_sessions_writes_an_event_log(tmp_path):
    world = SessionClusters()
    folder = write_sessions(tmp_path / "log", world, num_users=30, num_sessions=6, seed=0)
    events = pl.read_parquet(folder / "interactions.parquet")
    assert events.columns == ["user_id", "session_id", "timestamp", "action", "item_id"]
    assert set(events["action"]) == set(world.labels)
    assert events.filter(pl.col("item_id").is_null())["action"].unique().to_list() == ["leave"]
    assert (events["action"] == "leave").sum() == events["item_id"].null_count() == 30 * 6
    assert (events.group_by("user_id").agg(pl.col("timestamp").diff().min())["timestamp"] > 0).all()
    sessions = events.group_by("session_id").agg(pl.col("user_id").n_unique(), pl.col("timestamp").diff().max())
    assert sessions["user_id"].max() == 1
    assert sessions["timestamp"].max() < 120
    begins = events.group_by("user_id", "session_id").agg(pl.col("timestamp").min()).sort("session_id")
    gaps = begins.select(pl.col("timestamp").diff().over("user_id"))["timestamp"].drop_nulls()
    assert len(gaps) == 30 * 5
    assert (gaps >= 3600).all()
    items = pl.read_parquet(folder / "items.parquet")
    assert items["title"].n_unique() == world.num_items == 32
    assert items["category"].n_unique() == 8
    assert items["title"].str.ends_with(items["category"]).all()
    assert pl.read_parquet(folder / "clusters.parquet")["cluster"].n_unique() == 4
    assert SessionClusters(**json.loads((folder / "world.json").read_text())) == world
    again = write_sessions(tmp_path / "again", world, num_users=30, num_sessions=6, seed=0)
    assert pl.read_parquet(again / "interactions.parquet").equals(events)
    other = write_sessions(tmp_path / "other", world, num_users=30, num_sessions=6, seed=1)
    assert not pl.read_parquet(other / "interactions.parquet").equals(events)


def test_what_is_written_is_what_the_bounds_are_computed_of(tmp_path):
    world = SessionClusters()
    drawn = draw_sessions(world, 20, 4, seed=3)
    events = pl.read_parquet(write_sessions(tmp_path / "log", world, 20, 4, seed=3) / "interactions.parquet")
    assert events["user_id"].to_list() == drawn.users.tolist()
    assert events["action"].to_list() == [world.labels[action] for action in drawn.actions]
    assert events["item_id"].fill_null(-1).to_list() == drawn.items.tolist()
    clusters = pl.read_parquet(tmp_path / "log" / "clusters.parquet")["cluster"]
    assert clusters.to_list() == drawn.clusters.tolist()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"conflict": 1.5}, "conflict"),
        ({"noise": -0.1}, "noise"),
        ({"num_clusters": 0}, "num_clusters"),
        ({"num_actions": 9}, "num_actions"),
        ({"items_per_category": 0}, "items_per_category"),
        ({"exit_rate": 0.7}, "multiple of 1/8"),
        ({"exit_rate": 1.0}, "neither 0 nor all"),
        ({"num_clusters": 5}, "raise exit_rate"),
    ],
)
def test_an_impossible_world_is_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        SessionClusters(**wrong)


def test_what_cannot_be_computed_or_written_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="at least 1"):
        prompt_score(SessionClusters(), 0)
    with pytest.raises(UserError, match="at least 1 user"):
        write_sessions(tmp_path / "log", SessionClusters(), num_users=3, num_sessions=0, seed=0)
    assert not (tmp_path / "log").exists()
    monkeypatch.setattr(synthetic_sessions, "_MAX_BELIEFS", 3)
    with pytest.raises(UserError, match="bayes_answers"):
        prompt_score(SessionClusters(), 3)
