"""Subgraphs as text for a prompt.

Triples of N prompts enter (`Subgraphs`), with the names of entities and relations; N texts leave, in one of four
formats. "Heat, directed by Michael Mann, in the genres Crime and Drama" is

    grouped   Heat: directed by Michael Mann; has genre Crime, Drama
    lines     (Heat, directed by, Michael Mann)                       a line each triple
    turtle    <#Heat> <#directed_by> <#Michael_Mann>; <#has_genre> <#Crime>, <#Drama>.
    json_ld   {"@id": "#Heat", "directed_by": [{"@id": "#Michael_Mann"}], "has_genre": [{"@id": "#Crime"}, …]}

Triples of one head share a line, and those of one relation in it a part; lines, parts and tails stand in the order of
their best triples. What repeats, and a subgraph without triples, writes nothing.

What is unambiguous. Names are one line each and never empty ("entity 17" where nothing is left of a name). In `grouped`
and `lines` a name in which ",", ";" or ":" stands before a blank or at the end, or that begins with a quotation mark or
ends like a date, is written in quotation marks, those in it doubled; so is a relation that another one goes on from
("made", "made in"). Reading a relation then takes the longest one known. Turtle and JSON-LD are valid, and read back to
the same triples: a name is the fragment of an IRI, blanks as "_", what IRIs do not allow percent-encoded.
Two entities, or two relations, of the same name read as one in every format.

Dates (`dates=True`) are shown of triples that have a time, as days of UTC. Turtle states them about the triple (an
annotation of RDF 1.2); JSON-LD has no way to, and keeps them in "@index", which readers show and RDF leaves out.

Texts are made of pieces that each begin with a blank or a line, and no name ends in one: tokenizers cut there, so that
budget.py can count a text by its pieces.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recllm.data.prices import DAY_S
from recllm.errors import UserError
from recllm.graph.segments import stable_order
from recllm.graph.store import ALWAYS
from recllm.graph.subgraphs import Subgraphs
from recllm.recipe import GraphFormat

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Objects = npt.NDArray[np.object_]

MOST_PIECES = 2**18  # names kept as written, by each process: about 30 MB
# How a triple ends, by what follows it: a tail of the same head and relation, another relation, another line, nothing.
NEXT_TAIL, NEXT_PART, NEXT_LINE, LAST = range(4)

_NEEDS_QUOTES = re.compile(r'[,;:](?: |$)|^"|\(\d{4,}-\d\d-\d\d\)$')
# What may stand in the fragment of an IRI as it is (RFC 3987); "_" is a blank, and so is not among them.
_NOT_IN_IRI = re.compile(r"[^A-Za-z0-9!$&'()*+,;=:@/?.~\-\u00a0-\ud7ff\uf900-\ufdcf\ufdf0-\uffef\U00010000-\U0001fffd]")


def one_line(text: str) -> str:
    """Runs of white space as one blank, none around.

    >>> one_line(" Michael\\n Mann ")
    'Michael Mann'
    """
    return " ".join(text.split())


# ---- how names are written ----


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def plain(name: str) -> str:
    """A name as it is, in quotation marks where it could be read as more than a name.

    >>> plain("Heat"), plain("Tiger, Dragon"), plain('"Heat" (1995)'), plain("10,000 BC")
    ('Heat', '"Tiger, Dragon"', '\"""Heat"" (1995)"', '10,000 BC')
    """
    return _quoted(name) if _NEEDS_QUOTES.search(name) else name


def fragment(name: str) -> str:
    """A name as the fragment of an IRI; different names give different fragments.

    >>> fragment("Heat 2: <s>"), fragment("a_b"), fragment("100%")
    ('Heat_2:_%3Cs%3E', 'a%5Fb', '100%25')
    """
    words = name.split(" ")
    return "_".join(_NOT_IN_IRI.sub(_percent, word) for word in words)


def fragment_in_json(name: str) -> str:
    """The same without ":" and "@", which JSON-LD would read as a prefix or a keyword.

    >>> fragment_in_json("Heat 2: @home")
    'Heat_2%3A_%40home'
    """
    return fragment(name).replace(":", "%3A").replace("@", "%40")


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode())


@dataclass(frozen=True)
class Style:
    """What stands around names. Every text here begins with a blank, ends a piece, or begins a line."""

    name: Callable[[str], str]
    head: tuple[str, str]  # before and after the head of a line
    relation: tuple[str, str]
    tail: tuple[str, str]
    ends: tuple[str, str, str, str]  # behind the tail: NEXT_TAIL, NEXT_PART, NEXT_LINE, LAST
    dated: str  # behind a tail that has a date
    date: str  # of the date %s, before the end
    header: str = ""
    groups: bool = True  # triples of one head share a line


STYLES: dict[str, Style] = {
    "grouped": Style(plain, ("", ":"), (" ", ""), (" ", ""), (",", ";", "\n", ""), "", " (%s)"),
    "lines": Style(plain, ("(", ","), (" ", ","), (" ", ""), ("", "", ")\n", ")"), ",", " %s", groups=False),
    "turtle": Style(
        fragment,
        ("<#", ">"),
        (" <#", ">"),
        (" <#", ">"),
        (",", ";", ".\n", "."),
        "",
        ' {| <#date> "%s" |}',
        header="@base <kg:> .\n",
    ),
    "json_ld": Style(
        fragment_in_json,
        ('{"@id": "#', '",'),
        (' "', '": [{"@id":'),
        (' "#', '"'),
        ('}, {"@id":', "}],", "}]},\n", "}]}]}"),
        ",",
        ' "@index": "%s"',
        header='{"@context": {"@base": "kg:", "@vocab": "kg:#"}, "@graph": [\n',
    ),
}


class Pieces:
    """What is written for numbered things, made when first asked for: S of them so far.

    Args:
        size: of the numbers.
        write: texts of some numbers.
    """

    def __init__(self, size: int, write: Callable[[Ints], list[str]]) -> None:
        self._write = write
        self._slot = np.full(size, -1, dtype=np.int32)
        self.texts: Objects = np.empty(0, dtype=object)  # (S,) by slot
        self.generation = 0  # counted up when all slots are given anew

    def slots(self, numbers: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
        """Where the texts of some numbers stand; holds until the next call."""
        if len(self.texts) > MOST_PIECES:
            self._slot[:] = -1
            self.texts, self.generation = self.texts[:0], self.generation + 1
        found: npt.NDArray[np.int32] = self._slot[numbers]
        if (found < 0).any():
            new = np.unique(numbers[found < 0]).astype(np.int64)
            self._slot[new] = len(self.texts) + np.arange(len(new), dtype=np.int32)
            self.texts = np.concatenate([self.texts, np.array(self._write(new), dtype=object)])
            found = self._slot[numbers]
        return found

    def of(self, numbers: npt.NDArray[np.integer]) -> Objects:
        """The texts of some numbers."""
        slots = self.slots(numbers)
        found: Objects = self.texts[slots]
        return found


@dataclass(frozen=True)
class Layout:
    """Which triples of M stand together, before it is known which are kept."""

    prompts: Ints  # (M,)
    lines: Ints  # (M,) number of the line, different in each prompt
    parts: Ints  # (M,) number of the part of a line: triples of one relation
    is_repeat: Flags  # (M,) a better triple writes the same


class Verbaliser:
    """Writes subgraphs. Pickles as its names: what it has written so far stays behind.

    Args:
        entity_names: by entity number; best a pyarrow array of strings, which pickles as one buffer.
        relation_names: by relation number.
        format: one of STYLES.
        clean: applied to every name, once; made one line afterwards. A module's function (or a `partial` of one), so
            that it pickles.
        dates: show the day of triples that have a time.

    Raises:
        UserError: an unknown format.
    """

    def __init__(
        self,
        entity_names: Sequence[str] | pa.Array,
        relation_names: Sequence[str],
        format: GraphFormat = "grouped",
        clean: Callable[[str], str] = one_line,
        dates: bool = False,
    ) -> None:
        if format not in STYLES:
            raise UserError(f'graph.format is "{format}": one of {", ".join(STYLES)} is expected')
        self.entity_names, self.relation_names = _names(entity_names), list(relation_names)
        self.format, self.clean, self.dates, self.style = format, clean, dates, STYLES[format]
        self.relations, self._same = self._relation_texts()
        self.heads = Pieces(len(self.entity_names), partial(self._written, around=self.style.head))
        self.tails = Pieces(len(self.entity_names), partial(self._written, around=self.style.tail))

    def __reduce__(self) -> tuple[Any, ...]:
        return Verbaliser, (self.entity_names, self.relation_names, self.format, self.clean, self.dates)

    def layout(self, subgraphs: Subgraphs) -> Layout:
        """What would stand together if all triples were written."""
        prompts, places = subgraphs.prompts, np.arange(len(subgraphs.heads))
        keys = (prompts * len(self.entity_names) + subgraphs.heads) * max(len(self._same), 1)
        keys += self._same[subgraphs.relations]
        order = np.argsort(self.days(subgraphs), kind="stable") if self.dates else places
        for column in (subgraphs.tails.astype(np.int64), keys):
            order = order[stable_order(column[order])]
        lines, parts, wholes = np.empty_like(places), np.empty_like(places), np.empty_like(places)
        keys = keys[order]
        new_part = _differ(keys)
        new = new_part | _differ(subgraphs.tails[order])
        if self.dates:
            new |= _differ(self.days(subgraphs)[order])
        lines[order] = np.cumsum(_differ(keys // max(len(self._same), 1))) - 1
        parts[order] = np.cumsum(new_part) - 1
        wholes[order] = new  # the sort is stable: the first of equal triples is the best
        if not self.style.groups:
            lines = parts = places
        return Layout(prompts, lines, parts, wholes == 0)

    def write(self, subgraphs: Subgraphs, layout: Layout, kept: Ints) -> list[str]:
        """The text of each prompt, of the triples at `kept`, ascending and without repeats; "" where there is none."""
        kept = kept[_text_order(layout, kept)]
        prompts, lines, parts = layout.prompts[kept], layout.lines[kept], layout.parts[kept]
        new_line, new_part, new_prompt = _differ(lines), _differ(parts), _differ(prompts)
        ends = np.full(len(kept), LAST)
        ends[:-1] = np.select([new_prompt[1:], new_line[1:], new_part[1:]], [LAST, NEXT_LINE, NEXT_PART], NEXT_TAIL)
        days = self.days(subgraphs)[kept] if self.dates else np.full(len(kept), ALWAYS)
        has_date = days != ALWAYS
        counts = 2 + new_line + new_part + has_date  # pieces of each triple
        after = np.cumsum(counts)
        pieces: Objects = np.empty(int(counts.sum()), dtype=object)
        begins = after - counts
        pieces[begins[new_line]] = self.heads.of(subgraphs.heads[kept[new_line]])
        pieces[(begins + new_line)[new_part]] = self.relations[subgraphs.relations[kept[new_part]]]
        pieces[begins + new_line + new_part] = self.tails.of(subgraphs.tails[kept])
        if has_date.any():
            pieces[after[has_date] - 2] = self.date_texts(days[has_date])
        pieces[after - 1] = np.array(self.style.ends, dtype=object)[ends]
        bounds = np.concatenate([[0], after])[np.searchsorted(prompts, np.arange(subgraphs.num_prompts + 1))]
        flat, cuts, header = pieces.tolist(), bounds.tolist(), self.style.header
        return [header + "".join(flat[a:b]) if a < b else "" for a, b in itertools.pairwise(cuts)]

    def days(self, subgraphs: Subgraphs) -> Ints:
        """(M,) days since the epoch; ALWAYS without a time."""
        return np.where(subgraphs.times == ALWAYS, ALWAYS, subgraphs.times // DAY_S)

    def date_texts(self, days: Ints) -> Objects:
        """What is written for days, with what stands between tail and date."""
        unique, places = np.unique(days, return_inverse=True)
        dates = np.datetime_as_string(unique.astype("datetime64[D]"))
        texts: Objects = np.array([self.style.dated + self.style.date % date for date in dates], dtype=object)
        return texts[places]

    def _written(self, entities: Ints, around: tuple[str, str]) -> list[str]:
        names = self.entity_names.take(pa.array(entities)).to_pylist()
        cleaned = (self._cleaned(name, f"entity {entity}") for name, entity in zip(names, entities.tolist()))
        return [around[0] + self.style.name(name) + around[1] for name in cleaned]

    def _cleaned(self, name: str | None, otherwise: str) -> str:
        return one_line(self.clean(name or "")) or otherwise

    def _relation_texts(self) -> tuple[Objects, Ints]:
        """What is written for each relation, and the first one that is written the same."""
        names = [self._cleaned(name, f"relation {number}") for number, name in enumerate(self.relation_names)]
        written = [self.style.name(name) for name in names]
        if self.style.name is plain:  # the blank between relation and tail is not told from one in a relation's name
            goes_on = [any(other.startswith(name + " ") for other in names) for name in names]
            written = [_quoted(name) if longer else text for name, text, longer in zip(names, written, goes_on)]
        before, after = self.style.relation
        first = {text: number for number, text in reversed(list(enumerate(written)))}
        texts: Objects = np.array([before + text + after for text in written], dtype=object)
        return texts, np.array([first[text] for text in written], dtype=np.int64)


def _names(names: Sequence[str] | pa.Array) -> pa.Array:
    if isinstance(names, pa.ChunkedArray):
        return names.combine_chunks()
    return names if isinstance(names, pa.Array) else pa.array(list(names), type=pa.large_string())


def _text_order(layout: Layout, kept: Ints) -> Ints:
    """Order in which kept triples stand: lines by their best triple, parts in a line too, tails as they are ranked."""
    size = len(layout.lines)
    first_of_line, first_of_part = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    first_of_line[layout.lines[kept[::-1]]] = kept[::-1]  # the last to be written is the first
    first_of_part[layout.parts[kept[::-1]]] = kept[::-1]
    return np.argsort(first_of_line[layout.lines[kept]] * size + first_of_part[layout.parts[kept]], kind="stable")


def _differ(values: npt.NDArray[np.generic]) -> Flags:
    """Where a value differs from the one before it; the first does."""
    differs = np.ones(len(values), dtype=bool)
    differs[1:] = values[1:] != values[:-1]
    return differs
