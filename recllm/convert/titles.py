"""How an item or a user is written in a prompt: one line of text that nothing in it can use to break out of the prompt.

The table of items or users, the recipe's `prompt.item` or `prompt.user` and the tokenizer's special tokens enter; one
text an item or user leaves.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from jinja2 import Template as JinjaTemplate
from jinja2 import TemplateError

from recllm.convert.templates import compile_checked
from recllm.errors import UserError

# "<" opens a special token of every published chat format in angle brackets. It stays where it cannot: "<3", "a < b".
_ANGLE = re.compile(r"<(?![\s=-]|\d+(?!\w*>))")
# Square brackets are ordinary in titles ("[REC]" is a film), so only published names are broken, and shapes that no
# title has: "[/NAME]" and names with an underscore.
_SQUARE = re.compile(
    r"\[(?=(?:/\w+|\w+_\w*|INST|IMG|PREFIX|SUFFIX|MIDDLE|THINK|ARGS|AUDIO|[BE]OS|PAD|UNK|CLS|SEP|MASK|[gs]MASK|unused\d+)\])"
)
_INVISIBLE = {"Cc", "Cf", "Cs", "Co"}  # controls, zero-width and bidi characters, surrogates, private use
_JOINERS = "\u200c\u200d"  # Persian and Indic spelling and joined emoji need them, no Latin text does
_JOINED = ("L", "M", "So", "Sk")  # what they join: letters, marks, emoji and their skin tones


def neutralise(text: str, special_tokens: Sequence[str] = ()) -> str:
    """One line without control characters in which no chat control token is left; ordinary titles stay as they are.

    Tokens in angle brackets lose their "<" to the look-alike "‹", tokens in square brackets get a space after "[",
    any other of `special_tokens` gets a space after its first character. Doing it twice changes nothing more.
    Zero-width joiners stay between two letters or emoji that are not ASCII, unless a token would appear without them.

    >>> neutralise("Heat (1995)"), neutralise("I <3 [REC]"), neutralise("<|im_end|> now")
    ('Heat (1995)', 'I <3 [REC]', '‹|im_end|> now')
    """
    text = " ".join(text.split())  # first, so that nothing removed later joins two halves of a token
    if text.isascii() and text.isprintable():
        return _mend(text, special_tokens)
    text = "".join(c for c in text if c in _JOINERS or unicodedata.category(c) not in _INVISIBLE)
    bare = _mend(_without_joiners(text), special_tokens)
    if len(text) == len(_without_joiners(text)) or any(_without_joiners(token) != token for token in special_tokens):
        return bare
    joined = _joining(_mend(_joining(text), special_tokens))
    seen = _without_joiners(joined)  # by a tokenizer that drops joiners
    return joined if _mend(seen, special_tokens) == seen else bare


def _mend(text: str, special_tokens: Sequence[str]) -> str:
    text = " ".join(text.split())
    return _break(_SQUARE.sub("[ ", _ANGLE.sub("‹", text)), special_tokens)


def _without_joiners(text: str) -> str:
    return text.replace("\u200c", "").replace("\u200d", "")


def _joining(text: str) -> str:
    """Only those joiners that stand between two characters that they can join."""
    around = f" {text} "
    triples = zip(text, around, around[2:])  # a character, the one before and the one after
    return "".join(c for c, before, after in triples if c not in _JOINERS or (_joins(before) and _joins(after)))


def _joins(character: str) -> bool:
    return not character.isascii() and unicodedata.category(character).startswith(_JOINED)


def _break(text: str, special_tokens: Sequence[str]) -> str:
    """Break what is left of `special_tokens`; a token that a space cannot break is removed.

    Ends: a space is only put where none was, and a removal shortens the text.
    """
    tokens = sorted((token for token in special_tokens if token.strip()), key=len, reverse=True)
    while token := next((token for token in tokens if token in text), None):
        broken = f"{token[0]} {token[1:]}"
        breakable = len(token) > 1 and not token[:2].count(" ") and not any(other in broken for other in tokens)
        text = " ".join(text.replace(token, broken if breakable else " ").split())
    return text


def tokenizer_special_tokens(name_or_path: str) -> tuple[str, ...]:
    """Special tokens listed in the tokenizer.json of a local folder; none for a hub name or a GGUF file.

    The shapes that `neutralise` knows cover the published formats without this list; it adds what a tokenizer of
    the user's own calls special. Read as plain JSON, so that converting needs no tokenizer library.
    """
    path = Path(name_or_path) / "tokenizer.json"
    if not path.is_file():
        return ()
    try:
        added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
    except (json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{path} is not a tokenizer file ({error}): save the tokenizer again") from None
    return tuple(sorted({token["content"] for token in added if token.get("special")}))


def item_texts(items: pl.DataFrame, item_template: str, special_tokens: Sequence[str] = ()) -> list[str]:
    """The text of each item in item_index order: `item_template` rendered once an item, then neutralised.

    A null attribute renders as nothing. Raises UserError for a template with an unknown attribute and for an item
    of which nothing readable is left.
    """
    template = compile_checked(item_template, set(items.columns), "prompt.item", "column of the items")
    texts = []
    for row in items.iter_rows(named=True):
        text = neutralise(_render(template, row, f'prompt.item fails on item "{row["item_id"]}"'), special_tokens)
        if not text:
            raise UserError(
                f'item "{row["item_id"]}" has the title {row["title"]!r}, of which nothing readable is left: '
                f'every item needs a title, mend the items file or set prompt.item (now "{item_template}")'
            )
        texts.append(text)
    return texts


def user_texts(users: pl.DataFrame, user_template: str, special_tokens: Sequence[str] = ()) -> list[str]:
    """The text about each user in the order of rows: `user_template` rendered once a user, then neutralised.

    A null attribute renders as nothing, and the text may be empty. Raises UserError for an unknown attribute.
    """
    known = [name for name in users.columns if name != "user_index"]
    template = compile_checked(user_template, set(known), "prompt.user", "column of the users")
    return [
        neutralise(_render(template, row, f'prompt.user fails on user "{row["user_id"]}"'), special_tokens)
        for row in users.select(known).iter_rows(named=True)
    ]


def _render(template: JinjaTemplate, row: dict[str, object], what: str) -> str:
    try:
        return template.render({key: "" if value is None else value for key, value in row.items()})
    except (TemplateError, TypeError, LookupError, ValueError, ArithmeticError) as error:
        raise UserError(f"{what}: {error}. Mend the template") from None
