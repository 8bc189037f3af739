"""Every bad field is refused by name, with what was found and what is expected; nothing else is ever raised."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.serve.fields import Entry, FieldError, read_history, read_object, read_recommend

GOOD = {"history": ["i1", 2, {"item_id": "i3", "timestamp": 5}]}


def _with(**fields):
    return {"history": ["i1"]} | fields


@pytest.mark.parametrize(
    ("body", "field", "text"),
    [
        (b"", "body", "body is empty, a JSON object is expected"),
        (b"{", "body", "body is no JSON"),
        (b"[1]", "body", r"body is \[1\], a JSON object is expected"),
        (b"\xff", "body", "body is no JSON"),
        (b"[" * 100_000, "body", "body is no JSON"),
    ],
)
def test_bodies(body, field, text):
    with pytest.raises(FieldError, match=text) as found:
        read_object(body)
    assert found.value.field == field


@pytest.mark.parametrize(
    ("document", "field", "text"),
    [
        ({}, "history", "history is missing, a list of item ids"),
        (_with(history="i1"), "history", 'history is "i1", a list'),
        (_with(history={"a": 1}), "history", "a list"),
        (_with(history=["i1"] * 11), "history", "history is a list of 11, at most 10 are expected: send the newest"),
        (
            _with(history=["i1", None]),
            "history[1]",
            r"history\[1\] is None, an item id \(text or integer\) is expected",
        ),
        (_with(history=[True]), "history[0]", "is True, an item id"),
        (_with(history=[1.5]), "history[0]", "is 1.5, an item id"),
        (_with(history=[10**30]), "history[0]", "an item id"),
        (_with(history=["x" * 2001]), "history[0]", "a text of 2001 characters, at most 2000"),
        (_with(history=["\ud800"]), "history[0]", "half a surrogate pair"),
        (_with(history=[{}]), "history[0]", "without item_id and title, one of them is expected"),
        (_with(history=[{"item_id": 1, "title": "a"}]), "history[0]", "with both item_id and title"),
        (_with(history=[{"id": 1}]), 'history[0]."id"', "is no field of an item, known are item_id, title, timestamp"),
        (_with(history=[{"title": 1}]), "history[0].title", "is 1, a text is expected"),
        (_with(history=[{"item_id": []}]), "history[0].item_id", r"is \[\], an item id"),
        (
            _with(history=[{"item_id": 1, "timestamp": "now"}]),
            "history[0].timestamp",
            '"now", a finite number of seconds',
        ),
        (_with(history=[{"item_id": 1, "timestamp": math.nan}]), "history[0].timestamp", "a finite number"),
        (_with(history=[{"item_id": 1, "timestamp": 10**400}]), "history[0].timestamp", "a finite number"),
        (_with(history=[{"item_id": 1, "timestamp": False}]), "history[0].timestamp", "a finite number"),
        (
            _with(history=[{"item_id": 1, "timestamp": 1}, "i2"]),
            "history[1]",
            r"without a timestamp, one is expected because history\[0\] has one: give all or none",
        ),
        (_with(k=0), "k", "k is 0, an integer from 1 to 200 is expected"),
        (_with(k=201), "k", "from 1 to 200"),
        (_with(k="5"), "k", '"5", an integer'),
        (_with(k=True), "k", "True, an integer"),
        (_with(k=2.0), "k", "2.0, an integer"),
        (_with(k=20, width=19), "width", "width is 19, an integer from 20 to 1000 is expected"),
        (_with(width=1001), "width", "from 10 to 1000"),
        (_with(candidates=[]), "candidates", "candidates is empty, at least 1 is expected: leave the field out"),
        (_with(candidates=["a"] * 1001), "candidates", "at most 1000"),
        (_with(candidates=[{"item_id": "a", "timestamp": 1}]), 'candidates[0]."timestamp"', "no field of an item"),
        (_with(candidates=7), "candidates", "is 7, a list"),
        (_with(exclude_history=1), "exclude_history", "1, true or false is expected"),
        (_with(user=7), "user", "7, a text"),
        (_with(user="\udfff"), "user", "half a surrogate pair"),
        (_with(user_text=[]), "user_text", r"\[\], a text"),
        (_with(K=3), '"K"', "no field of this request, known are history, k, candidates"),
    ],
)
def test_fields(document, field, text):
    with pytest.raises(FieldError, match=text) as found:
        read_recommend(json.loads(json.dumps(document)), 10)
    assert found.value.field == field


def test_defaults_and_order():
    asked = read_recommend(GOOD | {"history": [{"title": "b", "timestamp": 2}, {"item_id": "a", "timestamp": 1.5}]}, 10)
    assert [entry.name for entry in asked.history] == ["a", "b"]  # by time
    assert (asked.k, asked.width, asked.exclude_history, asked.candidates) == (10, 100, True, None)
    assert [entry.name for entry in read_recommend(_with(history=["z", 7]), 10).history] == ["z", "7"]  # as given
    assert read_recommend(_with(k=3), 10).width == 10 * 3
    assert read_recommend(_with(k=150), 10).width == 200
    assert read_recommend(_with(candidates=["a", "b"]), 10).k == 2
    equal = [{"item_id": name, "timestamp": 1} for name in "cab"]
    assert [entry.name for entry in read_history(equal, "user_history", 10)] == list("cab")
    assert read_history([], "user_history", 10) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["item_id", "title", "timestamp", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
ENTRY = st.text(max_size=3) | st.integers() | st.fixed_dictionaries({"item_id": st.text(max_size=3)}) | JSON


def _read_or_refused(read, *arguments):
    try:
        return read(*arguments)
    except FieldError as error:
        return error


@given(
    st.dictionaries(st.sampled_from(["k", "width", "candidates", "exclude_history", "user", "user_text", "z"]), JSON),
    st.lists(ENTRY, max_size=4) | JSON,
)
@settings(max_examples=400, deadline=None)
def test_anything_is_read_or_refused_by_field(document, history):
    asked = _read_or_refused(read_recommend, {"history": history} | document, 5)
    if isinstance(asked, FieldError):
        assert asked.field
        assert str(asked).startswith(f"{asked.field} is ")
        json.dumps(str(asked)).encode()
        return
    assert 1 <= asked.k <= asked.width <= 1000 or asked.candidates is not None
    assert len(asked.history) <= 5


@given(st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_an_object_or_refused(body):
    found = _read_or_refused(read_object, body)
    assert isinstance(found, dict) or found.field == "body"


# ---- events ----

ACTIONS = ("view", "buy")


def test_events_have_an_action_and_an_item_where_they_have_one():
    given = [
        {"action": "buy", "item_id": 7, "timestamp": 30},
        {"action": "view", "timestamp": 10},
        {"action": "view", "item_id": None, "title": "Heat", "timestamp": 20},
    ]
    assert read_history(given, "user_history", 10, ACTIONS) == [
        Entry(None, None, 10.0, "view"),
        Entry(None, "Heat", 20.0, "view"),
        Entry("7", None, 30.0, "buy"),
    ]


@pytest.mark.parametrize(
    ("value", "field", "text"),
    [
        ("i1", "h", 'is "i1", a list of objects with an action is expected'),
        (["i1"], "h[0]", 'is "i1", an event is expected, as {"action": …, "item_id": …}'),
        ([{"item_id": "i1"}], "h[0]", "without an action, an event is expected"),
        ([{"action": "sell"}], "h[0].action", 'is "sell", one of view, buy is expected'),
        ([{"action": ["buy"]}], "h[0].action", "one of view, buy is expected"),
        ([{"action": "buy", "item_id": "a", "title": "b"}], "h[0]", "with both item_id and title"),
        ([{"action": "buy", "item_id": []}], "h[0].item_id", "an item id"),
        ([{"action": "buy", "item": "a"}], 'h[0]."item"', "is no field of an item, known are item_id, title"),
        ([{"action": "buy", "timestamp": "now"}], "h[0].timestamp", "a finite number of seconds"),
        ([{"action": "buy", "timestamp": 1}, {"action": "buy"}], "h[1]", "without a timestamp"),
        ([{"action": "buy"}] * 11, "h", "a list of 11, at most 10"),
    ],
)
def test_bad_events(value, field, text):
    with pytest.raises(FieldError) as found:
        read_history(value, "h", 10, ACTIONS)
    assert found.value.field == field
    assert text in str(found.value)


def test_an_adapter_of_items_takes_no_events():
    with pytest.raises(FieldError, match='"action" is no field of an item'):
        read_history([{"action": "buy", "item_id": "a"}], "h", 10)
