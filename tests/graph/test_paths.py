from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.errors import UserError
from recllm.graph.paths import Candidates, paths
from recllm.graph.store import ALWAYS, Graph
from recllm.graph.subgraphs import Seeds
from recllm.graph.walk import Rules

from .plain_graph import ENTITIES, RELATIONS, plain_edges, summed, worlds


def candidates_of(entities):
    return Candidates(np.cumsum([0, *map(len, entities)]), np.array([e for part in entities for e in part], np.int32))


def plain_paths(world, seeds, candidate, cutoff, length):
    """[(triples, score)] of all paths: the first triple from the seed, the last from the candidate."""

    def step(entity):
        return plain_edges(world, entity, cutoff)[0]

    found = []
    for seed, weight in summed(seeds).items():
        last = [((triple, entity),) for triple, entity in step(candidate)]
        chains = [((triple, entity),) for triple, entity in step(seed)]
        for size in range(1, length + 1):
            if size == 1:
                whole = [((triple,), (seed, entity)) for ((triple, entity),) in chains if entity == candidate]
            else:
                middle = chains if size == 2 else [(a, b) for (a,) in chains for b in step(a[1])]
                whole = [
                    ((*(triple for triple, _ in chain), end[0][0]), (seed, *(e for _, e in chain), candidate))
                    for chain in middle
                    for end in last
                    if end[0][1] == chain[-1][1]
                ]
            for triples, entities in whole:
                if len(set(entities)) == len(entities):
                    opened = [plain_edges(world, entity, cutoff)[1] for entity in entities[1:-1]]
                    found.append((triples, weight / np.prod(opened) ** world.rules.hub_penalty))
    return found


@st.composite
def asked(draw):
    world = draw(worlds(hops=1))
    entity = st.integers(-1, ENTITIES - 1)
    lists = st.lists(entity, max_size=3)
    return world, draw(st.lists(lists, min_size=len(world.seeds), max_size=len(world.seeds)))


def rows_of(found, candidate):
    here = range(found.offsets[candidate], found.offsets[candidate + 1])
    return [(tuple(triples_of(found, path, RELATIONS)), float(found.scores[path])) for path in here]


def triples_of(found, path, num_relations):
    """[(head, relation, tail, time)] along one path, as the graph has them."""
    ends, triples = found.entities[path].tolist(), []
    for place in range(found.lengths[path]):
        inverse, number = divmod(int(found.relations[path, place]), num_relations)
        head, tail = (ends[place + 1], ends[place]) if inverse else (ends[place], ends[place + 1])
        triples.append((head, number, tail, int(found.times[path, place])))
    return triples


@settings(deadline=None)
@given(asked(), st.integers(1, 3))
def test_paths_equal_plain_python(case, length):
    world, wanted = case
    found = paths(world.graph, world.batch, candidates_of(wanted), world.rules, length, count=10**6)
    flat = [(prompt, entity) for prompt, part in enumerate(wanted) for entity in part]
    assert len(found.offsets) == len(flat) + 1
    for candidate, (prompt, entity) in enumerate(flat):
        cutoff = world.cutoffs[prompt]
        expected = [] if entity < 0 else plain_paths(world, world.seeds[prompt], entity, cutoff, length)
        rows = rows_of(found, candidate)
        assert sorted(triples for triples, _ in rows) == sorted(triples for triples, _ in expected)
        assert sorted(score for _, score in rows) == pytest.approx(sorted(score for _, score in expected))
        assert all(time < cutoff for triples, _ in rows for *_, time in triples)
        scores = [score for _, score in rows]
        assert scores == sorted(scores, reverse=True)


@settings(deadline=None)
@given(asked())
def test_without_a_cap_these_are_all_simple_paths(case):
    """By depth-first search over the triples as they stand, direction and fan-out left aside."""
    world, wanted = case
    world = replace(world, rules=replace(world.rules, fan_out=10**6, allowed=None))
    found = paths(world.graph, world.batch, candidates_of(wanted), world.rules, count=10**6)
    flat = [(prompt, entity) for prompt, part in enumerate(wanted) for entity in part]
    for candidate, (prompt, goal) in enumerate(flat):
        triples = [triple for triple in set(world.triples) if triple[3] < world.cutoffs[prompt]]

        def search(at, chain, met, goal=goal, triples=triples):
            if at == goal and chain:
                yield chain
            elif len(chain) < 3:
                for triple in triples:
                    for here, there in ((triple[0], triple[2]), (triple[2], triple[0])):
                        if here == at and there not in met:
                            yield from search(there, (*chain, triple), met | {there})

        expected = [chain for seed in summed(world.seeds[prompt]) for chain in search(seed, (), {seed})]
        assert sorted(chain for chain, _ in rows_of(found, candidate)) == sorted(expected)


@settings(deadline=None, max_examples=60)
@given(asked(), st.integers(1, 3))
def test_the_best_are_the_first_of_all_and_a_batch_is_its_prompts(case, count):
    world, wanted = case
    every = paths(world.graph, world.batch, candidates_of(wanted), world.rules, count=10**6)
    some = paths(world.graph, world.batch, candidates_of(wanted), world.rules, count=count)
    alone = [
        paths(world.graph, world.one(prompt).batch, candidates_of([part]), world.rules, count=count)
        for prompt, part in enumerate(wanted)
    ]
    rows = [rows_of(found, candidate) for found in alone for candidate in range(len(found.offsets) - 1)]
    for candidate in range(len(every.offsets) - 1):
        assert rows_of(some, candidate) == rows_of(every, candidate)[:count] == rows[candidate]


def test_a_path_by_hand():
    """Film 0 was seen; film 1 has its director 2 (3 films) and, through a studio 4 of its writer 3, is further off."""
    heads, relations, tails = [0, 1, 5, 0, 3, 1], [0, 0, 0, 1, 2, 2], [2, 2, 2, 3, 4, 4]
    graph = Graph.of(heads, relations, tails, num_entities=6, num_relations=3)
    found = paths(graph, Seeds.of([[0]], [0]), candidates_of([[1, -1, 4, 0]]), Rules(hub_penalty=1.0))
    assert found.offsets.tolist() == [0, 2, 2, 4, 4]  # no link: none; the seed itself: none
    assert found.entities[:2].tolist() == [[0, 2, 1, -1], [0, 3, 4, 1]]
    assert found.relations[:2].tolist() == [[0, 3 + 0, -1], [1, 2, 3 + 2]]
    assert found.lengths.tolist() == [2, 3, 2, 3]
    assert found.scores.tolist() == pytest.approx([1 / 3, 1 / (2 * 2), 1 / 2, 1 / (3 * 2)])
    assert triples_of(found, 1, 3) == [(0, 1, 3, ALWAYS), (3, 2, 4, ALWAYS), (1, 2, 4, ALWAYS)]


def test_a_length_that_is_not_offered_is_refused():
    graph = Graph.of([0], [0], [1], num_entities=2, num_relations=1)
    with pytest.raises(UserError, match="paths of 4 triples: 1 to 3"):
        paths(graph, Seeds.of([[0]], [0]), candidates_of([[1]]), Rules(), max_length=4)


def test_no_prompt_gives_no_path():
    graph = Graph.of([0], [0], [1], num_entities=2, num_relations=1)
    assert paths(graph, Seeds.of([], []), candidates_of([]), Rules()).offsets.tolist() == [0]
