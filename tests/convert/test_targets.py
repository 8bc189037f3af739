import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.convert.targets import Sequences, find_outcomes, find_targets
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


# ---- events ----

ACTIONS = ["view", "cart", "buy"]
CODES = [UNUSED, TRAIN, VALID, TEST]
EVENTS = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.none() | st.integers(0, 3), st.integers(0, 2), st.sampled_from(CODES)),
    max_size=14,
)
LOGS = st.lists(EVENTS, min_size=1, max_size=4)


def with_times(users: list[list[tuple]]) -> dict[str, list[tuple]]:
    """(action, item, session, code) → events of conftest.make_events; sessions interleave."""
    return {f"u{n}": [(a, i, 10 * t, s, c) for t, (a, i, s, c) in enumerate(events)] for n, events in enumerate(users)}


def before(events: list[tuple], position: int, *, in_session: bool, items_only: bool) -> list[int]:
    """Positions before one, as plain loops: the oracle."""
    session = events[position][3]
    return [
        place
        for place, (_, item, _, of, _) in enumerate(events[:position])
        if (of == session or not in_session) and (item is not None or not items_only)
    ]


@settings(max_examples=150, deadline=None)
@given(LOGS, st.booleans(), st.booleans(), st.integers(0, 4))
def test_the_last_of_a_group_before_a_position(make_events, users, in_session, items_only, most):
    made = with_times(users)
    sequences = Sequences.of(make_events(made))
    groups = sequences.by_session if in_session else sequences.by_user
    chosen = sequences.has_item if items_only else np.ones(len(sequences.items), bool)
    flat = np.arange(len(sequences.items))[::-1]
    offsets, found = groups.last(flat, chosen, most)
    earlier = groups.earlier(chosen)
    for number, place in enumerate(flat):
        row = sequences.rows[place]
        begin = sequences.offsets[row]
        expected = before(made[f"u{row}"], place - begin, in_session=in_session, items_only=items_only)
        shown = found[offsets[number] : offsets[number + 1]] - begin
        assert shown.tolist() == expected[max(0, len(expected) - most) :]
        assert earlier[place] == len(expected)


@settings(max_examples=150, deadline=None)
@given(LOGS, st.sampled_from([TRAIN, VALID, TEST]), st.booleans(), st.booleans())
def test_targets_of_events(make_events, users, split, in_session, items_only):
    made = with_times(users)
    found = find_targets(
        Sequences.of(make_events(made)), split, needs_item=items_only, within_session=in_session, seed=0
    )
    expected = []
    for row, events in enumerate(made.values()):
        for position, (_, item, _, _, code) in enumerate(events):
            earlier = before(events, position, in_session=in_session, items_only=items_only)
            enough = earlier or not (in_session or split == TRAIN)
            if code == split and enough and (item is not None or not items_only):
                expected.append((row, position, position + 1))
    assert rows(found) == expected


def test_sessions_of_one_event_are_counted(make_events):
    events = [("view", 1, 0, 0, TRAIN), ("view", 1, 9, 1, TRAIN), ("buy", 1, 10, 1, TRAIN), ("view", None, 20, 2, TEST)]
    sequences = Sequences.of(make_events({"u": events}))
    found = find_targets(sequences, TRAIN, needs_item=False, within_session=True)
    assert rows(found) == [(0, 2, 3)]
    assert found.left_out == {"sessions_of_one_event": 1}
    assert found.take(slice(0, 0)).left_out == found.left_out
    assert find_targets(sequences, TEST, needs_item=False, within_session=True).left_out == found.left_out
    assert find_targets(sequences, TRAIN, needs_item=False).left_out == {}


def outcome(events: list[tuple], split: int, after: int) -> tuple[int, bool] | str | None:
    """What an outcome example of one session is, as plain loops: position and answer, or why there is none."""
    if not any(event[4] == split for _, event in events):
        return None
    if len(events) <= after:
        return "sessions_too_short"
    if any(event[0] == "buy" for _, event in events[:after]):
        return "sessions_already_positive"
    rest = events[after:]
    if not all(event[4] == split for _, event in rest):
        return "sessions_trimmed"
    return rest[0][0], any(event[0] == "buy" for _, event in rest)


@settings(max_examples=300, deadline=None)
@given(LOGS, st.sampled_from([TRAIN, VALID, TEST]), st.integers(1, 4))
def test_outcomes(make_events, users, split, after):
    made = with_times(users)
    found = find_outcomes(Sequences.of(make_events(made)), split, ["buy"], after)
    expected, left_out = [], dict.fromkeys(["sessions_too_short", "sessions_already_positive", "sessions_trimmed"], 0)
    for row, events in enumerate(made.values()):
        for session in {event[3] for event in events}:
            one = outcome([pair for pair in enumerate(events) if pair[1][3] == session], split, after)
            if isinstance(one, str):
                left_out[one] += 1
            elif one is not None:
                expected.append((row, *one))
    assert list(zip(found.row.tolist(), found.start.tolist(), found.yes.tolist())) == sorted(expected)
    assert found.left_out == left_out


def test_a_session_that_is_cut_off_has_no_outcome_whatever_it_shows(make_events):
    """Half of the whole sessions end in "buy", and so must half of the examples."""
    no, yes = ([("view", 1, 0, 0, TRAIN), (end, 1, 1, 0, TRAIN), ("view", 1, 2, 0, TRAIN)] for end in ("view", "buy"))
    cut_no, cut_yes = ([*events[:2], ("view", 1, 2, 0, UNUSED)] for events in (no, yes))
    users = {"no": no, "yes": yes, "cut no": cut_no, "cut yes": cut_yes}
    found = find_outcomes(Sequences.of(make_events(users)), TRAIN, ["buy"], 1)
    assert (rows(found), found.yes.tolist()) == ([(0, 1, 2), (1, 1, 2)], [False, True])
    assert found.left_out["sessions_trimmed"] == 2


def test_a_choice_of_event_targets_hangs_on_the_position(make_events):
    sessions = [("view", None, 10 * n, n // 3, TRAIN) for n in range(60)]
    sequences = Sequences.of(make_events({"u": sessions, "w": sessions}))
    for find in (
        lambda most, seed: find_targets(sequences, TRAIN, needs_item=False, within_session=True,
                                        max_train_targets=most, seed=seed),
        lambda most, seed: find_outcomes(sequences, TRAIN, ["buy"], 1, most, seed),
    ):  # fmt: skip
        chosen, whole = rows(find(5, 0)), rows(find(None, 0))
        assert [sum(row == user for row, _, _ in chosen) for user in range(2)] == [5, 5]
        assert set(chosen) < set(whole)
        assert chosen == sorted(chosen)
        assert chosen == rows(find(5, 0)) != rows(find(5, 1))
        alone = Sequences.of(make_events({"w": sessions}))
        assert alone.user_key[0] == sequences.user_key[1]


def test_windows_end_with_a_session_and_run_over_events_without_item(make_events):
    events = [
        *(("view", 1, 10 * n, 0, TRAIN) for n in range(4)),
        *(("view", 1, 100 + 10 * n, 1, TRAIN) for n in range(2)),
        ("view", None, 200, 1, TRAIN),
        *(("view", 1, 300 + 10 * n, 1, TRAIN) for n in range(3)),
    ]
    sequences = Sequences.of(make_events({"u": events}))
    within = find_targets(sequences, TRAIN, dense_window=3, within_session=True)
    assert rows(within) == [(0, 1, 4), (0, 4, 6), (0, 7, 10)]
    across = find_targets(sequences, TRAIN, dense_window=4)
    assert rows(across) == [(0, 1, 5), (0, 5, 10)]  # position 0 is the single left-over


@settings(max_examples=200, deadline=None)
@given(LOGS, st.booleans(), st.integers(2, 4))
def test_windows_of_events_cover_the_titles_of_a_group_once(make_events, users, in_session, size):
    """Sessions interleave, and events lack items. Dropped are only the oldest of a run of training titles."""
    made = with_times(users)
    sequences = Sequences.of(make_events(made))
    found = find_targets(sequences, TRAIN, dense_window=size, within_session=in_session)
    assert rows(found) == sorted(rows(found))
    covered = []
    for row, start, stop in rows(found):
        events = list(enumerate(made[f"u{row}"]))
        group = [place for place, event in events if event[1] is not None]
        if in_session:
            group = [place for place in group if events[place][1][3] == events[start][1][3]]
        window = [place for place in group if start <= place < stop]
        assert (window[0], window[-1]) == (start, stop - 1)
        assert 2 <= len(window) <= size
        assert all(events[place][1][4] == TRAIN for place in window)
        covered += [(row, place) for place in window]
    assert len(covered) == len(set(covered))
    for row, events in enumerate(made.values()):
        for place, (_, item, _, _, code) in enumerate(events):
            if code == TRAIN and item is not None and (row, place) not in covered:
                earlier = before(events, place, in_session=in_session, items_only=True)
                assert not earlier or events[earlier[-1]][4] != TRAIN


def test_attributes_and_sessions_are_flat(make_events):
    events = {"a": [("view", None, 0, 0, TRAIN, "x", "")], "b": [("buy", 2, 5, 0, TRAIN, "", "y")] * 2}
    sequences = Sequences.of(make_events(events, ["name", "text"]))
    assert {name: column.to_pylist() for name, column in sequences.attributes.items()} == {
        "name": ["x", "", ""],
        "text": ["", "y", "y"],
    }
    assert sequences.sessions.tolist() == [0, 0, 0]
    assert sequences.has_item.tolist() == [False, True, True]
    assert sequences.rows.tolist() == [0, 1, 1]
