"""Paths from what a user had to what may come next: seeds and candidates of N prompts enter, chains of triples leave.

A path starts at a seed, ends at a candidate, follows triples in either direction, all older than the prompt's cut-off,
and meets no entity twice. It is found from both ends: its first triple from the seed, its last from the candidate, one
between them from the entity that the first reached; each is among the newest `fan_out` of its relation where it is
followed from. Its score is the seed's weight, divided by degree ** hub_penalty of every entity between the ends (edges
of allowed relations before the cut-off): a path through what few others have says more, and so does a short one.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from recllm.errors import UserError
from recllm.graph.segments import best_places, is_in, ranges
from recllm.graph.store import ALWAYS, Graph
from recllm.graph.subgraphs import Floats, Ids, Ints, Seeds
from recllm.graph.walk import Doubles, Frontier, Rules, follow, gathered, keys_of

MAX_LENGTH = 3
SEEDS_AT_ONCE = 256  # bounds memory


@dataclass(frozen=True)
class Candidates:
    """What N prompts ask paths to; −1: an item without a link, which has none."""

    offsets: Ints  # (N + 1,) prompt n has entities offsets[n]:offsets[n + 1]
    entities: Ids  # (C,)

    @property
    def prompts(self) -> Ints:
        """(C,) the prompt of each candidate."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


@dataclass(frozen=True)
class Paths:
    """P paths to C candidates, those of a candidate best first. L is 3, the most triples of a path."""

    offsets: Ints  # (C + 1,) candidate c has paths offsets[c]:offsets[c + 1]
    lengths: npt.NDArray[np.int8]  # (P,) triples
    entities: Ids  # (P, L + 1) from the seed to the candidate; −1 behind the end
    relations: Ids  # (P, L) 0..R-1, and R more where the triple leads from the later entity to the earlier; −1 behind
    times: Ints  # (P, L) seconds since the epoch, or ALWAYS
    scores: Floats  # (P,) falling within a candidate


@dataclass(frozen=True)
class _Legs:
    """M edges, in the direction in which they were followed."""

    prompts: Ints  # (M,)
    sources: Ints  # (M,)
    targets: Ints  # (M,)
    relations: Ints  # (M,) of 2R
    times: Ints  # (M,)

    def __getitem__(self, rows: npt.NDArray[np.generic]) -> "_Legs":
        return _Legs(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True)
class _Chains:
    """P chains of legs, padded, and the candidate's key and score of each."""

    keys: Ints  # (P,) of prompt and candidate
    entities: Ints  # (P, L + 1)
    relations: Ints  # (P, L)
    times: Ints  # (P, L)
    scores: Doubles  # (P,)


def paths(
    graph: Graph, seeds: Seeds, candidates: Candidates, rules: Rules, max_length: int = MAX_LENGTH, count: int = 3
) -> Paths:
    """The `count` best paths of at most `max_length` triples to each candidate; ties: the shorter first.

    Raises:
        UserError: a max_length that is not 1, 2 or 3.
    """
    if not 1 <= max_length <= MAX_LENGTH:
        raise UserError(f"paths of {max_length} triples: 1 to {MAX_LENGTH} can be asked for")
    parts = [
        _paths(graph, part, _part(candidates, prompts), rules, max_length, count)
        for prompts, part in seeds.parts(SEEDS_AT_ONCE)
    ]
    counts = [np.diff(part.offsets) for part in parts]
    empty = _best(graph, _chains([]), Candidates(np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int32)), count)
    names = [field.name for field in fields(Paths) if field.name != "offsets"]
    columns = {name: np.concatenate([getattr(part, name) for part in (empty, *parts)]) for name in names}
    return Paths(np.concatenate([[0], *counts]).cumsum(), **columns)


def _paths(graph: Graph, seeds: Seeds, candidates: Candidates, rules: Rules, max_length: int, count: int) -> Paths:
    start = gathered(graph, seeds.prompts, seeds.entities, seeds.weights)
    linked = candidates.entities >= 0
    ends = _distinct(graph, candidates.prompts[linked], candidates.entities[linked])
    first = _legs(graph, start, seeds, rules)
    weights = start.weights[np.searchsorted(_keys(graph, start), keys_of(graph, first.prompts, first.sources))]
    direct = is_in(keys_of(graph, first.prompts, first.targets), _keys(graph, ends))
    chains = [_chain(graph, [first[direct]], weights[direct])]
    if max_length > 1:
        last = _legs(graph, ends, seeds, rules)
        left, right = _join(graph, first.prompts, first.targets, last.prompts, last.targets)
        chains.append(_through(graph, seeds, rules, [first[left], _turned(graph, last[right])], weights[left]))
    if max_length > 2:
        middle = _legs(graph, _distinct(graph, first.prompts, first.targets), seeds, rules)
        between, right = _join(graph, middle.prompts, middle.targets, last.prompts, last.targets)
        middle, last = middle[between], last[right]
        left, right = _join(graph, first.prompts, first.targets, middle.prompts, middle.sources)
        legs = [first[left], middle[right], _turned(graph, last[right])]
        chains.append(_through(graph, seeds, rules, legs, weights[left]))
    return _best(graph, _chains(chains), candidates, count)


def _best(graph: Graph, chains: _Chains, candidates: Candidates, count: int) -> Paths:
    """The best of each candidate; the same entity twice among a prompt's candidates has the same paths twice."""
    wanted, which = np.unique(chains.keys, return_inverse=True)
    offsets, rows = best_places(which, chains.scores.astype(np.float32), len(wanted), count)
    keys = keys_of(graph, candidates.prompts, candidates.entities)
    has = is_in(keys, wanted) & (candidates.entities >= 0)
    numbers = np.where(has, np.searchsorted(wanted, keys), 0)
    counts = np.where(has, np.append(np.diff(offsets), 0)[numbers], 0)
    rows = rows[ranges(offsets[numbers], counts)]
    return Paths(
        np.concatenate([[0], np.cumsum(counts)]),
        (chains.relations[rows] >= 0).sum(axis=1, dtype=np.int8),
        chains.entities[rows].astype(np.int32),
        chains.relations[rows].astype(np.int32),
        chains.times[rows],
        chains.scores[rows].astype(np.float32),
    )


def _legs(graph: Graph, frontier: Frontier, seeds: Seeds, rules: Rules) -> _Legs:
    steps, times = follow(graph, frontier, seeds.cutoffs, rules), graph.times
    return _Legs(
        steps.of_edges(steps.prompts),
        steps.of_edges(steps.entities),
        steps.targets.astype(np.int64),
        graph.run_relations[steps.runs[steps.edge_runs]].astype(np.int64),
        np.full(len(steps.targets), ALWAYS) if times is None else np.asarray(times[steps.positions]),
    )


def _turned(graph: Graph, legs: _Legs) -> _Legs:
    """The same triples, followed from their other end."""
    relations = (legs.relations + graph.num_relations) % (2 * graph.num_relations)
    return replace(legs, sources=legs.targets, targets=legs.sources, relations=relations)


def _through(graph: Graph, seeds: Seeds, rules: Rules, legs: list[_Legs], weights: Doubles) -> _Chains:
    """Chains of two legs and more: those that meet no entity twice, their scores lowered by the degrees between."""
    entities = np.stack([legs[0].sources, *(leg.targets for leg in legs)])
    pairs = [(left, right) for right in range(len(entities)) for left in range(right)]
    simple = np.logical_and.reduce([entities[left] != entities[right] for left, right in pairs])
    legs, scores = [leg[simple] for leg in legs], weights[simple]
    for leg in legs[1:]:
        inner = _distinct(graph, leg.prompts, leg.sources)
        degrees = follow(graph, inner, seeds.cutoffs, replace(rules, fan_out=0)).degrees
        here = degrees[np.searchsorted(_keys(graph, inner), keys_of(graph, leg.prompts, leg.sources))]
        scores = scores / np.maximum(here, 1) ** rules.hub_penalty
    return _chain(graph, legs, scores)


def _chain(graph: Graph, legs: list[_Legs], scores: Doubles) -> _Chains:
    """Legs one behind the other, padded to the longest path; a self-loop leads nowhere."""
    leads = legs[0].sources != legs[0].targets
    legs, scores = [leg[leads] for leg in legs], scores[leads]
    padding = [np.full(len(scores), -1)] * (MAX_LENGTH - len(legs))
    return _Chains(
        keys_of(graph, legs[-1].prompts, legs[-1].targets),
        np.stack([legs[0].sources, *(leg.targets for leg in legs), *padding], axis=1),
        np.stack([*(leg.relations for leg in legs), *padding], axis=1),
        np.stack([*(leg.times for leg in legs), *padding], axis=1),
        scores,
    )


def _chains(parts: list[_Chains]) -> _Chains:
    none = np.empty((0, MAX_LENGTH), dtype=np.int64)
    empty = _Chains(none[:, 0], np.empty((0, MAX_LENGTH + 1), dtype=np.int64), none, none, np.empty(0))
    names = [field.name for field in fields(_Chains)]
    return _Chains(**{name: np.concatenate([getattr(part, name) for part in (empty, *parts)]) for name in names})


def _join(graph: Graph, left_prompts: Ints, left: Ints, right_prompts: Ints, right: Ints) -> tuple[Ints, Ints]:
    """Places of all pairs of rows of one prompt and one entity, by left and then right."""
    keys = keys_of(graph, right_prompts, right)
    order = np.argsort(keys, kind="stable")
    wanted = keys_of(graph, left_prompts, left)
    begins = np.searchsorted(keys[order], wanted)
    counts = np.searchsorted(keys[order], wanted, side="right") - begins
    return np.repeat(np.arange(len(wanted)), counts), order[ranges(begins, counts)]


def _distinct(graph: Graph, prompts: Ints, entities: npt.NDArray[np.integer]) -> Frontier:
    return gathered(graph, prompts, entities, np.ones(len(prompts)))


def _keys(graph: Graph, frontier: Frontier) -> Ints:
    return keys_of(graph, frontier.prompts, frontier.entities)


def _part(candidates: Candidates, prompts: slice) -> Candidates:
    offsets = candidates.offsets[prompts.start : prompts.stop + 1]
    return Candidates(offsets - offsets[0], candidates.entities[offsets[0] : offsets[-1]])
