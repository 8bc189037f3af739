"""Which triples a prompt may show: weighted entities and a cut-off for each of N prompts enter, ranked triples leave.

`retrieve` answers by the recipe's section. Every method reads only triples that are older than the prompt's cut-off,
knows no other prompt (a batch gives what its prompts give one by one, to the last bit), and hands back at most
`max_triples`, best first:

- khop: what flows over a triple when the seeds' weights spread breadth first (`walk.py`);
- pagerank: what flows over it when random walks restart at the seeds, among the triples that khop reaches;
- random: the baseline, uniform among the triples that khop reaches;
- two_stage and parallel: `stages.py`.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from recllm.data.randomness import Keys, mix, mix_further, uniform
from recllm.errors import UserError
from recllm.graph.segments import best_places, stable_order, starts
from recllm.graph.stages import parallel, two_stage
from recllm.graph.store import ALWAYS, Graph
from recllm.graph.subgraphs import Floats, Ints, Seeds, Subgraphs
from recllm.graph.walk import (
    EDGES_AT_ONCE,
    Doubles,
    Found,
    Rules,
    Steps,
    best,
    floors,
    joined,
    keys_of,
    merged,
    near_of,
    spread,
    walk,
)
from recllm.recipe import RetrievalSection

DAMPING = 0.85  # share of a random walk that goes on, the rest restarts at the seeds
TOLERANCE = 1e-5  # of all shares together; a flow is off by less than 3 times as much, of a prompt's mass of 1
ROUNDS = math.ceil(math.log(TOLERANCE / 2) / math.log(DAMPING / (1 + math.sqrt(1 - DAMPING**2))))  # that reach it
SEEDS_AT_ONCE = 256  # bounds memory: edges of 2 hops; each further hop multiplies them
HOP_FACTOR = 16

Method = Callable[[Graph, Seeds, Keys], Subgraphs]


def retrieve(
    graph: Graph,
    seeds: Seeds,
    section: RetrievalSection,
    relation_names: Sequence[str],
    key: Keys,
    relation_ids: Sequence[str] = (),
) -> Subgraphs:
    """The triples that each of N prompts may show, by the recipe.

    Args:
        graph: of R relations.
        seeds: where each prompt starts, and its cut-off.
        section: method, hops, caps and the relations that are followed.
        relation_names: (R,) readable names.
        key: (N,) for `random`: prompts of one key draw the same.
        relation_ids: (R,) as the triples write them: allow and deny lists may hold either.

    Raises:
        UserError: allow or deny hold a relation that the graph has not; they leave none; a seed is no entity.
    """
    _check(graph, seeds, key)
    rules = rules_of(section, relation_names, relation_ids)
    methods: dict[str, Method] = {
        "khop": lambda graph, seeds, _: khop(graph, seeds, rules),
        "pagerank": lambda graph, seeds, _: pagerank(graph, seeds, rules),
        "random": lambda graph, seeds, key: random_triples(graph, seeds, rules, key),
        "two_stage": lambda graph, seeds, _: two_stage(graph, seeds, rules)[0],
        "parallel": lambda graph, seeds, _: parallel(graph, seeds, rules),
    }
    method, size = methods[section.method], max(1, SEEDS_AT_ONCE // HOP_FACTOR ** max(section.hops - 2, 0))
    parts = [method(graph, part, key[prompts]) for prompts, part in seeds.parts(size)]
    return Subgraphs.concatenated(parts)


def rules_of(section: RetrievalSection, relation_names: Sequence[str], relation_ids: Sequence[str] = ()) -> Rules:
    """The section in numbers of relations.

    Raises:
        UserError: allow or deny hold a relation that is neither a name nor an id; nothing is left to follow.
    """
    numbers = partial(_numbers, names=relation_names, ids=relation_ids)
    allowed = np.full(len(relation_names), not section.allow)
    allowed[numbers(section.allow, "allow")] = True
    allowed[numbers(section.deny, "deny")] = False
    if not allowed.any():
        raise UserError(
            f"graph.retrieval: allow {section.allow} and deny {section.deny} leave none of {len(allowed)} relations, "
            "at least 1 is needed: deny less"
        )
    return Rules(
        hops=section.hops,
        fan_out=section.fan_out,
        allowed=None if allowed.all() else np.tile(allowed, 2),
        hub_penalty=section.hub_penalty,
        max_triples=section.max_triples,
        entities=section.entities,
    )


def khop(graph: Graph, seeds: Seeds, rules: Rules) -> Subgraphs:
    """The triples within `rules.hops` of the seeds over which most flows; see `walk.py`."""
    return best(graph, walk(graph, seeds, rules, rules.max_triples), seeds.num_prompts, rules.max_triples)


def random_triples(graph: Graph, seeds: Seeds, rules: Rules, key: Keys) -> Subgraphs:
    """Uniform among the triples that `khop` could show: each has a number of its prompt's key (N,) and of itself.

    What is drawn hangs on nothing else: neither on the batch, nor on the order of the triples, nor on what else the
    graph holds, as a triple counts by the ids of its entities and relation and not by their numbers.
    """
    parts = []
    for steps in spread(graph, near_of(graph, seeds, rules), seeds.cutoffs, rules, rules.hops):
        numbers = _numbers_of(graph, steps, key)
        drawn = _highest(steps, numbers, seeds.num_prompts, 2 * rules.max_triples)  # a triple has two ends
        parts.append(steps.only(drawn, numbers[drawn].astype(np.float64)))
    found = merged(graph, joined(parts))
    numbers = found.steps.flows[found.edges].astype(np.float32)  # not the sum from both ends; each edge has its own
    return best(graph, replace(found, scores=numbers), seeds.num_prompts, rules.max_triples)


def _numbers_of(graph: Graph, steps: Steps, key: Keys) -> Floats:
    """(M,) of each edge the number of its triple, which is the same from either end."""
    relations, entities = graph.run_relations[steps.runs], steps.entities[steps.owners]
    is_inverse, relation_keys = relations >= graph.num_relations, graph.relation_keys[relations % graph.num_relations]
    sources, begun = graph.entity_keys[entities], mix(0, key[steps.prompts])[steps.owners]  # hashed once a prompt
    numbers = np.empty(len(steps.targets), dtype=np.float32)
    for begin in range(0, len(numbers), EDGES_AT_ONCE):
        here = slice(begin, begin + EDGES_AT_ONCE)
        runs, targets = steps.edge_runs[here], graph.entity_keys[steps.targets[here]]
        times = ALWAYS if graph.times is None else graph.times[steps.positions[here]]
        ends = sources[runs], targets
        heads = np.where(is_inverse[runs], ends[1], ends[0])
        tails = ends[0] ^ ends[1] ^ heads  # the other one
        numbers[here] = uniform(mix_further(begun[runs], heads, relation_keys[runs], tails, times))
    return numbers


def _highest(steps: Steps, numbers: Floats, num_prompts: int, count: int) -> Ints:
    """Edges with each prompt's `count` highest of some uniform numbers (M,), rising; of equals the first ones."""
    edges = np.bincount(steps.prompts, steps.followed, minlength=num_prompts)
    likely = count + 8 * np.sqrt(count) + 8  # so many above its floor are expected: 8 deviations more than are needed
    floors = (1 - likely / np.maximum(edges, 1)).astype(np.float32)
    is_high = numbers >= steps.of_edges(floors[steps.prompts])
    high = np.flatnonzero(is_high)
    prompts = steps.prompts[steps.sources(high)]
    too_few = np.bincount(prompts, minlength=num_prompts) < np.minimum(edges, count)
    if too_few.any():  # chance, or numbers that are not uniform
        high = np.flatnonzero(is_high | steps.of_edges(too_few[steps.prompts]))
        prompts = steps.prompts[steps.sources(high)]
    return np.sort(high[best_places(prompts, numbers[high], num_prompts, count)[1]])


def pagerank(graph: Graph, seeds: Seeds, rules: Rules) -> Subgraphs:
    """The triples over which most flows, both ways, when random walks restart at the seeds by their weights.

    Personalised PageRank (Haveliwala 2002, "Topic-sensitive PageRank", eq. 4) on each prompt's own graph: the triples
    that `khop` reaches, undirected. Of a node's mass m = (1 - DAMPING) · s + DAMPING · Aᵀ D⁻¹ m, where s are the seeds'
    weights (their sum 1), A the numbers of triples between two nodes and D the degrees (a self-loop counts once), each
    of its triples gets DAMPING · m / D. The flow over a triple is what it gets from both its ends, from the one end of
    a self-loop; off by less than 3 · TOLERANCE, of a prompt's mass of 1 (`Local`, `_shares`). A hub spreads its mass
    over its edges, so `hub_penalty` has no part here.
    """
    found = walk(graph, seeds, rules)
    local = Local.of(graph, found)
    shares = _shares(local, _restart(seeds, found.steps, local.degrees))
    leaf_flows = (DAMPING * (1 + DAMPING) * shares[: len(found.steps.prompts)]).astype(np.float32)
    flows = np.repeat(leaf_flows, local.triples)
    is_loop = local.left == local.right
    flows[local.links] = DAMPING * (shares[local.left] + np.where(is_loop, 0, shares[local.right]))
    lowest = floors(
        found.steps.prompts, leaf_flows, local.leaves[: len(leaf_flows)], seeds.num_prompts, rules.max_triples
    )
    kept = np.flatnonzero(flows >= lowest[found.prompts])
    ranked = Found(found.steps, found.edges[kept], found.prompts[kept], flows[kept])
    return best(graph, ranked, seeds.num_prompts, rules.max_triples)


@dataclass(frozen=True)
class Local:
    """The graphs of all prompts side by side: V nodes, of which the walk's F pairs are the first, joined by L links.

    Most nodes that a walk reaches last have one triple. Such a leaf is no node here and its triple no link: its mass is
    DAMPING · m / D of its one neighbour, and so is known when that is.
    """

    degrees: Ints  # (V,) triples; a self-loop is one
    leaves: Ints  # (V,) of these, with a leaf at their other end
    triples: Ints  # (F,) of the triples found, those that were found from there: they stand in this order
    links: Ints  # (L,) which of the triples found
    left: Ints  # (L,) node from which it was found
    right: Ints  # (L,) node at its other end

    @classmethod
    def of(cls, graph: Graph, found: Found) -> "Local":
        """Of what a walk found."""
        steps, pairs = found.steps, len(found.steps.prompts)
        sources = steps.sources(found.edges)
        ends = keys_of(graph, found.prompts, steps.targets[found.edges])
        keys = np.concatenate([keys_of(graph, steps.prompts, steps.entities), ends])
        order = stable_order(keys)  # puts the pair first, where the end of a triple is one
        new = starts(keys[order])
        is_alone = new & np.append(new[1:], True)  # a leaf, or a pair that no triple leads to
        order, new = order[~is_alone], new[~is_alone]
        first = order[new]
        numbers = np.where(first < pairs, first, pairs - 1 + np.cumsum(first >= pairs))[np.cumsum(new) - 1]
        is_end = order >= pairs
        links, right = order[is_end] - pairs, numbers[is_end]
        left, size = sources[links], max(pairs, int(right.max(initial=-1)) + 1)
        triples, linked = np.bincount(sources, minlength=pairs), np.bincount(left, minlength=size)
        leaves = np.append(triples, np.zeros(size - pairs, dtype=np.int64)) - linked
        degrees = leaves + linked + np.bincount(right[left != right], minlength=size)
        return cls(degrees, leaves, triples, links, left, right)


def _restart(seeds: Seeds, steps: Steps, degrees: Ints) -> Doubles:
    """(V,) the share of each node among its prompt's seeds; those without a triple have none."""
    is_seed = np.flatnonzero((steps.hops == 1) & (degrees[: len(steps.hops)] > 0))
    prompts, weights = steps.prompts[is_seed], steps.weights[is_seed]
    start = np.zeros(len(degrees))
    start[is_seed] = weights / np.bincount(prompts, weights, minlength=seeds.num_prompts)[prompts]
    return start


def _shares(local: Local, start: Doubles) -> Doubles:
    """(V,) mass over degree: DAMPING of it is what each triple of a node gets.

    With the leaves' masses put in, the shares z solve the symmetric system (C - DAMPING · B) z = (1 - DAMPING) · start,
    where C = degrees - DAMPING² · leaves and B counts the links between two nodes. As no eigenvalue of DAMPING · C⁻¹ B
    is beyond DAMPING, Jacobi's method may take the steps of Chebyshev (Golub and Varga 1961, "Chebyshev semi-iterative
    methods", part I): after n rounds the error e is at most 2 · r ** n of the solution, r = DAMPING /
    (1 + sqrt(1 - DAMPING²)), both as ‖e‖² = eᵀ C e. n is what TOLERANCE asks for, the same for every prompt. As the
    solution is no longer than 1 and C not below 1 - DAMPING², a triple's flow is off by at most
    DAMPING · sqrt((1 + DAMPING) / (1 - DAMPING)) · TOLERANCE.
    """
    is_loop = local.left == local.right
    sources = np.concatenate([local.left, local.right[~is_loop]])
    targets = np.concatenate([local.right, local.left[~is_loop]])
    scale = 1 / np.maximum(local.degrees - DAMPING**2 * local.leaves, 1 - DAMPING**2)  # a seed without triples: any
    fixed, scale = (1 - DAMPING) * start * scale, DAMPING * scale
    before, shares, stretch = np.zeros(len(start)), fixed, 2.0
    for _ in range(ROUNDS - 1):
        stretch = 1 / (1 - DAMPING**2 * stretch / 4)
        moved = fixed + scale * np.bincount(targets, shares[sources], minlength=len(start))
        before, shares = shares, before + stretch * (moved - before)
    return np.maximum(shares, 0)  # what is next to nothing may come out below


def _check(graph: Graph, seeds: Seeds, key: Keys) -> None:
    if len(key) != seeds.num_prompts:
        raise ValueError(f"{len(key)} keys for {seeds.num_prompts} prompts: one for each is expected")
    wrong = (seeds.entities < 0) | (seeds.entities >= graph.num_entities)
    if wrong.any():
        raise UserError(
            f"entity {seeds.entities[wrong][0]} of prompt {seeds.prompts[wrong][0]}: the graph has "
            f"{graph.num_entities}, numbered from 0: items without a link (-1) are left out"
        )


def _numbers(wanted: Sequence[str], place: str, names: Sequence[str], ids: Sequence[str]) -> list[int]:
    """Relations by name or id; a name that several relations have means all of them."""
    found: list[int] = []
    for text in wanted:
        here = [number for texts in (names, ids) for number, known in enumerate(texts) if known == text]
        if not here:
            close = difflib.get_close_matches(text, [*names, *ids], n=1)
            known = f"nearest: {close[0]!r}" if close else f"it has {', '.join(map(repr, list(names)[:10]))}"
            raise UserError(f"graph.retrieval.{place}: the graph has no relation {text!r} ({known}): correct the list")
        found += here
    return found
