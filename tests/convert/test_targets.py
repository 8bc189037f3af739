import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.convert.targets import Sequences, find_targets
from recllm.schema import TEST, TRAIN, UNUSED, VALID


def users_of(codes: list[list[int]]) -> dict[str, list[tuple]]:
    return {f"u{n}": [(i, 10 * i, code) for i, code in enumerate(row)] for n, row in enumerate(codes)}


def rows(targets) -> list[tuple[int, int, int]]:
    return list(zip(targets.row.tolist(), targets.start.tolist(), targets.stop.tolist(), strict=True))


def test_single_targets_need_an_earlier_item(make_batch):
    sequences = Sequences.of(make_batch(users_of([[TRAIN, TRAIN, UNUSED, TRAIN, VALID, TEST], [TEST]])))
    assert rows(find_targets(sequences, TRAIN)) == [(0, 1, 2), (0, 3, 4)]
    assert rows(find_targets(sequences, VALID)) == [(0, 4, 5)]
    assert rows(find_targets(sequences, TEST)) == [(0, 5, 6), (1, 0, 1)]


def test_windows_tile_runs_from_the_newest_end(make_batch):
    codes = [[TRAIN] * 7 + [VALID, TEST], [TRAIN, TRAIN, UNUSED, TRAIN, TRAIN, TRAIN, TRAIN], [TRAIN, TEST], []]
    sequences = Sequences.of(make_batch(users_of(codes)))
    windows = rows(find_targets(sequences, TRAIN, dense_window=3))
    assert windows == [(0, 1, 4), (0, 4, 7), (1, 0, 2), (1, 4, 7)]  # single left-overs are dropped


def test_max_train_targets_is_a_seeded_choice_of_each_user(make_batch):
    sequences = Sequences.of(make_batch(users_of([[TRAIN] * 20 + [TEST], [TRAIN] * 3, [TRAIN] * 30])))
    chosen = rows(find_targets(sequences, TRAIN, max_train_targets=4, seed=0))
    assert [sum(row == user for row, _, _ in chosen) for user in range(3)] == [4, 2, 4]
    assert chosen == sorted(chosen)
    assert chosen == rows(find_targets(sequences, TRAIN, max_train_targets=4, seed=0))
    assert chosen != rows(find_targets(sequences, TRAIN, max_train_targets=4, seed=1))
    assert len(find_targets(sequences, TEST, max_train_targets=4)) == 1  # only training is thinned out


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([UNUSED, TRAIN, VALID, TEST]), max_size=30), min_size=1, max_size=5),
    st.integers(2, 7),
)
def test_windows_cover_training_positions_once_and_nothing_else(make_batch, codes, size):
    sequences = Sequences.of(make_batch(users_of(codes)))
    covered = []
    for row, start, stop in rows(find_targets(sequences, TRAIN, dense_window=size)):
        assert 2 <= stop - start <= size
        covered += [(row, position) for position in range(start, stop)]
    training = {(u, p) for u, row in enumerate(codes) for p, code in enumerate(row) if code == TRAIN}
    assert len(covered) == len(set(covered))
    assert set(covered) <= training
    alone = {(u, p) for u, p in training - set(covered) if (u, p - 1) not in training}
    assert training - set(covered) == alone  # dropped: only the oldest of a run


@pytest.mark.parametrize("start", [0, 1])
def test_a_slice_of_a_batch_gives_the_same_targets(make_batch, start):
    batch = make_batch(users_of([[TRAIN, TRAIN, TEST], [TRAIN, TRAIN, TRAIN, TEST]]))
    whole = rows(find_targets(Sequences.of(batch), TRAIN))
    part = rows(find_targets(Sequences.of(batch.slice(start)), TRAIN))
    assert part == [(row - start, a, b) for row, a, b in whole if row >= start]


def test_positions_without_an_action_are_no_target_of_like(make_batch):
    batch = make_batch({"u": [(0, 0, TRAIN, "like"), (1, 1, TRAIN, None), (2, 2, TRAIN, "dislike")]})
    sequences = Sequences.of(batch)
    assert rows(find_targets(sequences, TRAIN, needs_action=True)) == [(0, 2, 3)]
    assert np.array_equal(find_targets(sequences, TRAIN).start, [1, 2])
