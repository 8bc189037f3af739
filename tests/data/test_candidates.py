import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.data import candidates
from recllm.data.candidates import CandidateSampler
from recllm.data.randomness import mix
from recllm.errors import UserError
from recllm.recipe import CandidatesSection
from recllm.schema import NO_ITEM

UNIFORM = [[9, 17, 22, 20, 1], [12, 17, 28, 25, 4], [23, 21, 26, 19, 20]]
POPULAR = [[22, 26, 28, 27, 1], [24, 26, 29, 28, 4], [20, 26, 28, 19, 21]]


def sampler(num_items, count, method="uniform", counts=None, seed=0):
    counts = np.zeros(num_items, dtype=np.int64) if counts is None else counts
    return CandidateSampler(num_items, counts, CandidatesSection(count=count, method=method, seed=seed))


def flat(histories):
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories])]).astype(np.int64)
    return offsets, np.array([item for history in histories for item in history], dtype=np.int32)


def draw(sample, keys, targets, histories):
    """Each example has a user of its own."""
    return sample.draw(keys, targets, np.arange(len(targets)), sample.taken(*flat(histories)))


@st.composite
def problems(draw):
    num_items = draw(st.integers(2, 40))
    count = draw(st.integers(2, num_items))
    room = num_items - count
    rows = draw(st.lists(st.permutations(range(num_items)), min_size=1, max_size=12))
    taken = [draw(st.integers(0, room)) for _ in rows]
    histories = [row[1 : 1 + size] + row[1 : 1 + size // 2] for row, size in zip(rows, taken)]  # items come again
    histories = [[*history, row[0]] if draw(st.booleans()) else history for history, row in zip(histories, rows)]
    method = draw(st.sampled_from(["uniform", "popularity"]))
    counts = np.array(draw(st.lists(st.sampled_from([0, 1, 1000]), min_size=num_items, max_size=num_items)))
    return num_items, count, np.array([row[0] for row in rows], dtype=np.int32), histories, method, counts


@settings(deadline=None)
@given(problems(), st.integers(0, 3))
def test_target_once_no_history_no_repeats_and_any_partition_alike(problem, seed):
    num_items, count, targets, histories, method, counts = problem
    sample = sampler(num_items, count, method, counts, seed)
    keys = mix(7, np.arange(len(targets)))
    drawn = draw(sample, keys, targets, histories)
    assert drawn.shape == (len(targets), count)
    assert drawn.dtype == np.int32
    for row, target, history in zip(drawn.tolist(), targets.tolist(), histories):
        assert row.count(target) == 1
        assert len(set(row)) == count
        assert not (set(row) - {target}) & set(history)
        assert set(row) <= set(range(num_items))
    for row in reversed(range(len(targets))):  # alone, and in another order
        alone = draw(sample, keys[[row]], targets[[row]], [histories[row]])
        assert alone[0].tolist() == drawn[row].tolist()


@pytest.mark.parametrize("method", ["uniform", "popularity"])
def test_chunks_and_rounds_do_not_change_what_is_drawn(monkeypatch, method):
    counts = np.arange(300) ** 2
    histories = [list(range(row % 150)) for row in range(500)]
    targets = np.array([299 - row % 100 for row in range(500)], dtype=np.int32)
    keys = mix(1, np.arange(500))
    sample = sampler(300, 20, method, counts)
    whole = draw(sample, keys, targets, histories)
    monkeypatch.setattr(candidates, "_CHUNK", 7)
    assert np.array_equal(draw(sample, keys, targets, histories), whole)


def test_rows_that_run_dry_are_completed(monkeypatch):
    """Nearly all weight on items of the history: the stream alone would draw for ever."""
    monkeypatch.setattr(candidates, "_MOST_DRAWS", 2)
    counts = np.array([10**12] * 10 + [0] * 40)
    targets = np.full(30, 10, dtype=np.int32)
    drawn = draw(sampler(50, 40, "popularity", counts), mix(0, np.arange(30)), targets, [list(range(10))] * 30)
    assert (np.sort(drawn, axis=1) == np.arange(10, 50)).all()


def test_uniform_draws_every_allowed_item_alike_and_the_target_stands_anywhere():
    rows, allowed = 20_000, 10
    drawn = draw(sampler(12, 4), mix(0, np.arange(rows)), np.zeros(rows, dtype=np.int32), [[11]] * rows)
    frequency = np.bincount(drawn.ravel(), minlength=12)
    expected = rows * 3 / allowed
    assert abs(frequency[1:11] - expected).max() < 5 * np.sqrt(expected)
    places = np.bincount((drawn == 0).argmax(axis=1), minlength=4)
    assert abs(places - rows / 4).max() < 5 * np.sqrt(rows / 4)


@pytest.mark.parametrize("most_draws", [16, 0])
def test_popularity_is_successive_sampling(monkeypatch, most_draws):
    """Two of three items, weights 1 + counts = 6, 3, 1: P(a, b) = 6/10 · 3/4, and so on. Also where rows run dry."""
    monkeypatch.setattr(candidates, "_MOST_DRAWS", most_draws)
    rows = 40_000
    sample = sampler(4, 3, "popularity", np.array([5, 2, 0, 0]))
    drawn = draw(sample, mix(3, np.arange(rows)), np.full(rows, 3, dtype=np.int32), [[]] * rows)
    left_out = np.array([(drawn != item).all(axis=1).mean() for item in range(3)])
    pair = {2: 6 / 10 * 3 / 4 + 3 / 10 * 6 / 7, 1: 6 / 10 * 1 / 4 + 1 / 10 * 6 / 9, 0: 3 / 10 * 1 / 7 + 1 / 10 * 3 / 9}
    for item, chance in pair.items():
        assert abs(left_out[item] - chance) < 5 * np.sqrt(chance * (1 - chance) / rows)


def test_another_seed_draws_others():
    arguments = mix(0, np.arange(50)), np.zeros(50, dtype=np.int32), [[]] * 50
    assert not np.array_equal(draw(sampler(1000, 20, seed=0), *arguments), draw(sampler(1000, 20, seed=1), *arguments))


def test_events_without_item_are_nothing_that_anybody_had():
    """Of 5 items a user had 1 and 3, with three events without an item between: 0, 2 and 4 are left."""
    sample = sampler(5, 4)
    taken = sample.taken(*flat([[NO_ITEM, 1, NO_ITEM, 3, NO_ITEM], [NO_ITEM], []]))
    assert taken.tolist() == [1, 3]
    assert np.array_equal(taken, sample.taken(*flat([[1, 3], [], []])))
    drawn = draw(sample, mix(0, np.arange(50)), np.full(50, 1, np.int32), [[NO_ITEM, 1, 3]] * 50)
    assert {tuple(sorted(row)) for row in drawn.tolist()} == {(0, 1, 2, 4)}


def test_no_rows():
    assert draw(sampler(5, 2), mix(0, np.arange(0)), np.zeros(0, dtype=np.int32), []).shape == (0, 2)


def test_more_candidates_than_items():
    with pytest.raises(UserError, match="count is 20, the catalogue has 19 items: lower"):
        sampler(19, 20)


@pytest.mark.parametrize("had", [[0, 1, 2, 3, 3, 2], [0, 1, 2, 3, 4]])
def test_history_that_leaves_too_few(had):
    arguments = mix(0, np.arange(2)), np.array([1, 4], dtype=np.int32), [[0], had]
    with pytest.raises(UserError, match=r"fewer than 4 of the 8 items.*lower protocol\.candidates\.count"):
        draw(sampler(8, 5), *arguments)
    assert draw(sampler(8, 4), *arguments).shape == (2, 4)


def test_examples_share_what_their_user_had(monkeypatch):
    """As if each had a copy of it; also where rows run dry and users come in any order."""
    histories = [[1, 2, 3, 2], [], [5, *range(30, 44)]]
    users = np.array([2, 0, 0, 2, 1, 2] * 20)
    targets, keys = np.tile(np.array([5, 2, 3, 40, 7, 30], dtype=np.int32), 20), mix(4, np.arange(120))
    for most_draws in (16, 1, 0):
        monkeypatch.setattr(candidates, "_MOST_DRAWS", most_draws)
        for method in ("uniform", "popularity"):
            sample = sampler(45, 25, method, np.arange(45) % 7)
            shared = sample.draw(keys, targets, users, sample.taken(*flat(histories)))
            assert np.array_equal(shared, draw(sample, keys, targets, [histories[user] for user in users]))


def test_frozen_candidates():
    """Written once: another version of the sampler must draw the same, or the candidates of papers change."""
    keys, histories = mix(9, np.arange(3)), [[1, 2], [3], list(range(20))]
    targets = np.array([1, 4, 19], dtype=np.int32)
    uniform = draw(sampler(30, 5), keys, targets, histories).tolist()
    popular = draw(sampler(30, 5, "popularity", np.arange(30) ** 3), keys, targets, histories).tolist()
    assert (uniform, popular) == (UNIFORM, POPULAR)


@pytest.mark.parametrize(
    ("target", "history", "name"),
    [(8, 0, "target item_index 8"), (-1, 0, "target item_index -1"), (0, -2, "history item_index -2")],
)
def test_items_outside_the_catalogue(target, history, name):
    with pytest.raises(UserError, match=f"{name} is outside the catalogue of 8 items"):
        draw(sampler(8, 2), mix(0, np.arange(1)), np.array([target], dtype=np.int32), [[history]])
