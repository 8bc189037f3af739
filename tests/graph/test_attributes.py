import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.graph.attributes import NO_NAME, Attributes
from recllm.graph.store import ALWAYS, Graph

ENTITIES, RELATIONS = 12, 3
TRIPLES = st.lists(
    st.tuples(
        st.integers(0, ENTITIES - 1),
        st.integers(0, RELATIONS - 1),
        st.integers(0, ENTITIES - 1),
        st.sampled_from([ALWAYS, 1, 5, 9]),
    ),
    min_size=1,
    max_size=60,
)
ALLOWED = st.lists(st.booleans(), min_size=RELATIONS, max_size=RELATIONS)
NAMES = st.lists(st.integers(NO_NAME, 5), min_size=ENTITIES, max_size=ENTITIES)  # several entities of one name


def graph_of(triples):
    return Graph.of(*zip(*triples, strict=True), num_entities=ENTITIES, num_relations=RELATIONS)


def tails(triples, entity, relation, cutoff):
    """Different tails, older than the cut-off, without the entity itself."""
    return {t for h, r, t, time in triples if (h, r) == (entity, relation) and time < cutoff and t != entity}


def pool(triples, relation, cutoff):
    return {t for _, r, t, time in triples if r == relation and time < cutoff}


@given(TRIPLES, ALLOWED, st.integers(0, ENTITIES - 1), st.integers(0, 10), st.integers(0, 2**64 - 1), st.integers(2, 6))
@settings(deadline=None)
def test_a_question_has_one_right_answer_and_knows_nothing_newer(triples, allowed, entity, cutoff, key, count):
    attributes = Attributes(graph_of(triples), np.array(allowed))
    asked = attributes.question(entity, cutoff, key, count)
    possible = {}
    for relation in range(RELATIONS):
        own, ever = (tails(triples, entity, relation, until) for until in (cutoff, 99))
        wrong = pool(triples, relation, cutoff) - ever - {entity}
        if allowed[relation] and own and len(wrong) >= count - 1:
            possible[relation] = (own, wrong)
    if asked is None:
        assert not possible
        return
    own, wrong = possible[asked.relation]
    assert asked.tail in own
    assert set(asked.right) == own
    assert len(asked.choices) == len(set(asked.choices)) == count
    assert set(asked.choices) - {asked.tail} <= wrong
    assert asked.newest < cutoff or asked.newest == ALWAYS
    assert asked == attributes.question(entity, cutoff, key, count)


@given(TRIPLES, NAMES, st.integers(0, ENTITIES - 1), st.integers(0, 10), st.integers(0, 2**64 - 1), st.integers(2, 4))
@settings(deadline=None)
def test_no_wrong_answer_is_called_as_a_right_one_is(triples, names, entity, cutoff, key, count):
    attributes = Attributes(graph_of(triples), np.ones(RELATIONS, dtype=bool), np.array(names))
    asked = attributes.question(entity, cutoff, key, count)
    possible = {}
    for relation in range(RELATIONS):
        own = {tail for tail in tails(triples, entity, relation, cutoff) if names[tail] != NO_NAME}
        ever = {names[tail] for tail in tails(triples, entity, relation, 99)} | {names[entity], NO_NAME}
        wrong = {names[tail] for tail in pool(triples, relation, cutoff)} - ever
        if own and len(wrong) >= count - 1:
            possible[relation] = (own, wrong)
    if asked is None:
        assert not possible
        return
    own, wrong = possible[asked.relation]
    assert asked.tail in own
    called = [names[choice] for choice in asked.choices]
    assert len(called) == len(set(called)) == count
    assert set(called) - {names[asked.tail]} <= wrong


@given(TRIPLES, NAMES, st.integers(0, ENTITIES - 1), st.integers(0, 10), st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_what_may_not_be_told_gives_way_to_what_may(triples, names, entity, cutoff, key):
    attributes = Attributes(graph_of(triples), np.ones(RELATIONS, dtype=bool), np.array(names))
    every = {r: tails(triples, entity, r, cutoff) for r in range(RELATIONS)}
    every = {r: {tail for tail in found if names[tail] > 0} for r, found in every.items()}  # 0 may not be told
    every = {r: found for r, found in every.items() if found}
    described = attributes.described(entity, cutoff, key, 2, 1, lambda tail: names[tail] != 0)
    assert len(described) == min(2, len(every))
    assert all(len(found.tails) == 1 and found.tails[0] in every[found.relation] for found in described)


@given(TRIPLES, st.integers(0, ENTITIES - 1), st.integers(0, 10), st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_the_future_changes_no_question(triples, entity, cutoff, key):
    """But that later tails of the entity are no wrong answers: so only others' later triples are taken away."""
    allowed = np.ones(RELATIONS, dtype=bool)
    before = [triple for triple in triples if triple[3] < cutoff or triple[0] == entity]
    asked = Attributes(graph_of(triples), allowed).question(entity, cutoff, key, 3)
    then = Attributes(graph_of(before), allowed).question(entity, cutoff, key, 3) if before else None
    assert (asked is None) == (then is None)
    if asked is not None:
        assert (asked.relation, asked.tail, asked.right) == (then.relation, then.tail, then.right)


@given(TRIPLES, ALLOWED, st.integers(0, ENTITIES - 1), st.integers(0, 10), st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_a_description_holds_attributes_only_and_all_where_there_is_room(triples, allowed, entity, cutoff, key):
    attributes = Attributes(graph_of(triples), np.array(allowed))
    every = {r: tails(triples, entity, r, cutoff) for r in range(RELATIONS) if allowed[r]}
    every = {relation: found for relation, found in every.items() if found}
    all_of_it = attributes.described(entity, cutoff, key, RELATIONS, ENTITIES)
    assert {found.relation: set(found.tails) for found in all_of_it} == every
    some = attributes.described(entity, cutoff, key, 2, 1)
    assert len(some) == min(2, len(every))
    for found in some:
        assert len(found.tails) == 1
        assert found.tails[0] in every[found.relation]
        assert found.newest < cutoff or found.newest == ALWAYS


def test_frequent_answers_are_as_often_wrong_as_right():
    """Answering each question by the tail that most entities have hits no more often than that tail is right."""
    rng = np.random.default_rng(0)
    shares = np.array([0.5, 0.2, 0.1, *[0.2 / 17] * 17])
    films, values = 400, len(shares)
    drawn = rng.choice(values, films, p=shares)
    triples = [(film, 0, films + int(value), ALWAYS) for film, value in enumerate(drawn)]
    graph = Graph.of(*zip(*triples, strict=True), num_entities=films + values, num_relations=1)
    attributes, frequency = Attributes(graph, np.ones(1, dtype=bool)), np.bincount(drawn, minlength=values)
    hits, count = 0, 4
    for film in range(films):
        asked = attributes.question(film, 1, 1000 + film, count)
        best = max(asked.choices, key=lambda entity: frequency[entity - films])
        hits += best == asked.tail
    assert hits / films < 0.5 + 0.05  # half of the films have the most frequent one; uniform wrong answers gave 0.75


def test_keys_spread_the_questions_over_relations_and_tails():
    triples = [(0, 0, tail, ALWAYS) for tail in range(1, 5)] + [(0, 1, tail, ALWAYS) for tail in range(5, 9)]
    triples += [(10, 0, 11, ALWAYS), (10, 1, 11, ALWAYS)]
    attributes = Attributes(graph_of(triples), np.ones(RELATIONS, dtype=bool))
    asked = [attributes.question(0, 1, key, 2) for key in range(400)]
    counts = np.bincount([question.tail for question in asked], minlength=9)[1:9]
    assert all(400 / 8 * 0.5 < count < 400 / 8 * 1.6 for count in counts)
    places = np.bincount([question.choices.index(question.tail) for question in asked])
    assert all(400 / 2 * 0.8 < count < 400 / 2 * 1.2 for count in places)
