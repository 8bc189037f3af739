"""Baselines where the graph is asked, by hand; in a whole report they are in tests/test_graph_run.py."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from recllm.evaluate import graph_systems, metrics
from recllm.evaluate.graph_systems import ConstantPath, Form
from recllm.evaluate.tasks import Task

SHARED = "{} -[made by]-> {} <-[made by]- {}"


def questions(relations, choices, right):
    fields = dict.fromkeys(Task._fields)
    ids = SimpleNamespace(example_ids=[f"item_to_attribute/u/{n}" for n in range(len(right))])
    given = {"relations": relations, "choices": choices, "right_column": np.array(right), "examples": ids}
    return Task(**(fields | given))


def test_a_choice_counts_as_often_as_it_was_right_of_the_same_relation():
    answers = [("has genre", "Drama")] * 3 + [("has genre", "Crime")] * 2 + [("about", "Crime")] * 5
    train = pa.table({"relation": [relation for relation, _ in answers], "label": [label for _, label in answers]})
    task = questions(["has genre", "about", "made in"], [["Crime", "Drama", "War"]] * 3, [1, 0, 2])
    scores = graph_systems.answer_counts(train, task)
    assert scores.tolist() == [[2, 3, 0], [5, 0, 0], [0, 0, 0]]
    assert metrics.ranks(scores, task.right_column).tolist() == [1, 1, 3]  # never seen: the last of equals


def test_random_scores_hang_on_seed_example_and_choice_only():
    task = questions(["r", "r"], [["Crime", "Drama"], ["Drama", "Crime"]], [0, 0])
    scores = graph_systems.random_scores(0, task)
    assert len(np.unique(scores)) == 4
    turned = questions(["r", "r"], [["Drama", "Crime"], ["Drama", "Crime"]], [0, 0])
    assert graph_systems.random_scores(0, turned)[0].tolist() == scores[0, ::-1].tolist()
    assert (graph_systems.random_scores(1, task) != scores).all()


def test_the_constant_path_is_the_form_that_training_writes_most_often():
    labels = [SHARED.format("Up", "Pixar", "Cars"), SHARED.format("Cars", "Pixar", "Coco")]
    labels += [SHARED.format("Heat", "Fox", "Ali"), "Up -[sequel]-> Up 2", "what a film", "Ali <-[made by]- Fox"]
    path = ConstantPath.of(labels)
    assert path.form == Form(("made by", "made by"), (True, False), ("Pixar",))
    assert path.starts == {"Up", "Cars", "Coco"}  # whoever is at an end of a form that is the same from both ends
    assert ConstantPath.of(["what a film"]) is None
    assert ConstantPath.of([]) is None


def test_equally_frequent_forms_give_way_to_the_first():
    labels = ["A -[sequel]-> B", "B <-[sequel]- A"]
    assert ConstantPath.of(labels).form == Form(("sequel",), (True,), ())
    assert ConstantPath.of(labels[::-1]).form == Form(("sequel",), (False,), ())
    assert ConstantPath.of(labels).starts == {"A"}  # the second is the first, told from its other end


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (["Ali", "Up", "Cars"], SHARED.format("Up", "Pixar", "Coco")),  # the newest that training knows
        (["Ali", "Heat"], SHARED.format("Ali", "Pixar", "Coco")),  # the newest
        (["Coco", "Heat"], SHARED.format("Heat", "Pixar", "Coco")),  # never from what is explained
        (["a -[b]-> c", "Heat"], SHARED.format("Heat", "Pixar", "Coco")),  # could not be read back
        (["Coco"], ""),
        ([], ""),
    ],
)
def test_it_begins_at_an_item_of_the_history(history, expected):
    form = Form(("made by", "made by"), (True, False), ("Pixar",))
    assert ConstantPath(form, frozenset({"Up", "Cars", "Coco"})).text(history, "Coco") == expected
