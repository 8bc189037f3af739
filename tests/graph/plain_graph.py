"""Random small worlds and what retrieval should give in them, with dicts and loops: the oracle of tests/graph."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from recllm.data.randomness import mix
from recllm.graph.store import ALWAYS, Graph
from recllm.graph.subgraphs import Seeds
from recllm.graph.walk import Rules

ENTITIES, RELATIONS = 8, 3
KEYS = mix(0, np.arange(ENTITIES)).tolist()  # by which edges of one time follow one another


@dataclass
class World:
    triples: list  # (head, relation, tail, time), some of them twice
    seeds: list  # of each prompt [(entity, weight)]
    cutoffs: list
    rules: Rules

    @property
    def graph(self):
        columns = np.array(self.triples, dtype=np.int64).reshape(-1, 4).T
        return Graph.of(*columns, num_entities=ENTITIES, num_relations=RELATIONS)

    @property
    def batch(self):
        flat = [pair for pairs in self.seeds for pair in pairs]
        return Seeds(
            np.cumsum([0, *map(len, self.seeds)]),
            np.array([entity for entity, _ in flat], dtype=np.int32),
            np.array([weight for _, weight in flat], dtype=np.float32),
            np.array(self.cutoffs, dtype=np.int64),
        )

    def one(self, prompt):
        return World(self.triples, [self.seeds[prompt]], [self.cutoffs[prompt]], self.rules)


@st.composite
def worlds(draw, hops=3):
    entity, relation = st.integers(0, ENTITIES - 1), st.integers(0, RELATIONS - 1)
    time = draw(st.sampled_from([st.just(ALWAYS), st.integers(0, 5), st.sampled_from([ALWAYS, 0, 1, 2, 3])]))
    triples = draw(st.lists(st.tuples(entity, relation, entity, time), max_size=30))
    weight = st.sampled_from([0.25, 0.5, 1.0, 2.0])
    seeds = draw(st.lists(st.lists(st.tuples(entity, weight), max_size=4), min_size=1, max_size=4))
    allowed = draw(st.none() | st.lists(st.booleans(), min_size=RELATIONS, max_size=RELATIONS))
    rules = Rules(
        hops=draw(st.integers(1, hops)),
        fan_out=draw(st.integers(1, 3)),
        allowed=None if allowed is None else np.array(allowed * 2),
        hub_penalty=draw(st.sampled_from([0.0, 0.5, 1.0])),
        max_triples=10**6,
        entities=draw(st.integers(1, 3)),
    )
    cutoffs = draw(st.lists(st.integers(-1, 7), min_size=len(seeds), max_size=len(seeds)))
    return World(triples, seeds, cutoffs, rules)


def plain_edges(world, entity, cutoff):
    """[(triple, target)] that are followed from an entity, and how many were open."""
    triples = set(world.triples)
    followed, opened = [], 0
    for code in range(2 * RELATIONS):
        if world.rules.allowed is not None and not world.rules.allowed[code]:
            continue
        if code < RELATIONS:
            here = [(triple, triple[2]) for triple in triples if triple[0] == entity and triple[1] == code]
        else:
            here = [(triple, triple[0]) for triple in triples if triple[2] == entity and triple[1] == code - RELATIONS]
        here = [pair for pair in here if pair[0][3] < cutoff]
        here.sort(key=lambda pair: (pair[0][3], KEYS[pair[1]]), reverse=True)
        opened += len(here)
        followed += here[: world.rules.fan_out]
    return followed, opened


def plain_spread(world, frontier, cutoff, hops, first=1):
    """{triple: [score, hop]} breadth first from {entity: weight}."""
    found, seen = {}, set()
    for hop in range(first, first + hops):
        seen |= set(frontier)
        reached = {}
        for entity in sorted(frontier):
            followed, opened = plain_edges(world, entity, cutoff)
            for triple, target in followed:
                flow = frontier[entity] / opened**world.rules.hub_penalty / len(followed)
                found.setdefault(triple, [0.0, hop])[0] += flow
                reached[target] = reached.get(target, 0.0) + flow
        frontier = {entity: weight for entity, weight in reached.items() if entity not in seen}
    return found


def summed(pairs):
    """{entity: summed weight}."""
    sums = {}
    for entity, weight in pairs:
        sums[entity] = sums.get(entity, 0.0) + weight
    return sums


def as_dict(subgraphs, prompt):
    """{triple: [score, hop]} of one prompt of a result."""
    here = slice(subgraphs.offsets[prompt], subgraphs.offsets[prompt + 1])
    pairs = zip(subgraphs.scores[here].tolist(), subgraphs.hops[here].tolist())
    found = dict(zip(subgraphs.triples(prompt), map(list, pairs)))
    assert len(found) == subgraphs.offsets[prompt + 1] - subgraphs.offsets[prompt]  # none twice
    return found


def assert_same(found, expected):
    """The same triples and hops, scores up to rounding."""
    assert set(found) == set(expected)
    for triple, (score, hop) in found.items():
        assert abs(score - expected[triple][0]) <= 1e-5 * expected[triple][0] + 1e-9
        assert hop == expected[triple][1]


def assert_equal(left, right):
    """Two results that are the same to the last bit."""
    for name in ("offsets", "heads", "relations", "tails", "times", "scores", "hops"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
        assert getattr(left, name).dtype == getattr(right, name).dtype
