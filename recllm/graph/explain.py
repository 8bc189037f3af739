"""A path as an explanation: written on one line, read back strictly, and checked against the graph.

    Heat -[directed by]-> Michael Mann <-[directed by]- The Insider

`write` turns the entities and relations of a path into such a line; `Checker` says of any line whether the graph holds
what it claims. An explanation counts as supported only if it is a path of the graph, from an item of the user's history
to the item that it explains, over triples older than the cut-off: one that reads well and is not there is wrong.
A path through what nearly everything shares ("spoken in English") is supported too, and says little.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from recllm.graph.paths import MAX_LENGTH
from recllm.graph.store import Graph

Verdict = Literal["supported", "unparsable", "unknown name", "wrong start", "wrong end", "not in the graph"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

_STEP = re.compile(r" (?:-\[(?P<forward>[^\[\]]+)\]->|<-\[(?P<backward>[^\[\]]+)\]-) ")
_ARROWS = ("-[", "]->", "<-[", "]-")


def write(names: Sequence[str], relations: Sequence[str], forward: Sequence[bool]) -> str | None:
    """n + 1 names with n relations between them; `forward`: the earlier name is the head. None: it would not be read.

    >>> write(["Heat", "Michael Mann", "Ali"], ["directed by", "directed by"], [True, False])
    'Heat -[directed by]-> Michael Mann <-[directed by]- Ali'
    """
    text = _joined(names, relations, forward)
    return text if read(text) == (list(names), list(relations), list(forward)) else None


def _joined(names: Sequence[str], relations: Sequence[str], forward: Sequence[bool]) -> str:
    parts = [names[0]]
    for name, relation, is_forward in zip(names[1:], relations, forward, strict=True):
        parts += [f"-[{relation}]->" if is_forward else f"<-[{relation}]-", name]
    return " ".join(parts)


def read(text: str) -> tuple[list[str], list[str], list[bool]] | None:
    """What `write` wrote: names, relations, directions; None for any other text.

    >>> read("Heat -[directed by]-> Michael Mann")
    (['Heat', 'Michael Mann'], ['directed by'], [True])
    >>> read("because it is good") is None
    True
    """
    names, relations, forward, begin = [], [], [], 0
    for step in _STEP.finditer(text):
        names.append(text[begin : step.start()])
        relations.append(step["forward"] or step["backward"])
        forward.append(step["forward"] is not None)
        begin = step.end()
    names.append(text[begin:])
    if (
        not 1 <= len(relations) <= MAX_LENGTH
        or not all(names)
        or any(arrow in name for name in names for arrow in _ARROWS)
    ):
        return None
    return names, relations, forward


class Checker:
    """Checks explanations against a graph.

    Args:
        graph: of E entities and R relations.
        names: what entities are called, each with its entity; an entity may have several names, as items that are one
            entity are called differently, and a name may mean several entities: any of them counts.
        relation_names: (R,) as the explanations write them.
    """

    def __init__(self, graph: Graph, names: Iterable[tuple[str, int]], relation_names: Sequence[str]) -> None:
        self.graph = graph
        self._entities: dict[str, set[int]] = {}
        for name, entity in names:
            self._entities.setdefault(name, set()).add(entity)
        self._relations: dict[str, list[int]] = {}
        for number, name in enumerate(relation_names):
            self._relations.setdefault(name, []).append(number)

    def verdict(self, text: str, starts: Collection[int], end: int, cutoff: int) -> Verdict:
        """Whether a line is a path from one of `starts` (entities of the history) to `end`, older than the cut-off.

        No entity may stand in a path twice: that an item hangs together with itself explains nothing.
        """
        parsed = read(text)
        if parsed is None:
            return "unparsable"
        names, relations, forward = parsed
        named = [self._entities.get(name, set()) for name in names]
        if not all(named) or not all(relation in self._relations for relation in relations):
            return "unknown name"
        if not (begins := named[0] & set(starts) - {end}):
            return "wrong start"
        if end not in named[-1]:
            return "wrong end"
        steps = list(zip([*named[1:-1], {end}], relations, forward, strict=True))
        found = any(self._leads((begin,), steps, cutoff) for begin in begins)
        return "supported" if found else "not in the graph"

    def _leads(self, path: tuple[int, ...], steps: Sequence[tuple[set[int], str, bool]], cutoff: int) -> bool:
        if not steps:
            return True
        (named, relation, is_forward), *later = steps
        reached = named & self._followed(path[-1], relation, is_forward, cutoff) - set(path)
        return any(self._leads((*path, entity), later, cutoff) for entity in reached)

    def _followed(self, source: int, relation: str, is_forward: bool, cutoff: int) -> set[int]:
        """Where one step leads from an entity."""
        graph, found = self.graph, set[int]()
        begin, end = int(graph.run_offsets[source]), int(graph.run_offsets[source + 1])
        for number in self._relations[relation]:
            wanted = number if is_forward else number + graph.num_relations
            for run in (begin + np.flatnonzero(graph.run_relations[begin:end] == wanted)).tolist():
                first, last = int(graph.run_begins[run]), int(graph.run_begins[run + 1])
                if graph.times is not None:
                    last = first + int(np.searchsorted(graph.times[first:last], cutoff))
                found |= set(graph.targets[first:last].tolist())
        return found
