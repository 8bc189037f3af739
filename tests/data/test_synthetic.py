import json
from math import log

import numpy as np
import polars as pl
import pytest

from recllm.data import synthetic
from recllm.data.sequences import prepare
from recllm.data.synthetic import Clusters, bayes_scores, best_score, draw_sequences, window_score, write_clusters
from recllm.errors import UserError
from recllm.recipe import DataSection, FilterSection, InteractionsSource, ItemsSource, SplitSection


def test_a_synthetic_log_looks_like_a_log_and_prepares(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "_BATCH", 999)  # several batches
    folder = synthetic.write_interactions(tmp_path / "log", 20_000, 300, 500, seed=0)
    frame = pl.read_parquet(folder / "interactions.parquet")
    assert frame.height == 20_000
    assert frame["user_id"].n_unique() == 300
    steps = frame.group_by("user_id").agg((pl.col("timestamp").diff() < 0).sum().alias("back"))
    assert steps["back"].sum() == 0
    sessions = frame.group_by("session_id").agg(pl.col("user_id").n_unique(), pl.len())
    assert sessions["user_id"].max() == 1
    assert sessions["len"].max() == 8
    shares = np.sort(frame.group_by("item_id").len()["len"].to_numpy())[::-1] / 20_000
    expected = 1 / np.arange(1, 501) / (1 / np.arange(1, 501)).sum()  # Zipf, exponent 1
    assert abs(shares[:5] - expected[:5]).max() < 0.02
    data = DataSection(
        interactions=InteractionsSource(path=str(folder / "interactions.parquet")),
        items=ItemsSource(path=str(folder / "items.parquet")),
    )
    prepared = prepare(data, FilterSection(), SplitSection(), 0, tmp_path)
    assert (prepared.counts["users"], prepared.counts["items"], prepared.counts["interactions"]) == (300, 500, 20_000)


def test_a_synthetic_log_of_events(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "_BATCH", 999)
    folder = synthetic.write_events(tmp_path / "log", 20_000, 300, 500, seed=0)
    frame = pl.read_parquet(folder / "interactions.parquet")
    assert frame.columns == ["user_id", "item_id", "timestamp", "session_id", "action", "query"]
    shares = dict(frame.group_by("action").len().with_columns(pl.col("len") / 20_000).iter_rows())
    assert shares.keys() == {"view", "cart", "buy", "save", "search"}
    assert abs(shares["view"] - 6 / 10) < 0.02
    searches = frame.filter(pl.col("action") == "search")
    assert searches["item_id"].null_count() == searches.height
    assert (searches["query"].str.split(" ").list.len() == 2).all()
    others = frame.filter(pl.col("action") != "search")
    assert (others["item_id"].null_count(), (others["query"] != "").sum()) == (0, 0)
    assert frame.group_by("session_id").len()["len"].max() == 8
    again = synthetic.write_events(tmp_path / "again", 20_000, 300, 500, seed=0)
    assert pl.read_parquet(again / "interactions.parquet").equals(frame)


def test_the_seed_decides(tmp_path):
    one, same, other = (
        pl.read_parquet(synthetic.write_interactions(tmp_path / name, 500, 10, 20, seed) / "interactions.parquet")
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert one.equals(same)
    assert not one.equals(other)


# ---- hidden clusters ----

SMALL = Clusters(num_clusters=3, num_tiers=3, tier_size=5, focus=0.6, jump=0.1, seed=4)


def at(conflict, **changes):
    return Clusters(
        **{"num_clusters": 3, "num_tiers": 3, "tier_size": 5, "focus": 0.6, "jump": 0.1, "seed": 4, **changes},
        conflict=conflict,
    )


@pytest.mark.parametrize("conflict", [0.0, 0.5, 1.0])
def test_rows_of_clusters_are_permutations_and_popularity_is_stationary(conflict):
    world = at(conflict)
    tables = world.tables
    assert np.allclose(tables.sum(2), 1)
    assert np.allclose(np.sort(tables, axis=2), np.sort(tables[:1], axis=2))  # every cluster is as predictable
    for table in tables:
        assert np.allclose(world.popularity @ table, world.popularity)
    differing = (~np.isclose(tables, tables[:1])).any(axis=(0, 2))  # items after which clusters differ
    assert np.array_equal(differing, world.conflicting[world.tiers])


def test_the_knob_goes_from_one_table_to_disjoint_successors():
    assert not at(0.0).conflicting.any()
    assert at(1.0).conflicting.all()
    share = at(0.6).popularity[at(0.6).conflicting[at(0.6).tiers]].sum()
    assert 0 < share <= 0.6
    successors = SMALL.successors
    for k, following in enumerate(successors):
        assert sorted(following) == list(range(SMALL.num_items))  # a permutation
        assert (following // SMALL.tier_size == SMALL.tiers).all()  # within the tier
        assert not (following == np.delete(successors, k, axis=0)).any()  # no arrow is shared
        assert (following != np.arange(SMALL.num_items)).all()


def test_popularity_gains_nothing_over_uniform_once_the_last_item_is_known():
    popularity = SMALL.popularity
    assert np.allclose(popularity[:5].sum() / popularity[5:10].sum(), 2)  # Zipf over tiers
    assert popularity[0] > popularity[-1]
    candidates = popularity[SMALL.successors]  # (C, N): popularity of each item's successors
    assert np.allclose(candidates, candidates[:1])  # choosing among them by popularity is choosing at random
    mixed = SMALL.tables.mean(0)  # what is known without the cluster
    among = mixed[np.arange(SMALL.num_items), SMALL.successors]
    assert np.allclose(among, among[:1])  # all successors are equally probable, too


def test_scores_by_arithmetic():
    world = at(1.0, jump=0.0)
    best = best_score(world)
    assert best.nats == pytest.approx(-0.6 * log(0.6) - 2 * 0.2 * log(0.2))
    assert best.hit_rate == pytest.approx(0.6)
    blind = window_score(world, 1)
    assert blind.nats == pytest.approx(log(3))
    assert blind.hit_rate == pytest.approx(1 / 3)
    # one transition: posterior 0.6, 0.2, 0.2; the same successor again 0.6² + 2 · 0.2², another one
    again = 0.6**2 + 2 * 0.2**2
    other = (1 - again) / 2
    assert window_score(world, 2).nats == pytest.approx(-again * log(again) - 2 * other * log(other))
    assert window_score(at(0.0, jump=0.0), 1) == pytest.approx(best)  # nothing to know about the cluster


@pytest.mark.parametrize("conflict", [0.5, 1.0])
def test_analytic_scores_agree_with_a_monte_carlo_estimate(conflict):
    world = at(conflict)
    clusters, sequences = draw_sequences(world, 6000, 12, seed=1)
    known, hits = bayes_scores(world, sequences, clusters=clusters)
    assert known.mean() == pytest.approx(best_score(world).nats, abs=0.02)
    assert hits.mean() == pytest.approx(best_score(world).hit_rate, abs=0.01)
    for window in (1, 2, 3):
        nats, hits = bayes_scores(world, sequences, window)
        assert nats[:, window:].mean() == pytest.approx(window_score(world, window).nats, abs=0.02)
        assert hits[:, window:].mean() == pytest.approx(window_score(world, window).hit_rate, abs=0.01)
    scores = [window_score(world, window).nats for window in (1, 2, 3)]
    assert scores == sorted(scores, reverse=True)  # more seen, fewer nats
    assert best_score(world).nats < scores[-1]
    assert bayes_scores(world, sequences)[0][:, -1].mean() < scores[-1]


def test_a_drawn_log_follows_the_tables():
    world = at(1.0)
    clusters, sequences = draw_sequences(world, 9000, 8, seed=0)
    assert np.bincount(clusters).tolist() == [3000, 3000, 3000]
    shares = np.bincount(sequences.ravel(), minlength=world.num_items) / sequences.size
    assert abs(shares - world.popularity).max() < 0.005
    before, after = sequences[clusters == 1, :-1].ravel(), sequences[clusters == 1, 1:].ravel()
    found = np.bincount(after[before == 0], minlength=world.num_items) / (before == 0).sum()
    assert abs(found - world.tables[1, 0]).max() < 0.03


def test_write_clusters_writes_a_log_that_prepares(tmp_path):
    folder = write_clusters(tmp_path / "log", SMALL, num_users=60, length=10, seed=0)
    log = pl.read_parquet(folder / "interactions.parquet")
    assert log.height == 600
    assert (log.group_by("user_id").agg(pl.col("timestamp").diff().min())["timestamp"] > 0).all()
    items = pl.read_parquet(folder / "items.parquet")
    assert items["title"].n_unique() == SMALL.num_items
    assert (items["colour"] + " " + items["thing"] == items["title"]).all()
    assert items["thing"].n_unique() == SMALL.num_tiers
    assert pl.read_parquet(folder / "clusters.parquet").height == 60
    assert Clusters(**json.loads((folder / "world.json").read_text())) == SMALL
    again = write_clusters(tmp_path / "again", SMALL, num_users=60, length=10, seed=0)
    assert pl.read_parquet(again / "interactions.parquet").equals(log)
    data = DataSection(
        interactions=InteractionsSource(path=str(folder / "interactions.parquet")),
        items=ItemsSource(path=str(folder / "items.parquet")),
    )
    assert prepare(data, FilterSection(), SplitSection(), 0, tmp_path).counts["interactions"] == 600


def test_titles_stay_apart_in_a_large_world():
    titles = synthetic._titled(Clusters(num_tiers=30, tier_size=20))["title"]
    assert len(set(titles)) == 600


@pytest.mark.parametrize("wrong", [{"num_clusters": 1}, {"num_clusters": 5}, {"focus": 1.5}, {"jump": -0.1}])
def test_an_impossible_world_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        at(1.0, **wrong)


def test_what_cannot_be_computed_or_written_is_refused(tmp_path):
    with pytest.raises(UserError, match="bayes_scores"):
        window_score(Clusters(), 6)
    with pytest.raises(UserError, match="at least 1"):
        window_score(SMALL, 0)
    with pytest.raises(UserError, match="2 items"):
        write_clusters(tmp_path / "log", SMALL, num_users=3, length=1, seed=0)
    assert not (tmp_path / "log").exists()
