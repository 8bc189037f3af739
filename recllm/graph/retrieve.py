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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from recllm.data.randomness import Keys, mix, mix_further, uniform
from recllm.errors import UserError
from recllm.graph.segments import best_places
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
    gathered,
    joined,
    merged,
    near_of,
    spread,
    walk,
)
from recllm.recipe import RetrievalSection

DAMPING = 0.85  # share of a random walk that goes on, the rest restarts at the seeds
TOLERANCE = 1e-4  # L1 distance to the stationary distribution, of a prompt's mass of 1
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
    that `khop` reaches, undirected. Power iteration from the restart distribution is off by at most 2 · DAMPING ** n in
    L1 after n rounds; n is what TOLERANCE asks for, the same for every prompt. A hub spreads its mass over its edges,
    so `hub_penalty` has no part here.
    """
    found = walk(graph, seeds, rules)
    steps, sources = found.steps, found.steps.sources(found.edges)
    ends = np.concatenate([steps.entities[sources], steps.targets[found.edges]]).astype(np.int64)
    keys = np.concatenate([found.prompts, found.prompts]) * graph.num_entities + ends
    nodes, numbers = np.unique(keys, return_inverse=True)
    left, right = numbers[: len(sources)], numbers[len(sources) :]
    start = _restart(graph, seeds, nodes)
    over = _spread(start, left, right, rounds=int(np.ceil(np.log(TOLERANCE / 2) / np.log(DAMPING))))
    ranked = Found(steps, found.edges, found.prompts, over.astype(np.float32))
    return best(graph, ranked, seeds.num_prompts, rules.max_triples)


def _restart(graph: Graph, seeds: Seeds, nodes: Ints) -> Doubles:
    """(nodes,) the share of each node among its prompt's seeds. A seed without a triple is no node."""
    frontier = gathered(graph, seeds.prompts, seeds.entities, seeds.weights)
    keys = frontier.prompts * graph.num_entities + frontier.entities
    is_node = np.isin(keys, nodes)
    prompts, weights = frontier.prompts[is_node], frontier.weights[is_node]
    sums = np.bincount(prompts, weights, minlength=seeds.num_prompts)
    start = np.zeros(len(nodes))
    start[np.searchsorted(nodes, keys[is_node])] = weights / sums[prompts]
    return start


def _spread(start: Doubles, left: Ints, right: Ints, rounds: int) -> Doubles:
    """(edges,) what flows over each undirected edge in a round, in the end; a self-loop is one edge."""
    is_loop = left == right
    sources, targets = np.concatenate([left, right[~is_loop]]), np.concatenate([right, left[~is_loop]])
    degrees = np.bincount(sources, minlength=len(start))
    mass = start
    for _ in range(rounds):
        shares = DAMPING * mass / np.maximum(degrees, 1)
        mass = (1 - DAMPING) * start + np.bincount(targets, shares[sources], minlength=len(start))
    shares = DAMPING * mass / np.maximum(degrees, 1)
    return shares[left] + np.where(is_loop, 0, shares[right])


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
