import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from recllm.convert.actions import NO_ACTION, REASONS, Answer, answer_schema, read_answer, write_answer

WORDS = ["view", "add to cart", "buy"]
FIELDS = ["name", "text"]
TEXTS = st.text(max_size=20)


@given(st.sampled_from(WORDS), TEXTS, TEXTS)
def test_what_is_written_is_read_again(words, name, text):
    written = write_answer(words, {"name": name, "text": text})
    assert "\n" not in written
    expected = {key: value for key, value in (("name", name), ("text", text)) if value}
    assert read_answer(written, True, WORDS, FIELDS) == Answer(WORDS.index(words), expected, "")


def test_an_event_is_one_line_with_its_keys_in_order_and_nothing_blank():
    assert write_answer("view", {"b": "1", "a": "2", "c": ""}) == '{"action": "view", "b": "1", "a": "2"}'
    assert write_answer("view", {"b": 'ü "x"\n'}) == '{"action": "view", "b": "ü \\"x\\"\\n"}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON"),
        ("view", "no JSON"),
        ('{"action": "view"', "no JSON"),
        ('{"action": "view"}}', "no JSON"),
        ('{"action": "view"} {"action": "view"}', "no JSON"),
        ('The next one is {"action": "view"}', "no JSON"),
        ('```json\n{"action": "view"}\n```', "no JSON"),
        ("{'action': 'view'}", "no JSON"),
        ('{"action": "view",}', "no JSON"),
        ('{"action": "view", "text": "a\nb"}', "no JSON"),  # a raw line break is no JSON
        ("[" * 100_000, "no JSON"),
        ('[{"action": "view"}]', "no object"),
        ('"view"', "no object"),
        ("null", "no object"),
        ('{"action": "buy", "action": "view"}', "a key twice"),
        ('{"action": "view", "why": "so"}', "an unknown key"),
        ('{"Action": "view"}', "an unknown key"),
        ("{}", "no action"),
        ('{"name": "a"}', "no action"),
        ('{"action": 1}', "a value that is no text"),
        ('{"action": "view", "text": null}', "a value that is no text"),
        ('{"action": "view", "text": ["a"]}', "a value that is no text"),
        ('{"action": "view", "text": "\\ud800"}', "a value that is no text"),
        ('{"action": "View"}', "an unknown action"),
        ('{"action": "view "}', "an unknown action"),
        ('{"action": "add"}', "an unknown action"),
    ],
)
def test_whatever_is_not_the_object_says_nothing(text, reason):
    assert reason in REASONS
    assert read_answer(text, True, WORDS, FIELDS) == Answer(NO_ACTION, {}, reason)


def test_an_answer_that_was_cut_off_says_nothing():
    assert read_answer('{"action": "view"}', False, WORDS) == Answer(NO_ACTION, {}, "unfinished")


def test_blanks_around_and_the_order_of_keys_do_not_matter():
    found = read_answer(' {"text":"b","name":"","action":"buy"}\n', True, WORDS, FIELDS)
    assert found == Answer(2, {"text": "b"}, "")


KEYS = st.sampled_from(["action", "name", "text", "why"])
VALUES = st.sampled_from(["view", "buy", "Buy", "", 1, None, True, ["view"], {"action": "view"}])
DOCUMENTS = st.dictionaries(KEYS, VALUES, max_size=4) | st.lists(VALUES, max_size=2) | VALUES


@given(DOCUMENTS.map(json.dumps) | st.text(max_size=30))
@example('{"action": "view"}')
@example('{"action": "view", "text": 3}')
def test_it_accepts_what_the_schema_does_and_nothing_else(text):
    jsonschema = pytest.importorskip("jsonschema")
    try:
        document = json.loads(text)
    except ValueError:
        fits = False
    else:
        fits = jsonschema.Draft202012Validator(answer_schema(WORDS, FIELDS)).is_valid(document)
    assert (read_answer(text, True, WORDS, FIELDS).reason == "") == fits


def test_the_schema_keeps_the_order_of_keys():
    assert list(answer_schema(WORDS, ["z", "a"])["properties"]) == ["action", "z", "a"]
