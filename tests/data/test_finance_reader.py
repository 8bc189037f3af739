import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.data.far_trans import read_far_trans
from recllm.data.prices import DAY_S, Prices, date_of, day_of, known_at, price_features, rose
from recllm.errors import UserError

from . import finance_banks


@pytest.fixture
def folder(tmp_path):
    return finance_banks.write(
        tmp_path,
        asset_information=[
            {"ISIN": "B", "assetName": "Fund", "sector": "Energy", "timestamp": "2020-01-05"},
            {"ISIN": "A", "assetName": "Fund", "assetShortName": "F"},
            {"ISIN": "B", "assetName": "Fund, renamed", "sector": "Utilities", "timestamp": "2020-03-01"},
            {"ISIN": "C", "assetShortName": " C-short "},
        ],
        customer_information=[
            {"customerID": "u2"},
            {"customerID": "u1"},
            {"customerID": "u1", "riskLevel": "Balanced"},
        ],
        close_prices=[
            {"ISIN": "A", "timestamp": "2020-01-02", "closePrice": 2},
            {"ISIN": "A", "timestamp": "2020-01-02", "closePrice": 3},
            {"ISIN": "A", "timestamp": "2020-01-03 00:00:00", "closePrice": 0},
            {"ISIN": "D", "timestamp": "2020-01-06", "closePrice": 5.5},
            {"ISIN": "D", "timestamp": "2020-01-07", "closePrice": ""},
        ],
        transactions=[
            {"customerID": "u2", "ISIN": "A", "timestamp": "2020-01-03"},
            {"customerID": "u1", "ISIN": "B", "timestamp": "2020-01-06", "transactionType": "Sell", "units": ""},
            {"customerID": "u1", "ISIN": "E", "timestamp": "2020-01-02", "totalValue": 7},
        ],
    )


def test_what_is_read(folder):
    data = read_far_trans(folder)
    assert data.isins == ["A", "B", "C", "D", "E"]  # D has prices only, E a transaction only
    assert data.titles == ["Fund (A)", "Fund (B)", "C-short", "D", "E"]
    assert data.asset_versions.select("asset", "day", "sector").rows() == [
        (0, day_of("2020-01-01"), None),
        (1, day_of("2020-01-05"), "Energy"),
        (1, day_of("2020-03-01"), "Utilities"),
        (2, day_of("2020-01-01"), None),
    ]
    assert data.transactions.drop("transaction_id").rows() == [
        ("u1", day_of("2020-01-02"), "Buy", 7.0, 1.0, 4),
        ("u1", day_of("2020-01-06"), "Sell", 10.0, None, 1),
        ("u2", day_of("2020-01-03"), "Buy", 10.0, 1.0, 0),
    ]
    assert [date_of(day) for day in data.prices.days] == ["2020-01-02", "2020-01-06"]
    assert np.nan_to_num(data.prices.close).tolist() == [[3, 0, 0, 0, 0], [0, 0, 0, 5.5, 0]]
    assert data.customer_versions["risk_level"].to_list() == ["Income", "Balanced", "Income"]
    assert data.counts == {"customers": 2, "assets": 5, "transactions": 3, "prices": 2, "prices dropped": 3}
    assert data.last_day == day_of("2020-01-06")
    assert data.markets == {}


def test_markets_are_optional(folder):
    finance_banks.write(folder, markets=[{"marketID": "M", "name": "Main"}, {"marketID": "N"}])
    assert read_far_trans(folder).markets == {"M": "Main", "N": "N"}


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("transactions", "2020-01-03", "03/01/2020", r'transactions\.csv, line 2: timestamp is "03/01/2020"'),
        ("transactions", "Sell", "Short", r'line 3: transactionType is "Short", expected Buy or Sell'),
        ("transactions", "u2,", ",", r"line 2: customerID is blank, expected a value"),
        ("transactions", ",7,", ",seven,", r'line 4: totalValue is "seven", expected a number'),
        ("close_prices", "5.5", "nan", r'line 5: closePrice is "nan", expected a number'),
        ("close_prices", "2020-01-02", "2020-02-30", r'line 2: .*expected a date YYYY-MM-DD: .*\(2 such rows\)'),
        ("close_prices", "closePrice", "close_price", r'no column "closePrice", did you mean "close_price"'),
        ("asset_information", "A,Fund", " ,Fund", r"line 3: ISIN is blank"),
    ],
)  # fmt: skip
def test_broken_files_name_the_line(folder, name, old, new, message):
    path = folder / f"{name}.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        read_far_trans(folder)


def test_a_missing_file_says_where_it_is_to_be_had(folder):
    (folder / "close_prices.csv").unlink()
    with pytest.raises(UserError, match=r"close_prices\.csv does not exist.*gla\.researchdata\.1658.*write_far_trans"):
        read_far_trans(folder)


def test_without_any_price_nothing_can_be_said(folder):
    finance_banks.write(folder, close_prices=[{"ISIN": "A", "timestamp": "2020-01-02", "closePrice": 0}])
    with pytest.raises(UserError, match="no price above 0"):
        read_far_trans(folder)


def test_text_that_is_not_utf8(folder):
    (folder / "close_prices.csv").write_bytes(b"ISIN,timestamp,closePrice\n\xe9,2020-01-01,1\n")
    with pytest.raises(UserError, match=r"close_prices\.csv: cannot be read"):
        read_far_trans(folder)


def test_a_wrong_date_says_so():
    with pytest.raises(UserError, match="YYYY-MM-DD"):
        day_of("1.2.2020")


@pytest.mark.shared
def test_the_partial_real_folder_has_our_columns_and_lacks_prices(shared_data):
    with pytest.raises(UserError, match=r"close_prices\.csv does not exist"):
        read_far_trans(shared_data / "far-trans-partial")


# ---- prices ----

series = st.dictionaries(st.tuples(st.integers(0, 2), st.integers(0, 30)), st.integers(1, 9), min_size=1)


@given(series, st.integers(-3, 33), st.integers(0, 20))
def test_newest_prices_and_rises_are_an_oracles(prices, begin, length):
    table = finance_banks.bank_of(3, prices, []).prices
    end = begin + length
    for asset in range(3):
        own = {day: price for (of, day), price in prices.items() if of == asset}
        inside = [own[day] for day in sorted(own) if begin <= day < end]
        before = [own[day] for day in sorted(own) if day < begin]
        assert table.last(begin, end)[asset] == pytest.approx(inside[-1] if inside else math.nan, nan_ok=True)
        assert table.before(begin)[asset] == pytest.approx(before[-1] if before else math.nan, nan_ok=True)
        assert rose(table, begin, end)[asset] == bool(inside and before and inside[-1] > before[-1])


@given(series, st.integers(-3, 33), st.integers(0, 40))
def test_features_are_an_oracles(prices, begin, length):
    found = price_features(finance_banks.bank_of(3, prices, []).prices, begin, begin + length)
    for asset in range(3):
        path = [prices[key] for key in sorted(prices) if key[0] == asset and begin <= key[1] < begin + length]
        if len(path) < 3:
            assert all(math.isnan(values[asset]) for values in found)
            continue
        returns = [b / a - 1 for a, b in pairwise(path)]
        mean = sum(returns) / len(returns)
        assert found.first[asset] == path[0]
        assert found.last[asset] == path[-1]
        assert found.mean[asset] == pytest.approx(mean)
        assert found.variance[asset] == pytest.approx(sum((r - mean) ** 2 for r in returns) / len(returns))
        falls = [1 - path[j] / path[i] for i in range(len(path)) for j in range(i, len(path))]
        assert found.drawdown[asset] == pytest.approx(max(falls))


def test_a_day_is_known_when_it_has_ended():
    day = day_of("2021-05-03")
    assert known_at(day) == (day + 1) * DAY_S - 1
    assert known_at(day - 1) < day * DAY_S <= known_at(day)


def test_no_prices_in_a_range():
    table = Prices(np.array([5]), np.array([[1.0]]))
    assert np.isnan(table.last(0, 5)).all()
    assert np.isnan(table.last(7, 6)).all()
    assert np.isnan(price_features(table, 6, 9).mean).all()
