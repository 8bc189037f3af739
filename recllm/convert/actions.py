"""Events as JSON: the form of an answer to "what does the user do next?", how it is written, and how it is read back.

The closed vocabulary of action words and the keys of further fields enter; a JSON schema, the text of an event, or what
an answer says leave. Convert writes with `write_answer`, engines are held to `answer_schema`, and the evaluator reads
with `read_answer`: reading is strict, repairs nothing and searches nothing, so what it accepts is what the schema does.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ACTION = "action"  # the key of the action's words, first in every answer
NO_ACTION = -1  # label of an answer that cannot be read


class Answer(NamedTuple):
    """What an answer says."""

    action: int  # its number; NO_ACTION where the answer is invalid
    fields: dict[str, str]  # in the order of the keys, without those left out or blank; empty where it is invalid
    reason: str  # why it is invalid: one of REASONS; "" where it is not


UNFINISHED, NOT_JSON, NOT_OBJECT = "unfinished", "no JSON", "no object"
KEY_TWICE, UNKNOWN_KEY, NO_ACTION_KEY = "a key twice", "an unknown key", "no action"
NOT_TEXT, UNKNOWN_ACTION = "a value that is no text", "an unknown action"
REASONS = (UNFINISHED, NOT_JSON, NOT_OBJECT, KEY_TWICE, UNKNOWN_KEY, NO_ACTION_KEY, NOT_TEXT, UNKNOWN_ACTION)


def answer_schema(words: Sequence[str], fields: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON schema of an answer: the action's words, and texts under the keys `fields`, which may be left out.

    Engines write the keys in this order.

    >>> sorted(answer_schema(["view", "buy"], ["text"])["properties"])
    ['action', 'text']
    """
    properties: dict[str, Any] = {ACTION: {"type": "string", "enum": list(words)}}
    properties |= {name: {"type": "string"} for name in fields}
    return {"type": "object", "properties": properties, "required": [ACTION], "additionalProperties": False}


def write_answer(words: str, fields: Mapping[str, str]) -> str:
    """An event as one line of JSON, keys in the order given, blank fields left out.

    >>> write_answer("type", {"name": "search box", "text": "", "unit": "€"})
    '{"action": "type", "name": "search box", "unit": "€"}'
    """
    return json.dumps({ACTION: words, **{name: text for name, text in fields.items() if text}}, ensure_ascii=False)


def read_answer(text: str, finished: bool, words: Sequence[str], fields: Sequence[str] = ()) -> Answer:
    """Read an answer that is one JSON object and nothing around it but blanks; the order of its keys does not matter.

    A field that is "" says the same as one that is left out, as a log's blank cell does.

    Args:
        text: the whole answer; of one with a rationale the last line.
        finished: whether the model ended it by itself. An answer that was cut off says nothing.
        words: of the actions, by number; they are compared letter by letter.
        fields: the other keys.

    >>> read_answer('{"text": "a", "action": "buy"}', True, ["view", "buy"], ["text"])
    Answer(action=1, fields={'text': 'a'}, reason='')
    >>> read_answer('I would {"action": "buy"}', True, ["view", "buy"]).reason
    'no JSON'
    """
    found, reason = _object(text) if finished else ({}, UNFINISHED)
    reason = reason or _misfit(found, words, fields)
    if reason:
        return Answer(NO_ACTION, {}, reason)
    return Answer(list(words).index(found[ACTION]), {name: found[name] for name in fields if found.get(name)}, "")


def _object(text: str) -> tuple[dict[str, Any], str]:
    """The members of the JSON object that the text is, or why it is none."""
    try:
        value = json.loads(text, object_pairs_hook=_Members)
    except (ValueError, RecursionError):
        return {}, NOT_JSON
    if not isinstance(value, _Members):
        return {}, NOT_OBJECT
    members = dict(value)
    return members, KEY_TWICE if len(members) < len(value) else ""


class _Members(list[tuple[str, Any]]):
    """A JSON object that still knows when a key stands in it twice."""


def _misfit(found: Mapping[str, Any], words: Sequence[str], fields: Sequence[str]) -> str:
    """What is wrong with the members of an object; "" if nothing is."""
    if not set(found) <= {ACTION, *fields}:
        return UNKNOWN_KEY
    if ACTION not in found:
        return NO_ACTION_KEY
    if not all(isinstance(value, str) and is_unicode(value) for value in found.values()):
        return NOT_TEXT
    return "" if found[ACTION] in words else UNKNOWN_ACTION


def is_unicode(text: str) -> bool:
    """Whether no half of a surrogate pair is in it, which JSON can write and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
