"""What examples take from the knowledge graph: subgraphs and paths for prompts, questions about items, explanations.

The folder that `graph.build` wrote, the recipe's section and the texts of the items enter; texts leave, for many
examples at once. Where an item is an entity, the entity is called what the prompts call the item. Travels to worker
processes: each maps the arrays into its memory when it first asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from recllm.convert.titles import neutralise
from recllm.data.randomness import Keys
from recllm.graph import explain
from recllm.graph.attributes import Attributes, described_text
from recllm.graph.budget import Budget
from recllm.graph.build import ENTITIES, LINKS, RELATION_ID, RELATIONS
from recllm.graph.paths import Candidates, paths
from recllm.graph.readers import NAME
from recllm.graph.retrieve import retrieve, rules_of
from recllm.graph.store import ALWAYS, Graph, Ids
from recllm.graph.subgraphs import Seeds
from recllm.graph.verbalise import Verbaliser
from recllm.recipe import GraphFormat, GraphSection

Ints = npt.NDArray[np.int64]

DESCRIBED = (3, 2)  # relations of an item that a description holds at most, and tails of each
NO_LINK = -1


class Moments(NamedTuple):
    """N examples as the graph sees them: what the user had, and when the question is asked."""

    offsets: Ints  # (N + 1,) example n has items offsets[n]:offsets[n + 1]
    items: npt.NDArray[np.int32]  # item_index, oldest first
    cutoffs: Ints  # (N,) seconds since the epoch
    keys: Keys  # (N,) random keys


class Shown(NamedTuple):
    """Subgraphs of N examples."""

    texts: list[str]  # "" where nothing is linked, found, or fits
    triples: Ints  # (N,) in the text
    tokens: Ints  # (N,) of the text
    timed: int  # shown triples that have a time
    not_older: int  # of them, those that are not older than their example's cut-off: 0, or something is broken


class Question(NamedTuple):
    """An item's attribute as text."""

    relation: str
    answer: str
    choices: list[str]  # with the answer, in seeded order


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

    def shown(self, moments: Moments, format: GraphFormat | None = None) -> Shown:
        """The subgraph of each example, within the budget; `format` in place of the recipe's."""
        seeds = self._seeds(moments)
        found = retrieve(
            self._graph, seeds, self.section.retrieval, self._relation_names, moments.keys, self._relation_ids
        )
        fitted = self._budget(format or self.section.format).fit(found)
        times, cutoffs = found.times[fitted.is_kept], moments.cutoffs[found.prompts[fitted.is_kept]]
        timed = times != ALWAYS
        return Shown(
            fitted.texts, fitted.kept, fitted.tokens, int(timed.sum()), int((times[timed] >= cutoffs[timed]).sum())
        )

    def explained(self, moments: Moments, targets: npt.NDArray[np.int32]) -> list[str | None]:
        """How the history leads to each example's target, the best path on one line; None where there is none."""
        offsets = np.arange(len(targets) + 1)
        return [lines[0] if lines else None for lines in self._paths(moments, offsets, self._linked[targets])]

    def led_to(self, moments: Moments, candidates: npt.NDArray[np.int32]) -> list[str]:
        """The candidates (N, C), one a line, each with the path that leads to it; best paths first spend the budget."""
        rows, count = candidates.shape
        found = self._paths(moments, np.arange(rows + 1) * count, self._linked[candidates.ravel()])
        texts = self.item_texts.take(pa.array(candidates.ravel())).to_pylist()
        lines = [f"{text}: {paths[0]}" if paths else text for text, paths in zip(texts, found, strict=True)]
        costs = [len(one.ids) for one in self._tokenizer.encode_batch(lines, add_special_tokens=False)]
        plain = [len(one.ids) for one in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        result = []
        for row in range(rows):
            here, left = range(row * count, (row + 1) * count), self.section.budget
            kept = []
            for place in here:
                added = costs[place] - plain[place]
                fits = added <= left
                left -= added if fits else 0
                kept.append(lines[place] if fits else texts[place])
            result.append("\n".join(kept))
        return result

    def questions(
        self, items: npt.NDArray[np.int32], moments: Moments, relations: Sequence[str], count: int
    ) -> list[Question | None]:
        """What is an attribute of each item? With count − 1 wrong answers; None without a link or an attribute."""
        attributes, found = self._attributes(tuple(relations)), list[Question | None]()
        for entity, cutoff, key in zip(self._linked[items].tolist(), moments.cutoffs.tolist(), moments.keys.tolist()):
            asked = None if entity == NO_LINK else attributes.question(entity, cutoff, key, count)
            if asked is None:
                found.append(None)
                continue
            names = [self._name(choice) for choice in asked.choices]
            answer = self._name(asked.tail)
            is_clear = len(set(names)) == len(names)
            found.append(Question(self._shown_relations[asked.relation], answer, names) if is_clear else None)
        return found

    def descriptions(
        self, items: npt.NDArray[np.int32], moments: Moments, relations: Sequence[str]
    ) -> list[str | None]:
        """Some attributes of each item, one relation a line; None without a link or an attribute."""
        attributes, found = self._attributes(tuple(relations)), list[str | None]()
        for entity, cutoff, key in zip(self._linked[items].tolist(), moments.cutoffs.tolist(), moments.keys.tolist()):
            described = [] if entity == NO_LINK else attributes.described(entity, cutoff, key, *DESCRIBED)
            named = {tail: self._name(tail) for _, tails in described for tail in tails}
            found.append(described_text(described, self._shown_relations, named) if described else None)
        return found

    def check(self, relations: Sequence[str] = ()) -> None:
        """Find now what examples would stumble over.

        Raises:
            UserError: a relation of the recipe that the graph does not have.
        """
        rules_of(self.section.retrieval, self._relation_names, self._relation_ids)
        self._attributes(tuple(relations))

    def checker(self) -> explain.Checker:
        """Checks explanations by the names that examples write."""
        names = pa.array([self._name(entity) for entity in range(self._graph.num_entities)], pa.string())
        return explain.Checker(self._graph, names, self._shown_relations)

    @property
    def linked(self) -> Ids:
        """(num_items,) the entity of each item, −1 without a link."""
        return self._linked

    # ---- opened once a process ----

    @cached_property
    def _graph(self) -> Graph:
        return Graph.open(self.folder)

    @cached_property
    def _linked(self) -> Ids:
        found: Ids = np.load(self.folder / LINKS, mmap_mode="r", allow_pickle=False)
        return found

    @cached_property
    def _names(self) -> pa.Array:
        """(E,) what each entity is called: its item's text, or its own name."""
        names = pq.read_table(self.folder / ENTITIES, columns=[NAME])[NAME].combine_chunks().cast(pa.string())
        linked = np.asarray(self._linked)
        items = np.flatnonzero(linked != NO_LINK)[::-1]  # the first item of an entity goes last, and stays
        item_of = np.full(len(names), NO_LINK)
        item_of[linked[items]] = items
        is_item = pa.array(item_of != NO_LINK)
        texts = self.item_texts.take(pa.array(np.maximum(item_of, 0)))
        return pa.compute.if_else(is_item, texts, names)

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
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.tokenizer)

    def _budget(self, format: GraphFormat) -> Budget:
        if format not in self._budgets:
            verbaliser = Verbaliser(self._names, self._relation_names, format, self._clean)
            self._budgets[format] = Budget(verbaliser, self._tokenizer, self.section.budget)
        return self._budgets[format]

    @cached_property
    def _budgets(self) -> dict[GraphFormat, Budget]:
        return {}

    def _attributes(self, relations: tuple[str, ...]) -> Attributes:
        if relations not in self._known_attributes:
            section = self.section.retrieval.model_copy(
                update={"allow": list(relations) or self.section.retrieval.allow}
            )
            rules = rules_of(section, self._relation_names, self._relation_ids)
            allowed = np.ones(self._graph.num_relations, dtype=bool) if rules.allowed is None else rules.allowed
            self._known_attributes[relations] = Attributes(self._graph, allowed[: self._graph.num_relations])
        return self._known_attributes[relations]

    @cached_property
    def _known_attributes(self) -> dict[tuple[str, ...], Attributes]:
        return {}

    def _seeds(self, moments: Moments) -> Seeds:
        """The entities of the newest `max_items` linked items of each example."""
        entities = self._linked[moments.items]
        linked = entities != NO_LINK
        behind = np.concatenate([[0], np.cumsum(linked)])  # linked items up to each place
        ends = behind[moments.offsets[1:]]
        begins = np.maximum(behind[moments.offsets[:-1]], ends - self.section.retrieval.max_items)
        counts = ends - begins
        offsets = np.concatenate([[0], np.cumsum(counts)])
        flat = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], counts)
        chosen = entities[linked][flat].astype(np.int32)
        return Seeds(offsets, chosen, np.ones(len(chosen), dtype=np.float32), moments.cutoffs)

    def _paths(self, moments: Moments, offsets: Ints, entities: Ids) -> list[list[str]]:
        """The paths to each candidate that can be written, best first."""
        rules = rules_of(self.section.retrieval, self._relation_names, self._relation_ids)
        wanted = Candidates(offsets, entities.astype(np.int32))
        found = paths(self._graph, self._seeds(moments), wanted, rules, self.section.retrieval.path_length, 1)
        num_relations, lines = self._graph.num_relations, list[list[str]]()
        for begin, end in zip(found.offsets[:-1].tolist(), found.offsets[1:].tolist(), strict=True):
            texts = []
            for place in range(begin, end):
                length = int(found.lengths[place])
                inverse, numbers = np.divmod(found.relations[place, :length], num_relations)
                texts.append(
                    explain.write(
                        [self._name(entity) for entity in found.entities[place, : length + 1].tolist()],
                        [self._shown_relations[number] for number in numbers.tolist()],
                        (inverse == 0).tolist(),
                    )
                )
            lines.append([text for text in texts if text is not None])
        return lines
