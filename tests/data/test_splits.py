import datetime
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.data import given as given_rows
from recllm.data import splits
from recllm.data.audit import Audit
from recllm.data.log import Log
from recllm.data.randomness import mix, text_keys
from recllm.errors import UserError
from recllm.recipe import (
    DataSection,
    FilterSection,
    GivenRows,
    InteractionsSource,
    ItemsSource,
    SplitSection,
    UsersSource,
)
from recllm.schema import TEST, TRAIN, UNUSED, VALID

METHODS = ("leave_one_out", "temporal", "user_holdout", "session_holdout")


def log_from(users, sessions=None):
    """users: a list of (times in seconds) a user; items count up, sessions is a list a user."""
    lengths = [len(times) for times in users]
    ids = [str(number) for number in range(1, len(users) + 1)]
    flat_sessions = None if sessions is None else np.array([s for row in sessions for s in row], dtype=np.int32)
    keys = None
    if flat_sessions is not None:
        keys = mix(9, np.repeat(np.arange(len(users)), lengths), flat_sessions)
    return Log(
        user_ids=ids,
        user_keys=text_keys(ids),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        order_us=np.array([t for times in users for t in times], dtype=np.int64) * 1_000_000,
        sessions=flat_sessions,
        session_keys=keys,
    )


def rules_of(log, section, seed=0):
    return splits.rules(section, seed, pl.Series(log.user_ids), log.lengths, lambda: [log.seconds])


def assign(log, section, seed=0):
    """The codes of a log in one part; an empty split is refused."""
    rules = rules_of(log, section, seed)
    codes = splits.assign(log, rules)
    found = {name: int((codes == code).sum()) for name, code in splits.SPLIT_CODES.items()}
    splits.refuse_empty(found, len(log.user_ids), len(codes), rules)
    return codes


def audit(log, codes, section, parts=1):
    """The audit of a log that comes in parts of about equal numbers of users."""
    with tempfile.TemporaryDirectory() as folder:
        result = Audit(section, Path(folder) / "times")
        for users in np.array_split(np.arange(len(log.user_ids)), parts):
            if len(users):
                result.add(
                    part_of(log, users[0], users[-1] + 1), codes[log.offsets[users[0]] : log.offsets[users[-1] + 1]]
                )
        return result.finish()


def part_of(log, first, end):
    return log.users_between(int(first), int(end))


def codes_of(log, section, seed=0):
    codes = assign(log, section, seed).tolist()
    return ["".join("-rvt"[code] for code in codes[a:b]) for a, b in zip(log.offsets, log.offsets[1:])]


def test_leave_one_out_takes_the_last_two():
    log = log_from([[1, 2, 3, 4], [1, 2], [5, 6, 7]])
    section = SplitSection(method="leave_one_out")
    assert codes_of(log, section) == ["rrvt", "rr", "rvt"]
    report = audit(log, assign(log, section, 0), section)
    assert report["users_too_short"] == 1
    assert any("1 users have fewer than 3 interactions" in warning for warning in report["warnings"])
    assert codes_of(log, SplitSection(method="leave_one_out", min_history=2)) == ["rrvt", "rr", "rrr"]


def test_leave_one_out_with_everybody_too_short():
    with pytest.raises(UserError, match=r"user 2 has 2 interactions, the most of all users, the split needs 3: lower"):
        assign(log_from([[1], [1, 2]]), SplitSection(method="leave_one_out"), 0)


def test_temporal_cut_offs_are_global_and_belong_to_the_later_side():
    """Ten times: the newest 20% begin at 9, the 20% before at 7; both 7s are valid, the user's first is scored."""
    log = log_from([[1, 2, 7, 8, 9], [3, 4, 5, 6, 10]])
    section = SplitSection(method="temporal", test_fraction=0.2, valid_fraction=0.2, targets="all")
    assert codes_of(log, section) == ["rrvvt", "rrrrt"]
    assert rules_of(log, section).cutoffs == {"valid": 7, "test": 9}
    tied = log_from([[1, 2, 7, 7, 9], [3, 4, 5, 7, 9]])
    assert codes_of(tied, section) == ["rrvvt", "rrrvt"]


@pytest.mark.parametrize(("targets", "expected"), [("first", "rrv-t-"), ("last", "rr-v-t"), ("all", "rrvvtt")])
def test_targets_choose_which_are_scored(targets, expected):
    log = log_from([[1, 2, 5, 6, 8, 9], [1, 2, 3, 4]])
    section = SplitSection(method="temporal", test_fraction=0.2, valid_fraction=0.2, targets=targets)
    assert codes_of(log, section) == [expected, "rrrr"]


def test_min_history_moves_the_first_target_on():
    log = log_from([[5, 8, 9], [1, 5, 8, 9], [1, 1, 5, 8]])
    section = SplitSection(method="temporal", test_fraction=0.4, valid_fraction=0.3, min_history=2)
    assert codes_of(log, section) == ["--t", "r-t-", "rrvt"]


def test_holdouts_keep_users_and_sessions_together():
    users = [[1, 2, 3]] * 300
    codes = codes_of(log_from(users), SplitSection(method="user_holdout", targets="all"))
    assert set(codes) == {"rrr", "-vv", "-tt"}
    assert 10 < codes.count("-tt") < 60
    sessions = [[0, 0, 1, 1]] * 300
    log = log_from([[1, 2, 3, 4]] * 300, sessions)
    section = SplitSection(method="session_holdout", targets="all")
    codes = codes_of(log, section)
    assert set(codes) == {"rrrr", "rrvv", "rrtt", "-v--", "-t--", "-vvv", "-ttt", "-vtt"}
    assert audit(log, assign(log, section, 0), section)["shared_sessions"] == 0


@pytest.mark.parametrize(
    ("lots", "expected"),
    [([0.9, 0.8, 0.1, 0.3], "rrt-t---"), ([0.3, 0.8, 0.1, 0.9], "--t-t---"), ([0.9, 0.3, 0.8, 0.1], "rv---t-t")],
)
def test_session_holdout_shows_no_test_answer_to_training_and_validation(monkeypatch, lots, expected):
    """Sessions a to d, interleaved; test has lots below 0.2, valid below 0.4: what comes after one of them is unused.

    Training from the first of either on, validation from the first of test on.
    """
    log = log_from([[1, 2, 3, 4, 5, 6, 7, 8]], [[0, 1, 2, 0, 2, 3, 1, 3]])
    monkeypatch.setattr(splits, "_session_lots", lambda *_: np.array(lots)[log.sessions])
    section = SplitSection(method="session_holdout", targets="all", test_fraction=0.2, valid_fraction=0.2)
    codes = splits.assign(log, rules_of(log, section))
    assert "".join("-rvt"[code] for code in codes) == expected
    report = audit(log, codes, section)
    assert report["train_histories_with_test_targets"] == report["valid_histories_with_test_targets"] == 0


def test_lots_hang_on_seed_and_user_only():
    section = SplitSection(method="user_holdout", targets="all")
    log = log_from([[1, 2, 3]] * 300)
    codes = codes_of(log, section)
    assert codes != codes_of(log, section, seed=1)
    assert codes_of(part_of(log, 100, 300), section) == codes[100:]


def test_session_holdout_needs_sessions():
    with pytest.raises(UserError, match=r"session_holdout needs a session id .*columns.session_id"):
        assign(log_from([[1, 2, 3]]), SplitSection(method="session_holdout"), 0)


@pytest.mark.parametrize(
    ("users", "section", "empty"),
    [
        ([[1, 1, 1], [1, 1, 1]], SplitSection(method="temporal"), "train, valid"),
        ([[1, 2, 3]], SplitSection(method="user_holdout"), "valid, test"),
        ([[1, 2, 3, 4, 5]], SplitSection(method="temporal", min_history=5), "valid, test"),
    ],
)
def test_empty_split_names_numbers_and_a_next_step(users, section, empty):
    with pytest.raises(UserError, match=rf"{empty} came out empty \(train .* change the fractions"):
        assign(log_from(users), section, 0)


LOGS = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12).map(sorted), min_size=3, max_size=10)


@settings(deadline=None, max_examples=200)
@given(
    LOGS, st.sampled_from(METHODS), st.sampled_from(["first", "last", "all"]), st.integers(1, 3),
    st.sampled_from([0.1, 0.3, 0.5]), st.sampled_from([0.1, 0.3]), st.integers(0, 5),
)  # fmt: skip
def test_every_split_keeps_its_promises(users, method, targets, min_history, test, valid, seed):
    log = log_from(users, [[number // 2 for number in range(len(times))] for times in users])
    section = SplitSection(
        method=method, targets=targets, min_history=min_history, test_fraction=test, valid_fraction=valid
    )
    try:
        codes, cutoffs = assign(log, section, seed), rules_of(log, section, seed).cutoffs
    except UserError:
        return
    assert codes.shape == log.items.shape
    assert set(np.unique(codes)) <= {UNUSED, TRAIN, VALID, TEST}  # one code: at most one role a position
    scored = (codes == VALID) | (codes == TEST)
    for start, end in zip(log.offsets, log.offsets[1:]):
        trained = np.flatnonzero(codes[start:end] == TRAIN)
        assert not scored[start:end][: trained.max(initial=-1) + 1].any()  # no history of training holds a target
    assert audit(log, codes, section)["train_histories_with_test_targets"] == 0
    assert (log.positions[scored] >= min_history).all()
    if method == "temporal":
        assert (log.seconds[codes == TRAIN] < cutoffs["valid"]).all()
        assert (log.seconds[codes == VALID] >= cutoffs["valid"]).all()
        assert (log.seconds[codes == VALID] < cutoffs["test"]).all()
        assert (log.seconds[codes == TEST] >= cutoffs["test"]).all()
        assert (codes[log.seconds < cutoffs["valid"]] == TRAIN).all()
        assert audit(log, codes, section)["test_older_than_last_train"] == 0
    if method != "leave_one_out" and targets != "all":
        for code in (VALID, TEST):
            assert np.bincount(log.users[codes == code], minlength=1).max(initial=0) <= 1
    if method == "user_holdout":
        trained, held_out = set(log.users[codes == TRAIN]), set(log.users[codes != TRAIN])
        assert not trained & held_out


SESSIONS = st.lists(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=12).map(sorted),
    min_size=3,
    max_size=10,
)


@settings(deadline=None, max_examples=200)
@given(
    SESSIONS, st.sampled_from(["temporal", "dates"]), st.sampled_from(["first", "last", "all"]), st.integers(1, 3),
    st.sampled_from([0.1, 0.3, 0.5]), st.integers(1, 4),
)  # fmt: skip
def test_whole_sessions_lie_on_one_side_and_end_at_the_next(users, method, targets, min_history, test, parts):
    """Sessions interleave, as those of two windows do. What a session holds beyond the next cut-off is unused."""
    day = 86_400
    log = log_from([[time * day for time, _ in row] for row in users], [numbered(row) for row in users])
    dates = (
        {"valid_from": datetime.date(1970, 1, 11), "test_from": datetime.date(1970, 1, 21)} if method == "dates" else {}
    )
    section = SplitSection(
        method=method, whole_sessions=True, targets=targets, min_history=min_history, test_fraction=test,
        valid_fraction=0.3, **dates,
    )  # fmt: skip
    rules = rules_of(log, section)
    try:
        codes = assign(log, section)
    except UserError:
        return
    cutoffs, trimmed = rules.cutoffs, splits.trimmed(log, rules)
    bounds = {
        TRAIN: (-1, cutoffs["valid"]),
        VALID: (cutoffs["valid"], cutoffs["test"]),
        TEST: (cutoffs["test"], 31 * day),
    }
    for user, session in set(zip(log.users.tolist(), log.sessions.tolist())):
        own = (log.users == user) & (log.sessions == session)
        begin = log.seconds[own].min()
        side = TEST if begin >= cutoffs["test"] else VALID if begin >= cutoffs["valid"] else TRAIN
        assert set(codes[own].tolist()) <= {UNUSED, side}
        assert (trimmed[own] == (log.seconds[own] >= bounds[side][1])).all()
        if side == TRAIN:
            assert ((codes[own] == TRAIN) == ~trimmed[own]).all()
    for code, (first, end) in bounds.items():
        assert ((log.seconds[codes == code] >= first) & (log.seconds[codes == code] < end)).all()
    report = audit(log, codes, section, parts)
    assert report["shared_sessions"] == 0
    assert report["train_histories_with_test_targets"] == report["valid_histories_with_test_targets"] == 0
    assert report["test_older_than_last_train"] == 0
    plain = assign_anyway(log, section.model_copy(update={"whole_sessions": False}))
    assert ((codes == TRAIN) <= (plain == TRAIN)).all()  # it only takes away


def numbered(row):
    """Sessions by first appearance, from (time, session)."""
    seen: dict[int, int] = {}
    return [seen.setdefault(session, len(seen)) for _, session in row]


def assign_anyway(log, section):
    return splits.assign(log, rules_of(log, section))


@settings(deadline=None, max_examples=100)
@given(SESSIONS, st.sampled_from(["session_holdout", "user_holdout"]), st.integers(0, 5))
def test_no_position_of_a_held_out_session_is_trained(users, method, seed):
    log = log_from([[time for time, _ in row] for row in users], [numbered(row) for row in users])
    section = SplitSection(method=method, targets="all", test_fraction=0.3, valid_fraction=0.3)
    codes = splits.assign(log, rules_of(log, section, seed))
    for user, session in set(zip(log.users.tolist(), log.sessions.tolist())):
        own = set(codes[(log.users == user) & (log.sessions == session)].tolist()) - {UNUSED}
        assert len(own) <= 1
    if (codes == TEST).any():
        report = audit(log, codes, section)
        assert report["shared_sessions"] == report["valid_histories_with_test_targets"] == 0


def test_audit_counts_what_events_do():
    """Two sessions of three: the times 5, 5 are of one session, 7 and 7 of two."""
    log = log_from([[1, 5, 5, 7, 7, 9]], [[0, 0, 0, 0, 1, 1]])
    codes = np.array([1, 1, 1, 0, 2, 3], dtype=np.int8)
    with tempfile.TemporaryDirectory() as folder:
        found = Audit(SplitSection(method="temporal", whole_sessions=True), Path(folder) / "times", events=True)
        found.add(log, codes, trimmed=1, disordered=2)
        report = found.finish()
    assert (report["trimmed_events"], report["out_of_order_events"], report["simultaneous_events"]) == (1, 2, 1 / 6)
    assert report["shared_sessions"] == 1
    assert any(text.startswith("2 events stand in the files behind a later one") for text in report["warnings"])
    assert any(text.startswith("16.7% of the events have the time") for text in report["warnings"])


@settings(deadline=None, max_examples=60)
@given(LOGS, st.sampled_from(METHODS), st.integers(1, 5))
def test_parting_the_users_changes_neither_codes_nor_audit(users, method, parts):
    log = log_from(users, [[number // 2 for number in range(len(times))] for times in users])
    section = SplitSection(method=method, targets="all", test_fraction=0.4, valid_fraction=0.3)
    try:
        codes = assign(log, section)
    except UserError:
        return
    rules = rules_of(log, section)
    edges = np.linspace(0, len(users), min(parts, len(users)) + 1).astype(int)
    pieces = [splits.assign(part_of(log, a, b), rules) for a, b in itertools.pairwise(edges)]
    assert np.array_equal(np.concatenate(pieces), codes)
    assert audit(log, codes, section, parts) == audit(log, codes, section)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(st.integers(-(2**53), 2**53), min_size=1, max_size=9), min_size=1, max_size=4),
    st.integers(0, 40),
)
def test_nth_equals_sorting(pieces, place):
    flat = sorted(value for piece in pieces for value in piece)
    place = min(place, len(flat) - 1)
    assert splits.nth(lambda: [np.array(piece) for piece in pieces], place) == flat[place]


def test_audit_counts_what_leaks():
    """Test targets at 9 and 4; the newest training interaction is at 7, of user 1."""
    log = log_from([[1, 7, 8, 9], [2, 2, 3, 4], [5, 6, 6]], [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0]])
    codes = np.array([1, 1, 2, 3, 1, 1, 2, 3, 1, 1, 1], dtype=np.int8)
    report = audit(log, codes, SplitSection(method="leave_one_out"))
    assert report["test_older_than_last_train"] == 1 / 2
    assert report["test_older_than_own_last_train"] == 0
    assert report["shared_sessions"] == 2  # session 0 of user 1 (train, valid), session 1 of user 2 (all three)
    assert report["users_with_tied_last_timestamps"] == 1 / 3
    assert (report["train_targets"], report["valid_targets"], report["test_targets"]) == (7, 2, 2)
    assert report["warnings"][0].startswith("leave_one_out leaks: 50.0% of the test targets")
    assert any("33.3% of the users have tied timestamps" in warning for warning in report["warnings"])


def test_audit_counts_training_histories_that_hold_a_test_target():
    """User 1: positions 3 and 4 are trained on after the target at 2; user 2: valid between does not count."""
    log = log_from([[1, 2, 3, 4, 5], [1, 2, 3], [1, 2]])
    codes = np.array([TRAIN, TRAIN, TEST, TRAIN, TRAIN, TRAIN, VALID, TRAIN, TRAIN, TEST], dtype=np.int8)
    report = audit(log, codes, SplitSection(method="session_holdout"))
    assert report["train_histories_with_test_targets"] == 2
    assert any("train_histories_with_test_targets: 2 training positions" in text for text in report["warnings"])


def test_audit_counts_validation_after_a_test_target():
    log = log_from([[1, 2, 3, 4], [1, 2, 3]])
    codes = np.array([TRAIN, TEST, VALID, VALID, TRAIN, VALID, TEST], dtype=np.int8)
    report = audit(log, codes, SplitSection(method="session_holdout"))
    assert report["valid_histories_with_test_targets"] == 2
    assert any("valid_histories_with_test_targets: 2 validation" in text for text in report["warnings"])


@pytest.mark.parametrize(("newest", "warned"), [(5_000_000, True), (1_700_000_000, False), (-5, False)])
def test_times_that_all_lie_in_1970_are_warned_about(newest, warned):
    log = log_from([[newest - 2, newest - 1, newest]])
    report = audit(log, np.array([TRAIN, VALID, TEST], dtype=np.int8), SplitSection(method="leave_one_out"))
    assert any("lies in 1970" in text for text in report["warnings"]) == warned


def test_audit_of_own_training_and_without_sessions():
    log = log_from([[1, 2, 3]])
    report = audit(log, np.array([3, 2, 1], dtype=np.int8), SplitSection(method="session_holdout"))
    assert report["test_older_than_own_last_train"] == 1
    assert report["shared_sessions"] is None


def given_section(tmp_path, valid, test, **names):
    for name, rows in (("valid", valid), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in ("valid", "test")}
    return SplitSection(method="given", given=GivenRows(**paths, **names))


def row_of(user, history, target):
    return {"user": user, "history": history, "target": target}


def test_given_targets_leave_later_positions_unused(tmp_path, prepare_rows, log_of):
    section = given_section(tmp_path, [row_of(1, ["a", "b"], "c")], [row_of("2", ["c"], "d")])
    prepared = prepare_rows(log_of("abcd", "bcdaf", "ab"), split=section)
    assert prepared.sequences.frame()["splits"].to_list() == [[1, 1, 2, 0], [1, 1, 3, 0, 0], [1, 1]]
    assert prepared.audit["given"] == {
        "valid": {"rows": 1, "history_equal": 1},
        "test": {"rows": 1, "history_equal": 1},
    }
    assert len(prepared.inputs) == 4


def test_given_rows_are_read_once(tmp_path, prepare_rows, log_of, monkeypatch):
    section, read = given_section(tmp_path, [row_of(1, ["a", "b"], "c")], [row_of("2", ["c"], "d")]), []
    real = given_rows._read
    monkeypatch.setattr(given_rows, "_read", lambda path, names: read.append(path) or real(path, names))
    prepare_rows(log_of("abcd", "bcdaf", "ab"), split=section)
    assert read == [section.given.valid, section.given.test]


def test_given_history_that_differs_is_counted_and_warned_about(tmp_path, prepare_rows, log_of):
    section = given_section(tmp_path, [row_of(1, ["b", "a"], "c")], [row_of(2, ["b", "c"], "d")])
    audit = prepare_rows(log_of("abcd", "bcdaf"), split=section).audit
    assert (audit["given"]["valid"]["history_equal"], audit["given"]["test"]["history_equal"]) == (0, 1)
    assert any("1 of 1 given valid rows have a history that differs" in warning for warning in audit["warnings"])


@pytest.mark.parametrize("seed", range(5))
def test_ties_stand_as_the_given_rows_have_them(tmp_path, prepare_rows, seed):
    times = {"a": 1, "b": 2, "c": 2, "d": 2, "e": 3, "f": 3, "g": 3}
    rows = [{"user_id": u, "item_id": i, "timestamp": t} for u in ("1", "2") for i, t in times.items()]
    section = given_section(tmp_path, [row_of(1, ["d", "b", "f"], "e")], [row_of(2, ["c", "b", "g"], "e")])
    prepared = prepare_rows(rows, split=section, seed=seed)
    names = prepared.items["item_id"].to_list()
    one, two = ("".join(names[i] for i in items) for items in prepared.sequences.frame()["items"].to_list())
    assert (one, two) == ("acdbfeg", "adcbgef")
    assert prepared.audit["given"]["valid"]["history_equal"] == 1
    assert prepared.sequences.frame()["splits"].to_list() == [[1, 1, 1, 1, 1, 2, 0], [1, 1, 1, 1, 1, 3, 0]]


def test_given_offset_and_other_keys(tmp_path, prepare_rows):
    rows = [{"user_id": 1, "item_id": t, "timestamp": t} for t in range(1, 6)]
    given_rows = [{"u": 1, "h": [0, 1], "t": 2}], [{"u": 1, "h": [2, 3], "t": 4}]
    section = given_section(tmp_path, *given_rows, user="u", history="h", target="t", item_id_offset=1)
    assert prepare_rows(rows, split=section).sequences.frame()["splits"].to_list() == [[1, 1, 2, 0, 3]]


@pytest.mark.parametrize(
    ("row", "names", "message"),
    [
        (row_of(9, [], "c"), {}, "line 2: user 9 is not in the interactions"),
        (row_of(1, [], "f"), {}, "line 2: user 1 has no interaction with target f"),
        (row_of(1, [], "z"), {}, 'line 2: item "z" is not in the items'),
        (row_of(1, ["a"], "c"), {"item_id_offset": 1}, "line 1: item id 'b' is no whole number"),
        ({"user": 1, "target": "c"}, {}, 'line 2: no key "history", keys there: user, target'),
        (row_of(1, "ab", "c"), {}, "line 2: history is 'ab', a list of item ids is expected"),
        (["a"], {}, "line 2: holds .* one JSON object a line"),
        (row_of(2, ["b"], "c"), {}, "item c of user 2 is a target in .*valid.jsonl, too"),
    ],
)
def test_given_rows_that_do_not_fit(tmp_path, prepare_rows, log_of, row, names, message):
    section = given_section(tmp_path, [row_of(2, ["b"], "c")], [row_of(1, ["b"], "c"), row], **names)
    if "offset" in str(names):
        section = given_section(tmp_path, [row_of(2, ["b"], "b")], [row_of(1, ["b"], "b")], **names)
    with pytest.raises(UserError, match=message):
        prepare_rows(log_of("abcd", "bcdaf"), split=section)


def test_given_files_that_are_missing_or_broken(tmp_path, prepare_rows, log_of):
    section = given_section(tmp_path, [], [])
    (tmp_path / "valid.jsonl").write_text('{"user": 1,\n')
    with pytest.raises(UserError, match=r"valid.jsonl, line 1: not valid JSON"):
        prepare_rows(log_of("abcd"), split=section)
    (tmp_path / "valid.jsonl").write_bytes('{"user": "é"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"valid.jsonl, line 1: is not UTF-8 text"):
        prepare_rows(log_of("abcd"), split=section)
    (tmp_path / "valid.jsonl").unlink()
    with pytest.raises(UserError, match=r"valid.jsonl does not exist"):
        prepare_rows(log_of("abcd"), split=section)
    with pytest.raises(UserError, match=r"needs split.given"):
        prepare_rows(log_of("abcd"), split=SplitSection(method="given"))


def movielens(shared_data):
    folder = shared_data / "ml-100k"
    return DataSection(
        interactions=InteractionsSource(path=str(folder / "ml-100k.inter")),
        items=ItemsSource(path=str(folder / "ml-100k.item"), columns={"title": "movie_title"}),
    )


@pytest.mark.shared
def test_movielens_leave_one_out_leaks_as_known(shared_data, tmp_path):
    """99.9% of the targets precede the last training event, 44% of the users have tied timestamps at the end."""
    from recllm.data.sequences import prepare

    data = movielens(shared_data).model_copy(
        update={"users": UsersSource(path=str(shared_data / "ml-100k" / "ml-100k.user"))}
    )
    prepared = prepare(data, FilterSection(), SplitSection(method="leave_one_out"), 0, tmp_path)
    assert prepared.users.row(9) == (9, "10", "53", "M", "lawyer", "90703")
    assert prepared.counts["users_without_attributes"] == 0
    assert (prepared.counts["users"], prepared.counts["items"], prepared.counts["interactions"]) == (943, 1682, 100_000)
    assert prepared.audit["test_older_than_last_train"] == 942 / 943
    assert prepared.audit["users_with_tied_last_timestamps"] == 415 / 943


@pytest.mark.shared
def test_published_movielens_rows_fit_ratings_of_three_and_more(shared_data, tmp_path):
    from recllm.data.sequences import prepare

    rows = GivenRows(
        valid=str(shared_data / "ilora-movielens" / "val.jsonl"),
        test=str(shared_data / "ilora-movielens" / "test.jsonl"),
        item_id_offset=1,
    )
    section = SplitSection(method="given", given=rows)
    audit = prepare(movielens(shared_data), FilterSection(min_rating=3), section, 0, tmp_path).audit
    assert audit["given"] == {"valid": {"rows": 94, "history_equal": 94}, "test": {"rows": 95, "history_equal": 95}}


@pytest.mark.shared
def test_movielens_1m_through_a_mapping(shared_data, tmp_path):
    from recllm.data.sequences import prepare
    from recllm.recipe import IdMap

    folder = shared_data / "ml-1m-dbpedia"
    log = [str(folder / "mapping" / f"{name}.txt") for name in ("train", "valid", "test")]
    data = DataSection(
        interactions=InteractionsSource(
            path=log, format="csv", header=False, separator="\t", columns={"user_id": 0, "item_id": 1, "timestamp": 3}
        ),
        items=ItemsSource(
            path=str(folder / "products.txt"),
            format="csv",
            separator="\t",
            columns={"item_id": "pid", "title": "name"},
            id_map=IdMap(
                path=str(folder / "mapping" / "product_mapping.txt"),
                source="rating_id",
                target="new_id",
                separator="\t",
            ),
        ),
    )
    prepared = prepare(data, FilterSection(), SplitSection(method="temporal"), 0, tmp_path)
    assert prepared.counts["interactions"] == 556_989 + 190_063 + 185_241
    assert (prepared.counts["users"], prepared.counts["items"]) == (6040, 2983)
    assert prepared.items.row(1)[2] == "Monty Python's Life of Brian (1979)"


def test_given_rows_without_a_history_are_equal_only_at_the_beginning(tmp_path, prepare_rows, log_of):
    section = given_section(tmp_path, [row_of(1, [], "c")], [row_of(2, ["b", "c"], "d")])
    audit = prepare_rows(log_of("abcd", "bcdaf"), split=section).audit
    assert audit["given"]["valid"] == {"rows": 1, "history_equal": 0}


def test_an_offset_is_added_to_whole_numbers_only(tmp_path, prepare_rows):
    rows = [{"user_id": 1, "item_id": t, "timestamp": t} for t in range(1, 6)]
    section = given_section(tmp_path, [row_of(1, [0, 1], 2.9)], [row_of(1, [2, 3], 4)], item_id_offset=1)
    with pytest.raises(UserError, match=r"item id 2.9 is no whole number"):
        prepare_rows(rows, split=section)
