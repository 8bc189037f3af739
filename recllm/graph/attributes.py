"""What an entity is: the triples that it heads, for tasks that teach a model what its items are.

Entities with a cut-off and a random key each enter; leave: one of each one's attributes and others that are wrong
(`Attributes.question`), or several of them (`Attributes.described`). Only triples older than the cut-off count.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from recllm.data.randomness import mix
from recllm.graph.store import Graph, Ids, Ints

Flags = npt.NDArray[np.bool_]

RELATION_SALT, TAIL_SALT, WRONG_SALT, ORDER_SALT = 11, 12, 13, 14  # keep the choices of one question independent
TRIES = 4  # draws for each wrong answer, before the whole relation is looked at


class Question(NamedTuple):
    """Of one entity: which tail does this relation have? `choices` holds the right one once, in seeded order."""

    relation: int
    tail: int
    choices: list[int]  # of entities; none but `tail` is one of the entity's tails


class Attributes:
    """The attributes of a graph's entities.

    Args:
        graph: of R relations.
        allowed: (R,) which relations are attributes.
    """

    def __init__(self, graph: Graph, allowed: Flags) -> None:
        self.graph, self.allowed = graph, allowed
        self._sources = np.repeat(np.arange(graph.num_entities), np.diff(graph.run_offsets))  # (S,) of each run
        self._pools: dict[int, Ids] = {}

    def question(self, entity: int, cutoff: int, key: int, count: int) -> Question | None:
        """A relation and one of its tails, by `key`, with count − 1 wrong answers; None where there are too few."""
        runs = self._runs(entity, cutoff)
        if not len(runs):
            return None
        order = np.argsort(mix(RELATION_SALT, np.uint64(key), runs), kind="stable")
        for run in runs[order].tolist():
            relation, tails = int(self.graph.run_relations[run]), self._tails(run, cutoff, entity)
            wrong = self._wrong(relation, tails, key, count - 1)
            if len(tails) and wrong is not None:
                tail = int(_first(tails, TAIL_SALT, key))
                choices = np.array([tail, *wrong])
                shuffled = choices[np.argsort(mix(ORDER_SALT, np.uint64(key), choices), kind="stable")]
                return Question(relation, tail, shuffled.tolist())
        return None

    def described(
        self, entity: int, cutoff: int, key: int, num_relations: int, num_tails: int
    ) -> list[tuple[int, list[int]]]:
        """At most so many relations with at most so many tails each, by `key`; relations in the graph's order."""
        runs = self._runs(entity, cutoff)
        order = np.argsort(mix(RELATION_SALT, np.uint64(key), runs), kind="stable")
        found = []
        for run in np.sort(runs[order[:num_relations]]).tolist():
            tails = self._tails(run, cutoff, entity)
            order_of_tails = np.argsort(mix(TAIL_SALT, np.uint64(key), tails), kind="stable")
            if len(tails):
                found.append((int(self.graph.run_relations[run]), tails[order_of_tails[:num_tails]].tolist()))
        return found

    def _runs(self, entity: int, cutoff: int) -> Ints:
        """Runs of the entity with an allowed relation, of which it is the head, and an edge before the cut-off."""
        graph = self.graph
        runs = np.arange(graph.run_offsets[entity], graph.run_offsets[entity + 1])
        relations = graph.run_relations[runs]
        runs = runs[relations < graph.num_relations]
        runs = runs[self.allowed[graph.run_relations[runs]]]
        if graph.times is None:
            return runs
        return runs[graph.times[graph.run_begins[runs]] < cutoff]  # the oldest of a run stands first

    def _tails(self, run: int, cutoff: int, entity: int) -> Ids:
        """Different tails of a run before the cut-off, without the entity itself, by number."""
        graph = self.graph
        begin, end = int(graph.run_begins[run]), int(graph.run_begins[run + 1])
        if graph.times is not None:
            end = begin + int(np.searchsorted(graph.times[begin:end], cutoff))
        found: Ids = np.unique(graph.targets[begin:end])
        return found[found != entity]

    def _wrong(self, relation: int, tails: Ids, key: int, count: int) -> list[int] | None:
        """So many entities that the relation leads to elsewhere, and none of `tails`."""
        pool = self._pool(relation)
        if len(pool) < count + len(tails):
            return None
        drawn = pool[mix(WRONG_SALT, np.uint64(key), np.arange(TRIES * count + len(tails))) % np.uint64(len(pool))]
        _, first = np.unique(drawn, return_index=True)
        drawn = drawn[np.sort(first)]
        wrong = drawn[~np.isin(drawn, tails)][:count]
        if len(wrong) < count:  # a small pool: all of it in a drawn order
            order = np.argsort(mix(WRONG_SALT, np.uint64(key), pool), kind="stable")
            wrong = pool[order][~np.isin(pool[order], tails)][:count]
        return wrong.tolist()

    def _pool(self, relation: int) -> Ids:
        """Entities that the relation leads to, by number."""
        if relation not in self._pools:
            inverse = self.graph.run_relations == relation + self.graph.num_relations
            self._pools[relation] = self._sources[inverse].astype(np.int32)
        return self._pools[relation]


def _first(numbers: Ids, salt: int, key: int) -> int:
    return int(numbers[np.argmin(mix(salt, np.uint64(key), numbers))])


def described_text(
    described: Sequence[tuple[int, Sequence[int]]], relation_names: Sequence[str], names: Mapping[int, str]
) -> str:
    """One relation a line.

    >>> described_text([(0, [1, 2])], ["stars"], {1: "Al Pacino", 2: "Val Kilmer"})
    'stars: Al Pacino, Val Kilmer'
    """
    return "\n".join(f"{relation_names[r]}: {', '.join(names[t] for t in tails)}" for r, tails in described)
