from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.data.randomness import text_keys, uniform
from recllm.errors import UserError
from recllm.graph.retrieve import DAMPING, TOLERANCE, khop, pagerank, random_triples, retrieve, rules_of
from recllm.graph.store import ALWAYS, Graph
from recllm.graph.subgraphs import Seeds, Subgraphs
from recllm.graph.walk import Rules, follow, gathered, walk
from recllm.recipe import RetrievalSection

from .plain_graph import as_dict, assert_equal, assert_same, plain_spread, summed, worlds

METHODS = ("khop", "random", "pagerank", "two_stage", "parallel")
NAMES = ["directed by", "stars", "has genre"]


def keys(count):
    return np.arange(count, dtype=np.uint64)


def sections(world, method, names=NAMES, **changes):
    allowed = world.rules.allowed
    deny = [] if allowed is None else [name for name, kept in zip(names, allowed) if not kept]
    rules = {name: getattr(world.rules, name) for name in ("hops", "fan_out", "hub_penalty", "max_triples", "entities")}
    return RetrievalSection(method=method, deny=deny, **rules | changes)


@settings(deadline=None)
@given(worlds())
def test_khop_equals_plain_python(world):
    found = khop(world.graph, world.batch, world.rules)
    assert found.num_prompts == len(world.seeds)
    for prompt, (seeds, cutoff) in enumerate(zip(world.seeds, world.cutoffs)):
        expected = plain_spread(world, summed(seeds), cutoff, world.rules.hops)
        assert_same(as_dict(found, prompt), expected)


@settings(deadline=None)
@given(worlds())
def test_khop_does_not_hang_on_how_keys_are_hashed(world):
    """In a table of two places every pair shares its place with others, and blocks of three edges are several."""
    expected = khop(world.graph, world.batch, world.rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recllm.graph.walk.FILTER_SPREAD", 0)
        patch.setattr("recllm.graph.walk.EDGES_AT_ONCE", 3)
        assert_equal(khop(world.graph, world.batch, world.rules), expected)


@settings(deadline=None)
@given(worlds(), st.integers(1, 5), st.sampled_from(["khop", "random"]))
def test_the_best_of_many_are_the_first_of_all(world, count, method):
    def found(rules):
        if method == "khop":
            return khop(world.graph, world.batch, rules)
        return random_triples(world.graph, world.batch, rules, keys(len(world.seeds)))

    every, some = found(world.rules), found(replace(world.rules, max_triples=count))
    for prompt in range(every.num_prompts):
        assert some.triples(prompt) == every.triples(prompt)[:count]
        scores = every.scores[every.prompts == prompt]
        assert (np.diff(scores) <= 0).all()


@settings(deadline=None, max_examples=60)
@given(worlds(), st.sampled_from(METHODS))
def test_nothing_is_of_the_future_and_all_hangs_on_the_seeds(world, method):
    if world.rules.allowed is not None and not world.rules.allowed.any():
        return
    found = retrieve(world.graph, world.batch, sections(world, method), NAMES, keys(len(world.seeds)))
    for prompt, (seeds, cutoff) in enumerate(zip(world.seeds, world.cutoffs)):
        triples = found.triples(prompt)
        assert set(triples) <= set(world.triples)
        assert all(time < cutoff for *_, time in triples)
        assert world.rules.allowed is None or all(world.rules.allowed[relation] for _, relation, *_ in triples)
        near = {entity for entity, _ in seeds}
        for _ in range(world.rules.hops):
            near |= {end for head, _, tail, _ in triples if {head, tail} & near for end in (head, tail)}
        assert all({head, tail} <= near for head, _, tail, _ in triples)


@settings(deadline=None, max_examples=60)
@given(worlds(), st.sampled_from(METHODS), st.integers(1, 4))
def test_a_batch_gives_what_its_prompts_give_alone(world, method, count):
    if world.rules.allowed is not None and not world.rules.allowed.any():
        return
    section, every = sections(world, method, max_triples=count), keys(len(world.seeds))
    together = retrieve(world.graph, world.batch, section, NAMES, every)
    alone = [
        retrieve(world.graph, world.one(prompt).batch, section, NAMES, every[prompt : prompt + 1])
        for prompt in range(len(world.seeds))
    ]
    assert_equal(together, Subgraphs.concatenated(alone))


def text_graph(triples):
    """The graph of triples of ids, numbered and keyed as `build_graph` does it, and the ids by number."""
    entities = sorted({end for head, _, tail, _ in triples for end in (head, tail)})
    relations = sorted({relation for _, relation, *_ in triples})
    rows = [(entities.index(h), relations.index(r), entities.index(t), time) for h, r, t, time in triples]
    graph = Graph.of(
        *zip(*rows, strict=True),
        num_entities=len(entities),
        num_relations=len(relations),
        entity_keys=text_keys(entities),
        relation_keys=text_keys(relations),
    )
    return graph, entities, relations


def shown(triples, world, section):
    """What each prompt shows, in ids, with scores and hops."""
    graph, entities, relations = text_graph(triples)
    flat = [(f"e{entity}", weight) for pairs in world.seeds for entity, weight in pairs]
    numbers = np.array([entities.index(entity) for entity, _ in flat], dtype=np.int32)
    found = retrieve(
        graph, replace(world.batch, entities=numbers), section, relations, keys(len(world.seeds)), relations
    )
    return [
        [(entities[h], relations[r], entities[t], time) for h, r, t, time in found.triples(prompt)]
        for prompt in range(found.num_prompts)
    ], [found.scores.tolist(), found.hops.tolist()]


LATER_IDS = st.sampled_from(["a", "e0", "e1", "e3", "e35", "e5", "e7", "z"])  # before, between and behind those there


@settings(deadline=None, max_examples=100)
@given(worlds(), st.sampled_from(METHODS), st.integers(1, 9), st.data())
def test_what_comes_later_changes_nothing(world, method, max_triples, data):
    """Triples at or after every cut-off, of hubs and of new entities and relations, change no bit of any prompt."""
    at = st.integers(0, 2).map(lambda more: max(world.cutoffs) + more)
    relation = st.sampled_from(["a", "r0", "r1", "r15", "r2"])
    later = data.draw(st.lists(st.tuples(LATER_IDS, relation, LATER_IDS, at), max_size=12))
    popular = data.draw(LATER_IDS)
    later += [(popular, "r0", f"e{entity}", max(world.cutoffs)) for entity in range(8)]
    # every entity and relation is there from the start, by a triple that no prompt may see, and edges that are alike
    # lead from every entity to more than a cap lets through
    named = [(f"e{entity}", f"r{entity % 3}", f"e{entity}", 99) for entity in range(8)]
    alike = [(head, tail % 3, tail, ALWAYS) for head in range(8) for tail in range(head)]
    triples = [(f"e{head}", f"r{relation}", f"e{tail}", time) for head, relation, tail, time in world.triples + alike]
    if world.rules.allowed is not None and not world.rules.allowed.any():
        return
    section = sections(world, method, ["r0", "r1", "r2"], max_triples=max_triples)
    assert shown(named + triples + later, world, section) == shown(named + triples, world, section)


def test_the_future_does_not_reach_a_prompt_through_a_cap():
    """Seed 0 has three equal edges and a cap of one; two triples of time 999 once made another of them the rarest."""
    times = [ALWAYS] * 3
    now = Graph.of([0, 0, 0], [0] * 3, [1, 2, 3], times, num_entities=6, num_relations=1)
    shown_now = khop(now, Seeds.of([[0]], [10]), Rules(hops=1, fan_out=1)).triples(0)
    for popular in (1, 2, 3):
        later = Graph.of(
            [0, 0, 0, popular, popular], [0] * 5, [1, 2, 3, 4, 5], [*times, 999, 999], num_entities=6, num_relations=1
        )
        assert khop(later, Seeds.of([[0]], [10]), Rules(hops=1, fan_out=1)).triples(0) == shown_now


def test_scores_by_hand():
    """Two seeds share entity 2, of degree 3; a cut-off leaves out what is newer, and degrees do not count it."""
    graph = Graph.of([0, 1, 2, 2], [0, 0, 0, 0], [2, 2, 3, 4], [1, 1, 1, 9], num_entities=5, num_relations=1)
    found = khop(graph, Seeds.of([[0, 1], [0, 1]], [9, 10]), Rules(hub_penalty=1.0))
    assert found.triples(0) == [(0, 0, 2, 1), (1, 0, 2, 1), (2, 0, 3, 1)]
    back = (1 + 1) / 3 / 3  # what reached entity 2, by its degree, in equal parts over 3 edges
    assert found.scores[found.prompts == 0].tolist() == pytest.approx([1 + back, 1 + back, back])
    back = (1 + 1) / 4 / 4
    assert found.scores[found.prompts == 1].tolist() == pytest.approx([1 + back, 1 + back, back, back])
    assert found.hops.tolist() == [1, 1, 2, 1, 1, 2, 2]


def test_cycles_and_self_loops_end_and_stand_once():
    graph = Graph.of([0, 1, 2, 0, 0], [0, 0, 0, 0, 0], [1, 2, 0, 0, 0], num_entities=3, num_relations=1)
    found = khop(graph, Seeds.of([[0]], [0]), Rules(hops=4))
    assert sorted(found.triples(0)) == [(0, 0, 0, ALWAYS), (0, 0, 1, ALWAYS), (1, 0, 2, ALWAYS), (2, 0, 0, ALWAYS)]


def test_an_entity_with_a_million_edges_costs_fan_out():
    count = 1_000_000
    heads, tails = np.zeros(count, dtype=np.int64), np.arange(1, count + 1)
    graph = Graph.of(heads, heads, tails, tails, num_entities=count + 1, num_relations=1)
    seeds = Seeds.of([[0]], [500_000])
    frontier = gathered(graph, seeds.prompts, seeds.entities, seeds.weights)
    steps = follow(graph, frontier, seeds.cutoffs, Rules())
    assert steps.targets.tolist() == list(range(499_999, 499_979, -1))  # the newest 20 before the cut-off
    assert steps.degrees.tolist() == [499_999]
    found = walk(graph, seeds, Rules())
    assert len(found.steps.edge_runs) == 20 + 20  # from the hub, and back from each


@settings(deadline=None)
@given(worlds(hops=2))
def test_random_is_a_permutation_of_what_khop_reaches(world):
    every = khop(world.graph, world.batch, world.rules)
    drawn = random_triples(world.graph, world.batch, world.rules, keys(len(world.seeds)))
    for prompt in range(len(world.seeds)):
        assert set(drawn.triples(prompt)) == set(every.triples(prompt))


def test_random_is_uniform_and_hangs_on_the_key_alone():
    """A star of 10: each triple is among the best 2 of 5000 draws about 1000 times, and a hub penalty has no part."""
    graph = Graph.of(np.zeros(10), np.zeros(10), np.arange(1, 11), num_entities=11, num_relations=1)
    seeds = Seeds.of([[0]] * 5000, [0] * 5000)
    found = random_triples(graph, seeds, Rules(max_triples=2), keys(5000))
    counts = np.bincount(found.tails, minlength=11)[1:]
    assert counts.sum() == 10_000
    assert np.abs(counts - 1000).max() < 5 * (5000 * 0.2 * 0.8) ** 0.5
    same = random_triples(graph, seeds, Rules(max_triples=2), np.zeros(5000, dtype=np.uint64))
    assert len({tuple(same.triples(prompt)) for prompt in range(5000)}) == 1


def test_random_draws_right_where_few_numbers_are_high(monkeypatch):
    """The highest are looked for above a floor; where nothing is above it, everywhere."""
    graph = Graph.of(np.zeros(900), np.zeros(900), np.arange(1, 901), num_entities=901, num_relations=1)
    seeds, rules = Seeds.of([[0], [1], []], [0] * 3), Rules(max_triples=5, fan_out=900)
    expected = random_triples(graph, seeds, rules, keys(3))
    monkeypatch.setattr("recllm.graph.retrieve.EDGES_AT_ONCE", 7)
    assert_equal(random_triples(graph, seeds, rules, keys(3)), expected)
    monkeypatch.setattr("recllm.graph.retrieve.uniform", lambda numbers: uniform(numbers) / 2)
    found = random_triples(graph, seeds, rules, keys(3))
    assert found.offsets.tolist() == expected.offsets.tolist() == [0, 5, 10, 10]
    assert found.tails.tolist() == expected.tails.tolist()


def test_random_draws_by_ids_and_not_by_numbers():
    """The same ten triples under other numbers of entities and of the relation: the same ones are drawn."""
    rows = [("e0", "r", f"e{tail}", ALWAYS) for tail in range(1, 10)]
    drawn = []
    for more in ([], [("a", "a", "b", ALWAYS)]):
        graph, entities, relations = text_graph(rows + more)
        seeds = Seeds.of([[entities.index("e0")]] * 50, [0] * 50)
        found = random_triples(graph, seeds, Rules(max_triples=3), keys(50))
        drawn.append([[entities[tail] for _, _, tail, _ in found.triples(prompt)] for prompt in range(50)])
        assert {relations[relation] for relation in found.relations} == {"r"}
    assert drawn[0] == drawn[1]
    assert len({tuple(tails) for tails in drawn[0]}) > 20


def stationary(triples, weights):
    """{triple: flow} of random walks that restart at {entity: weight}: the linear equations of one prompt, solved."""
    nodes = sorted({end for head, _, tail, _ in triples for end in (head, tail)})
    place = {node: number for number, node in enumerate(nodes)}
    start = np.array([weights.get(node, 0.0) for node in nodes])
    moves = np.zeros((len(nodes), len(nodes)))
    for head, _, tail, _ in triples:
        moves[place[head], place[tail]] += 1
        moves[place[tail], place[head]] += head != tail
    degrees = moves.sum(axis=1)
    step = DAMPING * (moves / degrees[:, None]).T
    mass = np.linalg.solve(np.eye(len(nodes)) - step, (1 - DAMPING) * start / start.sum())
    shares = DAMPING * mass / degrees
    return {triple: sum(shares[place[end]] for end in {triple[0], triple[2]}) for triple in triples}


@settings(deadline=None)
@given(worlds(hops=2))
def test_pagerank_is_the_stationary_flow(world):
    found = pagerank(world.graph, world.batch, world.rules)
    for prompt, (seeds, cutoff) in enumerate(zip(world.seeds, world.cutoffs)):
        triples = list(plain_spread(world, summed(seeds), cutoff, world.rules.hops))
        over = as_dict(found, prompt)
        assert set(over) == set(triples)
        for triple, flow in stationary(triples, summed(seeds)).items() if triples else ():
            assert abs(over[triple][0] - flow) < 3 * TOLERANCE


@pytest.mark.parametrize("hops", [1, 2, 5])
def test_pagerank_is_the_stationary_flow_on_larger_graphs(hops):
    """Of 40 prompts at once, with self-loops, several triples of two entities, leaves, and seeds without a triple."""
    rng, entities, count = np.random.default_rng(hops), 300, 330
    heads = rng.integers(0, entities, count)
    tails = np.where(rng.random(count) < 0.1, heads, rng.integers(0, entities, count))
    heads, tails = np.append(heads, tails[:60]), np.append(tails, heads[:60])
    graph = Graph.of(heads, rng.integers(0, 3, count + 60), tails, num_entities=entities + 1, num_relations=3)
    entities_of = [[entities, *rng.integers(0, entities, rng.integers(0, 9)).tolist()] for _ in range(40)]
    seeds, rules = Seeds.of(entities_of, [0] * 40), Rules(hops=hops, max_triples=10**6)
    every, some = pagerank(graph, seeds, rules), pagerank(graph, seeds, replace(rules, max_triples=7))
    for prompt, seeds_here in enumerate(entities_of):
        exact = stationary(every.triples(prompt), {seed: seeds_here.count(seed) for seed in seeds_here})
        for triple, (score, _) in as_dict(every, prompt).items():
            assert abs(score - exact[triple]) < 3 * TOLERANCE
        assert some.triples(prompt) == every.triples(prompt)[:7]
        least = sorted(exact.values(), reverse=True)[6:7] or [0.0]
        assert all(exact[triple] > least[0] - 6 * TOLERANCE for triple in some.triples(prompt))


def test_pagerank_by_hand():
    """A seed with n leaves has mass 1 / (1 + DAMPING), they DAMPING as much: each triple gets DAMPING / n of it all."""
    star = Graph.of([0, 0, 0, 3], [0, 0, 0, 0], [1, 2, 4, 3], num_entities=6, num_relations=1)
    found = pagerank(star, Seeds.of([[0], [3], [5], [0, 5]], [0] * 4), Rules())
    assert np.diff(found.offsets).tolist() == [3, 1, 0, 3]
    assert found.scores.tolist() == pytest.approx([DAMPING / 3] * 3 + [DAMPING] + [DAMPING / 3] * 3, abs=3 * TOLERANCE)


def test_allow_and_deny_go_by_name_or_id():
    ids = ["P57", "P161", "P136"]
    rules = rules_of(RetrievalSection(allow=["directed by", "P161"], deny=["stars"]), NAMES, ids)
    assert rules.allowed.tolist() == [True, False, False] * 2
    assert rules_of(RetrievalSection(), NAMES).allowed is None
    twins = rules_of(RetrievalSection(deny=["stars"]), ["stars", "has genre", "stars"])
    assert twins.allowed.tolist() == [False, True, False] * 2


def test_a_relation_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"allow: the graph has no relation 'directedby' \(nearest: 'directed by'"):
        rules_of(RetrievalSection(allow=["directedby"]), NAMES)
    with pytest.raises(UserError, match=r"deny: the graph has no relation 'xyz' \(it has 'directed by', 'stars'"):
        rules_of(RetrievalSection(deny=["xyz"]), NAMES)
    with pytest.raises(UserError, match="leave none of 3 relations"):
        rules_of(RetrievalSection(deny=NAMES), NAMES)


def test_seeds_that_are_no_entities_are_refused():
    graph = Graph.of([0], [0], [1], num_entities=2, num_relations=1)
    for wrong in (-1, 2):
        with pytest.raises(UserError, match=f"entity {wrong} of prompt 1: the graph has 2"):
            retrieve(graph, Seeds.of([[0], [1, wrong]], [0, 0]), RetrievalSection(), ["stars"], keys(2))
    with pytest.raises(ValueError, match="1 keys for 2 prompts"):
        retrieve(graph, Seeds.of([[0], [1]], [0, 0]), RetrievalSection(), ["stars"], keys(1))


@pytest.mark.parametrize("method", METHODS)
def test_no_prompt_no_seed_and_no_triple_give_nothing(method):
    section = RetrievalSection(method=method)
    graph = Graph.of([0], [0], [1], [5], num_entities=3, num_relations=1)
    assert retrieve(graph, Seeds.of([], []), section, ["stars"], keys(0)).num_prompts == 0
    # without a seed; a seed without a triple; a cut-off before the triple; and one behind it
    found = retrieve(graph, Seeds.of([[], [2], [0], [0, 2]], [9, 9, 5, 6]), section, ["stars"], keys(4))
    assert [found.triples(prompt) for prompt in range(4)] == [[], [], [], [(0, 0, 1, 5)]]


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=12), st.integers(1, 8))
def test_parts_hold_every_prompt_once(sizes, size):
    seeds = Seeds.of([list(range(count)) for count in sizes], list(range(len(sizes))))
    cutoffs = []
    for prompts, part in seeds.parts(size):
        assert part.num_prompts == prompts.stop - prompts.start >= 1
        assert len(part.entities) <= size or part.num_prompts == 1
        assert [part.entities[part.prompts == n].tolist() for n in range(part.num_prompts)] == [
            list(range(count)) for count in sizes[prompts]
        ]
        cutoffs += part.cutoffs.tolist()
    assert cutoffs == list(range(len(sizes)))
