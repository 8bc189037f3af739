"""What the manifest and the summary say of the classes of an event dataset: how often each answer is right.

Counts of the written examples enter; an entry of the manifest leaves, and of it lines and warnings for people.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from recllm.convert.events import NO, YES
from recllm.convert.examples import Task
from recllm.convert.targets import LEFT_OUT, WITHOUT_RATIONALE
from recllm.convert.templates import ACTION_TASKS
from recllm.recipe import ActionsSection
from recllm.schema import SPLITS

TOLD = (*LEFT_OUT, WITHOUT_RATIONALE)
_SAID = {
    "sessions_of_one_event": "sessions of one event",
    "sessions_too_short": "sessions with too few events",
    "sessions_already_positive": "sessions that had come to it before",
    "sessions_trimmed": "sessions cut off before it is known",
}


def entry(
    actions: ActionsSection,
    tasks: Iterable[Task],
    labels: Mapping[tuple[str, str], int],
    told: Mapping[str, int],
    sessions: Mapping[str, int],
    counts: Mapping[str, int],
) -> dict[str, Any]:
    """The manifest's `actions`.

    Args:
        actions: of the recipe.
        tasks: of the converter.
        labels: examples of the tasks about actions by "split/task name" and label.
        told: by "split/task name/what", with what of TOLD.
        sessions: with positions of each split.
        counts: of `Prepared`.

    Returns:
        labels, words: the vocabulary, label → words; targets: "split/task name" → label → examples, none left out;
        left_out: "split/task name" → reason → sessions; without_rationale: "split/task name" → events without the
        rationale that the task asks for, of train left out, of valid and test examples with the answer alone;
        sessions, events_without_item: counts.
    """
    tasks = list(tasks)
    places = {f"{split}/{task.name}": task for task in tasks for split in SPLITS}
    reasons = {place: {why: n for why in LEFT_OUT if (n := told.get(f"{place}/{why}", 0))} for place in places}
    blank = {place: told.get(f"{place}/{WITHOUT_RATIONALE}", 0) for place in places}
    return {
        "labels": list(actions.words),
        "words": dict(actions.words),
        "targets": {
            place: {label: labels.get((place, label), 0) for label in _labels(actions, task)}
            for place, task in places.items()
            if task.task in ACTION_TASKS
        },
        "left_out": {place: found for place, found in reasons.items() if found},
        WITHOUT_RATIONALE: {place: count for place, count in blank.items() if count},
        "sessions": {"all": counts["sessions"], **{split: sessions.get(split, 0) for split in SPLITS}},
        "events_without_item": counts["events_without_item"],
    }


def _labels(actions: ActionsSection, task: Task) -> list[str]:
    return [YES, NO] if task.task == "outcome" else list(actions.words)


def lines(found: Mapping[str, Any] | None) -> list[str]:
    """The entry for people: sessions, shares of classes, what has no example."""
    if found is None:
        return []
    sessions = ", ".join(f"{split} {found['sessions'][split]}" for split in SPLITS)
    said = [
        f"  sessions: {found['sessions']['all']}, with positions of {sessions}; "
        f"{found['events_without_item']} events without item"
    ]
    for place, counts in found["targets"].items():
        total = max(sum(counts.values()), 1)
        ordered = sorted(counts.items(), key=lambda pair: -pair[1])
        said.append(f"  classes, {place}: {', '.join(f'{label} {count / total:.1%}' for label, count in ordered)}")
    for place, reasons in found["left_out"].items():
        said.append(f"  without example, {place}: {', '.join(f'{n} {_SAID[why]}' for why, n in reasons.items())}")
    return said


def warnings(found: Mapping[str, Any] | None) -> list[str]:
    """Classes that a split lacks, and rationales that the log lacks."""
    if found is None:
        return []
    said = []
    names = dict.fromkeys(place.partition("/")[2] for place in found["targets"])
    for name in names:
        counts = {split: found["targets"][f"{split}/{name}"] for split in SPLITS}
        occur = {label for of_split in counts.values() for label, count in of_split.items() if count}
        for split, of_split in counts.items():
            if missing := [label for label, count in of_split.items() if not count and label in occur]:
                said.append(_missing(split, name, missing))
    for place, count in found[WITHOUT_RATIONALE].items():
        what = (
            "examples have no rationale in the log and are left out"
            if place.startswith("train/")
            else "examples have no rationale in the log: their completion is the answer alone, and evaluation has the "
            "model write its own"
        )
        said.append(f"{place}: {count} {what}")
    return said


def _missing(split: str, name: str, labels: list[str]) -> str:
    why = "it cannot be learnt" if split == "train" else "it has no recall and no F1 there"
    return f"{split}/{name} has no example of {', '.join(labels)}: {why}"
