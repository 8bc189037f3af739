"""The baselines of a report on the tasks about actions, those that make sense of each.

A dataset, the fitted encoder and the tasks enter; `System`s leave, with a temperature fitted on validation examples
where they have probabilities. For next_event each says an action, and the fields are those that training has most often
with it. Imports without torch but for the encoder.

Which baseline answers which task (`KINDS`), and why some do not:

    baseline            next_action, next_event     outcome                     action_on_item
    constant            yes                         yes                         yes
    user_most_frequent  yes                         yes                         yes
    item_most_frequent  no item is asked about      no item is asked about      yes
    last_action         of the session              no action is the answer     of the user's events with an item
    markov              within the session          run until buy or end        over the user's events with an item
    boosted_trees       yes                         yes                         yes, with what training did on the item
    encoder             its action scores           knows no end of a session   does not see the item

outcome asks yes or no, once, from the beginning of a session: there is no action before it that could be said again.
Nor does the encoder answer it, which scores the next action and not whether one comes before the session ends.
action_on_item gives the item of the event that is asked about, which the encoder's action scores do not see: they are
P(action | history), fitted on the next event whatever its item, or none. Items and actions have heads of their own, so
there is neither P(action | history, item) nor the P(item | history, action) from which Bayes' rule would make it. In
the table such scores would pass for what SASRec makes of the question, so they are left out; `last_action` and
`markov`, which do not see the item either, go by what the task asks and stand for no more than that. With
`within_session` they go by the session's events with an item.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from tqdm import tqdm

from recllm.convert.actions import write_answer
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.evaluate import action_baselines as made_of
from recllm.evaluate.action_baselines import Asked, Baseline, Log, Training
from recllm.evaluate.calibration import fit_temperature
from recllm.evaluate.language_model import System
from recllm.evaluate.tasks import (
    NEXT_ACTION,
    NEXT_EVENT,
    ON_ITEM,
    OUTCOME,
    Prediction,
    Task,
    last_line,
)
from recllm.recipe import Recipe

ENCODER = "sequence_encoder"  # stands in the report under its type
DESCRIPTIONS = {
    "constant": "the most frequent answer of training, for everybody",
    "user_most_frequent": "each user's most frequent answer of training",
    "item_most_frequent": "each item's most frequent answer of training",
    "last_action": "the last action of the session again; of action_on_item, the last one on any item",
    "markov": "a first-order Markov chain over the actions of a session; of action_on_item, over those on items",
    "boosted_trees": "gradient-boosted trees on what the session has held so far",
    ENCODER: "the sequence encoder of this run",
}
KINDS = {  # which tasks a baseline answers; the table above says why not others
    "constant": (NEXT_ACTION, NEXT_EVENT, OUTCOME, ON_ITEM),
    "user_most_frequent": (NEXT_ACTION, NEXT_EVENT, OUTCOME, ON_ITEM),
    "item_most_frequent": (ON_ITEM,),
    "last_action": (NEXT_ACTION, NEXT_EVENT, ON_ITEM),
    "markov": (NEXT_ACTION, NEXT_EVENT, OUTCOME, ON_ITEM),
    "boosted_trees": (NEXT_ACTION, NEXT_EVENT, OUTCOME, ON_ITEM),
    ENCODER: (NEXT_ACTION, NEXT_EVENT),
}
NO_PROBABILITIES = ("last_action",)
BLIND = ("markov", ENCODER)  # to what actions.observed says of the event that is asked about; others say what they see


class ActionSystems:
    """Baselines of the tasks about actions of one dataset.

    Args:
        recipe: which baselines (`evaluate.action_baselines`), and the protocol.
        dataset: an event dataset.
        encoder_folder: the fitted sequence encoder.
        tasks: of the report; those that are not about actions are passed over.

    Raises:
        UserError: scikit-learn is not installed; an encoder of another vocabulary.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, encoder_folder: Path, tasks: Iterable[Task]) -> None:
        self.recipe, self.dataset, self.encoder_folder = recipe, dataset, encoder_folder
        self.tasks = [task for task in tasks if task.is_action]
        check_packages(recipe, [task.kind for task in self.tasks], writes=False)
        self.log = Log.of(dataset) if self.tasks else None
        self.training = {task.name: self._training(task) for task in self.tasks}
        self._fields: dict[str, list[str]] = {}

    def _training(self, task: Task) -> Training:
        assert self.log is not None
        assert task.section is not None  # convert writes it into every manifest
        return made_of.training_of(self.log, task.section, task.labels)

    def label_counts(self, task: Task) -> npt.NDArray[np.int64]:
        """(C,) how often training has each answer of a task."""
        found = self.training[task.name]
        return np.bincount(found.label, minlength=found.classes).astype(np.int64)

    def systems(self, held: Mapping[str, Task]) -> list[System]:
        """Every baseline's answers; `held` has validation examples of some tasks, by the task's name."""
        wanted = [name for name in DESCRIPTIONS if name in self.recipe.evaluate.action_baselines] if self.tasks else []
        found = []
        for name in tqdm(wanted, desc="baselines of actions", unit="system", disable=not wanted):
            started, predictions, shown = time.monotonic(), {}, str(name)
            for task in self.tasks:
                if task.kind in KINDS[name]:
                    shown, baseline = self._make(name, task)
                    predictions[task.name] = self._predict(name, baseline, task, held.get(task.name))
            if predictions:
                took = time.monotonic() - started
                found.append(System(shown, "baseline", self._description(name), predictions, took))
        return found

    def constant(self, task: Task) -> Prediction:
        """The constant answer to a task, whether or not the recipe names that baseline."""
        return self._predict("constant", made_of.constant(self.training[task.name]), task, None)

    def _description(self, name: str) -> str:
        unseen = ", ".join(self.log.observed) if self.log is not None and name in BLIND else ""
        return f"{DESCRIPTIONS[name]}; it does not see {unseen}" if unseen else DESCRIPTIONS[name]

    def _make(self, name: str, task: Task) -> tuple[str, Baseline]:
        """A baseline, and its name in the report."""
        log, training, section = self.log, self.training[task.name], task.section
        assert log is not None
        assert section is not None
        if name == ENCODER:
            return made_of.sequence_encoder(self.dataset, self.encoder_folder, log)
        if name == "markov" and task.kind == OUTCOME:
            return name, made_of.markov_outcome(log, section.positive, task.labels.index("yes"))
        makers: dict[str, Callable[[], Baseline]] = {
            "constant": lambda: made_of.constant(training),
            "user_most_frequent": lambda: made_of.most_frequent_of(made_of.of_user, training),
            "item_most_frequent": lambda: made_of.most_frequent_of(made_of.of_item(log), training),
            "last_action": lambda: made_of.last_action(log, training, section),
            "markov": lambda: made_of.markov(log, training, section),
            "boosted_trees": lambda: made_of.boosted_trees(log, training, section, self.recipe.seed),
        }
        return name, makers[name]()

    def _predict(self, name: str, baseline: Baseline, task: Task, held: Task | None) -> Prediction:
        assert self.log is not None
        probability = baseline(Asked.of(self.log, task.examples))
        if task.kind == NEXT_EVENT:
            fields = self.most_frequent_events(task)
            written = [(fields[place], True) for place in probability.argmax(axis=1)]
            return Prediction(np.zeros((len(task.target), 0)), generations=written)
        if name in NO_PROBABILITIES:
            return Prediction(probability, has_probabilities=False)
        scores = np.log(probability)
        if held is None:
            return Prediction(scores)
        known = np.log(baseline(Asked.of(self.log, held.examples)))
        return Prediction(scores, calibration=fit_temperature(known, held.right_column))

    def most_frequent_events(self, task: Task) -> list[str]:
        """(C,) of each action the whole event that training has most often; the first in text order among equals.

        Of the examples that convert wrote: `max_train_targets` cuts them, other than what the actions are counted on.
        """
        if task.name not in self._fields:
            counts: dict[str, Counter[str]] = defaultdict(Counter)
            for batch in self.dataset.example_batches("train", ["example_id", "label", "completion"]):
                mine = batch.filter(pc.starts_with(batch["example_id"], f"{task.name}/"))
                for label, messages in zip(mine["label"].to_pylist(), mine["completion"].to_pylist()):
                    counts[label][last_line(messages[-1]["content"])] += 1
            self._fields[task.name] = [
                min(counts[label].items(), key=_by_count)[0] if counts[label] else write_answer(words, {})
                for label, words in zip(task.labels, task.words, strict=True)
            ]
        return self._fields[task.name]


def answers_any(names: Iterable[str], kind: str) -> bool:
    """Whether one of the baselines answers a kind of task.

    >>> answers_any(["item_most_frequent"], "next_action")
    False
    """
    return any(kind in KINDS[name] for name in names)


def check_packages(recipe: Recipe, kinds: Iterable[str], writes: bool) -> None:
    """Find now what would be missed after long work: scikit-learn of boosted trees, xgrammar of answers under a schema.

    Args:
        recipe: names the baselines.
        kinds: of the tasks.
        writes: whether a language model answers.

    Raises:
        UserError: names the package.
    """
    kinds, asked = set(kinds), recipe.evaluate.action_baselines
    trees = "boosted_trees" in asked and any(kind in KINDS["boosted_trees"] for kind in kinds)
    if trees and find_spec("sklearn") is None:
        raise UserError(
            'evaluate.action_baselines: boosted_trees needs scikit-learn, run `pip install "recllm[actions]"` or take '
            "it out"
        )
    if writes and NEXT_EVENT in kinds and recipe.protocol.decoding.constrained and find_spec("xgrammar") is None:
        raise UserError(
            'the task next_event under a JSON schema needs xgrammar, run `pip install "recllm[actions]"` or set '
            "protocol.decoding.constrained to false"
        )


def _by_count(entry: tuple[str, int]) -> tuple[int, str]:
    return -entry[1], entry[0]


def held_out(tasks: Iterable[Task], valid: Iterable[Task]) -> dict[str, Task]:
    """Of each closed task about actions the validation examples that fit temperatures, by the task's name.

    They go under another name, so that nothing takes them for what is reported.
    """
    of = {task.name: task for task in valid}
    wanted = [task for task in tasks if task.is_action and task.is_closed and task.name in of]
    return {task.name: of[task.name]._replace(name=f"valid {task.name}") for task in wanted}
