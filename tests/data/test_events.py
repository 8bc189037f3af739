"""Event logs: from their files to sequences with actions, sessions, attributes, and events without an item."""

import json
import random
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recllm import schema
from recllm.data import rows as reading
from recllm.data import sequences, spool
from recllm.data.sequences import prepare, source_paths
from recllm.errors import UserError
from recllm.recipe import (
    ActionsSection,
    DataSection,
    FilterSection,
    InteractionsSource,
    ItemsSource,
    SplitSection,
    UsersSource,
)
from recllm.schema import NO_ITEM

LOGS = Path(__file__).parent / "logs"
WORDS = {"view": "view", "cart": "add to cart", "search": "search", "leave": "leave"}
ACTIONS = ActionsSection(words=WORDS, without_item=["search", "leave"])
LAST = SplitSection(method="leave_one_out")


def events(*sessions, start=0, step=10):
    """("7", "s", "view a", "search") → user 7's session s; a time every `step` seconds."""
    time = iter(range(start, 10**9, step))
    return [
        {
            "user_id": user,
            "session_id": session,
            "timestamp": next(time),
            "action": action.split()[0],
            "item_id": [*action.split(), None][1],
        }
        for user, session, *actions in sessions
        for action in actions
    ]


@pytest.fixture
def prepared_from(write, tmp_path):
    """prepare() of rows given as dicts; the catalogue is that of the log unless items are given."""

    def run(rows, actions=ACTIONS, split=LAST, filters=None, items=None, name="log.jsonl", seed=0, **source):
        source = InteractionsSource(path=str(write(tmp_path / name, rows)), **source)
        items = items and ItemsSource(path=str(write(tmp_path / "items.jsonl", items)))
        data = DataSection(interactions=source, items=items)
        return prepare(data, filters or FilterSection(), split, seed, tmp_path, actions)

    return run


def told(prepared):
    """user id → what each event is: "view a", "search"."""
    names = [*prepared.items["item_id"].to_list(), ""]
    return {
        row["user_id"]: [f"{action} {names[item]}".strip() for action, item in zip(row["actions"], row["items"])]
        for row in prepared.sequences.frame().iter_rows(named=True)
    }


ONE = ("7", "s", "view b", "search", "view a", "cart a")
TWO = ("8", "t", "search", "view c", "leave")


def test_events_with_and_without_items(prepared_from):
    prepared = prepared_from(events(ONE, TWO)[::-1])
    assert told(prepared) == {"7": list(ONE[2:]), "8": list(TWO[2:])}
    assert pq.read_schema(prepared.sequences.path) == schema.SEQUENCES
    frame = prepared.sequences.frame()
    assert frame["items"].to_list() == [[1, NO_ITEM, 0, 0], [NO_ITEM, 2, NO_ITEM]]
    assert frame["sessions"].to_list() == [[0, 0, 0, 0], [0, 0, 0]]
    assert prepared.items.rows() == [(0, "a", "a"), (1, "b", "b"), (2, "c", "c")]
    assert prepared.actions == ["view", "cart", "search", "leave"]  # as the words, not as the alphabet, has them
    counts = prepared.counts
    assert (counts["interactions"], counts["events_without_item"]) == (7, 3)
    assert (counts["sessions"], counts["sessions_of_one_event"]) == (2, 0)
    assert prepared.train_counts.tolist() == [0, 1, 0]  # of 7: b is train, a valid and test; of 8 there is "search"
    assert list(prepared.inputs) == [str(prepared.sequences.path.parent / "log.jsonl")]


def test_a_catalogue_that_is_given_and_one_of_the_log(prepared_from):
    items = [{"item_id": i, "title": f"Tea {i}", "price": 3} for i in "dcba"]
    prepared = prepared_from(events(ONE, TWO), items=items)
    assert prepared.items["title"].to_list() == ["Tea a", "Tea b", "Tea c", "Tea d"]
    assert told(prepared) == told(prepared_from(events(ONE, TWO)))
    with pytest.raises(UserError, match=r"1 of 7 interactions have items that .*items.jsonl does not hold .*ids c…"):
        prepared_from(events(ONE, TWO), items=items[2:])
    dropped = prepared_from(events(ONE, TWO), items=items[2:], filters=FilterSection(drop_unknown_items=True))
    assert told(dropped)["8"] == ["search", "leave"]
    assert dropped.counts["after_unknown_items"] == 6


def test_ids_are_titles_on_one_line_in_natural_order(prepared_from):
    rows = [{**row, "item_id": item} for row, item in zip(events(ONE), ("10", None, "9\u2028x", 9))]
    assert prepared_from(rows).items.rows() == [(0, "9", "9"), (1, "10", "10"), (2, "9\u2028x", "9 x")]


def test_a_log_without_items(prepared_from):
    rows = [{k: v for k, v in row.items() if k != "item_id"} for row in events(("7", "s", "search", "search", "leave"))]
    for columns in ({}, {"item_id": None}):
        prepared = prepared_from(rows, columns=columns)
        assert prepared.items.schema == {"item_index": pl.Int32, "item_id": pl.String, "title": pl.String}
        assert (prepared.items.height, prepared.counts["items"], prepared.train_counts.shape) == (0, 0, (0,))
        assert prepared.sequences.frame()["items"].to_list() == [[NO_ITEM] * 3]


def test_an_action_without_its_item(write, tmp_path, prepared_from):
    rows = events(ONE)
    rows[2]["item_id"] = "  "
    with pytest.raises(
        UserError, match=r'log.csv, line 4: an event of the action "view" has no item: .* actions.without_item'
    ):
        prepared_from(rows, name="log.csv")
    everything = ActionsSection(words=WORDS, without_item="*")
    assert told(prepared_from(rows, everything, name="log.csv"))["7"][2] == "view"
    rows = [{k: v for k, v in row.items() if k != "item_id"} for row in events(ONE)]
    with pytest.raises(UserError, match=r'log.parquet, row 1: an event of the action "view" has no item.*\(3 such'):
        prepared_from(rows, name="log.parquet")


def test_unknown_actions(prepared_from):
    rows = events(("7", "s", "view b", "veiw a", "veiw", "hover", "view a", "cart a"))
    with pytest.raises(
        UserError,
        match=r'log.jsonl: 2 events have the action "veiw" and 1 others one of 1 further.*did you mean "view"\?',
    ) as error:
        prepared_from(rows)
    assert "actions.drop_unknown" in str(error.value)
    dropped = prepared_from(rows, ActionsSection(words=WORDS, drop_unknown=True))
    assert told(dropped) == {"7": ["view b", "view a", "cart a"]}
    assert (dropped.counts["interactions_read"], dropped.counts["after_unknown_actions"]) == (6, 3)
    with pytest.raises(UserError, match=r'1 events have the action "hover", which .* does not hold, known: view, cart'):
        prepared_from([row for row in rows if row["action"] != "veiw"])


@pytest.mark.parametrize("column", ["action", "session_id", "user_id"])
def test_what_no_event_may_lack(prepared_from, column):
    rows = events(ONE)
    rows[1][column] = None
    with pytest.raises(UserError, match=rf'log.jsonl, line 2: {column} in column "{column}" is blank'):
        prepared_from(rows)
    with pytest.raises(UserError, match=r'no column "action" for action'):
        prepared_from([{k: v for k, v in row.items() if k != "action"} for row in rows])


def test_actions_may_be_made_of_ratings(prepared_from):
    rows = [{**row, "rating": rating} for row, rating in zip(events(("7", "s", *["view a"] * 4)), (5, 1, None, 4))]
    bands = ActionsSection(words={"like": "like", "dislike": "dislike"})
    with pytest.raises(UserError, match="1 events have no rating in any band, hence no action"):
        prepared_from(rows, bands, filters=FilterSection(like_at=4))
    dropping = bands.model_copy(update={"drop_unknown": True})
    assert told(prepared_from(rows, dropping, filters=FilterSection(like_at=4)))["7"] == [
        "like a",
        "dislike a",
        "like a",
    ]
    banded = FilterSection(rating_bands={"dislike": 1, "like": 4})
    assert told(prepared_from(rows, dropping, filters=banded))["7"] == ["like a", "dislike a", "like a"]
    by_value = ActionsSection(words={"1": "one star", "4": "four stars", "5": "five stars"})
    rated = [row for row in rows if row["rating"]]
    assert told(prepared_from(rated, by_value, columns={"action": "rating"}))["7"] == ["5 a", "1 a", "4 a"]
    rated[0]["item_id"] = None
    with pytest.raises(UserError, match=r'line 1: item_id in column "item_id" is blank'):
        prepared_from(rated, dropping, filters=FilterSection(like_at=4))


def test_sessions_of_one_event(prepared_from):
    """They stay, and are counted: nothing can be asked within them, but what comes later sees them."""
    prepared = prepared_from(events(ONE, ("7", "x", "leave"), ("8", "y", "search")))
    assert prepared.counts["sessions"] == 3
    assert prepared.counts["sessions_of_one_event"] == 2
    assert prepared.sequences.frame()["sessions"].to_list() == [[0, 0, 0, 0, 1], [0]]


def test_a_log_with_session_ids_only(prepared_from):
    rows = [{k: v for k, v in row.items() if k != "user_id"} for row in events(ONE, TWO)]
    prepared = prepared_from(rows, columns={"user_id": "session_id", "session_id": "session_id"})
    assert told(prepared) == {"s": list(ONE[2:]), "t": list(TWO[2:])}


def without_sessions(rows, times):
    return [{**{k: v for k, v in row.items() if k != "session_id"}, "timestamp": t} for row, t in zip(rows, times)]


def test_sessions_from_pauses(prepared_from):
    """A pause of 30 s belongs to the session, one of 30.5 s begins the next."""
    times = [0, 30, 60.5, 61, 5, 36, 66]
    rows = without_sessions(events(ONE, TWO), times)
    prepared = prepared_from(rows, ActionsSection(words=WORDS, without_item="*", session_gap_s=30))
    assert prepared.sequences.frame()["sessions"].to_list() == [[0, 0, 1, 1], [0, 1, 1]]
    assert (prepared.counts["sessions"], prepared.counts["sessions_of_one_event"]) == (4, 1)
    whole = prepared_from(rows)  # neither ids nor pauses: a user is one session
    assert whole.sequences.frame()["sessions"].to_list() == [[0] * 4, [0] * 3]
    with pytest.raises(UserError, match=r"session_gap_s=30 makes sessions from pauses, and the log has session ids in"):
        prepared_from(events(ONE), ActionsSection(words=WORDS, without_item="*", session_gap_s=30))


def test_sessions_from_pauses_can_be_held_out(prepared_from):
    rows = [
        {"user_id": u, "timestamp": t + 100 * s, "action": "leave"} for u in range(50) for s in range(4) for t in (1, 2)
    ]
    section = SplitSection(method="session_holdout", targets="all")
    prepared = prepared_from(rows, ActionsSection(words=WORDS, without_item="*", session_gap_s=60), section)
    assert prepared.audit["shared_sessions"] == 0
    assert prepared.counts["sessions"] == 200
    codes = prepared.sequences.frame()["splits"].to_list()
    assert len({tuple(row) for row in codes}) > 5  # sessions have lots of their own, not users
    fewer = [row for row in rows if row["user_id"] in (3, 30)]
    with pytest.raises(UserError, match="came out empty"):  # of so few users; what is drawn does not hang on others
        prepared_from([row for row in fewer if row["timestamp"] < 100], ACTIONS, section)


def test_events_out_of_order_are_sorted_and_counted(prepared_from):
    """In the file session s is 30, 0, 10 and x is 5, 40: one of s is older than the one of s before it."""
    rows = [{**row, "timestamp": t} for row, t in zip(events(("7", "s", *["view a"] * 5)), (30, 5, 0, 10, 40))]
    rows[1]["session_id"] = rows[4]["session_id"] = "x"
    prepared = prepared_from(rows)
    assert prepared.sequences.frame()["timestamps"].to_list() == [[0, 5, 10, 30, 40]]
    assert prepared.audit["out_of_order_events"] == 1
    assert any("1 events stand in the files behind a later one" in text for text in prepared.audit["warnings"])
    ordered = prepared_from(sorted(rows, key=lambda row: row["timestamp"]))
    assert ordered.audit["out_of_order_events"] == 0
    assert set(prepared.audit["warnings"]) - set(ordered.audit["warnings"]) == {
        text for text in prepared.audit["warnings"] if text.startswith("1 events stand")
    }
    assert ordered.sequences.frame().equals(prepared.sequences.frame())


def test_simultaneous_events_are_drawn_by_lot_and_counted(prepared_from):
    """Without an item there is the action and the time to draw by: each order of two is about as frequent."""
    rows = [
        {"user_id": u, "session_id": 1, "timestamp": t, "action": a, "item_id": None}
        for u in range(300)
        for t in (1, 2)
        for a in ("search", "leave")
    ]
    prepared = prepared_from(rows, split=SplitSection(method="user_holdout"))
    orders = [tuple(row[:2]) for row in told(prepared).values()]
    assert abs(orders.count(("search", "leave")) - 150) < 5 * np.sqrt(75)
    twice = [row[:2] == row[2:] for row in told(prepared).values()]
    assert 100 < sum(twice) < 200  # another time is another lot
    assert prepared.audit["simultaneous_events"] == 600 / 1200
    assert any(text.startswith("50.0% of the events have the time of the one") for text in prepared.audit["warnings"])


MANY = st.lists(
    st.fixed_dictionaries(
        {
            "user_id": st.sampled_from("uvw"),
            "session_id": st.sampled_from("st"),
            "timestamp": st.sampled_from([1, 1.25, 2, 30]),
            "action": st.sampled_from(list(WORDS)),
            "item_id": st.sampled_from(["a", "b", "c"]),
            "typed": st.sampled_from(["", "x", "y"]),
        }
    ).map(lambda row: row | {"item_id": None if row["action"] in ("search", "leave") else row["item_id"]}),
    max_size=25,
)
TYPED = ActionsSection(words=WORDS, without_item=["search", "leave"], attributes=["typed"])


def whole_user():
    return [{**row, "typed": "z"} for row in events(("z", "s", "view a", "cart a", "search", "view a"))]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(MANY, st.randoms(use_true_random=False))
def test_row_order_never_changes_events(prepared_from, rows, shuffler):
    rows = rows + whole_user()
    shuffled = shuffler.sample(rows, len(rows))
    one, two = prepared_from(rows, TYPED), prepared_from(shuffled, TYPED)
    assert one.sequences.frame().equals(two.sequences.frame())
    assert one.items.equals(two.items)
    assert one.counts == two.counts
    same = [
        {k: v for k, v in made.audit.items() if k not in ("out_of_order_events", "warnings")} for made in (one, two)
    ]
    assert same[0] == same[1]


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(MANY, st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_size_of_buckets_chunks_and_row_groups_changes_no_event(prepared_from, rows, bucket, chunk, text):
    one = prepared_from(rows + whole_user(), TYPED, filters=FilterSection(item_core=2))
    found = one.sequences.frame(), one.items, one.audit, one.counts, one.train_counts.tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "GROUP_POSITIONS", bucket)
        patch.setattr(sequences, "_GROUP_TEXT", text)
        patch.setattr(reading, "_BATCH", chunk)
        patch.setattr(spool, "CHUNK", chunk)
        two = prepared_from(rows + whole_user(), TYPED, filters=FilterSection(item_core=2))
    assert found[0].equals(two.sequences.frame())
    assert found[1].equals(two.items)
    assert found[2:] == (two.audit, two.counts, two.train_counts.tolist())
    batches = [batch.num_rows for batch in two.sequences.batches(5)]
    assert sum(batches) == two.sequences.num_users


def test_k_core_counts_events_for_users_and_leaves_those_without_item(prepared_from):
    """c has one event: with item_core 2 it goes; then user 8 has two events, which with user_core 3 are too few."""
    rows = events(ONE, TWO, ("9", "u", "search", "search", "view b"))
    prepared = prepared_from(rows, filters=FilterSection(item_core=2))
    assert told(prepared) == {"7": list(ONE[2:]), "8": ["search", "leave"], "9": ["search", "search", "view b"]}
    assert prepared.items["item_id"].to_list() == ["a", "b"]
    prepared = prepared_from(rows, filters=FilterSection(item_core=2, user_core=3))
    assert list(told(prepared)) == ["7", "9"]
    assert prepared.counts["after_core"] == 7


def test_attributes_are_text_on_one_line(prepared_from):
    rows = [{**row, "typed": typed, "page": page} for row, typed, page in zip(
        events(ONE), ("two\n lines", None, "  ", "x\u2028y"), (1, 2, None, 4))]  # fmt: skip
    actions = ActionsSection(words=WORDS, without_item="*", attributes=["typed", "where"])
    prepared = prepared_from(rows, actions, columns={"where": "page"}, name="log.parquet")
    frame = prepared.sequences.frame()
    assert frame.columns == [*schema.SEQUENCES.names, "attribute:typed", "attribute:where"]
    assert pq.read_schema(prepared.sequences.path) == schema.sequences_schema(["typed", "where"])
    assert frame["attribute:typed"].to_list() == [["two lines", "", "", "x y"]]
    assert frame["attribute:where"].to_list() == [["1", "2", "", "4"]]
    with pytest.raises(UserError, match=r'no column "page2" for where, did you mean "page"'):
        prepared_from(rows, actions, columns={"where": "page2"})
    with pytest.raises(UserError, match=r'unknown name "wher", did you mean "where"'):
        prepared_from(rows, actions, columns={"wher": "page"})
    with pytest.raises(UserError, match=r"where is mapped to null, but it is needed"):
        prepared_from(rows, actions, columns={"where": None})
    tags = [{**row, "typed": ["a"], "where": 1} for row in rows]
    with pytest.raises(UserError, match=r'"typed" holds List\(String\), typed is text'):
        prepared_from(tags, actions, name="log.parquet")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [(["item"], "'item' is there twice, or has a meaning"), (["a", "a"], "'a' is there twice")],
)
def test_names_that_no_attribute_may_have(attributes, message):
    with pytest.raises(ValueError, match=message):
        ActionsSection(words=WORDS, attributes=attributes)


def test_attributes_that_are_too_long_for_a_row_group(prepared_from, monkeypatch):
    rows = [{**row, "typed": "x" * 40} for row in events(ONE, TWO, ("9", "u", "search"))]
    monkeypatch.setattr(sequences, "_GROUP_TEXT", 200)  # bytes: users 7 and 8 have 160 and 120
    prepared = prepared_from(rows, TYPED)
    assert pq.ParquetFile(prepared.sequences.path).num_row_groups == 2
    assert [batch.num_rows for batch in prepared.sequences.batches(100)] == [1, 2]
    monkeypatch.setattr(sequences, "_MOST_TEXT", 159)
    with pytest.raises(UserError, match=r"user 7 has an attribute of 160 bytes in all events, at most 159 are read"):
        prepared_from(rows, TYPED)


def test_columns_of_json_are_gone_into(write, prepared_from):
    rows = [
        {**row, "meta": text} for row, text in zip(events(ONE), ('{"page": {"no": 3}}', None, "null", '{"page": 4}'))
    ]
    actions = ActionsSection(words=WORDS, without_item="*", attributes=["page"])
    for name in ("log.csv", "log.jsonl", "log.parquet"):
        prepared = prepared_from(rows, actions, columns={"page": "meta.page.no"}, name=name)
        assert prepared.sequences.frame()["attribute:page"].to_list() == [["3", "", "", ""]], name


@pytest.mark.parametrize(
    ("name", "place"), [("log.csv", "line 4"), ("log.jsonl", "line 3"), ("log.parquet", "row 3"), ("hf", "row 3")]
)
def test_json_that_is_none_is_told_with_its_line(prepared_from, tmp_path, name, place):
    """A text column that should hold JSON, in each format: lines and rows count from 1, a header is a line."""
    rows = [{**row, "meta": '{"page": {"no": 3}}'} for row in events(ONE)]
    actions = ActionsSection(words=WORDS, without_item="*", attributes=["page"])
    rows[2]["meta"] = '{"page": '
    message = rf"""{name}, {place}: column "meta" is no valid JSON \('\{{"page": '\), of which meta.page.no is asked"""
    with pytest.raises(UserError, match=rf"{message}: mend the line$"):
        prepared_from(rows, actions, columns={"page": "meta.page.no"}, name=name)
    rows[3]["meta"] = "{'page': 1}"  # as Python writes it
    with pytest.raises(UserError, match=rf"{message}: mend the line \(2 such rows\)$"):
        prepared_from(rows, actions, columns={"page": "meta.page.no"}, name=name)


def test_json_that_is_none_within_a_session_is_told_with_its_line_and_event(tmp_path):
    steps = [
        {"ts": time, "type": "search", "meta": text} for time, text in enumerate(['{"page": 3}', "", None, '{"page": '])
    ]
    lines = [{"session": number, "events": steps[: number + 2]} for number in range(3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = {**OTTO, "page": "events.meta.page", "item_id": None}
    source = InteractionsSource(path=str(tmp_path / "log.jsonl"), format="jsonl_sessions", columns=columns)
    actions = ActionsSection(words=WORDS, without_item="*", attributes=["page"])
    message = (
        r'log.jsonl, line 3, event 4: column "events.meta" is no valid JSON .*, of which events.meta.page is asked'
    )
    with pytest.raises(UserError, match=message):
        prepare(DataSection(interactions=source, items=None), FilterSection(), LAST, 0, tmp_path, actions)


@pytest.mark.parametrize(
    ("way", "hint"),
    [
        ("meta.page.nr", 'did you mean "meta.page.no"'),
        ("meta.pgae.no", 'did you mean "meta.page"'),
        ("meta.qqqqqqqqqq.y", "known: meta.page, meta.nil"),
        ("meta.page.no.more", "meta.page.no holds no object"),
        ("meta.nil", "it is null wherever it stands"),
    ],
)
def test_a_name_that_leads_nowhere_in_json(prepared_from, way, hint):
    """Not a column of blanks. One that leads somewhere in one row of one file is fine."""
    meta = ('{"page": {"no": 3}, "nil": null}', None, "", "null")
    rows = [{**row, "meta": text} for row, text in zip(events(ONE), meta)]
    actions = ActionsSection(words=WORDS, without_item="*", attributes=["page"])
    with pytest.raises(UserError, match=rf'log.csv: "{way}" has no value in any row, {hint}'):
        prepared_from(rows, actions, columns={"page": way}, name="log.csv")
    with pytest.raises(UserError, match=rf'log.csv: "{way}" has no value in any row, {hint}'):
        prepared_from(rows, actions, columns={"page": "meta.page.no", "timestamp": way}, name="log.csv")
    fine = {"page": "meta.page.no", "rating": way}  # ratings, which no filter asks for, are not read
    assert prepared_from(rows, actions, columns=fine, name="log.csv").counts["interactions"] == 4


def test_a_name_may_lead_nowhere_in_one_of_several_files(write, tmp_path):
    rows = [{**row, "meta": '{"page": 3}' if place else "{}"} for place, row in enumerate(events(ONE))]
    paths = [str(write(tmp_path / f"{place}.csv", part)) for place, part in enumerate((rows[:1], rows[1:]))]
    actions = ActionsSection(words=WORDS, without_item="*", attributes=["page"])

    def run(way):
        source = InteractionsSource(path=paths, columns={"page": way})
        return prepare(DataSection(interactions=source, items=None), FilterSection(), LAST, 0, tmp_path, actions)

    assert run("meta.page").sequences.frame()["attribute:page"].to_list() == [["", "3", "3", "3"]]
    with pytest.raises(UserError, match=r'0.csv: "meta.pag" has no value in any row, '):
        run("meta.pag")


def test_keys_with_quotes_and_dots(write, prepared_from):
    rows = [{**row, "it's": {"a\\b": 7, "c.d": 1}, "x.y": 5, "t": '{"it\'s": 2}'} for row in events(ONE)]
    names = {"one": "it's.a\\b", "two": "it's.c.d", "three": "x.y", "four": "t.it's"}
    actions = ActionsSection(words=WORDS, without_item="*", attributes=list(names))
    frame = prepared_from(rows, actions, columns=names).sequences.frame()
    assert [frame[f"attribute:{name}"][0][0] for name in names] == ["7", "1", "5", "2"]


def test_a_session_of_very_many_events_needs_one_bucket(prepared_from, monkeypatch):
    """One session of 20,000 events among small ones: read in batches, sorted in a bucket of its own."""
    rows = [{"user_id": "0", "session_id": "s", "timestamp": t, "action": "search"} for t in range(20_000)]
    rows += [
        {"user_id": str(u), "session_id": "s", "timestamp": t, "action": "leave"} for u in range(1, 300) for t in (1, 2)
    ]
    monkeypatch.setattr(sequences, "GROUP_POSITIONS", 100)
    monkeypatch.setattr(reading, "_BATCH", 500)
    monkeypatch.setattr(spool, "CHUNK", 700)
    sizes = {"batch": [], "chunk": [], "bucket": []}
    batches, chunks, read = reading.tables.batches, spool.Spool.chunks, spool.Spool.read

    def seen(name, pieces):
        for piece in pieces:
            sizes[name].append(len(piece))
            yield piece

    monkeypatch.setattr(reading.tables, "batches", lambda *given: seen("batch", batches(*given)))
    monkeypatch.setattr(spool.Spool, "chunks", lambda self: seen("chunk", chunks(self)))
    monkeypatch.setattr(spool.Spool, "read", lambda self, bucket: next(seen("bucket", [read(self, bucket)])))
    prepared = prepared_from(random.Random(0).sample(rows, len(rows)), split=SplitSection(method="temporal"))
    assert sum(sizes["bucket"]) == prepared.counts["interactions"] == 20_598
    assert max(sizes["batch"]) <= 500
    assert max(sizes["chunk"]) <= 700
    assert sorted(sizes["bucket"])[-1] == 20_000
    assert sorted(sizes["bucket"])[-2] <= 100 + 2  # one user's overhang
    assert prepared.sequences.frame()["timestamps"][0].to_list() == list(range(20_000))


def test_whole_sessions_are_trimmed_at_the_next_cut_off(prepared_from):
    """Times 0 to 91, cut-offs at 60 and 90. s begins in train and ends in valid, t begins in valid, ends in test."""
    rows = events(("7", "s", *["view a"] * 5), start=20) + events(("8", "t", *["view b"] * 4), start=60)
    rows += events(("9", "u", "search", "view a"), start=0)
    section = SplitSection(
        method="temporal", whole_sessions=True, targets="all", test_fraction=0.2, valid_fraction=0.34
    )
    rows += events(("9", "v", "search", "view a"), start=90, step=1)
    prepared = prepared_from(rows, split=section)
    times = sorted(row["timestamp"] for row in rows)
    assert prepared.split["cutoffs"] == {"valid": times[13 - 7], "test": times[13 - 3]} == {"valid": 60, "test": 90}
    codes = {row["user_id"]: row["splits"] for row in prepared.sequences.frame().iter_rows(named=True)}
    train, valid, test, unused = schema.TRAIN, schema.VALID, schema.TEST, schema.UNUSED
    assert codes["7"] == [train] * 4 + [unused]  # 20 to 50, and 60
    assert codes["8"] == [unused, valid, valid, unused]  # the first has no history, the last is at 90
    assert codes["9"] == [train, train, test, test]
    assert prepared.audit["trimmed_events"] == 2
    assert prepared.audit["shared_sessions"] == 0


def test_whole_sessions_need_sessions(prepared_from, prepare_rows, log_of):
    with pytest.raises(UserError, match=r"split.whole_sessions needs a session id for each interaction"):
        prepare_rows(log_of("abcdef"), split=SplitSection(method="temporal", whole_sessions=True))
    rows = events(("7", "s", *["view a"] * 9))
    with pytest.raises(
        UserError, match=r"valid, test came out empty .*by whole_sessions a side has the sessions that begin"
    ):
        prepared_from(rows, split=SplitSection(method="temporal", whole_sessions=True))


@pytest.mark.parametrize("method", ["session_holdout", "leave_one_out"])
def test_times_that_go_backwards_across_a_split_are_said(prepared_from, method):
    """Each user begins a day after the one before."""
    visits = ("s", "view a", "view b"), ("t", "search", "view c")
    rows = [row for u in range(60) for row in events(*((str(u), *visit) for visit in visits), start=86_400 * u)]
    prepared = prepared_from(rows, split=SplitSection(method=method, targets="all"))
    assert prepared.audit["test_older_than_last_train"] > 0.5
    text = "leave_one_out leaks: " if method == "leave_one_out" else "of the test targets are older than the newest"
    assert any(text in warning for warning in prepared.audit["warnings"])
    assert prepared.audit["shared_sessions"] == (60 if method == "leave_one_out" else 0)
    shared = "60 sessions have positions in more than one split."
    assert (shared in prepared.audit["warnings"]) == (method == "leave_one_out")


def test_no_action_words_are_read_of_other_logs(prepare_rows, log_of):
    """A log whose recipe has no actions is as it was: any action, an item each, no columns more."""
    rows = [{**row, "action": "whatever"} for row in log_of("abc")]
    prepared = prepare_rows(rows)
    assert prepared.actions == ["whatever"]
    assert not {"events_without_item", "after_unknown_actions"} & set(prepared.counts)
    assert not {"trimmed_events", "out_of_order_events", "simultaneous_events"} & set(prepared.audit)


def log_at(name, actions, *, split=LAST, users=None, **source):
    """The log of a fixture."""

    def run(folder):
        data = DataSection(
            interactions=InteractionsSource(path=str(LOGS / name), **source),
            items=None,
            users=users and UsersSource(path=str(LOGS / users)),
        )
        assert source_paths(data, split) == [str(LOGS / name), *([str(LOGS / users)] if users else [])]
        return prepare(data, FilterSection(), split, 0, folder, actions)

    return run


OTTO = {"user_id": "session", "session_id": "session", "item_id": "events.aid", "timestamp": "events.ts",
        "action": "events.type"}  # fmt: skip
OTTO_WORDS = ActionsSection(words={"clicks": "click", "carts": "add to cart", "orders": "order"})


def test_otto(tmp_path):
    prepared = log_at("otto.jsonl", OTTO_WORDS, format="jsonl_sessions", timestamp_unit="ms", columns=OTTO)(tmp_path)
    assert told(prepared) == {
        "0": ["clicks 11", "clicks 12", "clicks 13", "carts 13", "orders 13"],
        "1": ["clicks 14", "clicks 9"],
        "2": ["carts 11"],
    }
    assert prepared.sequences.frame()["timestamps"][0][1] == 1_700_000_058
    assert prepared.counts["sessions_of_one_event"] == 1
    assert prepared.items["item_id"].to_list() == ["9", "11", "12", "13", "14"]


def test_yoochoose(tmp_path):
    """No actions, no titles: sessions of items alone."""
    columns = {"user_id": "SessionId", "session_id": "SessionId", "item_id": "ItemId", "timestamp": "Time"}
    prepared = log_at("yoochoose.txt", None, separator="\t", columns=columns)(tmp_path)
    frame = prepared.sequences.frame()
    assert frame["user_id"].to_list() == ["3", "7", "12"]
    assert frame["items"].to_list() == [[0, 1], [2, 3, 2], [0, 1]]
    assert frame["sessions"].to_list() == [[0, 0], [0, 0, 0], [0, 0]]
    assert frame["actions"].to_list() == [None] * 3
    assert prepared.items["title"].to_list() == ["501", "502", "503", "504"]


def test_web_actions_of_the_opera_schema(tmp_path):
    """A row an action (Wang et al. 2025): no user in that table, so a session is its user."""
    actions = ActionsSection(
        words={"input": "type", "click": "click", "terminate": "close the browser"},
        without_item="*",
        attributes=["name", "text", "kind", "page", "rationale", "part", "term"],
        observed=["page"],
    )
    columns = {"user_id": "session_id", "session_id": "session_id", "action": "action_type", "name": "semantic_id",
               "text": "input_text", "kind": "click_type", "page": "simplified_html", "part": "element_meta.name",
               "term": "page_meta.search_term"}  # fmt: skip
    split = SplitSection(
        method="dates", whole_sessions=True, valid_from="2025-04-04", test_from="2025-04-06", targets="all"
    )
    prepared = log_at("opera_actions.jsonl", actions, split=split, timestamp_unit="iso8601", columns=columns)(tmp_path)
    first = prepared.sequences.frame().row(0, named=True)
    assert first["actions"] == ["input", "click", "click", "click"]
    assert first["attribute:name"][:2] == ["nav_bar.search_input", "nav_bar.search_button"]
    assert first["attribute:text"] == ["green tea", "", "", ""]
    assert first["attribute:rationale"][2] == "It is the cheapest of the three"
    assert first["attribute:part"] == ["", "", "search_result", "buy_box"]
    assert first["attribute:term"] == ["tea"] * 4
    assert first["attribute:page"][0].startswith("<html> <body><div")
    assert (prepared.counts["sessions"], prepared.counts["interactions"]) == (4, 12)
    assert [prepared.audit[name] for name in ("shared_sessions", "trimmed_events", "valid_targets")] == [0, 0, 2 + 1]


def test_web_actions_of_the_shop_r1_schema(tmp_path):
    """A line a session of steps, an action an object of type, name and text (Zhang et al. 2025)."""
    actions = ActionsSection(
        words={"type_and_submit": "type and submit", "click": "click", "terminate": "terminate"},
        without_item="*",
        attributes=["name", "text", "context", "rationale"],
        observed=["context"],
    )
    columns = {"timestamp": "steps.timestamp", "action": "steps.action.type", "name": "steps.action.name",
               "text": "steps.action.text", "context": "steps.context", "rationale": "steps.rationale"}  # fmt: skip
    read = log_at("shop_r1_sessions.jsonl", actions, format="jsonl_sessions", events="steps", timestamp_unit="iso8601",
                  columns=columns)  # fmt: skip
    frame = read(tmp_path).sequences.frame()
    assert frame["user_id"].to_list() == ["u1", "u2"]
    assert frame["sessions"].to_list() == [[0, 0, 0, 1, 1], [0, 0]]  # s3 has no step, and is no session
    assert frame["attribute:name"][0].to_list() == [
        "search_input",
        "search_results.brass_lamp",
        "buy_now",
        "orders",
        "",
    ]
    assert frame["attribute:text"].to_list() == [["desk lamp", "", "", "", ""], ["oak shelf", ""]]
    assert frame["attribute:rationale"][1].to_list() == ["", "They have none."]


def test_social_actions_on_threads(tmp_path):
    """Follow, like, repost, reply, quote, ignore; a persona of each user."""
    names = ("follow", "like", "repost", "reply", "quote", "ignore")
    actions = ActionsSection(words={name: name for name in names}, without_item=["follow"], attributes=["text"])
    columns = {"user_id": "user", "session_id": "visit", "item_id": "post", "timestamp": "when", "action": "act"}
    prepared = log_at(
        "social.csv", actions, users="personas.csv", timestamp_unit="iso8601", columns=columns
    )(tmp_path)  # fmt: skip
    assert told(prepared)["bob"] == ["repost p1", "quote p3", "follow", "ignore p4"]
    assert prepared.users["persona"].to_list()[2] == "Contradicts"
    frame = prepared.sequences.frame()
    assert frame["attribute:text"][0].to_list() == ["", "", "Yes, and it works", "", ""]
    assert frame["attribute:text"][1].to_list() == ["", '"Works", he says', "ada", ""]
    assert frame["sessions"].to_list() == [[0, 0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0]]
    assert prepared.actions == list(names)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"session": 1, "events": [{"aid": 1, "ts": 5, "type": "clicks"}'], "line 3: not valid JSON"),
        (['{"session": 1, "events": {"aid": 1}}'], r"""line 3: "events" is "{'aid': 1}", a list of events is exp"""),
        (['{"session": 1, "events": [7]}'], "line 3: event 1 is '7', an object is expected"),
        (["[1]"], r"line 3: holds '\[1\]', one JSON object a line is expected"),
        (['{"session": 1}'], 'line 3: the timestamp in column "events.ts" is blank'),
        (['{"session": 1, "events": [{"aid": 1, "ts": 5, "type": "clicks"}, {"aid": 1, "type": "clicks"}]}'],
         'line 3, event 2: the timestamp in column "events.ts" is blank'),
        (['{"session": 1, "events": []}', "", '{"session": 2, "events": [{"ts": 5, "type": "carts"}]}'],
         'line 5, event 1: an event of the action "carts" has no item: give it one in the column of item_id .ev'),
        (['{"events": [{"aid": 3, "ts": 5, "type": "carts"}]}'], 'line 3, event 1: user_id in column "session" is bl'),
    ],
)  # fmt: skip
def test_broken_session_lines_are_named(tmp_path, lines, message):
    good = '{"session": 0, "events": [{"aid": 1, "ts": 5, "type": "clicks"}, {"aid": 2, "ts": 6, "type": "clicks"}]}'
    (tmp_path / "log.txt").write_text("\n".join(["", good, *lines, good]) + "\n")
    data = DataSection(
        interactions=InteractionsSource(path=str(tmp_path / "log.txt"), format="jsonl_sessions", columns=OTTO)
    )
    with pytest.raises(UserError, match=rf"log.txt, {message}"):
        prepare(data, FilterSection(), LAST, 0, tmp_path, OTTO_WORDS)


def test_session_lines_without_the_list_or_with_other_keys(tmp_path):
    lines = [
        {"session": 0, "user": {"id": 3}, "steps": [{"aid": 1, "ts": 5, "type": "clicks", "more": {"x": 1.5}}] * 3}
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(columns=OTTO, **source):
        source = InteractionsSource(
            path=str(tmp_path / "log.jsonl"), format="jsonl_sessions", columns=columns, **source
        )
        more = ActionsSection(words={"clicks": "click", "x": "y"}, attributes=["more"] if "more" in columns else [])
        return prepare(DataSection(interactions=source), FilterSection(), LAST, 0, tmp_path, more)

    with pytest.raises(UserError, match=r'no line has events under "events", keys there: session, user, steps: set'):
        run()
    steps = {name: column.replace("events", "steps") for name, column in OTTO.items()}
    with pytest.raises(UserError, match=r'no column "steps.tz" for timestamp, did you mean "steps.ts"'):
        run({**steps, "timestamp": "steps.tz"}, events="steps")
    made = run({**steps, "user_id": "user.id", "more": "steps.more.x"}, events="steps").sequences.frame()
    assert made["user_id"].to_list() == ["3"]
    assert made["attribute:more"].to_list() == [["1.5"] * 3]
    with pytest.raises(UserError, match="does not exist"):
        prepare(
            DataSection(interactions=InteractionsSource(path=str(tmp_path / "no.jsonl"), format="jsonl_sessions")),
            FilterSection(), LAST, 0, tmp_path, OTTO_WORDS,
        )  # fmt: skip


@pytest.mark.shared
def test_real_event_logs(shared_data, tmp_path):
    """E-commerce events and the sample of OTTO: as many events, sessions and actions as their files have."""
    path = str(shared_data / "ecom-events" / "ecom.csv.gz")
    words = pl.read_csv(path)["event"].unique().sort().to_list()
    source = InteractionsSource(path=path, columns={"action": "event"}, timestamp_unit="iso8601")
    actions = ActionsSection(words={w: w.replace("_", " ") for w in words}, without_item="*", attributes=["platform"])
    split = SplitSection(method="temporal", whole_sessions=True, targets="all")
    prepared = prepare(DataSection(interactions=source), FilterSection(), split, 0, tmp_path, actions)
    found = [prepared.counts[name] for name in ("users", "sessions", "sessions_of_one_event", "interactions", "items")]
    assert found == [600, 3605, 231, 31_106, 0]
    assert (prepared.audit["shared_sessions"], prepared.audit["trimmed_events"]) == (0, 19)
    assert len(prepared.actions) == 19
    path = str(shared_data / "otto-sample" / "train.jsonl")
    source = InteractionsSource(path=path, format="jsonl_sessions", timestamp_unit="ms", columns=OTTO)
    split = SplitSection(method="session_holdout", targets="all")
    prepared = prepare(DataSection(interactions=source), FilterSection(), split, 0, tmp_path, OTTO_WORDS)
    assert [prepared.counts[name] for name in ("users", "sessions", "interactions", "items")] == [20, 20, 862, 510]


@pytest.mark.shared
def test_real_sessions_without_actions(shared_data, tmp_path):
    """YooChoose: the published files are split at 2014-04-07, as split.dates does it."""
    files = [
        str(shared_data / "yoochoose-100k" / f"yoochoose-clicks-100k_{name}.txt") for name in ("train_full", "test")
    ]
    columns = {"user_id": "SessionId", "session_id": "SessionId", "item_id": "ItemId", "timestamp": "Time"}
    data = DataSection(interactions=InteractionsSource(path=files, separator="\t", columns=columns), items=None)
    split = SplitSection(method="temporal", whole_sessions=True, targets="all")
    prepared = prepare(data, FilterSection(), split, 0, tmp_path)
    assert (prepared.counts["interactions"], prepared.counts["users"]) == (70_278 + 13_568, 17_794 + 3_416)
    assert prepared.audit["shared_sessions"] == 0
    assert prepared.audit["test_older_than_last_train"] == 0
