import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.graph.attributes import Attributes
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


def graph_of(triples):
    return Graph.of(*zip(*triples, strict=True), num_entities=ENTITIES, num_relations=RELATIONS)


def tails(triples, entity, relation, cutoff):
    """Different tails, older than the cut-off, without the entity itself."""
    return {t for h, r, t, time in triples if (h, r) == (entity, relation) and time < cutoff and t != entity}


def pool(triples, relation):
    return {t for _, r, t, _ in triples if r == relation}


@given(TRIPLES, ALLOWED, st.integers(0, ENTITIES - 1), st.integers(0, 10), st.integers(0, 2**64 - 1), st.integers(2, 6))
@settings(deadline=None)
def test_a_question_has_one_right_answer_that_is_old_enough(triples, allowed, entity, cutoff, key, count):
    attributes = Attributes(graph_of(triples), np.array(allowed))
    asked = attributes.question(entity, cutoff, key, count)
    possible = [
        relation
        for relation in range(RELATIONS)
        if allowed[relation]
        and (own := tails(triples, entity, relation, cutoff))
        and len(pool(triples, relation) - own) >= count - 1
        and len(pool(triples, relation)) >= count - 1 + len(own)
    ]
    if asked is None:
        assert not possible
        return
    own = tails(triples, entity, asked.relation, cutoff)
    assert asked.relation in possible
    assert asked.tail in own
    assert len(asked.choices) == len(set(asked.choices)) == count
    assert set(asked.choices) & own == {asked.tail}
    assert set(asked.choices) <= pool(triples, asked.relation)
    assert asked == attributes.question(entity, cutoff, key, count)


@given(TRIPLES, ALLOWED, st.integers(0, ENTITIES - 1), st.integers(0, 10), st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_a_description_holds_attributes_only_and_all_where_there_is_room(triples, allowed, entity, cutoff, key):
    attributes = Attributes(graph_of(triples), np.array(allowed))
    every = {r: tails(triples, entity, r, cutoff) for r in range(RELATIONS) if allowed[r]}
    every = {relation: found for relation, found in every.items() if found}
    all_of_it = attributes.described(entity, cutoff, key, RELATIONS, ENTITIES)
    assert {relation: set(found) for relation, found in all_of_it} == every
    for relation, found in attributes.described(entity, cutoff, key, 2, 1):
        assert len(found) == 1
        assert found[0] in every[relation]
    assert len(attributes.described(entity, cutoff, key, 2, 1)) <= 2


def test_keys_spread_the_questions_over_relations_and_tails():
    triples = [(0, 0, tail, ALWAYS) for tail in range(1, 5)] + [(0, 1, tail, ALWAYS) for tail in range(5, 9)]
    triples += [(10, 0, 11, ALWAYS), (10, 1, 11, ALWAYS)]
    attributes = Attributes(graph_of(triples), np.ones(RELATIONS, dtype=bool))
    asked = [attributes.question(0, 1, key, 2) for key in range(400)]
    counts = np.bincount([question.tail for question in asked], minlength=9)[1:9]
    assert all(400 / 8 * 0.5 < count < 400 / 8 * 1.6 for count in counts)
    places = np.bincount([question.choices.index(question.tail) for question in asked])
    assert all(400 / 2 * 0.8 < count < 400 / 2 * 1.2 for count in places)
