import numpy as np
import polars as pl

from recllm.data import synthetic
from recllm.data.sequences import prepare
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


def test_the_seed_decides(tmp_path):
    one, same, other = (
        pl.read_parquet(synthetic.write_interactions(tmp_path / name, 500, 10, 20, seed) / "interactions.parquet")
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert one.equals(same)
    assert not one.equals(other)
