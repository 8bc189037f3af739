"""What is evaluated: the examples of each task, chosen and checked before any long work.

A dataset's split enters; `Task`s leave, the same for every system. `Prediction` is what a system says of a task.
Imports without torch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recllm.convert.events import YES
from recllm.data.dataset import Dataset
from recllm.data.randomness import mix
from recllm.errors import UserError
from recllm.evaluate.asset_rankings import AssetRankings
from recllm.evaluate.baselines import NO_ITEM, Examples
from recllm.evaluate.calibration import Fitted
from recllm.evaluate.next_events import NextEvents
from recllm.evaluate.recommendations import Recommendations
from recllm.graph.explain import Verdict
from recllm.recipe import TaskSection

NEXT_ITEM, LIKE = "next_item", "like"  # kinds of task; next_item_among and attribute_to_item are ranked as next_item is
QUESTION, EXPLAIN = "item_to_attribute", "explain"
ASSETS, RANK_ASSETS = "assets", "rank_assets"
NEXT_ACTION, NEXT_EVENT, OUTCOME, ON_ITEM = "next_action", "next_event", "outcome", "action_on_item"
ACTION_KINDS = (NEXT_ACTION, NEXT_EVENT, OUTCOME, ON_ITEM)
CLOSED_KINDS = (LIKE, NEXT_ACTION, OUTCOME, ON_ITEM)  # answered by one of a few labels
_WORD_KINDS = (*CLOSED_KINDS, QUESTION, EXPLAIN, ASSETS, RANK_ASSETS, NEXT_EVENT)  # whose answers are no items


class Task(NamedTuple):
    """The evaluated examples of one task of the recipe: N examples with C candidates or answers."""

    name: str  # how its example ids begin: "next_item", "next_item.2"
    kind: str  # of TaskSection.task
    examples: Examples
    prompts: list[list[dict[str, str]]]
    target: npt.NDArray[np.int64]  # (N,) item_index, of rank_assets the choice; NO_ITEM where a list is asked for
    candidates: npt.NDArray[np.int64] | None  # (N, C) item_index; None where answers are no items
    right_column: npt.NDArray[np.int64]  # (N,) where the target stands in candidates, or the label in `labels`
    ends: list[str]  # (N,) what ends an answer: "\n" where it continues a list, otherwise "" (eos)
    labels: list[str]  # of closed tasks, and of next_event the actions
    words: list[str]  # the words that answer each label
    available: int  # examples of this task in the split, of which the N were chosen
    choices: list[list[str]] | None = None  # (N, C) of questions; of what is written the right one alone
    judge: Recommendations | AssetRankings | None = None  # of a bank's tasks: how well an answer did
    section: TaskSection | None = None  # of the recipe that the dataset was converted with
    sessions: npt.NDArray[np.int64] | None = None  # (N,) of event datasets: a number for each session of each user
    events: NextEvents | None = None  # of next_event: how well an answer did
    relations: list[str] | None = None  # (N,) of questions: what each asks for

    @property
    def is_closed(self) -> bool:
        """Answered by one of a few labels."""
        return self.kind in CLOSED_KINDS

    @property
    def is_action(self) -> bool:
        """Asked about actions: averaged over sessions, which are what is resampled."""
        return self.kind in ACTION_KINDS

    @property
    def is_reasoned(self) -> bool:
        """Whether an answer comes after a line that gives its reason."""
        return self.section is not None and self.section.rationale is not None

    @property
    def is_explained(self) -> bool:
        """Answered by a path that is checked against the graph."""
        return self.kind == EXPLAIN

    @property
    def is_written(self) -> bool:
        """Answered by a text that is judged, every example of it."""
        return self.is_explained or self.judge is not None or self.events is not None

    @property
    def is_ranked(self) -> bool:
        """Whether the right answer has a rank among others."""
        return not self.is_closed and not self.is_written

    @property
    def right_texts(self) -> list[str] | None:
        """(N,) the right answers of what is asked in words: closed tasks, questions, explanations, lists."""
        if self.choices is not None:
            return [row[right] for row, right in zip(self.choices, self.right_column)]
        return [self.labels[right] for right in self.right_column] if self.is_closed else None

    @property
    def classes(self) -> npt.NDArray[np.int64]:
        """(N,) of closed tasks and next_event: the right label, by its place in `labels`."""
        return self.right_column if self.events is None else self.events.classes

    @property
    def users(self) -> npt.NDArray[np.int32]:
        """(N,): the user of each example."""
        return self.examples.user_index

    @property
    def clusters(self) -> npt.NDArray[np.int64]:
        """(N,): what is resampled as a whole: users, of tasks about actions sessions."""
        if self.is_action:
            assert self.sessions is not None  # of every event dataset
            return self.sessions
        return self.users.astype(np.int64)

    def answer_texts(self, titles: Sequence[str]) -> list[list[str]]:
        """The answers that a language model scores, (N, C), each with what ends it."""
        if self.choices is not None:
            return [[f"{text}{end}" for text in row] for row, end in zip(self.choices, self.ends)]
        if self.candidates is None:
            return [list(self.words) for _ in self.prompts]
        return [[titles[i] + end for i in row] for row, end in zip(self.candidates.tolist(), self.ends)]


class Prediction(NamedTuple):
    """What one system says of one task."""

    scores: npt.NDArray[np.float64]  # (N, C), a NaN row is invalid
    full_rank: npt.NDArray[np.int64] | None = None  # (N,) in the whole catalogue; 0 where a beam did not find it
    beam: dict[str, Any] | None = None  # {width, k, exact, recall} of the beam search, catalogue.py
    nats: npt.NDArray[np.float64] | None = None  # (N,) negative log-likelihood of the right answer
    generations: list[tuple[str, bool]] | None = None  # of the first examples: text, and whether it ended by itself
    has_probabilities: bool = True  # closed tasks: whether scores are log-probabilities
    verdicts: list[Verdict] | None = None  # (N,) of explanations
    rationales: list[tuple[str, bool]] | None = None  # (N,) written before the answers that were scored or generated
    free: list[tuple[str, bool]] | None = None  # next_event: answers of the first examples without a schema
    calibration: Fitted | None = None  # closed tasks about actions: the temperature, where one was to be fitted
    top: npt.NDArray[np.int64] | None = None  # (N, k) the first items of the whole catalogue, NO_ITEM behind the last


def valid_rows(prediction: Prediction) -> npt.NDArray[np.bool_]:
    """(N,): examples for which every score is a number."""
    return np.asarray(~np.isnan(prediction.scores).any(axis=1))


def predicted_labels(prediction: Prediction) -> npt.NDArray[np.int64]:
    """Closed tasks: the column with the highest score (the first among equals), -1 where invalid. (N,)"""
    filled = np.where(np.isnan(prediction.scores), -np.inf, prediction.scores)
    return np.where(valid_rows(prediction), filled.argmax(axis=1), -1)


def load_tasks(dataset: Dataset, split: str, max_examples: int | None, seed: int) -> list[Task]:
    """The tasks of a split, with at most `max_examples` examples each, of users chosen by `seed`.

    Raises:
        UserError: an empty split; candidates that are missing, repeated or without the target (names the example).
    """
    light = dataset.examples(split, ["example_id", "user_index"])
    if not light.num_rows:
        raise UserError(f"{dataset.folder}: the split {split} has 0 examples, at least 1 is needed: see its manifest")
    names = pc.list_element(pc.split_pattern(light["example_id"], "/", max_splits=1), 0).to_numpy(zero_copy_only=False)
    keys = dataset.sequences.user_keys[light["user_index"].to_numpy()]
    chosen = {name: choose(np.flatnonzero(names == name), keys, max_examples, seed) for name in dict.fromkeys(names)}
    rows = np.sort(np.concatenate(list(chosen.values())))
    table = dataset.chosen_examples(split, rows)
    tasks = []
    for name, picked in chosen.items():
        part = table.take(pa.array(np.searchsorted(rows, picked)))
        tasks.append(_task(str(name), part, dataset, split, int((names == name).sum())))
    return tasks


def choose(
    rows: npt.NDArray[np.int64], keys: npt.NDArray[np.uint64], max_examples: int | None, seed: int
) -> npt.NDArray[np.int64]:
    """Rows of the users that come first in a seeded order, at most `max_examples`, in their old order.

    keys holds the user key of every row. A choice hangs on (seed, user): it is the same for all systems and tasks.
    """
    if max_examples is None or len(rows) <= max_examples:
        return rows
    order = np.argsort(mix(seed, keys[rows]), kind="stable")
    return np.sort(rows[order[:max_examples]])


def _task(name: str, table: pa.Table, dataset: Dataset, split: str, available: int) -> Task:
    kind = table["task"][0].as_py()
    examples, target = Examples.of(table), pc.fill_null(table["target"], NO_ITEM).to_numpy().astype(np.int64)
    judges: dict[str, type[Recommendations] | type[AssetRankings]]
    judges = {ASSETS: Recommendations, RANK_ASSETS: AssetRankings}
    judge = judges[kind](dataset, split, examples.example_ids) if kind in judges else None
    section = _section(dataset, name)
    labels, words = _answers(dataset, name) if kind in (*CLOSED_KINDS, NEXT_EVENT) else ([], [])
    candidates = None if kind in _WORD_KINDS else candidate_matrix(table)
    completions = [messages[-1]["content"] for messages in table["completion"].to_pylist()]
    events = None
    if kind == NEXT_EVENT:
        place = [_label_index(label, labels, name) for label in table["label"].to_pylist()]
        fields = list(section.fields) if section else []
        events = NextEvents([last_line(text) for text in completions], np.array(place, np.int64), words, fields)
    choices = _choices(table, kind) if events is None else [[text] for text in events.right]
    if events is not None:
        right = np.zeros(len(target), dtype=np.int64)
    elif choices is not None:
        pairs = zip(table["label"].to_pylist(), choices)
        right = np.array([row.index(label) for label, row in pairs], dtype=np.int64)
    elif candidates is None:
        right = np.array([_label_index(label, labels, name) for label in table["label"].to_pylist()], dtype=np.int64)
    else:
        right = (candidates == target[:, None]).argmax(axis=1)
    ends = ["\n" if text.endswith("\n") else "" for text in completions]
    prompts = table["prompt"].to_pylist()
    return Task(
        name=name,
        kind=kind,
        examples=examples,
        prompts=prompts,
        target=target,
        candidates=candidates,
        right_column=right,
        ends=ends,
        labels=labels,
        words=words,
        available=available,
        choices=choices,
        judge=judge,
        section=section,
        sessions=_sessions(table, dataset) if dataset.is_events else None,
        events=events,
        relations=table["relation"].to_pylist() if kind == QUESTION else None,
    )


def _sessions(table: pa.Table, dataset: Dataset) -> npt.NDArray[np.int64]:
    """(N,) a number for each session of each user, the same whichever examples were chosen: reports are compared."""
    assert dataset.sequences.sessions is not None  # of every event dataset
    most = int(dataset.sequences.sessions.max(initial=0)) + 1
    return np.asarray(table["user_index"].to_numpy().astype(np.int64) * most + table["session"].to_numpy())


def last_line(text: str) -> str:
    """The answer of a completion that may begin with a rationale.

    >>> last_line("They compared two.\\nbuy")
    'buy'
    """
    return text.rpartition("\n")[2]


def _section(dataset: Dataset, name: str) -> TaskSection | None:
    """The entry of `tasks` that made a task's examples, from the manifest; None where that names no such entry."""
    base, _, repeat = name.partition(".")
    found = [one for one in dataset.manifest.get("recipe", {}).get("tasks", []) if one.get("task") == base]
    place = int(repeat or 1) - 1
    return TaskSection.model_validate(found[place]) if place < len(found) else None


def _choices(table: pa.Table, kind: str) -> list[list[str]] | None:
    """The answers of questions (N, C), of explanations and lists the right one of each; None of other tasks.

    Raises:
        UserError: a question whose right answer is not among its choices once.
    """
    if kind in (EXPLAIN, ASSETS, RANK_ASSETS):
        return [[label] for label in table["label"].to_pylist()]
    if kind != QUESTION:
        return None
    found: list[list[str]] = table["choices"].to_pylist()
    for example_id, label, row in zip(table["example_id"].to_pylist(), table["label"].to_pylist(), found):
        if row.count(label) != 1 or len(row) != len(found[0]):
            raise UserError(
                f"example {example_id} has {len(row)} choices, its answer {label!r} among them {row.count(label)} "
                f"times: {len(found[0])} choices with the answer once are expected, convert again"
            )
    return found


def candidate_matrix(table: pa.Table) -> npt.NDArray[np.int64]:
    """Frozen candidates (N, C) of a table with example_id, target and candidates, checked.

    Raises:
        UserError: no candidates, another number than in the first example, an item twice, or no target among them.
    """
    ids, rows = table["example_id"].to_pylist(), table["candidates"].to_pylist()
    targets = table["target"].to_pylist()
    for example_id, row, target in zip(ids, rows, targets):
        if not row:
            raise UserError(f"example {example_id} has no candidates: convert the dataset again, it draws them")
        if row.count(target) != 1:
            raise UserError(
                f"example {example_id}: its target (item_index {target}) is among the candidates {row.count(target)} "
                "times, exactly once is expected: convert the dataset again"
            )
        if len(set(row)) != len(row):
            twice = next(item for item in row if row.count(item) > 1)
            raise UserError(f"example {example_id}: item_index {twice} is among the candidates twice: convert again")
        if len(row) != len(rows[0]):
            raise UserError(
                f"example {example_id} has {len(row)} candidates, {ids[0]} has {len(rows[0])}: all examples need the "
                "same number, set protocol.candidates.count and convert again"
            )
    return np.array(rows, dtype=np.int64)


def _answers(dataset: Dataset, name: str) -> tuple[list[str], list[str]]:
    """Labels and their words: the actions, or of like and outcome those of the template in the manifest."""
    base, _, repeat = name.partition(".")
    if base not in (LIKE, OUTCOME):
        return dataset.actions, dataset.words
    entries = [entry for entry in dataset.manifest["templates"] if entry["task"] == base]
    place = int(repeat or 1) - 1
    answers: dict[str, Any] = entries[place].get("answers", {}) if place < len(entries) else {}
    if len(answers) < 2:
        raise UserError(
            f"{dataset.folder}: its manifest names {len(answers)} answers for {name}, 2 are needed: convert again"
        )
    # the positive one first: "like", or "yes"
    labels = sorted(answers, key=lambda label: (label not in (LIKE, YES), label))
    return labels, [answers[label] for label in labels]


def _label_index(label: str | None, labels: list[str], name: str) -> int:
    if label not in labels:
        raise UserError(f"an example of {name} has the label {label!r}, its answers are {', '.join(labels)}")
    return labels.index(label)
