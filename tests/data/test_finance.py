import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.data import offline
from recllm.data.far_trans_synthetic import Bank, write_far_trans
from recllm.data.finance import build_task, completions, ledger, schedule
from recllm.data.finance_triples import market_triples
from recllm.data.prices import DAY_S, Prices, date_of, day_of, known_at, price_features
from recllm.errors import UserError
from recllm.evaluate import finance as metrics

from . import finance_banks as banks

CUTOFFS = [day_of("2020-02-01"), day_of("2020-06-15"), day_of("2021-01-04")]

seeds = st.integers(0, 3)
cutoffs = st.integers(day_of("2019-01-02"), day_of("2021-12-31"))

# ---- schedule ----


@given(st.integers(0, 50), st.integers(1, 200), st.integers(1, 200), st.integers(0, 200), st.integers(1, 60))
def test_no_window_reaches_the_next_split(first, to_valid, to_test, to_last, every):
    valid, test = first + to_valid, first + to_valid + to_test
    window, last = 30, first + to_valid + to_test + to_last
    if min(to_valid, to_test, to_last + 1) < window:
        with pytest.raises(UserError, match="no window of 30 days fits between"):
            schedule(first, valid, test, last, every, window)
        return
    splits = schedule(first, valid, test, last, every, window)
    for begin, days, end in zip((first, valid, test), splits.values(), (valid, test, last + 1)):
        assert days[-1] + window == end
        assert days[0] >= begin
        assert days[0] - every < begin
        assert set(np.diff(days)) <= {every}


# ---- examples ----

prices = st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, 40)), st.integers(1, 5), min_size=1)
rows = st.tuples(st.sampled_from("uvw"), st.integers(0, 3), st.integers(0, 40), st.sampled_from(["Buy", "Sell"]))


@settings(max_examples=60, deadline=None)
@given(prices, st.lists(rows, max_size=15), st.integers(1, 30), st.sampled_from(["both", "preference", "all"]))
def test_examples_are_an_oracles(prices, transactions, cutoff, keep):
    data = banks.bank_of(4, prices | {(0, 40): 3}, transactions)
    end = cutoff + 10
    up, offered = set(), set()
    for asset in range(4):
        own = [(day, price) for (of, day), price in sorted((prices | {(0, 40): 3}).items()) if of == asset]
        before, inside = [p for d, p in own if d < cutoff], [p for d, p in own if cutoff <= d < end]
        offered |= {asset} if before else set()
        up |= {asset} if before and inside and inside[-1] > before[-1] else set()
    expected = []
    for customer in "uvw":
        past = [row for row in transactions if row[0] == customer and row[2] < cutoff]
        bought = {row[1] for row in transactions if row[0] == customer and cutoff <= row[2] < end and row[3] == "Buy"}
        if past and {"both": bought & up, "preference": bought, "all": True}[keep]:
            expected.append((customer, len(past), sorted(bought), sorted(bought & up)))
    if not expected:
        with pytest.raises(UserError, match="no example"):
            build_task(data, [cutoff], 10, keep)
        return
    task = build_task(data, [cutoff], 10, keep)
    assert task.examples.select("customer_id", "history_end", "preference", "both").rows() == expected
    assert task.windows.rows() == [(cutoff * DAY_S, end * DAY_S, sorted(offered), sorted(up))]
    labels = task.labels()
    for row, (_, _, bought, both) in enumerate(expected):
        for name, assets in (("preference", bought), ("both", both), ("profit", up), ("offered", offered)):
            assert np.flatnonzero(labels[name][row]).tolist() == sorted(assets)


def test_the_examples_of_several_cutoffs():
    data = banks.drawn_bank()
    task = build_task(data, CUTOFFS)
    parts = [build_task(data, [cutoff]) for cutoff in CUTOFFS]
    assert task.examples.equals(pl.concat([part.examples for part in parts]))
    for name, matrix in task.labels().items():
        np.testing.assert_array_equal(matrix, np.concatenate([part.labels()[name] for part in parts]))
    first = task.examples.row(0, named=True)
    assert first["example_id"] == f"{first['customer_id']}/2020-02-01"
    assert first["window_end"] - first["cutoff"] == 180 * DAY_S
    every = build_task(data, CUTOFFS, keep="all").examples
    assert every.height >= build_task(data, CUTOFFS, keep="preference").examples.height >= task.examples.height
    assert build_task(data, CUTOFFS, keep="all", min_history=5).examples["history_end"].min() >= 5


def test_a_window_needs_data_up_to_its_end():
    data = banks.drawn_bank()
    build_task(data, [data.last_day + 1 - 180])
    with pytest.raises(UserError, match="take earlier cut-offs"):
        build_task(data, [data.last_day + 2 - 180])


def test_the_first_lines_of_a_ledger_are_those_before_the_cutoff():
    data = banks.drawn_bank()
    task = build_task(data, CUTOFFS)
    written = dict(ledger(data).iter_rows())
    for example in task.examples.iter_rows(named=True):
        own = data.transactions.filter(
            (pl.col("customer_id") == example["customer_id"]) & (pl.col("day") * DAY_S < example["cutoff"])
        )
        lines = written[example["customer_id"]][: example["history_end"]]
        assert [line[:10] for line in lines] == [date_of(day) for day in own["day"]]
    row = own.row(-1, named=True)
    amount = f": {row['units']:g} units, {row['value']:,.2f} EUR"
    assert lines[-1] == f"{date_of(row['day'])} {row['side']} {data.titles[row['asset']]}{amount}"


# ---- triples, and no future ----


def shown(triples, cutoff_s):
    """What may be shown for a cut-off, with the names that it is read by."""
    found = triples.triples.filter(pl.col("timestamp") < cutoff_s)
    for side in ("head", "tail"):
        named = triples.names.rename({"entity_id": side, "name": f"{side}_name"})
        found = found.join(named, on=side, how="left", maintain_order="left")
    assert found["tail_name"].null_count() + found["head_name"].null_count() == 0
    return sorted(found.rows())


@settings(max_examples=25, deadline=None)
@given(seeds, cutoffs, st.integers(0, DAY_S - 1), st.sampled_from([(10, None), (10, 2), (3, 5)]))
def test_no_triple_shown_for_a_cutoff_knows_its_day_or_later(seed, day, second, weeks):
    data = banks.drawn_bank(seed=seed)
    past, cutoff_s = data.until(day), day * DAY_S + second
    assert shown(market_triples(data, *weeks), cutoff_s) == shown(market_triples(past, *weeks), cutoff_s)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(day_of("2019-08-01"), day_of("2021-06-30")))
def test_what_happens_from_the_cutoff_on_changes_labels_only(seed, day):
    data = banks.drawn_bank(seed=seed)
    close = np.where(data.prices.days[:, None] >= day, data.prices.close[::-1], data.prices.close)
    future = pl.col("day") >= day
    moved = data.transactions.with_columns(
        pl.when(future).then((pl.col("asset") + 7) % 25).otherwise(pl.col("asset")).alias("asset"),
        pl.when(future).then(pl.lit("Buy")).otherwise(pl.col("side")).alias("side"),
    )
    other = banks.replaced(data, prices=Prices(data.prices.days, close), transactions=moved)
    one, two = (build_task(bank, [day], keep="all") for bank in (data, other))
    same = ["example_id", "customer_id", "cutoff", "history_end"]
    assert one.examples.select(same).equals(two.examples.select(same))
    assert one.windows["offered"].to_list() == two.windows["offered"].to_list()
    books = [dict(ledger(bank).iter_rows()) for bank in (data, other)]
    for customer, end in one.examples.select("customer_id", "history_end").iter_rows():
        assert books[0][customer][:end] == books[1][customer][:end]
    assert shown(market_triples(data), day * DAY_S) == shown(market_triples(other), day * DAY_S)


def test_a_summary_is_of_its_ten_weeks():
    data = banks.drawn_bank()
    market = market_triples(data)
    names = dict(market.names.iter_rows())
    ends = set()
    for head, relation, tail, time in market.triples.filter(pl.col("relation") == "10-week return").rows():
        end = (time + 1) // DAY_S  # the first day that is not in it
        assert known_at(end - 1) == time
        assert (end + 3) % 7 == 0  # a Monday
        found = price_features(data.prices, end - 70, end)
        asset = data.isins.index(head)
        assert names[tail] == f"{found.last[asset] / found.first[asset] - 1:+.1%}"
        assert relation in tail
        ends.add(end)
    assert {b - a for a, b in zip(sorted(ends), sorted(ends)[1:])} == {70}
    fresh = market_triples(data, every_weeks=2).triples.filter(pl.col("relation") == "10-week return")
    assert fresh.height > 4 * len(ends) * 25 / 2


def test_facts_of_an_asset_appear_with_the_version_that_first_says_them(tmp_path):
    folder = banks.write(
        tmp_path,
        asset_information=[
            {"ISIN": "A", "sector": "Energy", "timestamp": "2020-01-01"},
            {"ISIN": "A", "sector": "Utilities", "timestamp": "2020-03-01"},
        ],
        customer_information=[{"customerID": "u"}],
        markets=[{"marketID": "M", "name": "Main Exchange"}],
        close_prices=[{"ISIN": "A", "timestamp": "2020-01-02", "closePrice": 1}],
        transactions=[{"customerID": "u", "ISIN": "A", "timestamp": "2020-01-02", "totalValue": 1234.5}],
    )
    data = banks.read_far_trans(folder)
    market, names = market_triples(data), dict(market_triples(data).names.iter_rows())
    said = [
        (head, relation, names[tail], date_of(time // DAY_S)) for head, relation, tail, time in market.triples.rows()
    ]
    assert said == [
        ("A", "is a", "stock", "2020-01-01"),
        ("A", "in sector", "Energy", "2020-01-01"),
        ("A", "in sector", "Utilities", "2020-03-01"),
        ("A", "traded on", "Main Exchange", "2020-01-01"),
    ]


def test_equal_numbers_do_not_link_assets():
    market = market_triples(banks.drawn_bank())
    values = market.triples.filter(pl.col("relation").str.contains("week|last price"))
    assert values["tail"].is_unique().all()
    assert market.names["entity_id"].is_unique().all()


def test_summaries_of_no_weeks_are_refused():
    with pytest.raises(UserError, match="at least 1 week"):
        market_triples(banks.drawn_bank(), 0)


# ---- completions ----


def test_good_completions_hit_everything_and_bad_ones_do_not():
    data = banks.drawn_bank()
    task = build_task(data, CUTOFFS)
    labels = task.labels()
    known = metrics.vocabulary(data.isins, data.titles)
    for texts in (None, data.titles):
        table = completions(data, task, seed=1, texts=texts)
        assert table["example_id"].to_list() == [name for name in task.examples["example_id"] for _ in range(2)]
        for label in (True, False):
            texts = table.filter(pl.col("label") == label)["completion"].to_list()
            answers = metrics.read_answers(texts, [True] * len(texts), known)
            found = metrics.recommendation(answers, labels, [1, 20])
            assert found["hits@20/both"].mean() == (1 if label else 0)
            assert found["hits@1/offered"].mean() == found["valid_ratio"].mean() == 1
            assert found["unknown_share"].sum() == 0


def test_lengths_of_good_and_bad_completions():
    data = banks.drawn_bank()
    task = build_task(data, CUTOFFS)
    table = completions(data, task, seed=1, most=2).with_columns(pl.col("assets").list.len().alias("length"))
    good, bad = (table.filter(pl.col("label") == label)["length"].to_list() for label in (True, False))
    assert good == bad == [min(2, len(both)) for both in task.examples["both"].to_list()]
    filled = completions(data, task, seed=1, most=4, same_length=False).filter(~pl.col("label"))
    assert set(filled["assets"].list.len()) == {4}


def test_completions_hang_on_seed_customer_and_cutoff_only():
    data = banks.drawn_bank()
    whole = completions(data, build_task(data, CUTOFFS), seed=1)
    last = completions(data, build_task(data, CUTOFFS[2:]), seed=1)
    assert whole.filter(pl.col("cutoff") == CUTOFFS[2] * DAY_S).equals(last)
    assert not completions(data, build_task(data, CUTOFFS), seed=2).equals(whole)
    empty = build_task(data, CUTOFFS, keep="all")
    without = {name for name, both in empty.examples.select("example_id", "both").iter_rows() if not both}
    assert without
    assert not without & set(completions(data, empty, seed=1)["example_id"])


# ---- files ----


def test_tables_for_the_other_rooms_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path / "cache"))
    bank = write_far_trans(tmp_path / "bank", Bank(num_customers=20, num_assets=8, last="2018-12-31"))
    data, names = banks.read_far_trans(bank), ("interactions", "items", "triples", "entities", "links")
    paths = {name: offline.resolve(f"far-trans://{bank}/{name}.parquet") for name in names}
    read = {name: pl.read_parquet(path) for name, path in paths.items()}
    assert read["interactions"].columns == ["user_id", "item_id", "timestamp", "action"]
    assert read["interactions"].height == data.transactions.height
    assert read["triples"].columns == ["head", "relation", "tail", "timestamp"]
    assert set(read["triples"]["head"]) | set(read["triples"]["tail"]) <= set(read["entities"]["entity_id"])
    assert set(read["links"]["entity_id"]) <= set(read["entities"]["entity_id"])
    assert read["items"]["item_id"].to_list() == read["links"]["item_id"].to_list() == data.isins
    assert read["items"]["title"].is_unique().all()
    assert offline.resolve(f"far-trans://{bank}/items.parquet") == paths["items"]
    with (bank / "transactions.csv").open("a") as file:
        file.write(f"u,{data.isins[0]},9999,Buy,2018-06-01,1,1,Branch,ZZATH\n")
    again = offline.resolve(f"far-trans://{bank}/interactions.parquet")
    assert pl.read_parquet(again).height == data.transactions.height + 1
    assert len(list((tmp_path / "cache").iterdir())) == 2
    with pytest.raises(UserError, match=r'no "prices.parquet" there'):
        offline.resolve(f"far-trans://{bank}/prices.parquet")
    with pytest.raises(UserError, match="nowhere does not exist"):
        offline.resolve("far-trans://nowhere/items.parquet")
    assert len(list((tmp_path / "cache").iterdir())) == 2  # nothing half-made is left


def test_the_drawn_bank_lies_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path))
    folder = offline.resolve("offline://far-trans-synthetic")
    assert banks.read_far_trans(folder).counts["customers"] == Bank().num_customers
    tables = offline.resolve("far-trans://offline://far-trans-synthetic/items.parquet")
    assert pl.read_parquet(tables).height == Bank().num_assets
