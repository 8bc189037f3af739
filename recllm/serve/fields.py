"""Request bodies: JSON enters, checked values leave, or a `FieldError` that names the field, what was found there and
what is expected. Nothing else is raised, whatever a client sends.
"""

import json
import math
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from recllm.convert.actions import is_unicode

MAX_K, MAX_WIDTH, MAX_CANDIDATES = 200, 1000, 1000
WIDTH_FACTOR, WIDE_ENOUGH = 10, 200  # the default width: so many times k, at most so much
MAX_TEXT = 2000  # characters of an id, a title or what is told about a user
BODY = "body"


class FieldError(ValueError):
    """A field that cannot be used."""

    def __init__(self, field: str, found: str, expected: str) -> None:
        self.field = field
        super().__init__(f"{field} is {found}, {expected}")


class Entry(NamedTuple):
    """An item as a request names it, or an event."""

    item_id: str | None  # None: only a title was given, or an event without an item
    title: str | None  # what a bare text may be, beside an id
    timestamp: float | None
    action: str | None = None  # of events alone

    @property
    def name(self) -> str:
        """As answers call it."""
        return self.item_id if self.item_id is not None else self.title or ""


class Recommend(NamedTuple):
    """The body of POST /v1/recommend."""

    history: list[Entry]  # oldest first
    k: int
    candidates: list[Entry] | None
    width: int
    exclude_history: bool
    user: str | None
    user_text: str


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        FieldError: no JSON, or no object.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        why = f"no JSON ({error})" if isinstance(error, json.JSONDecodeError) else "no JSON"
        raise FieldError(BODY, why if body else "empty", "a JSON object is expected") from None
    if not isinstance(document, dict):
        raise FieldError(BODY, _short(document), "a JSON object is expected")
    return document


def read_recommend(document: dict[str, Any], max_history: int) -> Recommend:
    """Check every field of POST /v1/recommend.

    Raises:
        FieldError: the first one that is wrong.
    """
    known = Recommend._fields
    if unknown := [name for name in document if name not in (*known, "model")]:
        raise FieldError(_short(unknown[0]), "no field of this request", f"known are {', '.join(known)} and model")
    candidates = document.get("candidates")
    if candidates is not None:
        candidates = _entries(candidates, "candidates", MAX_CANDIDATES, timed=False)
        if not candidates:
            raise FieldError("candidates", "empty", "at least 1 is expected: leave the field out to rank everything")
    most = MAX_K if candidates is None else MAX_CANDIDATES
    k = _integer(document.get("k"), "k", 1, most, 10 if candidates is None else len(candidates))
    width = _integer(document.get("width"), "width", k, MAX_WIDTH, max(k, min(WIDTH_FACTOR * k, WIDE_ENOUGH)))
    return Recommend(
        history=read_history(document.get("history"), "history", max_history),
        k=k,
        candidates=candidates,
        width=width,
        exclude_history=_boolean(document.get("exclude_history"), "exclude_history", True),
        user=None if document.get("user") is None else _text(document["user"], "user"),
        user_text="" if document.get("user_text") is None else _text(document["user_text"], "user_text"),
    )


def read_history(value: Any, field: str, max_history: int, actions: Sequence[str] = ()) -> list[Entry]:
    """Items with times, oldest first: by their times where all have one, otherwise in the order given.

    With `actions` the entries are events: objects with one of these as `action`, and an item where they have one.

    Raises:
        FieldError: no list, too many items, an item that is none, an event without action or with another one, times
            for some of them only.
    """
    entries = _entries(value, field, max_history, timed=True, actions=actions)
    timed = [entry.timestamp is not None for entry in entries]
    if any(timed) and not all(timed):
        raise FieldError(
            f"{field}[{timed.index(False)}]",
            "without a timestamp",
            f"one is expected because {field}[{timed.index(True)}] has one: give all or none",
        )
    return sorted(entries, key=lambda entry: entry.timestamp or 0.0)  # stable


def _entries(value: Any, field: str, most: int, timed: bool, actions: Sequence[str] = ()) -> list[Entry]:
    if not isinstance(value, list):
        found = "missing" if value is None else _short(value)
        ids = "item ids, or of objects with item_id or title," if not actions else "objects with an action"
        raise FieldError(field, found, f"a list of {ids} is expected")
    if len(value) > most:
        newest = ": send the newest" if timed else ""
        raise FieldError(field, f"a list of {len(value)}", f"at most {most} are expected{newest}")
    if actions:
        return [_event(entry, f"{field}[{place}]", actions) for place, entry in enumerate(value)]
    return [_entry(entry, f"{field}[{place}]", timed) for place, entry in enumerate(value)]


def _event(value: Any, field: str, actions: Sequence[str]) -> Entry:
    """An object with an action, and with an item as `_entry` reads it or without."""
    if not isinstance(value, dict) or "action" not in value:
        found = "without an action" if isinstance(value, dict) else _short(value)
        raise FieldError(field, found, 'an event is expected, as {"action": …, "item_id": …}')
    action = value["action"]
    if not isinstance(action, str) or action not in actions:
        raise FieldError(f"{field}.action", _short(action), f"one of {', '.join(actions)} is expected")
    item = {name: given for name, given in value.items() if name != "action"}
    if item.get("item_id") is None and item.get("title") is None:
        _only_known(item, field)
        return Entry(None, None, _time(item, field), action)
    return _entry(item, field, timed=True)._replace(action=action)


def _entry(value: Any, field: str, timed: bool) -> Entry:
    """An id or a title as a text or an integer, or an object that says which of them it is."""
    if not isinstance(value, dict):
        text = _identifier(value, field)
        return Entry(text, text if isinstance(value, str) else None, None)
    _only_known(value, field, timed)
    if (value.get("item_id") is None) == (value.get("title") is None):
        found = "without item_id and title" if value.get("title") is None else "with both item_id and title"
        raise FieldError(field, found, "one of them is expected")
    timestamp = _time(value, field)
    if value.get("title") is not None:
        return Entry(None, _text(value["title"], f"{field}.title"), timestamp)
    return Entry(_identifier(value["item_id"], f"{field}.item_id"), None, timestamp)


def _only_known(value: dict[str, Any], field: str, timed: bool = True) -> None:
    known = ("item_id", "title", "timestamp") if timed else ("item_id", "title")
    if unknown := [name for name in value if name not in known]:
        raise FieldError(f"{field}.{_short(unknown[0])}", "no field of an item", f"known are {', '.join(known)}")


def _time(value: dict[str, Any], field: str) -> float | None:
    return None if value.get("timestamp") is None else _seconds(value["timestamp"], f"{field}.timestamp")


def _identifier(value: Any, field: str) -> str:
    if type(value) is int and abs(value) < 10**18:
        return str(value)
    return _text(value, field, "an item id (text or integer) is expected")


def _text(value: Any, field: str, expected: str = "a text is expected") -> str:
    if not isinstance(value, str):
        raise FieldError(field, _short(value), expected)
    if len(value) > MAX_TEXT:
        raise FieldError(field, f"a text of {len(value)} characters", f"at most {MAX_TEXT} are expected")
    if not value.isascii() and not is_unicode(value):
        raise FieldError(field, _short(value), "whole Unicode characters are expected, it has half a surrogate pair")
    return value


def _integer(value: Any, field: str, least: int, most: int, default: int) -> int:
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        raise FieldError(field, _short(value), f"an integer from {least} to {most} is expected")
    return value


def _boolean(value: Any, field: str, default: bool) -> bool:
    if value is None:
        return default
    if not isinstance(value, bool):
        raise FieldError(field, _short(value), "true or false is expected")
    return value


def _seconds(value: Any, field: str) -> float:
    expected = "a finite number of seconds is expected"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FieldError(field, _short(value), expected)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise FieldError(field, _short(value), expected)
    return number


def _short(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    text = text if len(text) <= 60 else f"{text[:60]}…"
    return json.dumps(text) if isinstance(value, str) else text
