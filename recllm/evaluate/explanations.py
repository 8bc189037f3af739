"""Written explanations against the graph of the dataset: what a language model wrote enters, a verdict each leaves.

An explanation counts when it is a path of the graph from an item of the user's history to the item that it explains,
over triples older than the example's cut-off (graph/explain.py). What is unfinished or cannot be read is wrong, and
counted.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from recllm.convert.knowledge import Knowledge
from recllm.convert.pipeline import GRAPH
from recllm.convert.titles import tokenizer_special_tokens
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.evaluate.tasks import Task
from recllm.graph.explain import Checker, Verdict
from recllm.recipe import Recipe

NEW_TOKENS = 96  # of an explanation: a path of three triples has about 60
SUPPORTED: Verdict = "supported"
UNREADABLE: Verdict = "unparsable"


class Explanations:
    """The checks of one dataset.

    Raises:
        UserError: the dataset has no graph.
    """

    def __init__(self, dataset: Dataset, section: Any, special_tokens: Sequence[str]) -> None:
        if section is None:
            raise UserError("the recipe has no graph, against which the task explain is checked: add `graph`")
        if not (dataset.folder / GRAPH).is_dir():
            raise UserError(
                f"{dataset.folder} has no {GRAPH}/, against which explanations are checked: convert with a recipe that "
                "has a graph"
            )
        texts = dataset.items["text"].combine_chunks()
        self.dataset = dataset
        self._knowledge = Knowledge(dataset.folder / GRAPH, section, texts, tuple(special_tokens), tokenizer="")

    @classmethod
    def of(cls, recipe: Recipe, dataset: Dataset) -> "Explanations":
        """By the graph of a recipe, with the names that its base model's tokenizer lets prompts write."""
        return cls(dataset, recipe.graph, tokenizer_special_tokens(recipe.model.name_or_path))

    @cached_property
    def _checker(self) -> Checker:
        return self._knowledge.checker()

    def verdicts(self, task: Task, written: Sequence[tuple[str, bool]]) -> list[Verdict]:
        """Of each example's text, and whether it ended by itself."""
        sequences, linked = self.dataset.sequences, self._knowledge.linked
        found = list[Verdict]()
        for row, (text, finished) in enumerate(written):
            user, end = int(task.users[row]), int(task.examples.history_end[row])
            begin = int(sequences.offsets[user])
            starts = np.unique(linked[self.dataset.history(user, end, end)]).tolist()  # events without item have none
            cutoff, target = int(sequences.timestamps[begin + end]), int(linked[task.target[row]])
            verdict: Verdict = UNREADABLE
            if finished:
                verdict = self._checker.verdict(text.strip(), {one for one in starts if one >= 0}, target, cutoff)
            found.append(verdict)
        return found


def counted(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How often each verdict was given, most often first."""
    return dict(Counter(verdicts).most_common())
