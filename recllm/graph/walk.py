"""Breadth first from weighted entities, for many prompts at once, each with its own cut-off.

Seeds enter; the triples within some hops of them leave, each once a prompt, with what flowed over it. There is no loop
over prompts, entities or edges: a frontier is a flat array of (prompt, entity), and a run of edges gives its newest
`fan_out` before the cut-off as a slice, found by bisection. An entity with a million edges costs what one with
`fan_out` costs.

An entity of weight w passes on w / degree ** hub_penalty, in equal parts over the edges that are followed from it. Its
degree is what the cut-off lets it have: edges of allowed relations that are older. An entity is followed once, at the
hop after the one that first reached it, so cycles end.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from recllm.data.randomness import GOLDEN
from recllm.graph.segments import (
    Flags,
    best_places,
    by_prompt_and_score,
    is_in,
    packed,
    ranges,
    stable_order,
    starts,
)
from recllm.graph.store import ALWAYS, Graph
from recllm.graph.subgraphs import Floats, Ids, Ints, Seeds, Subgraphs

Doubles = npt.NDArray[np.float64]

EDGES_AT_ONCE = 16_384  # that are hashed together: what that takes stays in the processor's cache
FILTER_SPREAD = 32  # places of the filter an expanded entity: 3 of 100 others pass


@dataclass(frozen=True)
class Rules:
    """What retrieval may follow, and how much of it. R relations."""

    hops: int = 2
    fan_out: int = 20  # edges of one relation that are followed from an entity, the newest
    allowed: Flags | None = None  # (2R,) of relations and, behind them, their inverses; None: all
    hub_penalty: float = 0.5  # an entity passes on its weight / degree ** hub_penalty
    max_triples: int = 100  # a prompt
    entities: int = 20  # that the first of two stages hands to the second


@dataclass(frozen=True)
class Frontier:
    """F pairs of prompt and entity, by prompt and then entity, none twice."""

    prompts: Ints  # (F,)
    entities: Ints  # (F,)
    weights: Doubles  # (F,)


@dataclass(frozen=True)
class Steps:
    """The edges followed from F pairs of prompt and entity: M of them, in Q runs; newest first within a run."""

    prompts: Ints  # (F,)
    entities: Ints  # (F,)
    weights: Doubles  # (F,)
    degrees: Ints  # (F,) open edges: those older than the cut-off, of allowed relations
    followed: Ints  # (F,) edges that are followed
    flows: Doubles  # (F,) over each of them
    hops: npt.NDArray[np.int8]  # (F,) hop at which its edges are followed, from 1
    owners: Ints  # (Q,) which of the F
    runs: Ints  # (Q,) runs of the graph
    edge_runs: Ints  # (M,) which of the Q
    positions: Ints  # (M,) edges of the graph
    targets: Ids  # (M,)

    def sources(self, edges: Ints) -> Ints:
        """Which of the F some edges start from."""
        return self.owners[self.edge_runs[edges]]

    def of_edges(self, column: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(M,) what each edge's source has in a column (F,): edges stand in the order of their sources."""
        return np.repeat(column, self.followed)

    def only(self, edges: Ints, flows: Doubles) -> "Steps":
        """Some of the edges, with another flow over each: every edge has a source and a run of its own."""
        sources, each = self.sources(edges), np.arange(len(edges))
        rest: dict[str, Any] = {
            "flows": flows,
            "followed": np.ones(len(edges), dtype=np.int64),
            "owners": each,
            "edge_runs": each,
        }
        names = ("prompts", "entities", "weights", "degrees", "hops")
        columns: dict[str, Any] = {name: getattr(self, name)[sources] for name in names}
        runs, positions, targets = self.runs[self.edge_runs[edges]], self.positions[edges], self.targets[edges]
        return Steps(**columns, **rest, runs=runs, positions=positions, targets=targets)


@dataclass(frozen=True)
class Found:
    """M triples, each once a prompt: edges of a walk and what flowed over them, in either direction."""

    steps: Steps
    edges: Ints  # (M,) edges of the steps, rising
    prompts: Ints  # (M,)
    scores: Floats  # (M,)


def gathered(
    graph: Graph, prompts: Ints, entities: npt.NDArray[np.integer], weights: npt.NDArray[np.floating]
) -> Frontier:
    """Pairs of prompt and entity, each once, with the sum of its weights in the order given."""
    keys = keys_of(graph, prompts, entities)
    order = stable_order(keys)
    new = starts(keys[order])
    sums = np.bincount(np.cumsum(new) - 1, weights[order], minlength=int(new.sum())).astype(np.float64)
    first = order[new]
    return Frontier(prompts[first], entities[first].astype(np.int64), sums)


def follow(graph: Graph, frontier: Frontier, cutoffs: Ints, rules: Rules, hop: int = 1) -> Steps:
    """The edges from each entity of a frontier: of an allowed run the newest `fan_out` before the prompt's cut-off."""
    first = graph.run_offsets[frontier.entities]
    counts = graph.run_offsets[frontier.entities + 1] - first  # (F,)
    runs, owners = ranges(first, counts), np.repeat(np.arange(len(counts)), counts)
    limits = None if graph.times is None else np.repeat(cutoffs[frontier.prompts], counts)
    if rules.allowed is not None:
        kept = rules.allowed[graph.run_relations[runs]]
        runs, owners, limits = runs[kept], owners[kept], None if limits is None else limits[kept]
        counts = np.bincount(owners, minlength=len(counts))
    begins, ends = (graph.run_begins[where].astype(np.int64) for where in (runs, runs + 1))  # twice one fits, too
    if graph.times is not None and limits is not None:
        ends = _cut(graph.times, begins, ends, limits)
    sizes = np.minimum(ends - begins, rules.fan_out)
    degrees, followed = _sums(ends - begins, counts), _sums(sizes, counts)
    edge_runs = np.repeat(np.arange(len(runs)), sizes)
    newest = ends - 1 + np.cumsum(sizes) - sizes  # of each run, and as many more as edges before it
    positions = newest[edge_runs] - np.arange(len(edge_runs))
    return Steps(
        frontier.prompts,
        frontier.entities,
        frontier.weights,
        degrees,
        followed,
        frontier.weights / np.maximum(degrees, 1) ** rules.hub_penalty / np.maximum(followed, 1),
        np.full(len(counts), hop, dtype=np.int8),
        owners,
        runs,
        edge_runs,
        positions,
        graph.targets[positions],
    )


def walk(graph: Graph, seeds: Seeds, rules: Rules, only_best: int | None = None) -> Found:
    """The triples within `rules.hops` of the seeds; with `only_best` as `merged` leaves them."""
    steps = spread(graph, near_of(graph, seeds, rules), seeds.cutoffs, rules, rules.hops)
    return merged(graph, joined(steps), only_best)


def near_of(graph: Graph, seeds: Seeds, rules: Rules) -> Steps:
    """The edges from the seeds."""
    return follow(graph, gathered(graph, seeds.prompts, seeds.entities, seeds.weights), seeds.cutoffs, rules)


def spread(graph: Graph, near: Steps, cutoffs: Ints, rules: Rules, hops: int, first: int = 1) -> list[Steps]:
    """Breadth first on from `near`, which is the first of `hops` steps, counted from `first`."""
    steps = [near]
    for hop in range(first + 1, first + hops):
        steps.append(follow(graph, _next_frontier(graph, steps), cutoffs, rules, hop))
    return steps


def joined(steps: list[Steps]) -> Steps:
    """Steps one behind the other, as one."""
    columns = {field.name: [getattr(step, field.name) for step in steps] for field in fields(Steps)}
    for name, behind in (("owners", "prompts"), ("edge_runs", "owners")):
        shifts = np.cumsum([0] + [len(column) for column in columns[behind]])
        columns[name] = [column + shift for column, shift in zip(columns[name], shifts)]
    return Steps(**{name: np.concatenate(parts) for name, parts in columns.items()})


def merged(graph: Graph, steps: Steps, only_best: int | None = None) -> Found:
    """Each triple of a prompt once: where both its ends were followed, at the earlier one, with the sum of both flows.

    With `only_best` those that cannot be among a prompt's best so many may be missing. An edge can only have been
    followed from its other end, too, where that was followed at all. That is asked first of a filter (one hash a pair;
    Bloom 1970) and then, of the few that pass, exactly.
    """
    twice = _followed_at_both_ends(graph, steps)
    order, new = grouped(graph, steps.prompts[steps.sources(twice)], *triples_of(graph, steps, twice))
    first = twice[order[new]]
    may = np.ones(len(steps.prompts), dtype=bool) if only_best is None else _may_be_best(steps, only_best)
    kept = steps.of_edges(may)
    kept[twice] = False
    kept[first] = True
    flows, edges = steps.of_edges(steps.flows), np.flatnonzero(kept)
    flows[first] = np.bincount(np.cumsum(new) - 1, flows[twice[order]])
    return Found(steps, edges, steps.prompts[steps.sources(edges)], flows[edges].astype(np.float32))


def best(graph: Graph, found: Found, num_prompts: int, max_triples: int) -> Subgraphs:
    """The triples of highest score of each prompt; ties in the order in which they were found."""
    offsets, order = best_places(found.prompts, found.scores, num_prompts, max_triples)
    edges = found.edges[order]
    heads, relations, tails, times = triples_of(graph, found.steps, edges)
    return Subgraphs(
        offsets,
        heads.astype(np.int32),
        relations.astype(np.int32),
        tails.astype(np.int32),
        times,
        found.scores[order],
        found.steps.hops[found.steps.sources(edges)],
    )


def triples_of(graph: Graph, steps: Steps, edges: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """(head, relation, tail, time) of some edges of a walk, as the graph has them."""
    runs = steps.edge_runs[edges]
    sources, targets = steps.entities[steps.owners[runs]], steps.targets[edges].astype(np.int64)
    relations = graph.run_relations[steps.runs[runs]].astype(np.int64)
    is_inverse = relations >= graph.num_relations
    times = np.full(len(edges), ALWAYS) if graph.times is None else np.asarray(graph.times[steps.positions[edges]])
    return (
        np.where(is_inverse, targets, sources),
        np.where(is_inverse, relations - graph.num_relations, relations),
        np.where(is_inverse, sources, targets),
        times,
    )


def grouped(graph: Graph, prompts: Ints, heads: Ints, relations: Ints, tails: Ints, times: Ints) -> tuple[Ints, Flags]:
    """The order that puts the same triples of a prompt together, equals as they stand, and where each group begins."""
    columns = packed(times, relations, keys_of(graph, prompts, heads), tails)
    order = np.arange(len(prompts))
    for column in columns:
        order = order[stable_order(column[order])]
    return order, starts(*(column[order] for column in columns))


def _next_frontier(graph: Graph, steps: list[Steps]) -> Frontier:
    """What the last step reached and none before had followed."""
    last = steps[-1]
    reached = gathered(graph, last.of_edges(last.prompts), last.targets, last.of_edges(last.flows))
    seen = np.concatenate([keys_of(graph, step.prompts, step.entities) for step in steps])
    new = ~is_in(keys_of(graph, reached.prompts, reached.entities), np.sort(seen))
    return Frontier(reached.prompts[new], reached.entities[new], reached.weights[new])


def floors(prompts: Ints, flows: Floats, counts: Ints, num_prompts: int, count: int) -> Floats:
    """(N,) the highest flow that `count` edges of a prompt have or exceed; 0 where it has fewer.

    Each of F pairs has as many edges as `counts` (F,) says, over which as much flows as `flows` (F,) says.
    """
    order = by_prompt_and_score(prompts, flows)
    in_order, edges = prompts[order], np.cumsum(counts[order])
    before = np.append(0, edges)[np.searchsorted(in_order, in_order)]
    enough = np.flatnonzero(edges - before >= count)
    last = enough[starts(in_order[enough])]
    lowest = np.zeros(num_prompts, dtype=np.float32)
    lowest[in_order[last]] = flows[order[last]]
    return lowest


def _may_be_best(steps: Steps, count: int) -> Flags:
    """(F,) whether an edge followed from there may be among its prompt's `count` best triples, met from one end.

    The edges over which most flows are so many triples by the time that they are three times as many: a triple can be
    met from both its ends, and once more as what ties a seed to a chosen entity (`stages.py`).
    """
    flows = steps.flows.astype(np.float32)  # as scores are compared
    lowest = floors(steps.prompts, flows, steps.followed, int(steps.prompts.max(initial=-1)) + 1, 3 * count)
    may: Flags = flows >= lowest[steps.prompts]
    return may


def _followed_at_both_ends(graph: Graph, steps: Steps) -> Ints:
    """Edges whose target was followed, too, in the same prompt."""
    followed = keys_of(graph, steps.prompts, steps.entities)
    shift = np.uint64(64 - int(FILTER_SPREAD * len(followed) + 1).bit_length())
    places, table = _hashes(followed, shift), np.zeros(1 << (64 - int(shift)), dtype=bool)
    table[places] = True
    holds = np.empty(len(table), dtype=np.int64)  # the last of the pairs of each place; nothing where there is none
    holds[places] = followed
    of_runs, in_order, found = keys_of(graph, steps.prompts, np.int64(0))[steps.owners], np.sort(followed), [places[:0]]
    for begin in range(0, len(steps.targets), EDGES_AT_ONCE):
        here = slice(begin, begin + EDGES_AT_ONCE)
        keys = of_runs[steps.edge_runs[here]] + steps.targets[here]
        hashes = _hashes(keys, shift)
        passed = np.flatnonzero(table[hashes])
        is_followed = holds[hashes[passed]] == keys[passed]
        unsure = np.flatnonzero(~is_followed)  # another pair of the same hash, or a pair that gave way to it
        is_followed[unsure] = is_in(keys[passed[unsure]], in_order)
        found.append(begin + passed[is_followed])
    return np.concatenate(found)


def _hashes(keys: Ints, shift: np.uint64) -> Ints:
    """Multiplicative hashing (Knuth 1973, section 6.4): the upper bits of key · 2^64 / φ."""
    return ((keys.view(np.uint64) * GOLDEN) >> shift).view(np.int64)


def keys_of(graph: Graph, prompts: Ints, entities: npt.NDArray[np.integer] | np.integer) -> Ints:
    """One integer a pair, which sorts by prompt and then entity."""
    return prompts * max(graph.num_entities, 1) + entities


def _sums(numbers: Ints, counts: npt.NDArray[np.integer]) -> Ints:
    """The sums of the first `counts[0]` numbers, of the next `counts[1]`, …"""
    behind, ends = np.concatenate([[0], np.cumsum(numbers)]), np.cumsum(counts)
    sums: Ints = behind[ends] - behind[ends - counts]
    return sums


def _cut(times: Ints, begins: Ints, ends: Ints, limits: Ints) -> Ints:
    """Where each run begins to be as new as its limit: bisection of all of them together, oldest first."""
    is_late = times[ends - 1] >= limits
    cuts = np.where(is_late, begins, ends)  # right but for late runs of several edges
    late = np.flatnonzero(is_late & (ends - begins > 1))
    low, high, limits = begins[late], ends[late] - 1, limits[late]
    while len(late):
        middle = (low + high) // 2
        older = times[middle] < limits
        low, high = np.where(older, middle + 1, low), np.where(older, high, middle)
        cuts[late] = low
        left = np.flatnonzero(low < high)
        late, low, high, limits = late[left], low[left], high[left], limits[left]
    return cuts
