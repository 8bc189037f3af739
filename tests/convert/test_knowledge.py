"""What examples take from a graph where names make it hard; the rest is asked through whole runs, test_graph_run.py."""

import numpy as np
import pyarrow as pa
import pytest

from recllm.convert.knowledge import LONGEST_NAME, Knowledge, Moments, names_it
from recllm.graph.build import build_graph
from recllm.recipe import GraphSection

ITEMS = ["i0", "i1", "i2", "i3"]
TITLES = ["Gandhi", "Heat", "Up", "Heat 2"]


@pytest.fixture
def knowledge(tmp_path):
    """knowledge(triples, links, names): of a graph written as CSV files."""

    def build(triples, links, names=()):
        for name, header, rows in (
            ("triples", "head,relation,tail", triples),
            ("links", "item_id,entity_id", links),
            ("names", "id,name", names),
        ):
            (tmp_path / f"{name}.csv").write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
        source = {"path": str(tmp_path / "triples.csv")}
        if names:
            source["entities"] = {"path": str(tmp_path / "names.csv")}
        section = GraphSection(triples=source, links={"path": str(tmp_path / "links.csv")})
        build_graph(section, ITEMS, tmp_path / "graph")
        return Knowledge(tmp_path / "graph", section, pa.array(TITLES), (), tokenizer="")

    return build


def moments(history, keys):
    """One history for as many examples as there are keys."""
    flat = np.tile(np.array(history, dtype=np.int32), len(keys))
    offsets = np.arange(len(keys) + 1) * len(history)
    return Moments(offsets, flat, np.full(len(keys), 10), np.array(keys, dtype=np.uint64))


def test_no_wrong_choice_is_called_as_a_right_one(knowledge):
    """Two genres are called Crime: asked which genre Heat has, the other one would be counted wrong."""
    triples = [("e1", "has genre", genre) for genre in ("drama", "crime-a")]
    triples += [("e2", "has genre", genre) for genre in ("crime-b", "war", "comedy")]
    names = [("drama", "Drama"), ("crime-a", "Crime"), ("crime-b", "Crime"), ("war", "War"), ("comedy", "Comedy")]
    keys = range(200)
    known = knowledge(triples, [("i1", "e1"), ("i2", "e2")], names)
    asked, _ = known.questions(np.full(len(keys), 1), moments([2], keys), ("has genre",), 3)
    assert None not in asked  # another wrong answer stands in its place
    for question in asked:
        assert sorted(question.choices) == sorted([question.answer, "War", "Comedy"])
    assert {question.answer for question in asked} == {"Drama", "Crime"}


def test_a_wrong_choice_that_looks_like_a_right_one_makes_no_question(knowledge):
    """Two names that differ in the graph, and are the same once they are cleaned."""
    triples = [("e1", "has genre", "crime-a"), ("e2", "has genre", "crime-b"), ("e2", "has genre", "war")]
    names = [("crime-a", "Crime"), ("crime-b", "Cri\u202eme"), ("war", "War")]
    keys = range(100)
    known = knowledge(triples, [("i1", "e1"), ("i2", "e2")], names)
    found, _ = known.questions(np.full(len(keys), 1), moments([2], keys), (), 2)
    assert None in found
    assert {tuple(sorted(question.choices)) for question in found if question is not None} == {("Crime", "War")}


@pytest.mark.parametrize("name", ["Gandhi", "GANDHI", "Gandhi (film score)", "Richard Attenborough's Gandhi"])
def test_a_description_does_not_name_the_item(knowledge, name):
    triples = [("e0", "about", "India"), ("e0", "about", name), ("e0", "directed by", "Attenborough")]
    triples += [("e1", "part of", "Heat 2"), ("e3", "part of", "Heat")]  # Heat 2 is named by Heat 2, not by Heat
    known = knowledge(triples, [(f"i{n}", f"e{n}") for n in (0, 1, 3)])
    found, _ = known.descriptions(np.array([0, 1, 3]), moments([2], [1, 2, 3]), ())
    assert found == ["about: India\ndirected by: Attenborough", None, "part of: Heat"]


def test_a_description_does_not_say_what_the_graph_calls_the_item(knowledge):
    triples = [("e0", "about", "Mahatma (book)"), ("e0", "directed by", "Attenborough")]
    known = knowledge(triples, [("i0", "e0")], [("e0", "Mahatma")])
    assert known.descriptions(np.array([0]), moments([2], [1]), ())[0] == ["directed by: Attenborough"]


@pytest.mark.parametrize(
    ("title", "name", "expected"),
    [
        ("Toy Story (1995)", "Toy Story", True),
        ("Toy Story (1995)", "Toy Story 2", True),
        ("Toy Story (1995)", "A toy storybook", False),
        ("Toy Story (1995)", "Story, Toy", False),
        ("Shanghai Triad (Yao a yao dao waipo qiao) (1995)", "Shanghai triad.", True),
        ("Usual Suspects, The (1995)", "The Usual Suspects (soundtrack)", True),
        ("The Matrix", "Matrix (franchise)", True),
        ("The", "The", True),
        ("M (1931)", "M", True),
        ("M (1931)", "Fritz Lang", False),
        ("Amélie", "Le monde d’Ame\u0301lie", True),  # an accent as a character of its own
        ("千と千尋", "千と千尋の神隠し", True),
        ("(500)", "(500) Days", True),
        ("!!!", "!!!", True),
        ("!!!", "what!!!", False),
        ("1984", "in 1984", True),
        ("1984", "19845", False),
        ("C++ (book)", "C++", True),
        ("Heat .*", "anything", False),
    ],
)
def test_a_name_that_holds_the_title_names_it(title, name, expected):
    assert names_it(name, title) == expected


def test_names_that_could_be_several_are_quoted(knowledge):
    known = knowledge([("e0", "about", '"Tiger, Dragon"')], [("i0", "e0")])
    found, _ = known.descriptions(np.array([0]), moments([2], [1]), ())
    assert found == ['about: "Tiger, Dragon"']


@pytest.mark.parametrize("length", [LONGEST_NAME, LONGEST_NAME + 1])
def test_a_text_is_no_name(knowledge, length):
    text = "日" * length
    triples = [("e0", "about", text), ("e1", "about", text), ("e2", "about", "peace"), ("e2", "about", "war")]
    known = knowledge(triples, [("i0", "e0"), ("i1", "e1"), ("i2", "e2")])
    short = length <= LONGEST_NAME  # characters, not bytes
    described, _ = known.descriptions(np.array([0]), moments([2], [1]), ())
    assert described == [f"about: {text}" if short else None]
    (question,), _ = known.questions(np.array([0]), moments([2], [1]), (), 2)
    assert (question is not None) == short
    (path,), _ = known.explained(moments([0], [1]), np.array([1], dtype=np.int32))
    assert path == (f"Gandhi -[about]-> {text} <-[about]- Heat" if short else None)


def test_a_text_gives_way_to_a_name(knowledge):
    """Items with a text are asked about, and told of, what has a name, and texts are no wrong answers."""
    texts = [f"{n}" * (LONGEST_NAME + 1) for n in range(2)]
    triples = [("e0", "about", texts[0]), ("e0", "about", "India"), ("e0", "summary", texts[0])]
    triples += [("e1", "about", texts[1]), ("e1", "about", "crime"), ("e1", "summary", texts[1])]
    known = knowledge(triples, [("i0", "e0"), ("i1", "e1")])
    keys = range(50)
    found, _ = known.questions(np.zeros(len(keys), dtype=np.int32), moments([2], keys), (), 2)
    assert {(question.relation, question.answer, *sorted(question.choices)) for question in found} == {
        ("about", "India", "India", "crime")
    }
    described, _ = known.descriptions(np.zeros(len(keys), dtype=np.int32), moments([2], keys), ())
    assert set(described) == {"about: India"}


def test_a_path_that_cannot_be_written_gives_way_to_one_that_can(knowledge):
    triples = [("e0", "has [x]", "rare"), ("e1", "has [x]", "rare"), ("e0", "about", "war"), ("e1", "about", "war")]
    triples += [("e2", "about", "war"), ("e3", "about", "war")]  # war says less than rare
    known = knowledge(triples, [(f"i{n}", f"e{n}") for n in range(4)])
    (path,), _ = known.explained(moments([0], [1]), np.array([1], dtype=np.int32))
    assert path == "Gandhi -[about]-> war <-[about]- Heat"


def test_what_is_explained_is_no_beginning_of_its_own_explanation(knowledge):
    """The subgraph lies around it too, and paths begin at what the user had."""
    known = knowledge([("e0", "about", "war"), ("e1", "about", "war")], [("i0", "e0"), ("i1", "e1")])
    around = moments([0], [1])._replace(around=np.array([1], dtype=np.int32))
    assert known.explained(around, np.array([1], dtype=np.int32))[0] == ["Gandhi -[about]-> war <-[about]- Heat"]
    alone = moments([2], [1])._replace(around=np.array([1], dtype=np.int32))
    assert known.explained(alone, np.array([1], dtype=np.int32))[0] == [None]
