import dataclasses

import numpy as np
import polars as pl
import pytest

from recllm.data.far_trans import COLUMNS, read_far_trans
from recllm.data.far_trans_synthetic import Bank, check_digit, write_far_trans
from recllm.data.finance import build_task
from recllm.data.prices import day_of, price_features, rose
from recllm.errors import UserError

from .finance_banks import drawn_bank

SMALL = Bank(num_customers=40, num_assets=20, first="2020-01-01", last="2021-06-30", purchases=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_far_trans(tmp_path_factory.mktemp("bank") / "bank", SMALL)


def table(folder, name):
    return pl.read_csv(folder / f"{name}.csv", infer_schema_length=None)


def test_the_seed_decides(folder, tmp_path):
    same = write_far_trans(tmp_path / "same", SMALL)
    other = write_far_trans(tmp_path / "other", dataclasses.replace(SMALL, seed=1))
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted([*(f"{name}.csv" for name in COLUMNS), "bank.json"])
    assert all((folder / name).read_bytes() == (same / name).read_bytes() for name in names)
    assert all((folder / name).read_bytes() != (other / name).read_bytes() for name in names if name != "markets.csv")


def test_columns_are_those_of_the_schema(folder):
    for name, columns in COLUMNS.items():
        assert tuple(table(folder, name).columns) == columns


@pytest.mark.shared
def test_columns_and_values_are_those_of_far_trans(folder, shared_data):
    real = shared_data / "far-trans-partial"
    for name in ("customer_information", "asset_information", "markets", "limit_prices"):
        assert table(folder, name).columns == table(real, name).columns
    for name, columns in {
        "customer_information": ("customerType", "riskLevel", "investmentCapacity"),
        "asset_information": ("assetCategory", "assetSubCategory", "sector"),
        "markets": ("tradingDays", "tradingHours", "marketClass", "country"),
    }.items():
        for column in columns:
            assert set(table(folder, name)[column]) <= set(table(real, name)[column]), column


def test_no_prices_on_weekends_and_holidays(folder):
    dates = table(folder, "close_prices")["timestamp"].str.to_date()
    assert dates.dt.weekday().max() <= 5
    assert not dates.dt.to_string("%m-%d").is_in(["01-01", "08-15", "12-25"]).any()
    assert dates.min().isoformat() == "2020-01-02"
    assert dates.max().isoformat() == "2021-06-30"


def test_isins_are_nobodys_and_end_in_their_check_digit(folder):
    isins = table(folder, "asset_information")["ISIN"].unique()
    assert isins.str.contains(r"^ZZ\d{10}$").all()
    assert all(int(isin[-1]) == check_digit(isin[:-1]) for isin in isins)
    assert [check_digit(body) for body in ("US037833100", "AU0000XVGZA", "GB000263494")] == [5, 3, 6]


def test_transactions_are_at_the_days_price_and_nobody_sells_what_is_not_held(folder):
    joined = table(folder, "transactions").join(table(folder, "close_prices"), on=["ISIN", "timestamp"], how="left")
    assert joined["closePrice"].null_count() == 0
    assert (joined["totalValue"] - joined["units"] * joined["closePrice"]).abs().max() <= 0.005 + 1e-9
    assert joined["transactionID"].is_sorted()
    assert joined["timestamp"].is_sorted()
    signed = pl.when(pl.col("transactionType") == "Buy").then(pl.col("units")).otherwise(-pl.col("units"))
    held = joined.with_columns(signed.cum_sum().over("customerID", "ISIN").alias("held"))["held"]
    assert held.min() >= 0
    assert set(joined["transactionType"]) == {"Buy", "Sell"}
    assert set(joined["channel"]) <= {"Internet Banking", "Phone Banking", "Branch"}


def test_limit_prices_are_those_of_the_prices(folder):
    prices, limits = table(folder, "close_prices"), table(folder, "limit_prices")
    for isin, first, last, start, end, profit in limits.rows():
        own = prices.filter(pl.col("ISIN") == isin).sort("timestamp")
        assert (first, last) == (own["timestamp"][0], own["timestamp"][-1])
        assert profit == pytest.approx(own["closePrice"][-1] / own["closePrice"][0] - 1)
        assert (start, end) == (own["closePrice"][0], own["closePrice"][-1])


def test_popularity_is_skewed_and_risk_levels_choose_categories():
    data = drawn_bank(num_customers=400, purchases=30.0)
    bought = data.transactions.filter(pl.col("side") == "Buy")
    counts = np.sort(np.bincount(bought["asset"].to_numpy(), minlength=25))[::-1]
    assert counts[:5].sum() > 2 * counts[10:].sum()
    kinds = data.asset_versions.unique("asset", keep="first").select("asset", "category")
    levels = data.customer_versions.unique("customer_id", keep="first", maintain_order=True)
    joined = bought.join(kinds, on="asset").join(levels.select("customer_id", "risk_level"), on="customer_id")
    share = joined.group_by("risk_level").agg((pl.col("category") == "Stock").mean().alias("stocks"))
    stocks = dict(share.iter_rows())
    assert stocks["Conservative"] < stocks["Balanced"] < stocks["Aggressive"]


def test_behaviour_follows_or_opposes_profit_as_the_knob_says():
    shares = []
    for conflict in (0.0, 0.5, 1.0):
        data = drawn_bank(num_customers=200, num_assets=100, conflict=conflict)
        labels = build_task(data, range(day_of("2019-06-01"), day_of("2021-06-01"), 90), keep="preference").labels()
        shares.append(labels["both"].sum() / labels["preference"].sum())
    assert shares[0] > shares[1] + 0.1 > shares[2] + 0.2
    prices = [drawn_bank(conflict=conflict).prices.close for conflict in (0.0, 1.0)]
    np.testing.assert_array_equal(*prices)  # the market is the same, customers differ


def test_the_past_says_something_of_the_next_months():
    data = drawn_bank(num_assets=300, first="2018-01-01")
    up, down = [], []
    for cutoff in range(day_of("2018-09-01"), day_of("2021-06-01"), 60):
        found = price_features(data.prices, cutoff - 180, cutoff)
        known = ~np.isnan(found.mean)
        gained, risen = found.last / found.first > 1, rose(data.prices, cutoff, cutoff + 180)
        up += risen[known & gained].tolist()
        down += risen[known & ~gained].tolist()
    assert np.mean(up) > np.mean(down) + 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_assets": 1}, "2 assets"),
        ({"num_customers": 0}, "at least 1 customer"),
        ({"last": "2020-01-09"}, "5 trading days"),
        ({"conflict": 1.5}, r"conflict is 1\.5"),
        ({"first": "2020"}, "YYYY-MM-DD"),
    ],
)
def test_impossible_banks_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        write_far_trans(tmp_path / "bank", dataclasses.replace(SMALL, **change))
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_banks_are_read(tmp_path, seed):
    bank = Bank(num_customers=1, num_assets=2, first="2020-01-01", last="2020-02-28", purchases=0.1, seed=seed)
    data = read_far_trans(write_far_trans(tmp_path / "bank", bank))
    assert data.counts["customers"] == 1
    assert data.transactions["value"].null_count() == 0
