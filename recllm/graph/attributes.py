"""What an entity is: the triples that it heads, for tasks that teach a model what its items are.

Entities with a cut-off and a random key each enter; leave: one of each one's attributes and others that are wrong
(`Attributes.question`), or several of them (`Attributes.described`). Only triples older than the cut-off count: no
answer, right or wrong, is known from a later one.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from recllm.data.randomness import mix
from recllm.graph.store import ALWAYS, Graph, Ids, Ints

Flags = npt.NDArray[np.bool_]

RELATION_SALT, TAIL_SALT, WRONG_SALT, ORDER_SALT = 11, 12, 13, 14  # keep the choices of one question independent
NO_NAME = -1  # in place of a name's number: what the entity is called is no name but a text
TRIES = 8  # draws for each wrong answer, before all tails of the relation are looked at


class Question(NamedTuple):
    """Of one entity: which tail does this relation have? `choices` holds the right one once, in seeded order."""

    relation: int
    tail: int
    choices: list[int]  # of entities; none but `tail` is, becomes, or is called as, one of the entity's tails
    right: list[int]  # every tail older than the cut-off: all of them would be right
    newest: int  # time of the newest triple that the question knows, or ALWAYS


class Described(NamedTuple):
    """One relation of an entity, with some of its tails."""

    relation: int
    tails: list[int]
    newest: int  # time of the newest of these triples, or ALWAYS


class _Tails(NamedTuple):
    """Different tails of a run that are older than a cut-off, by number, and since when each is one."""

    entities: Ids
    since: Ints


class Attributes:
    """The attributes of a graph's entities.

    Args:
        graph: of E entities and R relations.
        allowed: (R,) which relations are attributes.
        names: (E,) a number for each entity's name: entities of one number are called the same, and NO_NAME ones are
            never a tail. None: each its own.
    """

    def __init__(self, graph: Graph, allowed: Flags, names: Ints | None = None) -> None:
        self.graph, self.allowed = graph, allowed
        self.names = np.arange(graph.num_entities) if names is None else names
        self._edges: dict[int, tuple[Ints, Ints]] = {}

    def question(self, entity: int, cutoff: int, key: int, count: int) -> Question | None:
        """A relation and one of its tails, by `key`, with count − 1 wrong answers; None where there are too few.

        Wrong answers are drawn as often as the relation leads to them: an answer that is frequent in the graph is then
        no more likely to be the right one.
        """
        runs = self._runs(entity, cutoff)
        for run in runs[np.argsort(mix(RELATION_SALT, np.uint64(key), self._relations(runs)), kind="stable")].tolist():
            relation, own = int(self.graph.run_relations[run]), self._tails(run, cutoff, entity)
            wrong = self._wrong(relation, run, entity, cutoff, key, count - 1)
            if wrong is None:
                continue
            place = int(np.argmin(mix(TAIL_SALT, np.uint64(key), own.entities)))
            choices = np.array([own.entities[place], *wrong[0]], dtype=np.int64)
            order = np.argsort(mix(ORDER_SALT, np.uint64(key), choices), kind="stable")
            newest = max(int(own.since[place]), wrong[1])
            return Question(relation, int(choices[0]), choices[order].tolist(), own.entities.tolist(), newest)
        return None

    def described(
        self,
        entity: int,
        cutoff: int,
        key: int,
        num_relations: int,
        num_tails: int,
        may_be_told: Callable[[int], bool] = lambda _: True,
    ) -> list[Described]:
        """At most so many relations with at most so many tails each, by `key`; relations in the graph's order.

        Args:
            may_be_told: of a tail; others give way to the next ones.
        """
        runs = self._runs(entity, cutoff)
        order = np.argsort(mix(RELATION_SALT, np.uint64(key), self._relations(runs)), kind="stable")
        found = dict[int, Described]()
        for run in runs[order].tolist():
            own = self._tails(run, cutoff, entity)
            drawn = np.argsort(mix(TAIL_SALT, np.uint64(key), own.entities), kind="stable").tolist()
            told = (place for place in drawn if may_be_told(int(own.entities[place])))
            if kept := list(itertools.islice(told, num_tails)):
                relation = int(self.graph.run_relations[run])
                found[run] = Described(relation, own.entities[kept].tolist(), int(own.since[kept].max()))
            if len(found) == num_relations:
                break
        return [found[run] for run in sorted(found)]

    def _relations(self, runs: Ints) -> Ids:
        relations: Ids = self.graph.run_relations[runs]
        return relations

    def _runs(self, entity: int, cutoff: int) -> Ints:
        """Runs of the entity with an allowed relation, of which it is the head, and a tail before the cut-off."""
        graph = self.graph
        runs = np.arange(graph.run_offsets[entity], graph.run_offsets[entity + 1])
        runs = runs[graph.run_relations[runs] < graph.num_relations]
        runs = runs[self.allowed[graph.run_relations[runs]]]
        tails = (graph.targets[self._open(run, cutoff)] for run in runs.tolist())
        return runs[np.array([bool(self._is_tail(ends, entity).any()) for ends in tails], dtype=bool)]

    def _is_tail(self, entities: Ids, of: int) -> Flags:
        """Whether each of some entities is another one that has a name."""
        usable: Flags = (entities != of) & (self.names[entities] != NO_NAME)
        return usable

    def _open(self, run: int, cutoff: int) -> slice:
        """The edges of a run that are older than a cut-off."""
        begin, end = int(self.graph.run_begins[run]), int(self.graph.run_begins[run + 1])
        if self.graph.times is not None:
            end = begin + int(np.searchsorted(self.graph.times[begin:end], cutoff))
        return slice(begin, end)

    def _tails(self, run: int, cutoff: int, entity: int) -> _Tails:
        """Without the entity itself."""
        times, edges = self.graph.times, self._open(run, cutoff)
        entities, first = np.unique(self.graph.targets[edges], return_index=True)  # the oldest stands first
        since = np.full(len(entities), ALWAYS) if times is None else times[edges][first]
        kept = self._is_tail(entities, entity)
        return _Tails(entities[kept], since[kept])

    def _wrong(
        self, relation: int, run: int, entity: int, cutoff: int, key: int, count: int
    ) -> tuple[list[int], int] | None:
        """So many entities of different names that the relation leads to elsewhere, and the time of the newest triple.

        None is called as one of the entity's own tails is, or as itself.
        """
        graph = self.graph
        own = np.append(graph.targets[graph.run_begins[run] : graph.run_begins[run + 1]], entity)  # of every time
        own = np.append(self.names[own], NO_NAME)
        begins, behind = self._forward(relation)
        drawn = (mix(WRONG_SALT, np.uint64(key), np.arange(TRIES * count)) % np.uint64(behind[-1])).astype(np.int64)
        found = self._usable(self._places(begins, behind, drawn), own, cutoff)
        if len(found) < count:  # few tails, or a few that are very frequent: all of them, in a drawn order
            every = self._places(begins, behind, np.arange(behind[-1]))
            found_too = self._usable(every, own, cutoff)
            order = np.argsort(mix(WRONG_SALT, np.uint64(key), graph.targets[found_too]), kind="stable")
            found = self._usable(np.concatenate([found, found_too[order]]), own, cutoff)
        if len(found) < count:
            return None
        kept = found[:count]
        newest = ALWAYS if graph.times is None or not count else int(graph.times[kept].max())
        return graph.targets[kept].tolist(), newest

    def _usable(self, edges: Ints, own: Ints, cutoff: int) -> Ints:
        """Of some edges those before the cut-off to entities of names outside `own`, one of each, in their order."""
        if self.graph.times is not None:
            edges = edges[self.graph.times[edges] < cutoff]
        edges = edges[~np.isin(self.names[self.graph.targets[edges]], own)]
        _, first = np.unique(self.names[self.graph.targets[edges]], return_index=True)
        return edges[np.sort(first)]

    def _forward(self, relation: int) -> tuple[Ints, Ints]:
        """Where the runs of a relation begin, and how many edges lie in them up to each."""
        if relation not in self._edges:
            runs = np.flatnonzero(self.graph.run_relations == relation)
            begins = self.graph.run_begins[runs].astype(np.int64)
            self._edges[relation] = begins, np.cumsum(self.graph.run_begins[runs + 1] - begins)
        return self._edges[relation]

    @staticmethod
    def _places(begins: Ints, behind: Ints, numbers: Ints) -> Ints:
        """Edges of the graph by their numbers among those of a relation."""
        run = np.searchsorted(behind, numbers, side="right")
        before = np.concatenate([[0], behind[:-1]])[run]
        places: Ints = begins[run] + numbers - before
        return places
