"""What examples take from the knowledge graph: subgraphs and paths for prompts, questions about items, explanations.

The folder that `graph.build` wrote, the recipe's section and the texts of the items enter; texts leave, for many
examples at once. Where an item is an entity, the entity is called what the prompts call the item. Travels to worker
processes: each maps the arrays into its memory when it first asks.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from recllm.convert.titles import neutralise
from recllm.data.randomness import Keys
from recllm.errors import UserError
from recllm.graph import attributes as graph_attributes
from recllm.graph import explain
from recllm.graph.attributes import NO_NAME, Attributes
from recllm.graph.budget import Budget, Fitted
from recllm.graph.build import ENTITIES, LINKS, RELATION_ID, RELATIONS
from recllm.graph.paths import Candidates, Paths, paths
from recllm.graph.readers import NAME
from recllm.graph.retrieve import retrieve, rules_of
from recllm.graph.store import ALWAYS, Graph, Ids
from recllm.graph.subgraphs import Seeds, Subgraphs
from recllm.graph.verbalise import Verbaliser, plain
from recllm.recipe import GraphFormat, GraphSection

Ints = npt.NDArray[np.int64]

DESCRIBED = (3, 2)  # relations of an item that a description holds at most, and tails of each
NO_LINK = -1
LONGEST_NAME = 200  # characters of a name outside subgraphs, whose budget does not count it: beyond, it is a text
PATHS = 3  # that are looked at for one that can be written
LINES_AT_ONCE = 4096  # bounds memory


class Moments(NamedTuple):
    """N examples as the graph sees them: what the user had, and when the question is asked."""

    offsets: Ints  # (N + 1,) example n has items offsets[n]:offsets[n + 1]
    items: npt.NDArray[np.int32]  # item_index, oldest first
    cutoffs: Ints  # (N,) seconds since the epoch
    keys: Keys  # (N,) random keys
    around: npt.NDArray[np.int32] | None = None  # (N,) an item that retrieval starts from too, as heavy as all others


class Ages(NamedTuple):
    """How old what examples show is: counts for the manifest, taken behind retrieval and not by it."""

    timed: int = 0  # triples that have a time
    not_older: int = 0  # of them, those that are not older than their example's cut-off: 0, or something is broken

    @classmethod
    def of(cls, times: npt.ArrayLike, cutoffs: npt.ArrayLike) -> "Ages":
        """Of triples, each with its example's cut-off."""
        shown, limits = np.asarray(times), np.asarray(cutoffs)
        timed = shown != ALWAYS
        return cls(int(timed.sum()), int((timed & (shown >= limits)).sum()))

    def __add__(self, other: "Ages") -> "Ages":  # type: ignore[override]  # of tuples it would join them
        return Ages(self.timed + other.timed, self.not_older + other.not_older)


class Shown(NamedTuple):
    """Subgraphs of N examples."""

    texts: list[str]  # "" where nothing is linked, found, or fits
    triples: Ints  # (N,) in the text
    tokens: Ints  # (N,) of the text
    too_small: int  # examples of whose triples not one fits into the budget
    ages: Ages


class Written(NamedTuple):
    """A path as text."""

    text: str
    score: float


class Question(NamedTuple):
    """An item's attribute as text. No other choice is called as one of the item's attributes is."""

    relation: str
    answer: str
    choices: list[str]  # with the answer, in seeded order


def names_it(name: str, title: str) -> bool:
    """Whether a name holds a title, or what is left of it without an end like "(1995)" and an article.

    Whole words count, in any case and with any signs between them.

    >>> [names_it(name, "Heat (1995)") for name in ("Heat", "Michael Mann's HEAT", "Heather", "1995")]
    [True, True, False, False]
    >>> names_it("The Usual Suspects (score)", "Usual Suspects, The (1995)"), names_it("Matrix trilogy", "The Matrix")
    (True, True)
    """
    short = _ADDITIONS.sub("", title)
    wanted = _in_words(_ARTICLE_BEHIND.sub("", short)) or _in_words(title)
    wanted = _ARTICLE_BEFORE.sub("", wanted) or wanted
    if not wanted:  # a title without a letter
        return name.strip() == title.strip()
    before, behind = ("" if _is_uncased(end) else edge for end, edge in ((wanted[0], r"\b"), (wanted[-1], r"\b")))
    return re.search(f"{before}{re.escape(wanted)}{behind}", _in_words(name)) is not None


_ADDITIONS = re.compile(r"(?:\s*\([^()]*\))+\s*$")
_ARTICLE_BEHIND = re.compile(r",\s*(?:the|an?|les?|la|l'|il|lo|gli|el|los|las|une?|una|der|die|das)\s*$", re.IGNORECASE)
_ARTICLE_BEFORE = re.compile(r"^(?:the|an?) ")


def _in_words(text: str) -> str:
    """Its words in lower case, a blank between them."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _is_uncased(letter: str) -> bool:
    """Whether a letter is of a script without case, some of which put no blank between words."""
    return letter.isalpha() and letter.lower() == letter.upper()


@dataclass(frozen=True)
class Knowledge:
    """A dataset's graph, as the converter asks it."""

    folder: Path
    section: GraphSection
    item_texts: pa.StringArray  # (num_items,)
    special_tokens: tuple[str, ...]  # that no name may hold
    tokenizer: str  # tokenizer.json of the base model: counts the budget

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def shown(self, moments: Moments, format: GraphFormat | None = None, budget: int | None = None) -> Shown:
        """The subgraph of each example, within the budget; `format` and `budget` in place of the recipe's."""
        found, fitted = self.fitted(moments, format, budget)
        times, cutoffs = found.times[fitted.is_kept], moments.cutoffs[found.prompts[fitted.is_kept]]
        return Shown(fitted.texts, fitted.kept, fitted.tokens, fitted.num_too_small, Ages.of(times, cutoffs))

    def fitted(
        self, moments: Moments, format: GraphFormat | None = None, budget: int | None = None
    ) -> tuple[Subgraphs, Fitted]:
        """What retrieval found for each example, best first, and which of it the budget lets a prompt show."""
        seeds = self._seeds(moments)
        found = retrieve(
            self.graph, seeds, self.section.retrieval, self._relation_names, moments.keys, self._relation_ids
        )
        return found, self._budget(format or self.section.format, budget or self.section.budget).fit(found)

    def explained(self, moments: Moments, targets: npt.NDArray[np.int32]) -> tuple[list[str | None], Ages]:
        """How the history leads to each example's target, the best path on one line; None where there is none."""
        found, ages = self._paths(moments, np.arange(len(targets) + 1), targets)
        return [None if path is None else path.text for path in found], ages

    def led_to(self, moments: Moments, candidates: npt.NDArray[np.int32], left: Ints) -> tuple[list[str], Ages]:
        """The candidates (N, C), one a line, each with the path that leads to it.

        Paths cost tokens beside the candidates' own: the best of an example come first, each that still fits into what
        is `left` (N,) of the budget.
        """
        rows, count = candidates.shape
        found, ages = self._paths(moments, np.arange(rows + 1) * count, candidates.ravel())
        texts = self.item_texts.take(pa.array(candidates.ravel())).to_pylist()
        lines = [text if path is None else f"{text}: {path.text}" for text, path in zip(texts, found, strict=True)]
        costs = self._costs(texts, lines)
        scores = {place: path.score for place, path in enumerate(found) if path is not None}
        order = sorted(scores, key=lambda place: -scores[place])
        budget, kept = left.tolist(), list(texts)
        for place in order:
            if costs[place] <= budget[place // count]:
                budget[place // count] -= costs[place]
                kept[place] = lines[place]
        return ["\n".join(kept[row * count : (row + 1) * count]) for row in range(rows)], ages

    def _costs(self, texts: Sequence[str], lines: Sequence[str]) -> dict[int, int]:
        """Tokens that each line has more than its text, where they differ."""
        places = [place for place, (text, line) in enumerate(zip(texts, lines)) if text != line]
        found = dict[int, int]()
        for begin in range(0, len(places), LINES_AT_ONCE):
            here = places[begin : begin + LINES_AT_ONCE]
            for text in {texts[place] for place in here} - self._known_tokens.keys():
                self._known_tokens[text] = len(self._tokenizer.encode(text, add_special_tokens=False).ids)
            counted = self._tokenizer.encode_batch_fast([lines[place] for place in here], add_special_tokens=False)
            found |= {p: len(one.ids) - self._known_tokens[texts[p]] for p, one in zip(here, counted, strict=True)}
        return found

    def questions(
        self, items: npt.NDArray[np.int32], moments: Moments, relations: Sequence[str], count: int
    ) -> tuple[list[Question | None], Ages]:
        """What is an attribute of each item? With count − 1 wrong answers; None without a link or an attribute."""
        attributes, found, ages = self._attributes(tuple(relations)), list[Question | None](), Ages()
        for entity, cutoff, key in zip(self.linked[items].tolist(), moments.cutoffs.tolist(), moments.keys.tolist()):
            asked = None if entity == NO_LINK else attributes.question(entity, cutoff, key, count)
            question = None if asked is None else self._question(asked)
            if asked is not None and question is not None:
                ages += Ages.of(asked.newest, cutoff)
            found.append(question)
        return found, ages

    def _question(self, asked: graph_attributes.Question) -> Question | None:
        """None where names that differ are written the same, and a wrong answer would look like a right one."""
        names = [self._name(choice) for choice in asked.choices]
        answer, right = self._name(asked.tail), {self._name(tail) for tail in asked.right}
        if len(set(names)) < len(names) or set(names) & right != {answer}:
            return None
        return Question(self._shown_relations[asked.relation], answer, names)

    def descriptions(
        self, items: npt.NDArray[np.int32], moments: Moments, relations: Sequence[str]
    ) -> tuple[list[str | None], Ages]:
        """Some attributes of each item, one relation a line; None without a link or an attribute.

        What names the item (`names_it`) would give the answer away, and other attributes stand in its place.
        """
        attributes, found, ages = self._attributes(tuple(relations)), list[str | None](), Ages()
        for item, cutoff, key in zip(items.tolist(), moments.cutoffs.tolist(), moments.keys.tolist()):
            entity, lines = int(self.linked[item]), list[str]()
            for relation, tails, newest in [] if entity == NO_LINK else self._told(attributes, item, cutoff, key):
                lines.append(f"{self._shown_relations[relation]}: {', '.join(plain(self._name(t)) for t in tails)}")
                ages += Ages.of(newest, cutoff)
            found.append("\n".join(lines) or None)
        return found, ages

    def _told(self, attributes: Attributes, item: int, cutoff: int, key: int) -> list[graph_attributes.Described]:
        """Attributes of a linked item that do not name it."""
        entity, title = int(self.linked[item]), self.item_texts[item].as_py()
        called = [title, self._own_names[entity].as_py()]

        def may_be_told(tail: int) -> bool:
            return not any(names_it(self._name(tail), one) for one in called)

        return attributes.described(entity, cutoff, key, *DESCRIBED, may_be_told)

    def check(self, relations: Sequence[str] = ()) -> None:
        """Find now what examples would stumble over.

        Raises:
            UserError: a relation of the recipe that the graph does not have.
        """
        rules_of(self.section.retrieval, self._relation_names, self._relation_ids)
        self._attributes(tuple(relations))

    def checker(self) -> explain.Checker:
        """Checks explanations by the names that examples write: every text of an item, where items are one entity."""
        names = [(self._name(entity), entity) for entity in range(self.graph.num_entities)]
        items = np.flatnonzero(np.asarray(self.linked) != NO_LINK).tolist()
        names += [(self.item_texts[item].as_py(), int(self.linked[item])) for item in items]
        return explain.Checker(self.graph, names, self._shown_relations)

    # ---- opened once a process ----

    @cached_property
    def graph(self) -> Graph:
        """The folder's, mapped into memory."""
        return Graph.open(self.folder)

    @cached_property
    def linked(self) -> Ids:
        """(num_items,) the entity of each item, NO_LINK without one."""
        found: Ids = np.asarray(np.load(self.folder / LINKS, mmap_mode="r", allow_pickle=False))
        return found

    @cached_property
    def _own_names(self) -> pa.Array:
        """(E,) what the graph calls each entity."""
        return pq.read_table(self.folder / ENTITIES, columns=[NAME])[NAME].combine_chunks().cast(pa.string())

    @cached_property
    def _name_numbers(self) -> Ints:
        """(E,) entities that are called the same have one number; NO_NAME: what is longer than a name."""
        numbers = pc.dictionary_encode(self._names).indices.to_numpy().astype(np.int64)
        numbers[pc.utf8_length(self._names).to_numpy() > LONGEST_NAME] = NO_NAME
        return numbers

    @cached_property
    def _names(self) -> pa.Array:
        """(E,) what each entity is called: its item's text, or its own name."""
        names, linked = self._own_names, np.asarray(self.linked)
        items = np.flatnonzero(linked != NO_LINK)[::-1]  # the first item of an entity goes last, and stays
        item_of = np.full(len(names), NO_LINK)
        item_of[linked[items]] = items
        texts = self.item_texts.take(pa.array(item_of, mask=item_of == NO_LINK))
        return pc.coalesce(texts, names)

    @cached_property
    def _relations(self) -> pa.Table:
        return pq.read_table(self.folder / RELATIONS)

    @property
    def _relation_names(self) -> list[str]:
        return list(self._relations[NAME].to_pylist())

    @property
    def _relation_ids(self) -> list[str]:
        return list(self._relations[RELATION_ID].to_pylist())

    @cached_property
    def _shown_relations(self) -> list[str]:
        return [self._clean(name) or f"relation {number}" for number, name in enumerate(self._relation_names)]

    @property
    def _clean(self) -> Any:
        return partial(neutralise, special_tokens=self.special_tokens)

    def _name(self, entity: int) -> str:
        known = self._known_names
        if entity not in known:
            known[entity] = self._clean(self._names[entity].as_py()) or f"entity {entity}"
        return known[entity]

    @cached_property
    def _known_names(self) -> dict[int, str]:
        return {}

    @cached_property
    def _known_tokens(self) -> dict[str, int]:
        """Of texts of items."""
        return {}

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.tokenizer)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _budget(self, format: GraphFormat, tokens: int) -> Budget:
        if (format, tokens) not in self._budgets:
            verbaliser = Verbaliser(self._names, self._relation_names, format, self._clean, self.section.dates)
            self._budgets[format, tokens] = Budget(verbaliser, self._tokenizer, tokens)
        return self._budgets[format, tokens]

    @cached_property
    def _budgets(self) -> dict[tuple[GraphFormat, int], Budget]:
        return {}

    def _attributes(self, relations: tuple[str, ...]) -> Attributes:
        """Of the relations that a task names, or else of those that retrieval follows."""
        if relations not in self._known_attributes:
            section = self.section.retrieval
            if relations:
                section = section.model_copy(update={"allow": list(relations), "deny": []})
            try:
                rules = rules_of(section, self._relation_names, self._relation_ids)
            except UserError as error:
                raise UserError(str(error).replace("graph.retrieval.allow", "tasks[].relations")) from None
            allowed = np.ones(self.graph.num_relations, dtype=bool) if rules.allowed is None else rules.allowed
            self._known_attributes[relations] = Attributes(
                self.graph, allowed[: self.graph.num_relations], self._name_numbers
            )
        return self._known_attributes[relations]

    @cached_property
    def _known_attributes(self) -> dict[tuple[str, ...], Attributes]:
        return {}

    def _seeds(self, moments: Moments) -> Seeds:
        """The linked items of each example, and what is asked `around`."""
        prompts = np.repeat(np.arange(len(moments.cutoffs)), np.diff(moments.offsets))
        entities = self.linked[moments.items]
        prompts, entities = prompts[entities != NO_LINK], entities[entities != NO_LINK]
        counts = np.bincount(prompts, minlength=len(moments.cutoffs))
        weights = np.ones(len(entities), dtype=np.float32)
        if moments.around is not None:
            others = self.linked[moments.around]
            rows = np.flatnonzero(others != NO_LINK)
            order = np.argsort(np.concatenate([prompts, rows]), kind="stable")
            entities = np.concatenate([entities, others[rows]])[order]
            weights = np.concatenate([weights, np.maximum(counts[rows], 1).astype(np.float32)])[order]
            counts[rows] += 1
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return Seeds(offsets, entities.astype(np.int32), weights, moments.cutoffs)

    def _paths(
        self, moments: Moments, offsets: Ints, items: npt.NDArray[np.int32]
    ) -> tuple[list[Written | None], Ages]:
        """The best path to each item that can be written; example n asks for items offsets[n]:offsets[n + 1]."""
        rules = rules_of(self.section.retrieval, self._relation_names, self._relation_ids)
        wanted = Candidates(offsets, self.linked[items].astype(np.int32))
        seeds = self._seeds(moments._replace(around=None))  # a path begins at what the user had
        found = paths(self.graph, seeds, wanted, rules, self.section.retrieval.path_length, PATHS)
        lines, times, cutoffs = list[Written | None](), list[int](), list[int]()
        for number, (prompt, item) in enumerate(zip(wanted.prompts.tolist(), items.tolist())):
            begin, end = int(found.offsets[number]), int(found.offsets[number + 1])
            had = moments.items[moments.offsets[prompt] : moments.offsets[prompt + 1]]
            texts = ((place, self._path_text(found, place, had, item)) for place in range(begin, end))
            place, text = next(((place, text) for place, text in texts if text is not None), (begin, None))
            lines.append(None if text is None else Written(text, float(found.scores[place])))
            if text is not None:
                length = int(found.lengths[place])
                times += found.times[place, :length].tolist()
                cutoffs += [int(moments.cutoffs[prompt])] * length
        return lines, Ages.of(np.array(times, dtype=np.int64), np.array(cutoffs, dtype=np.int64))

    def _path_text(self, found: Paths, place: int, had: npt.NDArray[np.int32], item: int) -> str | None:
        """A path, its ends called as the prompt calls these items; None where it could not be read back."""
        length = int(found.lengths[place])
        entities = found.entities[place, : length + 1].tolist()
        inverse, relations = np.divmod(found.relations[place, :length], self.graph.num_relations)
        first = int(had[np.flatnonzero(self.linked[had] == entities[0])[-1]])  # the newest of one entity
        ends = self.item_texts[first].as_py(), self.item_texts[item].as_py()
        names = [ends[0], *map(self._name, entities[1:-1]), ends[1]]
        if max(map(len, names)) > LONGEST_NAME:
            return None
        shown = [self._shown_relations[relation] for relation in relations.tolist()]
        return explain.write(names, shown, (inverse == 0).tolist())
