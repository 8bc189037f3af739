import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.graph import explain
from recllm.graph.explain import Checker
from recllm.graph.store import ALWAYS, Graph

NAMES = ["Heat", "Ali", "Up", "Michael Mann", "Crime", "Heat"]  # two entities are called Heat
RELATIONS = ["directed by", "has genre"]
HEAT, ALI, UP, MANN, CRIME, OTHER_HEAT = range(6)
LATE = 100


@pytest.fixture(scope="module")
def checker():
    triples = [
        (HEAT, 0, MANN, ALWAYS),
        (ALI, 0, MANN, ALWAYS),
        (HEAT, 1, CRIME, LATE),
        (UP, 1, CRIME, ALWAYS),
        (OTHER_HEAT, 1, CRIME, ALWAYS),
    ]
    graph = Graph.of(*zip(*triples, strict=True), num_entities=6, num_relations=2)
    names = [*((name, entity) for entity, name in enumerate(NAMES)), ("Ali (2001)", ALI)]
    return Checker(graph, names, RELATIONS)


@pytest.mark.parametrize(
    ("text", "starts", "end", "cutoff", "verdict"),
    [
        ("Heat -[directed by]-> Michael Mann <-[directed by]- Ali", {HEAT}, ALI, LATE, "supported"),
        ("Heat <-[directed by]- Michael Mann <-[directed by]- Ali", {HEAT}, ALI, LATE, "not in the graph"),
        ("Heat -[directed by]-> Michael Mann <-[directed by]- Ali", {UP}, ALI, LATE, "wrong start"),
        ("Heat -[directed by]-> Michael Mann <-[directed by]- Ali", {HEAT}, UP, LATE, "wrong end"),
        ("Heat -[directed by]-> Mann <-[directed by]- Ali", {HEAT}, ALI, LATE, "unknown name"),
        ("Heat -[made by]-> Michael Mann <-[directed by]- Ali", {HEAT}, ALI, LATE, "unknown name"),
        ("heat -[directed by]-> Michael Mann <-[directed by]- Ali", {HEAT}, ALI, LATE, "unknown name"),
        ("They share a director", {HEAT}, ALI, LATE, "unparsable"),
        ("Heat -[directed by]-> Michael Mann <-[directed by]- Ali.", {HEAT}, ALI, LATE, "unknown name"),
        ("Heat -[directed by]-> Michael Mann <-[directed by]- Ali (2001)", {HEAT}, ALI, LATE, "supported"),
        ("Ali -[directed by]-> Michael Mann <-[directed by]- Ali (2001)", {ALI, HEAT}, ALI, LATE, "wrong start"),
        ("Ali -[directed by]-> Michael Mann <-[directed by]- Ali", {ALI}, ALI, LATE, "wrong start"),
        (
            "Heat -[directed by]-> Michael Mann <-[directed by]- Heat -[has genre]-> Crime",
            {HEAT},
            CRIME,
            LATE + 1,
            "not in the graph",  # the same Heat twice, and the other has no such director
        ),
        ("Heat", {HEAT}, HEAT, LATE, "unparsable"),
        ("", {HEAT}, ALI, LATE, "unparsable"),
        ("Heat -[has genre]-> Crime <-[has genre]- Up", {HEAT}, UP, LATE + 1, "supported"),
        ("Heat -[has genre]-> Crime <-[has genre]- Up", {HEAT}, UP, LATE, "not in the graph"),  # not yet
        ("Heat -[has genre]-> Crime <-[has genre]- Up", {OTHER_HEAT}, UP, LATE, "supported"),  # of the same name
        ("Heat -[directed by]-> Michael Mann <-[directed by]- Ali", {OTHER_HEAT}, ALI, LATE, "not in the graph"),
    ],
)
def test_an_explanation_counts_only_if_the_graph_holds_it(checker, text, starts, end, cutoff, verdict):
    assert verdict in explain.VERDICTS
    assert checker.verdict(text, starts, end, cutoff) == verdict


@pytest.mark.parametrize(
    ("names", "relation"),
    [
        (["Heat", ""], "r"),
        (["Heat", "a -[r]-> b"], "r"),
        (["Heat", "Up"], "has [x]"),
        (["Heat", "Up"], ""),
    ],
)
def test_what_could_not_be_read_back_is_not_written(names, relation):
    assert explain.write(names, [relation], [True]) is None


def test_four_triples_are_no_explanation():
    text = "a -[r]-> b -[r]-> c -[r]-> d"
    assert explain.read(text) == (["a", "b", "c", "d"], ["r", "r", "r"], [True, True, True])
    assert explain.read(f"{text} -[r]-> e") is None


WORDS = st.text(alphabet="ab -[]<>", min_size=1, max_size=6).map(lambda text: " ".join(text.split()))


@given(st.lists(WORDS, min_size=2, max_size=4), st.lists(WORDS, min_size=3, max_size=3), st.lists(st.booleans()))
@settings(deadline=None)
def test_what_is_written_is_read_back_or_not_written(names, relations, forward):
    steps = len(names) - 1
    forward = (forward + [True] * 3)[:steps]
    text = explain.write(names, relations[:steps], forward)
    if text is None:
        return
    assert explain.read(text) == (names, relations[:steps], forward)


@given(st.text(max_size=60))
@settings(deadline=None)
def test_no_text_breaks_the_reader(text):
    found = explain.read(text)
    if found is not None:
        assert explain.write(*found) == text
