"""The baselines of a report where the graph is asked: questions about items, and explanations.

A dataset and tasks enter; `System`s leave that answer without a model, and without the graph: all that they know is the
right answers of training's examples of the same kind. What they write is judged as a model's texts are.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recllm.data.dataset import Dataset
from recllm.data.randomness import mix, text_keys, uniform
from recllm.evaluate.explanations import Explanations
from recllm.evaluate.language_model import System
from recllm.evaluate.tasks import EXPLAIN, QUESTION, Prediction, Task
from recllm.graph import explain
from recllm.recipe import Recipe

MOST_FREQUENT, CONSTANT_PATH, RANDOM = "most_frequent_answer", "constant_path", "random"
DESCRIPTIONS = {
    MOST_FREQUENT: "how often training has each choice as the right answer of the same relation",
    CONSTANT_PATH: "the relations, and what they meet at, that training's explanations write most often, for everybody",
    RANDOM: "uniform numbers, seeded by example and choice",
}

Floats = npt.NDArray[np.float64]


def systems(
    recipe: Recipe, dataset: Dataset, tasks: Sequence[Task], explanations: Explanations | None
) -> tuple[list[System], list[str]]:
    """The baselines of the tasks that ask the graph, and a sentence for each task that has none.

    Args:
        explanations: judges the task explain; None where it is not among the tasks.
    """
    asked = [task for task in tasks if task.kind in (QUESTION, EXPLAIN)]
    if not asked:
        return [], []
    started, made, notes = time.monotonic(), dict[str, dict[str, Prediction]](), list[str]()
    train = dataset.examples("train", ["task", "label", "relation"])
    for task in asked:
        known = train.filter(pc.equal(train["task"], task.kind))
        if task.kind == QUESTION:
            made.setdefault(MOST_FREQUENT, {})[task.name] = Prediction(answer_counts(known, task))
            if RANDOM in recipe.evaluate.baselines:
                made.setdefault(RANDOM, {})[task.name] = Prediction(random_scores(recipe.seed, task))
        elif (path := ConstantPath.of(known["label"].to_pylist())) is not None and explanations is not None:
            written = [(text, True) for text in path.explained(dataset, task)]
            verdicts, scores = explanations.verdicts(task, written), np.zeros((len(written), 0))
            made.setdefault(CONSTANT_PATH, {})[task.name] = Prediction(scores, generations=written, verdicts=verdicts)
        else:
            notes.append(f"{task.name}: no constant path, training explains nothing.")
    took = (time.monotonic() - started) / max(len(made), 1)
    return [System(name, "baseline", DESCRIPTIONS[name], found, took) for name, found in made.items()], notes


def answer_counts(train: pa.Table, task: Task) -> Floats:
    """(N, C) how often each choice was the right answer of the example's relation in training; 0 where it never was."""
    assert task.choices is not None
    assert task.relations is not None
    counts = Counter(zip(train["relation"].to_pylist(), train["label"].to_pylist()))
    rows = [[counts[relation, choice] for choice in row] for relation, row in zip(task.relations, task.choices)]
    return np.array(rows, dtype=np.float64)


def random_scores(seed: int, task: Task) -> Floats:
    """(N, C) uniform numbers, each a function of (seed, example, choice)."""
    assert task.choices is not None
    choices = np.array([text_keys(row) for row in task.choices])
    return uniform(mix(seed, text_keys(task.examples.example_ids)[:, None], choices))


@dataclass(frozen=True)
class Form:
    """A path without its ends: n relations, their directions, and the n − 1 names that they meet at."""

    relations: tuple[str, ...]
    forward: tuple[bool, ...]
    inner: tuple[str, ...]

    @property
    def turned(self) -> "Form":
        """The same path from its other end."""
        return Form(self.relations[::-1], tuple(not one for one in self.forward[::-1]), self.inner[::-1])


@dataclass(frozen=True)
class ConstantPath:
    """Explains everything by one form: from an item of the history over the form to what is explained.

    It begins at the newest item of the history that training's explanations have at that end of the form; where there
    is none, at the newest item.
    """

    form: Form
    starts: frozenset[str]  # items that training has at the beginning of the form

    @classmethod
    def of(cls, labels: Sequence[str]) -> "ConstantPath | None":
        """The form that most of training's explanations have; of equally frequent ones the first. None without any."""
        read = [path for label in labels if (path := explain.read(label)) is not None]
        parts = [
            (names[0], Form(tuple(relations), tuple(forward), tuple(names[1:-1])), names[-1])
            for names, relations, forward in read
        ]
        counts = Counter(form for _, form, _ in parts)
        if not counts:
            return None
        form = counts.most_common(1)[0][0]
        starts = {start for start, found, _ in parts if found == form}
        return cls(form, frozenset(starts | {end for _, found, end in parts if found.turned == form}))

    def explained(self, dataset: Dataset, task: Task) -> list[str]:
        """(N,) the text for each example."""
        titles, rows = (
            dataset.titles,
            zip(task.users.tolist(), task.examples.history_end.tolist(), task.target.tolist()),
        )
        return [
            self.text([titles[item] for item in dataset.history(user, end, end)[::-1].tolist()], titles[target])
            for user, end, target in rows
        ]

    def text(self, history: Sequence[str], target: str) -> str:
        """The path from one of a history, newest first, to the target; "" where none can be written.

        >>> form = Form(("made by", "made by"), (True, False), ("Pixar",))
        >>> ConstantPath(form, frozenset({"Up"})).text(["Heat", "Up"], "Cars")
        'Up -[made by]-> Pixar <-[made by]- Cars'
        >>> ConstantPath(form, frozenset()).text(["Heat", "Up"], "Cars")
        'Heat -[made by]-> Pixar <-[made by]- Cars'
        """
        form, others = self.form, [title for title in history if title != target]
        for start in sorted(others, key=lambda title: title not in self.starts):  # stable: the newest first
            written = explain.write([start, *form.inner, target], form.relations, form.forward)
            if written is not None:
                return written
        return ""
