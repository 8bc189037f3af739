"""A JSON schema as a grammar of texts, one for every engine.

A schema enters; an EBNF in the dialect of xgrammar leaves, whose texts are exactly what
`json.dumps(value, ensure_ascii=False)` writes of the values that the schema allows, with the keys of objects in the
order of `properties`. So a value has one text, whose likelihood is the value's, and both engines allow the same ones.

It keeps the part of JSON Schema that an answer needs and refuses the rest. xgrammar's own converter passes over what it
does not know (`not`, `uniqueItems`, several `allOf`), and lets a text be spelt in many ways: "\\/", "\\u0041", half a
surrogate pair, which no file can hold.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from recllm.errors import UserError

# One code point of a string, as json.dumps writes it. The ranges are all of Unicode but controls, quote, backslash and
# surrogates: bytes that are no UTF-8 fit none of them
_CHARACTER = (
    r'[ !#-\[\]-\ud7ff\ue000-\U0010ffff] | "\\" ["\\bfnrt]'
    r' | "\\u00" ("0" [0-7be-f] | "1" [0-9a-f])'  # of controls those that have no letter of their own
)
_INTEGER = '("0" | "-"? [1-9] [0-9]*)'

_NOTES = {"title", "description", "default", "examples", "$schema"}  # which allow and forbid nothing
_BOUNDS = {"string": ("minLength", "maxLength"), "array": ("minItems", "maxItems")}
_OTHERS: dict[str, set[str]] = {"object": {"properties", "required", "additionalProperties"}, "array": {"items"}}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None),
}  # fmt: skip


def json_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of a schema.

    Known are enum, const and the types object (additionalProperties: false), array (items, minItems, maxItems), string
    (minLength, maxLength, in code points), integer, boolean and null; titles, descriptions and the like say nothing.

    Raises:
        UserError: anything else, or what no value fits; it names the place in the schema.

    >>> print(json_grammar({"enum": ["view", 3]}))
    root ::= ("\\"view\\"" | "3")
    >>> json_grammar({"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": False})
    'root ::= "{" ("\\\\"a\\\\": " "null"  | "") "}"'
    """
    value = _value(schema, "json_schema")
    return f"root ::= {value}" + (f"\ncharacter ::= {_CHARACTER}" if " character" in value else "")


def _value(schema: Any, place: str) -> str:
    """The expression of one value, wherever it stands."""
    if not isinstance(schema, Mapping):
        raise UserError(f"{place} is {_shown(schema)}: an object with a type, an enum or a const is expected")
    kind = schema.get("type")
    if "enum" in schema or "const" in schema:
        return _choice(schema, kind, place)
    if not isinstance(kind, str) or kind not in _TYPES:
        raise UserError(f"{place}.type is {_shown(kind)}: one of {', '.join(_TYPES)} is expected, or an enum")
    _check_keywords(schema, {"type", *_BOUNDS.get(kind, ()), *_OTHERS.get(kind, ())}, place)
    constants = {"boolean": '("true" | "false")', "null": '"null"', "integer": _INTEGER}
    writers: dict[str, Callable[[Mapping[str, Any], str], str]] = {
        "object": _object, "array": _array, "string": _string,
    }  # fmt: skip
    return constants[kind] if kind in constants else writers[kind](schema, place)


def _choice(schema: Mapping[str, Any], kind: Any, place: str) -> str:
    """The values of an enum or of a const, each as a literal."""
    _check_keywords(schema, {"type", "const" if "const" in schema else "enum"}, place)
    values = [schema["const"]] if "const" in schema else schema["enum"]
    if not isinstance(values, list) or not values:
        raise UserError(f"{place}.enum is {_shown(values)}: a list of at least one value is expected")
    for value in values:
        fits = kind is None or (isinstance(kind, str) and isinstance(value, _TYPES.get(kind, ())))
        if not fits or (kind == "integer" and isinstance(value, bool)):
            raise UserError(f"{place} has the value {_shown(value)}, its type is {_shown(kind)}: make them agree")
    return f"({' | '.join(dict.fromkeys(_literal(_dumped(value, place)) for value in values))})"


def _object(schema: Mapping[str, Any], place: str) -> str:
    """The members in the order of `properties`; those not `required` may be left out."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if schema.get("additionalProperties") is not False:
        raise UserError(f"{place} lets further keys be: additionalProperties: false is expected")
    if not isinstance(properties, Mapping) or not all(isinstance(name, str) for name in properties):
        raise UserError(f"{place}.properties is {_shown(properties)}: an object is expected")
    if not isinstance(required, list) or not all(isinstance(name, str) and name in properties for name in required):
        raise UserError(f"{place}.required is {_shown(required)}: keys of {place}.properties are expected")
    members = [
        (f"{_literal(_dumped(name, place) + ': ')} {_value(value, f'{place}.properties.{name}')}", name in required)
        for name, value in properties.items()
    ]
    # `rest`: what may follow a member; `firsts`: the whole by the member that stands first, from the last one backwards
    rest, firsts = "", ['""']
    for member, is_required in reversed(members):
        firsts = [f"{member} {rest}", *([] if is_required else firsts)]
        rest = f'", " {member} {rest}' if is_required else f'(", " {member})? {rest}'
    return f'"{{" ({" | ".join(firsts)}) "}}"'


def _array(schema: Mapping[str, Any], place: str) -> str:
    least, most = _bounds(schema, "array", place)
    item = _value(schema.get("items"), f"{place}.items")
    if most == 0:
        return '"[]"'
    items = f'{item} (", " {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
    return f'"[" ({items}) "]"' if least else f'"[" ({items} | "") "]"'


def _string(schema: Mapping[str, Any], place: str) -> str:
    least, most = _bounds(schema, "string", place)
    return rf'"\"" character{{{least},{"" if most is None else most}}} "\""'


def _bounds(schema: Mapping[str, Any], kind: str, place: str) -> tuple[int, int | None]:
    lower, upper = _BOUNDS[kind]
    least, most = schema.get(lower, 0), schema.get(upper)
    if type(least) is not int or least < 0 or (most is not None and (type(most) is not int or most < least)):
        raise UserError(f"{place}: 0 ≤ {lower} ≤ {upper} is expected, not {_shown(least)} and {_shown(most)}")
    return least, most


def _check_keywords(schema: Mapping[str, Any], known: Iterable[str], place: str) -> None:
    unknown = [name for name in schema if name not in _NOTES and name not in known]
    if unknown:
        raise UserError(
            f"{place} has the keyword {_shown(unknown[0])}, which the grammar cannot keep: leave it out "
            f"(known there: {', '.join(sorted(known))})"
        )


def _dumped(value: Any, place: str) -> str:
    """A value as answers write it.

    Raises:
        UserError: what is no JSON, or half a surrogate pair.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError):  # the latter also of the encoding
        raise UserError(f"{place} has the value {value!r}, which is no JSON: leave it out") from None
    return text


def _literal(text: str) -> str:
    """A text in an EBNF, which escapes as JSON does."""
    return f'"{text.replace(chr(92), 2 * chr(92)).replace(chr(34), chr(92) + chr(34))}"'


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)[:60]
