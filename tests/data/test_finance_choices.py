import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.data.finance_choices import Choices, Rankings, build_rankings, draw_choices, fit_tastes
from recllm.data.finance_utility import fit_taste, views
from recllm.data.prices import DAY_S, Prices, date_of, day_of, price_features
from recllm.errors import UserError
from recllm.recipe import CandidatesSection, FinanceSection

from . import finance_banks as banks

CUTOFFS = [day_of("2020-02-01"), day_of("2020-06-15"), day_of("2021-01-04")]
FEATURES = ("mean", "variance", "drawdown")
PAST = [*FEATURES, "example_id", "history_end", "candidates", "taste_variance", "taste_drawdown", "num_choices"]


def rankings(data, cutoffs=CUTOFFS, count=5, seed=0, choices=None, **fields) -> Rankings:
    section = FinanceSection(folder="", **({"window_days": 180} | fields))
    choices = draw_choices(data, count, section.lookback_days, seed) if choices is None else choices
    return build_rankings(data, cutoffs, choices, section, CandidatesSection(count=count, seed=seed))


# ---- choices ----


def test_choices_are_purchases_among_assets_with_prices_that_were_not_bought_that_day():
    data = banks.drawn_bank()
    choices = draw_choices(data, 6, seed=3)
    count = len(choices.customer_ids)
    assert count > 300
    assert np.isfinite(choices.mean).all()
    bought = set(data.transactions.filter(pl.col("side") == "Buy").select("customer_id", "day", "asset").iter_rows())
    for row in range(count):
        day = int(choices.cutoffs[row]) // DAY_S
        mine = {
            asset for asset in choices.candidates[row].tolist() if (choices.customer_ids[row], day, asset) in bought
        }
        assert mine == {int(choices.candidates[row, choices.chosen[row]])}
        assert len(set(choices.candidates[row].tolist())) == 6
        if row % 20 == 0:
            known = price_features(data.until(day).prices, day - 70, day)
            for name in FEATURES:
                expected = getattr(known, name)[choices.candidates[row]]
                np.testing.assert_array_equal(getattr(choices, name)[row], expected)
    places = np.bincount(choices.chosen, minlength=6) / count
    assert abs(places - 1 / 6).max() < 0.08  # where the purchase stands says nothing
    assert len(draw_choices(data, 26).customer_ids) == 0  # fewer assets than candidates


def test_two_purchases_of_a_day_are_a_choice_each_and_never_against_each_other():
    prices = {(asset, day): 1.0 + asset + day for asset in range(4) for day in range(5)}
    data = banks.bank_of(4, prices, [("u", 0, 4, "Buy"), ("u", 1, 4, "Buy"), ("u", 0, 4, "Buy"), ("u", 2, 4, "Sell")])
    choices = draw_choices(data, 3)
    assert choices.candidates[range(2), choices.chosen].tolist() == [0, 1]
    assert [sorted(set(row) - {0, 1}) for row in choices.candidates.tolist()] == [[2, 3], [2, 3]]
    assert len(draw_choices(data, 4).customer_ids) == 0  # two others are left


# ---- tastes ----


def of_customer(choices, customer, cutoff) -> np.ndarray:
    everybody = customer is None
    names = zip(choices.customer_ids, choices.cutoffs.tolist())
    return np.array([(everybody or name == customer) and time < cutoff for name, time in names], dtype=bool)


def fitted(choices, rows):
    return fit_taste(choices.mean[rows], choices.variance[rows], choices.drawdown[rows], choices.chosen[rows])


def test_a_taste_is_fitted_to_what_the_customer_chose_before_or_to_what_all_did():
    choices = draw_choices(banks.drawn_bank(num_customers=12, purchases=9.0), 6)
    customers = [*dict.fromkeys(choices.customer_ids), "nobody"]
    pairs = [(name, day * DAY_S) for name in customers for day in (day_of("2019-01-01"), *CUTOFFS)]
    for fewest in (1, 4):
        found = fit_tastes(choices, [name for name, _ in pairs], [cutoff for _, cutoff in pairs], fewest)
        for row, (name, cutoff) in enumerate(pairs):
            mine = of_customer(choices, name, cutoff)
            assert found.num_choices[row] == mine.sum()
            assert found.own[row] == (mine.sum() >= fewest)
            expected = fitted(choices, mine if mine.sum() >= fewest else of_customer(choices, None, cutoff))
            assert (found.variance[row], found.drawdown[row]) == expected
        assert found.own.any()
        assert not found.own.all()


def test_a_purchase_on_the_date_itself_says_nothing_of_it():
    features = np.array([[1.0, 2.0], [2.0, 1.0]])
    choices = Choices(["u", "u"], np.array([10, 20]) * DAY_S, np.array([[0, 1]] * 2), np.array([0, 1]), *[features] * 3)
    counts = [fit_tastes(choices, ["u"], [day * DAY_S], 1).num_choices.tolist() for day in (10, 11, 20, 21)]
    assert counts == [[0], [1], [1], [2]]
    assert fit_tastes(choices, ["u"], [10 * DAY_S], 1)[:2] == (0, 0)  # nobody has chosen yet


# ---- examples ----

prices = st.dictionaries(st.tuples(st.integers(0, 5), st.integers(0, 40)), st.integers(1, 5), min_size=60)
rows = st.tuples(st.sampled_from("uvw"), st.integers(0, 5), st.integers(0, 40), st.sampled_from(["Buy", "Sell"]))


@settings(max_examples=60, deadline=None)
@given(prices, st.lists(rows, max_size=20), st.integers(5, 30))
def test_examples_are_an_oracles(prices, transactions, cutoff):
    data = banks.bank_of(6, prices | {(0, 40): 3}, transactions)
    on_offer = {
        asset for asset in range(6) if sum(cutoff - 12 <= day < cutoff for of, day in prices if of == asset) >= 3
    }
    expected, buys = {}, False
    for customer in "uvw":
        own = sorted((row for row in transactions if row[0] == customer), key=lambda row: row[2])  # stable
        past = [row for row in own if row[2] < cutoff]
        bought = [row[1] for row in own if cutoff <= row[2] < cutoff + 10 and row[3] == "Buy"]
        choice = next((asset for asset in bought if asset in on_offer), None)
        buys |= bool(past and bought)
        if past and choice is not None:
            expected[customer] = (len(past), choice, set(bought))
    short = [len(on_offer - bought) < 2 for _, _, bought in expected.values()]
    arguments = {"cutoffs": [cutoff], "count": 3, "window_days": 10, "lookback_days": 12}
    too_few = buys and len(on_offer) < 3
    if too_few or not expected or any(short):
        message = "three prices" if too_few else "no example" if not expected else "which leaves"
        with pytest.raises(UserError, match=message):
            rankings(data, **arguments)
        return
    found = rankings(data, **arguments)
    assert found.table["customer_id"].to_list() == sorted(expected)
    for row in found.table.iter_rows(named=True):
        history, choice, bought = expected[row["customer_id"]]
        assert row["history_end"] == history
        assert row["candidates"][row["chosen"]] == choice
        assert len(set(row["candidates"])) == 3
        assert set(row["candidates"]) - {choice} <= on_offer - bought
        assert (row["cutoff"], row["window_end"]) == (cutoff * DAY_S, (cutoff + 10) * DAY_S)
        assert row["example_id"] == f"{row['customer_id']}/{date_of(cutoff)}"


def test_candidates_hang_on_seed_customer_and_date_only():
    data = banks.drawn_bank()
    choices = draw_choices(data, 5)
    whole = rankings(data, choices=choices).table
    last = rankings(data, CUTOFFS[2:], choices=choices).table
    assert whole.filter(pl.col("cutoff") == CUTOFFS[2] * DAY_S).equals(last)
    few = whole["customer_id"].unique().sort()[::3]
    mine = data.transactions.filter(pl.col("customer_id").is_in(few.implode()))
    alone = rankings(banks.replaced(data, transactions=mine), choices=choices).table
    assert whole.filter(pl.col("customer_id").is_in(few.implode())).equals(alone)
    other = rankings(data, choices=choices, seed=1).table
    assert whole["candidates"].to_list() != other["candidates"].to_list()
    keys = ["example_id", "chosen", "candidates"]
    bought = [
        [row["candidates"][row["chosen"]] for row in table.select(keys).iter_rows(named=True)]
        for table in (whole, other)
    ]
    assert bought[0] == bought[1]


def test_neither_where_a_candidate_stands_nor_how_it_is_ranked_tells_the_choice_apart():
    """Of a bank whose customers buy at random, the choice stands anywhere in the prompt and in the taught order."""
    data = banks.drawn_bank(num_customers=400)
    lots = np.random.default_rng(0)
    walks = np.exp(np.cumsum(lots.normal(scale=0.01, size=data.prices.close.shape), axis=0))
    moved = data.transactions.with_columns(pl.Series("asset", lots.integers(25, size=data.transactions.height)))
    found = rankings(banks.replaced(data, prices=Prices(data.prices.days, walks), transactions=moved), CUTOFFS[1:])
    count = found.table.height
    assert count > 400
    bought = np.take_along_axis(found.matrix("candidates"), found.chosen[:, None], axis=1)
    for places in (found.chosen, (found.taught() == bought).argmax(axis=1)):
        shares = np.bincount(places, minlength=5) / count
        assert abs(shares - 1 / 5).max() < 4 * np.sqrt(0.2 * 0.8 / count)  # four standard errors


# ---- no future ----


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 3), st.integers(day_of("2019-08-01"), day_of("2021-06-30")))
def test_prices_and_amounts_from_the_date_on_change_nothing(seed, day):
    data = banks.drawn_bank(seed=seed)
    close = np.where(data.prices.days[:, None] >= day, data.prices.close[::-1], data.prices.close)
    worth = pl.when(pl.col("day") >= day).then(pl.col("value") * 7 + 1).otherwise(pl.col("value"))
    moved = data.transactions.with_columns(worth.alias("value"))
    other = banks.replaced(data, prices=Prices(data.prices.days, close), transactions=moved)
    one, two = (rankings(bank, [day - 40, day]).table for bank in (data, other))
    assert one.equals(two)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 3), st.integers(day_of("2019-08-01"), day_of("2021-06-30")))
def test_features_tastes_and_the_taught_order_are_those_of_a_bank_that_ends_before_the_date(seed, day):
    data = banks.drawn_bank(seed=seed)
    found = rankings(data, [day])
    past = data.until(day)
    known = price_features(past.prices, day - 70, day)
    candidates = found.matrix("candidates")
    for name in FEATURES:
        np.testing.assert_array_equal(found.matrix(name), getattr(known, name)[candidates])
    counts = past.transactions.group_by("customer_id").len()
    histories = dict(counts.iter_rows())
    customers = found.table["customer_id"].to_list()
    assert found.table["history_end"].to_list() == [histories[name] for name in customers]
    tastes = fit_tastes(draw_choices(past, 5), customers, found.table["cutoff"].to_list(), 5)
    assert found.table["taste_variance"].to_list() == tastes.variance.tolist()
    assert found.table["taste_drawdown"].to_list() == tastes.drawdown.tolist()
    assert found.table["own_taste"].to_list() == tastes.own.tolist()
    parts = [getattr(known, name)[candidates] for name in FEATURES]
    utility = views(*parts, list(zip(tastes.variance, tastes.drawdown))).utility
    for row, order in enumerate(found.taught().tolist()):
        by_asset = dict(zip(candidates[row].tolist(), utility[row].tolist()))
        assert sorted(order) == sorted(by_asset)
        assert [by_asset[asset] for asset in order] == sorted(by_asset.values(), reverse=True)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 3), st.integers(day_of("2019-08-01"), day_of("2021-06-30")))
def test_what_is_bought_from_the_date_on_changes_who_is_offered_only(seed, day):
    data = banks.drawn_bank(seed=seed)
    shifted = pl.when(pl.col("day") >= day).then((pl.col("asset") + 7) % 25).otherwise(pl.col("asset"))
    other = banks.replaced(data, transactions=data.transactions.with_columns(shifted.alias("asset")))
    one, two = (rankings(bank, [day - 40, day]).table.select(PAST) for bank in (data, other))
    both = one.join(two, on="example_id", suffix="_other")
    assert both.height > 10
    for name in ("history_end", "taste_variance", "taste_drawdown", "num_choices"):
        assert both[name].equals(both[f"{name}_other"].rename(name))
    for row in both.iter_rows(named=True):
        for name in FEATURES:
            first, second = (dict(zip(row[f"candidates{side}"], row[f"{name}{side}"])) for side in ("", "_other"))
            assert {asset: first[asset] for asset in first.keys() & second.keys()}.items() <= second.items()


# ---- bad input ----


def small_bank(num_assets=4, transactions=(), missing=()):
    prices = {
        (asset, day): 10.0 + asset * day % 7
        for asset in range(num_assets)
        for day in range(40)
        if not (asset in missing and day < 20)
    }
    return banks.bank_of(num_assets, prices, [("u", 0, 5, "Buy"), *transactions])


def test_fewer_assets_on_offer_than_candidates_is_an_error_that_names_the_date():
    data = small_bank(4, [("u", 1, 25, "Buy")])
    with pytest.raises(UserError, match=r"on 1970-01-21 4 assets have three prices in the 12 days .* 5 candidates"):
        rankings(data, [20], 5, window_days=10, lookback_days=12)
    assert rankings(data, [20], 4, window_days=10, lookback_days=12).table.height == 1


def test_a_customer_who_buys_nearly_everything_is_an_error_that_names_them():
    data = small_bank(4, [("u", asset, 25, "Buy") for asset in (1, 2, 3)])
    with pytest.raises(UserError, match=r'"u" buys 3 of the 4 assets .* leaves 1 for 2 others: .*count to 2 or less'):
        rankings(data, [20], 3, window_days=10, lookback_days=12)
    assert rankings(data, [20], 2, window_days=10, lookback_days=12).table["candidates"][0].to_list() != []


def test_an_asset_without_prices_in_the_lookback_is_neither_candidate_nor_choice():
    data = small_bank(
        5, [("u", 4, 22, "Buy"), ("u", 1, 25, "Buy"), ("v", 2, 6, "Buy"), ("v", 4, 23, "Buy")], missing={4}
    )
    found = rankings(data, [20], 4, window_days=10, lookback_days=12).table
    assert found["customer_id"].to_list() == ["u"]  # the first purchase on offer is the choice, and v makes none
    assert sorted(found["candidates"][0].to_list()) == [0, 1, 2, 3]
    assert found["candidates"][0][found["chosen"][0]] == 1
    only = small_bank(5, [("u", 4, 22, "Buy")], missing={4})
    with pytest.raises(UserError, match="1 cut-offs give no example: no customer with a history then buys an asset"):
        rankings(only, [20], 4, window_days=10, lookback_days=12)


def test_a_customer_without_choices_has_the_taste_of_all():
    data = small_bank(5, [("u", 3, 15, "Buy"), ("v", 2, 6, "Sell"), ("v", 1, 25, "Buy"), ("u", 1, 25, "Buy")])
    found = rankings(data, [20], 3, window_days=10, lookback_days=12, min_choices=1).table
    assert found.select("customer_id", "num_choices", "own_taste").rows() == [("u", 2, True), ("v", 0, False)]
    assert found["taste_variance"][0] == found["taste_variance"][1]  # u's are all there are


def test_a_window_needs_data_up_to_its_end():
    data = banks.drawn_bank()
    assert rankings(data, [data.last_day + 1 - 180]).table.height
    with pytest.raises(UserError, match="take earlier cut-offs"):
        rankings(data, [data.last_day + 2 - 180])
