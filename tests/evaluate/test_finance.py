import json
import math
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from recllm.data.finance_utility import Taste, Views, views
from recllm.evaluate import finance, metrics
from recllm.evaluate.finance import Orders, read_answers

ASSETS = finance.vocabulary(["GR1", "GR10", "GR2"], ["Alpha", "Alpha Beta", "Bond"])


def read(*texts, finished=True, key=None):
    return read_answers(texts, [finished] * len(texts), ASSETS, key)


# ---- reading ----


def test_ids_and_names_are_read_whole():
    answers = read('["GR10", "Alpha", " Bond "]', '["GR", "GR100", "alpha", "Alpha Beta Gamma"]')
    assert answers.assets.tolist() == [[1, 0, 2, -1], [-1, -1, -1, -1]]
    assert answers.lengths.tolist() == [3, 4]
    assert answers.json_valid.tolist() == [True, True]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GR1",
        "- GR1\n- GR2",
        '["GR1", "GR2"',
        '["GR1"] and more',
        'Here you are: ["GR1"]',
        '```json\n["GR1"]\n```',
        '"GR1"',
        '{"final_rank": ["GR1"]}',
        "[null]",
        "[true]",
        "[1.5]",
        '[["GR1"]]',
        '[{"id": "GR1"}]',
        "[NaN]",
        "[" * 100_000,
        "[" + "1" * 10_000 + "]",
    ],
)
def test_anything_but_one_list_of_texts_is_unparsable(text):
    answers = read(text, '["GR1"]')
    assert answers.json_valid.tolist() == [False, True]
    assert answers.assets[0].tolist() == [-1]
    assert answers.lengths.tolist() == [0, 1]


def test_an_empty_list_is_an_answer_without_hits():
    answers = read("[]")
    assert answers.json_valid.all()
    assert finance.hits(answers, np.ones((1, 3), bool), 3).tolist() == [0.0]


def test_an_unfinished_answer_is_not_read_even_where_it_would_parse():
    answers = read('["GR1"]', finished=False)
    assert answers.json_valid.tolist() == answers.finished.tolist() == [False]
    assert finance.hits(answers, np.ones((1, 3), bool), 3).tolist() == [0.0]


def test_thoughts_are_no_part_of_an_answer():
    texts = ['<think>["GR2"]</think>\n["GR1"]', 'so: ["GR2"]\n</think>["GR1"]', '<think>["GR1"]', "<think>a</think>"]
    answers = read(*texts)
    assert answers.assets.tolist() == [[0], [0], [-1], [-1]]
    assert answers.finished.tolist() == [True, True, False, True]
    assert answers.json_valid.tolist() == [True, True, False, False]


def test_an_asset_named_twice_counts_once_and_keeps_both_places():
    answers = read('["GR1", "Alpha", "GR2"]')
    assert answers.assets.tolist() == [[0, -1, 2]]
    bond = np.array([[False, False, True]])
    assert [finance.hits(answers, bond, k)[0] for k in (1, 2, 3)] == [0.0, 0.0, 1.0]
    assert finance.recommendation(answers, {}, [])["unknown_share"].tolist() == [1 / 3]


def test_an_object_needs_exactly_the_key():
    texts = [
        '{"final_rank": ["GR1"]}',
        '{"final_rank": ["GR1"], "why": "x"}',
        '{"rank": ["GR1"]}',
        '{"final_rank": ["GR1"], "final_rank": ["GR2"]}',
        '{"final_rank": "GR1"}',
        '{"final_rank": {"0": "GR1"}}',
        '["GR1"]',
    ]
    assert read(*texts, key="final_rank").json_valid.tolist() == [True] + [False] * 6


def test_names_that_two_assets_share_mean_neither():
    assert finance.vocabulary(["1", "2", "3"], ["Fund", "Fund ", ""]) == {"1": 0, "2": 1, "3": 2}
    assert read_answers(["[2]"], [True], {"1": 0, "2": 1}).assets.tolist() == [[1]]  # a number stands for its digits


@given(st.lists(st.lists(st.sampled_from(["GR1", "GR10", "GR2", "GR", "x"]), max_size=5), max_size=4), st.booleans())
def test_a_list_is_read_as_an_oracle_reads_it(lists, finished):
    answers = read_answers([json.dumps(entries) for entries in lists], [finished] * len(lists), ASSETS)
    for row, entries in enumerate(lists):
        expected = []
        for entry in entries if finished else []:
            expected.append(ASSETS[entry] if entry in ASSETS and ASSETS[entry] not in expected else -1)
        assert answers.assets[row].tolist() == expected + [-1] * (answers.assets.shape[1] - len(expected))
        assert answers.lengths[row] == len(expected)


# ---- hits ----


def test_hits_against_preference_profit_and_both():
    answers = read('["GR1", "GR2"]', '["GR10"]', "GR1 GR10 GR2", '["GR2", "GR1"]')
    preference = np.array([[True, False, False]] * 4)
    profit = np.array([[False, True, True]] * 3 + [[True, True, True]])
    table = finance.recommendation(
        answers, {"preference": preference, "profit": profit, "both": preference & profit}, [1, 3]
    )
    assert table["hits@1/preference"].tolist() == [1, 0, 0, 0]
    assert table["hits@3/preference"].tolist() == [1, 0, 0, 1]
    assert table["hits@1/profit"].tolist() == [0, 1, 0, 1]
    assert table["hits@3/profit"].tolist() == [1, 1, 0, 1]
    assert table["hits@3/both"].tolist() == [0, 0, 0, 1]
    assert table["attainable/both"].tolist() == [0, 0, 0, 1]
    assert table["valid_ratio"].tolist() == [1, 1, 0, 1]
    assert {len(values) for values in table.values()} == {4}


def test_no_examples_give_empty_columns_and_a_k_below_one_is_refused():
    table = finance.recommendation(read(), {"both": np.zeros((0, 3), bool)}, [3])
    assert {values.shape for values in table.values()} == {(0,)}
    with pytest.raises(ValueError, match="at least 1"):
        finance.hits(read("[]"), np.ones((1, 3), bool), 0)


@given(st.data())
def test_hits_grow_with_k_and_never_pass_what_is_attainable(data):
    relevant = np.array([data.draw(st.lists(st.booleans(), min_size=3, max_size=3)) for _ in range(3)])
    drawn = st.lists(st.sampled_from(["GR1", "GR10", "GR2", "?"]), max_size=6)
    answers = read(*(json.dumps(data.draw(drawn)) for _ in range(3)))
    curves = np.array([finance.hits(answers, relevant, k) for k in range(1, 8)])
    assert (np.diff(curves, axis=0) >= 0).all()
    assert (curves[-1] <= finance.attainable(relevant)).all()


def test_chance_is_the_mean_over_all_draws():
    relevant = np.array([[True, False, True, False, False, True]])
    offered = np.array([[True, True, True, True, True, False]])
    for k in (1, 2, 3, 5, 6):
        draws = [set(draw) for draw in permutations(range(5), min(k, 5))]
        expected = sum(bool(draw & {0, 2}) for draw in draws) / len(draws)
        assert finance.chance(relevant, k, offered) == pytest.approx([expected])
    assert finance.chance(np.zeros((1, 4), bool), 3).tolist() == [0.0]


# ---- rankings ----


def order_of(*rows, valid=True):
    return Orders(np.array(rows), np.full(len(rows), valid))


def test_permutations_hold_every_candidate_once_and_nothing_else():
    texts = ['["GR2", "GR1"]', '["GR1"]', '["GR1", "GR1"]', '["GR1", "GR10"]', '["GR1", "GR2", "GR10"]', "no"]
    found = finance.orders(read(*texts), np.array([[0, 2]] * 6))
    assert found.valid.tolist() == [True] + [False] * 5
    assert found.columns.tolist() == [[1, 0]] + [[0, 1]] * 5
    assert finance.orders(read("no"), np.array([[0, 2]])).valid.tolist() == [False]


@given(st.permutations(range(6)), st.permutations(range(6)))
def test_a_permutation_comes_back(candidates, ranking):
    assets = {str(number): number for number in range(6)}
    found = finance.orders(read_answers([json.dumps(ranking)], [True], assets), np.array([candidates]))
    assert found.valid.all()
    assert [candidates[column] for column in found.columns[0]] == ranking


def test_the_users_choice():
    order = Orders(np.array([[2, 0, 1], [2, 0, 1], [0, 1, 2]]), np.array([True, True, False]))
    rank = finance.choice_rank(order, np.array([2, 1, 0]))
    assert metrics.mrr(rank).tolist() == [1, 1 / 3, 0]
    assert metrics.hit_rate(rank, 1).tolist() == [1, 0, 0]
    assert metrics.hit_rate(rank, 3).tolist() == [1, 1, 0]


def test_utility_ndcg_by_hand():
    utility = np.array([[0.5, -1.0, 2.0]])  # gains by rank 2, 1, 3; by utility 1.5, 0, 3
    order = order_of([0, 1, 2])
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    found = 2 / math.log2(2) + 1 / math.log2(3) + 3 / math.log2(4)
    assert finance.utility_ndcg(order, utility) == pytest.approx([found / ideal])
    ideal = 3 / math.log2(2) + 1.5 / math.log2(3)
    found = 1.5 / math.log2(2) + 3 / math.log2(4)
    assert finance.utility_ndcg(order, utility, "utility") == pytest.approx([found / ideal])


def test_equal_utilities_share_their_gains():
    utility = np.array([[1.0, 1.0, 0.0]])  # gains 2.5, 2.5, 1
    for row in ([0, 1, 2], [1, 0, 2]):
        assert finance.utility_ndcg(order_of(row), utility) == pytest.approx([1])
    found, ideal = 1 + 2.5 / math.log2(3) + 2.5 / 2, 2.5 + 2.5 / math.log2(3) + 1 / 2
    assert finance.utility_ndcg(order_of([2, 0, 1]), utility) == pytest.approx([found / ideal])
    for gain in ("rank", "utility"):
        assert finance.utility_ndcg(order_of([2, 1, 0]), np.ones((1, 3)), gain).tolist() == [1.0]


def test_random_orders_of_ten_have_an_undcg_of_0_834_by_rank():
    gains, discounts = list(range(10, 0, -1)), [1 / math.log2(1 + place) for place in range(1, 11)]
    expected = sum(gains) / 10 * sum(discounts) / sum(g * d for g, d in zip(gains, discounts))
    assert expected == pytest.approx(0.834, abs=5e-4)
    rng = np.random.default_rng(0)
    rows = rng.permuted(np.tile(np.arange(10), (4000, 1)), axis=1)
    found = finance.utility_ndcg(Orders(rows, np.ones(4000, bool)), np.tile(np.arange(10.0), (4000, 1)))
    assert found.mean() == pytest.approx(expected, abs=0.005)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=5), st.sampled_from(["rank", "utility"]))
def test_the_ideal_order_alone_reaches_one(utility, gain):
    scores = np.array([utility], dtype=float)
    for row in permutations(range(len(utility))):
        value = finance.utility_ndcg(order_of(row), scores, gain)[0]
        sorted_so = all(utility[a] >= utility[b] for a, b in pairwise(row))
        assert (value == pytest.approx(1)) if sorted_so else 0 <= value < 1


def test_kendall_tau_by_hand():
    scores = np.array([[3.0, 2.0, 1.0]])
    taus = [finance.kendall_tau(order_of(row), scores)[0] for row in ([0, 1, 2], [1, 0, 2], [2, 1, 0])]
    assert taus == [1, (2 - 1) / 3, -1]
    assert finance.kendall_tau(order_of([0, 1, 2]), np.array([[2.0, 2.0, 1.0]])).tolist() == [2 / 3]
    assert finance.kendall_tau(order_of([0]), np.array([[1.0]])).tolist() == [0]
    assert finance.kendall_tau(order_of([0, 1, 2], valid=False), scores).tolist() == [0]


@given(st.permutations(range(7)), st.permutations(range(7)))
def test_kendall_tau_without_ties_is_scipys(row, scores):
    place = np.argsort(row)
    expected = kendalltau(-place, scores).statistic
    assert finance.kendall_tau(order_of(row), np.array([scores], dtype=float)) == pytest.approx([expected])


def test_all_figures_of_a_ranking():
    mean, variance, drawdown = (np.array([row] * 3) for row in ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]))
    seen = views(mean, variance, drawdown, [Taste(1, 1)] * 3)
    answers = read(
        *('{"final_rank": ["GR1", "GR10", "GR2"]}', '{"final_rank": ["GR1"]}', '["GR1", "GR10", "GR2"]'),
        key="final_rank",
    )
    table = finance.ranking(answers, np.array([[0, 1, 2]] * 3), np.array([1, 0, 0]), seen)
    assert {name: values.tolist() for name, values in table.items()} == {
        "undcg/rank": [1, 0, 0],
        "undcg/utility": [1, 0, 0],
        "mrr": [1 / 2, 0, 0],
        "hit_rate@1": [0, 0, 0],
        "hit_rate@3": [1, 0, 0],
        "tau/utility": [1, 0, 0],
        "tau/momentum": [1, 0, 0],
        "tau/safety": [1, 0, 0],
        "json_valid": [1, 1, 0],
        "permutation_valid": [1, 0, 0],
        "finished": [1, 1, 1],
    }


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=5), st.integers(0, 2**32 - 1))
def test_the_expected_ranking_is_the_mean_over_all_orders(utility, seed):
    width = len(utility)
    rows = np.array(list(permutations(range(width))))
    momentum, safety = np.random.default_rng(seed).normal(size=(2, 1, width))
    seen = Views(np.array([utility], dtype=float), momentum, safety)
    everywhere = Views(*(np.repeat(scores, len(rows), axis=0) for scores in seen))
    texts = [json.dumps([str(column) for column in row]) for row in rows.tolist()]
    answers = read_answers(texts, [True] * len(rows), {str(column): column for column in range(width)})
    table = finance.ranking(answers, np.tile(np.arange(width), (len(rows), 1)), np.zeros(len(rows), int), everywhere)
    expected = finance.expected_ranking(seen)
    assert set(table) - set(expected) == {"json_valid", "permutation_valid", "finished"}
    for name, values in expected.items():
        assert values == pytest.approx([table[name].mean()], abs=1e-12)
