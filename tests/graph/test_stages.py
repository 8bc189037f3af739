from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from recllm.graph.retrieve import khop
from recllm.graph.stages import FUSION_RANK, behaviour, context, parallel, two_stage
from recllm.graph.store import ALWAYS, Graph
from recllm.graph.subgraphs import Seeds
from recllm.graph.walk import Rules, best

from .plain_graph import as_dict, assert_same, plain_edges, plain_spread, summed, worlds


def plain_behaviour(world, seeds, cutoff):
    """{entity: weight} of every entity next to the seeds, seeds apart."""
    seeds = summed(seeds)
    shared = {}
    for seed, weight in seeds.items():
        for target in {target for _, target in plain_edges(world, seed, cutoff)[0]} - set(seeds):
            shared[target] = shared.get(target, 0.0) + weight
    return {
        entity: weight**2 / plain_edges(world, entity, cutoff)[1] ** world.rules.hub_penalty
        for entity, weight in shared.items()
    }


def plain_context(world, seeds, chosen, cutoff):
    """{triple: [score, hop]} of stage two."""
    ties = {entity: [] for entity in chosen}
    for seed in summed(seeds):
        for triple, target in plain_edges(world, seed, cutoff)[0]:
            if target in chosen:
                ties[target].append(triple)
    found = {}
    for entity, triples in ties.items():
        for triple in triples:
            opened = plain_edges(world, entity, cutoff)[1]
            found.setdefault(triple, [0.0, 1])[0] += chosen[entity] / opened**world.rules.hub_penalty / len(triples)
    for triple, (score, hop) in plain_spread(world, chosen, cutoff, world.rules.hops - 1, first=2).items():
        found.setdefault(triple, [0.0, hop])[0] += score
    return found


def chosen_of(seeds, prompt):
    here = slice(seeds.offsets[prompt], seeds.offsets[prompt + 1])
    return dict(zip(seeds.entities[here].tolist(), seeds.weights[here].tolist()))


@settings(deadline=None)
@given(worlds())
def test_stage_one_equals_plain_python(world):
    chosen = behaviour(world.graph, world.batch, world.rules)
    for prompt, (seeds, cutoff) in enumerate(zip(world.seeds, world.cutoffs)):
        found, every = chosen_of(chosen, prompt), plain_behaviour(world, seeds, cutoff)
        assert len(found) == min(len(every), world.rules.entities)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        best_weights = sorted(every.values(), reverse=True)[: len(found)]
        assert list(found.values()) == pytest.approx([weight / sum(best_weights) for weight in best_weights])
        assert [every[entity] for entity in found] == pytest.approx(best_weights)


@settings(deadline=None)
@given(worlds())
def test_stage_two_equals_plain_python(world):
    found, chosen = two_stage(world.graph, world.batch, world.rules)
    for prompt, (seeds, cutoff) in enumerate(zip(world.seeds, world.cutoffs)):
        assert_same(as_dict(found, prompt), plain_context(world, seeds, chosen_of(chosen, prompt), cutoff))


@settings(deadline=None)
@given(worlds())
def test_stage_two_shows_only_what_hangs_on_stage_one(world):
    found, chosen = two_stage(world.graph, world.batch, world.rules)
    for prompt in range(len(world.seeds)):
        triples, near = found.triples(prompt), set(chosen_of(chosen, prompt))
        for _ in range(max(world.rules.hops - 1, 1)):
            near |= {end for head, _, tail, _ in triples if {head, tail} & near for end in (head, tail)}
        assert all({head, tail} <= near for head, _, tail, _ in triples)


# Films 0, 1, 2 seen. 10 directed 0 and 1, 11 directed 2 alone; both have films that nobody saw (20, 21).
FILMS = Graph.of(
    [0, 1, 2, 20, 21, 0, 1, 2, 20, 21],
    [0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
    [10, 10, 11, 10, 11, 12, 12, 12, 12, 12],
    num_entities=22,
    num_relations=2,
)
SEEN = Seeds.of([[0, 1, 2]], [0])


def test_stage_one_prefers_what_is_shared_and_rare():
    chosen = behaviour(FILMS, SEEN, Rules(hub_penalty=1.0, entities=2))
    weights = {10: 2**2 / 3, 11: 1**2 / 2, 12: 3**2 / 5}  # the genre is shared by all three, and by all films
    assert chosen.entities.tolist() == [12, 10]
    assert chosen.weights.tolist() == pytest.approx([weights[12] / (9 / 5 + 4 / 3), weights[10] / (9 / 5 + 4 / 3)])
    harder = behaviour(FILMS, SEEN, Rules(hub_penalty=2.0, entities=2))
    assert harder.entities.tolist() == [10, 12]  # 4 / 9 and 9 / 25: a hub counts less


def test_another_result_of_stage_one_is_another_stage_two():
    rules = Rules(hops=2, entities=1)
    shown = {}
    for entity in (10, 11):
        chosen = Seeds.of([[entity]], [0])
        shown[entity] = best(FILMS, context(FILMS, SEEN, chosen, rules), 1, 100).triples(0)
    assert set(shown[10]) == {(film, 0, 10, ALWAYS) for film in (0, 1, 20)}
    assert set(shown[11]) == {(film, 0, 11, ALWAYS) for film in (2, 21)}
    nobody = best(FILMS, context(FILMS, SEEN, Seeds.of([[]], [0]), rules), 1, 100)
    assert nobody.triples(0) == []


def test_the_history_reaches_stage_two_through_stage_one():
    """The same item, context and cut-off; only what else the user had makes stage one choose otherwise."""
    rules = Rules(hops=2, entities=1, hub_penalty=2.0)
    first, second = (two_stage(FILMS, Seeds.of([items], [0]), rules)[0].triples(0) for items in ([0, 1], [2]))
    assert (20, 0, 10, ALWAYS) in first
    assert (20, 0, 10, ALWAYS) not in second
    assert (21, 0, 11, ALWAYS) in second


def test_two_stages_differ_from_both_at_once():
    rules = Rules(hops=2, entities=1, hub_penalty=2.0)
    one_behind_the_other = two_stage(FILMS, SEEN, rules)[0]
    at_once = parallel(FILMS, SEEN, rules)
    assert set(one_behind_the_other.triples(0)) == {(film, 0, 10, ALWAYS) for film in (0, 1, 20)}
    assert set(at_once.triples(0)) == set(khop(FILMS, SEEN, rules).triples(0))  # what nobody chose is there, too
    assert (21, 0, 11, ALWAYS) in at_once.triples(0)
    assert set(at_once.triples(0)[:2]) == {(0, 0, 10, ALWAYS), (1, 0, 10, ALWAYS)}  # in both lists: first


@settings(deadline=None)
@given(worlds())
def test_parallel_is_the_fusion_of_two_rankings(world):
    rules = replace(world.rules, max_triples=5)
    found = parallel(world.graph, world.batch, rules)
    chosen = behaviour(world.graph, world.batch, rules)
    ties = best(world.graph, context(world.graph, world.batch, chosen, replace(rules, hops=1)), len(world.seeds), 5)
    around = khop(world.graph, world.batch, rules)
    for prompt in range(len(world.seeds)):
        expected = {}
        for ranking in (ties, around):
            for rank, triple in enumerate(ranking.triples(prompt), 1):
                expected[triple] = expected.get(triple, 0.0) + 1 / (FUSION_RANK + rank)
        order = sorted(expected, key=expected.get, reverse=True)[:5]  # stable: the first list first
        assert found.triples(prompt) == order
        scores = found.scores[found.prompts == prompt].tolist()
        assert scores == pytest.approx([expected[triple] for triple in order])


def test_stage_one_counts_an_item_once_whatever_ties_it():
    """Entity 3 both directed and wrote item 0: one item shares it, not two."""
    graph = Graph.of([0, 0, 0], [0, 1, 0], [3, 3, 2], num_entities=4, num_relations=2)
    chosen = behaviour(graph, Seeds.of([[0]], [0]), Rules(hub_penalty=0.0))
    assert chosen.entities.tolist() == [2, 3]
    np.testing.assert_array_equal(chosen.weights, np.float32([0.5, 0.5]))
