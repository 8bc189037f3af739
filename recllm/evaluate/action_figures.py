"""Figures of the tasks about actions: tasks and predictions enter, the parts of metrics.json about them leave.

evaluation.py says what each part holds, action_metrics.py how each figure is defined. Intervals are over sessions, of
items to come (next_item) over users.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from recllm.data.dataset import Dataset
from recllm.evaluate import action_metrics, metrics, statistics
from recllm.evaluate.action_metrics import Found
from recllm.evaluate.action_ranks import Draws, Ranking
from recllm.evaluate.calibration import probabilities
from recllm.evaluate.next_events import EXACT, ROUGE, TYPE_ACCURACY
from recllm.evaluate.statistics import Estimate, as_json
from recllm.evaluate.tasks import Prediction, Task, predicted_labels
from recllm.recipe import ActionProtocol, BootstrapSection, Protocol

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

EXACT_MATCH = "exact_match"  # the figure that leads these tasks


class Columns(NamedTuple):
    """Figures that one function computes at once from how often each session was drawn, (S, U) → (S, M)."""

    names: list[str]  # (M,)
    of: Callable[[Floats], Floats]


def predicted_classes(task: Task, prediction: Prediction) -> Integers:
    """(N,) the action that a prediction says, by its place in the task's labels; -1 where it says none."""
    if task.events is None:
        return predicted_labels(prediction)
    return task.events.predicted(prediction.generations or [])


def right_rows(task: Task, prediction: Prediction) -> Floats:
    """(N,) 1 where all that is asked is right."""
    if task.events is None:
        return metrics.accuracy(task.right_column, predicted_labels(prediction))
    return task.events.figures(prediction.generations or [])[EXACT]


def exact_match(task: Task, prediction: Prediction) -> Floats:
    """A session's exact match, sessions in ascending order: their mean is the figure."""
    return action_metrics.session_means(right_rows(task, prediction), task.clusters)


def temperature(prediction: Prediction) -> float | None:
    """What a prediction's scores are divided by; None without calibration."""
    return None if prediction.calibration is None else prediction.calibration.temperature


# ---- of one system ----


def entries(
    task: Task, predictions: Sequence[Prediction], protocol: Protocol, training: Integers
) -> list[dict[str, Any]]:
    """By system what its entry has more: {metrics, classes, calibration, reliability}; training (C,) counts labels."""
    head = action_metrics.head_classes(training)
    section = protocol.bootstrap
    of_counts = functools.partial(statistics.bootstrap_counts, width=len(training) * (len(training) + 1))  # confusion
    exact = np.stack([exact_match(task, prediction) for prediction in predictions], axis=1)
    means = _bootstrapped(statistics.bootstrap_means, exact, np.arange(len(exact)), section)
    found = []
    for prediction, mean in zip(predictions, means, strict=True):  # one at a time, as a ranking of each is kept
        own = _columns(task, prediction, head, protocol.actions)
        estimates = _bootstrapped(of_counts, [one.of for one in own], task.clusters, section)
        named = {n: e for one, known in zip(own, estimates, strict=True) for n, e in zip(one.names, known, strict=True)}
        found.append(_entry(task, prediction, mean, named, head, protocol))
    return found


def _bootstrapped(method: Callable[..., Any], figures: Any, clusters: npt.NDArray, section: BootstrapSection) -> Any:
    return method(figures, clusters, np.random.default_rng(section.seed), section.samples, section.confidence)


def _entry(
    task: Task,
    prediction: Prediction,
    exact: Estimate,
    found: Mapping[str, Estimate],
    head: npt.NDArray[np.bool_],
    protocol: Protocol,
) -> dict[str, Any]:
    plain = {EXACT_MATCH: exact} | {name: one for name, one in found.items() if "|" not in name}
    found = _without_few(task, prediction, found)
    return {
        "metrics": {name: as_json(one) for name, one in plain.items()},
        "classes": _classes(task, prediction, found, head),
        "calibration": _calibration(prediction, found),
        "reliability": _reliability(task, prediction, protocol.actions.bins),
    }


def _without_few(task: Task, prediction: Prediction, found: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """The figures of each class without intervals where fewer than FEW_USERS sessions hold it.

    They hold it where its label is right, for precision where it is the answer. Of so few the resamples that drew one
    say next to nothing of how far the figure may move: of a single session they are all alike.
    """
    kept, columns = dict(found), {"precision": predicted_classes(task, prediction)}
    for figure in ("precision", "recall", "f1"):
        column = columns.get(figure, task.classes)
        for place in range(len(task.labels)):
            if len(np.unique(task.clusters[column == place])) < statistics.FEW_USERS:
                kept[f"{figure}|{place}"] = Estimate(kept[f"{figure}|{place}"].value, np.nan, np.nan)
    return kept


def _columns(task: Task, prediction: Prediction, head: npt.NDArray[np.bool_], section: ActionProtocol) -> list[Columns]:
    """Everything that is no mean of examples. "A|B" are figures of class B, or after calibration."""
    found = [_of_classes(task, prediction, head)]
    if task.events is not None:
        found += _of_fields(task, prediction)
    elif prediction.has_probabilities:
        found.append(_of_probabilities(task, probabilities(prediction.scores), section.bins, ""))
        if (scale := temperature(prediction)) is not None:
            scaled = probabilities(prediction.scores, scale)
            found.append(_of_probabilities(task, scaled, section.bins, "|calibrated"))
    return found


def _of_classes(task: Task, prediction: Prediction, head: npt.NDArray[np.bool_]) -> Columns:
    label, predicted, size = task.classes, predicted_classes(task, prediction), len(task.labels)
    names = ["macro_f1", "weighted_f1", "macro_recall", "weighted_recall"]
    names += [f"{mean}_recall/{part}" for part in ("head", "tail") for mean in ("macro", "weighted")]
    names += ["most_frequent_share|", "rest_recall|"]
    names += [f"{figure}|{place}" for figure in ("precision", "recall", "f1") for place in range(size)]
    answered = np.bincount(predicted[predicted >= 0], minlength=size)
    often = np.arange(size) == answered.argmax()  # the answer that is given most often

    members, sizes = statistics.clusters_of(task.clusters)
    cells = action_metrics.confusion_by_cluster(label, predicted, size, members)
    whole = action_metrics.class_figures(action_metrics.confusion(label, predicted, size))

    def compute(counts: Floats) -> Floats:
        table = action_metrics.confusion_of(cells, counts)
        of = action_metrics.class_figures(table)
        columns = [action_metrics.macro(of.f1, whole=whole.f1[0]), action_metrics.weighted(of.f1, of.support)]
        for part in (None, head, ~head):
            columns += [
                action_metrics.macro(of.recall, part, whole.recall[0]),
                action_metrics.weighted(of.recall, of.support, part),
            ]
        share = table[:, :, :-1].sum(axis=1)[:, often][:, 0] / (counts @ sizes)
        columns += [share, action_metrics.macro(of.recall, ~often, whole.recall[0])]
        return np.concatenate([np.stack(columns, axis=1), of.precision, of.recall, of.f1], axis=1)

    return Columns(names, compute)


def _of_probabilities(task: Task, probability: Floats, bins: int, suffix: str) -> Columns:
    """AUC and its user-grouped form, Brier score, calibration error and nats among the labels.

    With two labels the first is the positive one, and AUC and Brier score are those of two classes.
    """
    label, nats = task.right_column, action_metrics.label_nats(probability, task.right_column)
    known = np.asarray(~np.isnan(probability).any(axis=1))
    gaps = action_metrics.calibration_gaps(probability, label, bins)
    is_two = len(task.labels) == 2
    error = (
        metrics.brier(probability[:, 0], label == 0) if is_two else action_metrics.multiclass_brier(probability, label)
    )
    sums = _sums(task, np.column_stack([error, np.ones(len(error)), np.where(known, nats, 0), known, gaps]))
    # a temperature changes no order: AUC stays as it is, or nearly so of many classes
    names, ranked = ([], None) if suffix else _of_two(task, probability) if is_two else _of_many(task, probability)
    names = [*names, "brier" if is_two else "multiclass_brier", "top_label_calibration_error", "label_nats"]

    def compute(counts: Floats) -> Floats:
        found = counts @ sums
        columns = [_ratio(found[:, 0], found[:, 1]), action_metrics.calibration_error_of(found[:, 4:])]
        plain = np.stack([*columns, _ratio(found[:, 2], found[:, 3])], axis=1)
        return plain if ranked is None else np.concatenate([ranked(counts), plain], axis=1)

    return Columns([name + suffix for name in names], compute)


Ranked = tuple[list[str], Callable[[Floats], Floats]]  # names of two figures of ranks, and both, (S, U) → (S, 2)


def _of_two(task: Task, probability: Floats) -> Ranked:
    first, positive, (members, _) = probability[:, 0], task.right_column == 0, statistics.clusters_of(task.clusters)
    plain, grouped = Ranking.of(first, positive, members), Ranking.of(first, positive, members, task.users)

    def compute(counts: Floats) -> Floats:
        draws = Draws.of(counts, members)
        return np.stack([plain.auc(draws), grouped.grouped(draws)], axis=1)

    return ["auc", "grouped_auc"], compute


def _of_many(task: Task, probability: Floats) -> Ranked:
    members, sizes = statistics.clusters_of(task.clusters)
    plain = action_metrics.rank_classes(probability, task.right_column, members)
    grouped = action_metrics.rank_classes(probability, task.right_column, members, task.users)

    def areas(counts: Floats) -> list[Floats]:
        draws = Draws.of(counts, members)
        found = [one.auc(draws) for one in plain], [one.grouped(draws) for one in grouped]
        return [np.stack(of, axis=1) for of in found]

    whole = areas(np.ones((1, len(sizes))))

    def compute(counts: Floats) -> Floats:
        found = zip(areas(counts), whole, strict=True)
        return np.stack([action_metrics.macro(of, whole=known[0]) for of, known in found], axis=1)

    return ["macro_auc", "macro_grouped_auc"], compute


def _of_fields(task: Task, prediction: Prediction) -> list[Columns]:
    """ROUGE-L of each field, over the examples whose right answer has it."""
    assert task.events is not None
    figures = task.events.figures(prediction.generations or [])
    return [_of_known(task, name, values) for name, values in figures.items() if name.startswith(ROUGE)]


def _of_known(task: Task, name: str, values: Floats) -> Columns:
    known = ~np.isnan(values)
    sums = _sums(task, np.column_stack([np.where(known, values, 0), known]))
    return Columns([name], lambda counts: _ratio(*(counts @ sums).T)[:, None])


def _sums(task: Task, values: Floats) -> Floats:
    """(U, K) the sums of values (N, K) over each session, in ascending order."""
    members, sizes = statistics.clusters_of(task.clusters)
    return np.stack([np.bincount(members, column, len(sizes)) for column in values.T], axis=1)


def _ratio(above: Floats, below: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)


def _classes(
    task: Task, prediction: Prediction, found: Mapping[str, Estimate], head: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    label, predicted = task.classes, predicted_classes(task, prediction)
    table = action_metrics.confusion(label, predicted, len(task.labels))[0]
    answered = table[:, :-1].sum(axis=0)
    often = {
        "label": task.labels[int(answered.argmax())],
        "share": as_json(found["most_frequent_share|"]),
        "rest_recall": as_json(found["rest_recall|"]),
    }
    per_class = [
        {
            "label": name,
            "words": words,
            "head": bool(head[place]),
            "support": int(table[place].sum()),
            "predicted": int(answered[place]),
            **{figure: as_json(found[f"{figure}|{place}"]) for figure in ("precision", "recall", "f1")},
        }
        for place, (name, words) in enumerate(zip(task.labels, task.words, strict=True))
    ]
    return {
        "per_class": per_class,
        "confusion": table.astype(int).tolist(),
        "most_frequent": often if answered.any() else None,
    }


def _calibration(prediction: Prediction, found: Mapping[str, Estimate]) -> dict[str, Any] | None:
    fitted = prediction.calibration
    if fitted is None or fitted.temperature is None:
        return None
    after = {name.partition("|")[0]: one for name, one in found.items() if name.endswith("|calibrated")}
    return {
        "temperature": fitted.temperature,
        "num_examples": fitted.num_examples,
        "before": {name: as_json(found[name]) for name in after},
        "after": {name: as_json(one) for name, one in after.items()},
    }


def _reliability(task: Task, prediction: Prediction, bins: int) -> dict[str, Any] | None:
    if task.events is not None or not prediction.has_probabilities:
        return None
    scales = {"before": 1.0} | ({} if (scale := temperature(prediction)) is None else {"after": scale})
    return {
        name: [
            one._asdict()
            for one in action_metrics.reliability(probabilities(prediction.scores, scale), task.right_column, bins)
        ]
        for name, scale in scales.items()
    }


# ---- items to come ----


def wants_otto(task: Task, dataset: Dataset) -> bool:
    """Whether a task's ranked items are held against all that follows in the session, by action."""
    return dataset.is_events and task.kind == "next_item" and bool(task.section and task.section.within_session)


def items_to_come(task: Task, dataset: Dataset, split: str, next_only: Sequence[str]) -> list[list[Integers]]:
    """By example and action the items that follow in the session, from the target on.

    Of the actions `next_only` the next one alone, as OTTO asks of clicks. What another split holds is left out: of
    valid sessions what is newer than the cut-off of test.
    """
    sequences = dataset.sequences
    assert sequences.actions is not None
    assert sequences.sessions is not None
    cutoff = dataset.manifest["split"]["cutoffs"].get("test") if split == "valid" else None
    alone = [label in next_only for label in dataset.actions]
    found = []
    for user, end in zip(task.users.tolist(), task.examples.history_end.tolist()):
        begin, stop = sequences.offsets[user] + end, sequences.offsets[user + 1]
        rest = np.arange(begin, stop)
        mine = (sequences.sessions[rest] == sequences.sessions[begin]) & (sequences.items[rest] >= 0)
        if cutoff is not None:
            mine &= sequences.timestamps[rest] < cutoff
        items, actions = sequences.items[rest[mine]], sequences.actions[rest[mine]]
        line = [items[actions == place].astype(np.int64) for place in range(len(alone))]
        found.append([of[:1] if only else of for of, only in zip(line, alone, strict=True)])
    return found


def otto(
    task: Task, predictions: Sequence[Prediction], to_come: list[list[Integers]], labels: list[str], protocol: Protocol
) -> list[dict[str, Any] | None]:
    """By system {k, recall {label: ESTIMATE}, possible {label: items to be found}, score}; None without a ranking.

    The task is next_item, of which users are resampled, not sessions.
    """
    section, made = protocol.actions, list[dict[str, Any] | None]()
    for prediction in predictions:
        if prediction.top is None:
            made.append(None)
            continue
        found = action_metrics.found_items(prediction.top, to_come, section.otto_k)
        made.append(_otto_entry(found, task.clusters, labels, protocol))
    return made


def _otto_entry(found: Found, clusters: Integers, labels: list[str], protocol: Protocol) -> dict[str, Any]:
    parts = protocol.actions.otto_weights

    def compute(weights: Floats) -> Floats:
        recalls = action_metrics.recall_at_k(found, weights)
        if not parts:
            return recalls
        return np.concatenate([recalls, action_metrics.otto_score(recalls, labels, parts)[:, None]], axis=1)

    estimates = _bootstrapped(statistics.bootstrap_columns, [compute], clusters, protocol.bootstrap)[0]
    return {
        "k": protocol.actions.otto_k,
        "recall": {label: as_json(one) for label, one in zip(labels, estimates)},
        "possible": dict(zip(labels, found.possible.sum(axis=0).tolist())),
        "score": as_json(estimates[-1]) if parts else None,
    }


# ---- what is to be said of them ----


def warnings(task: Task) -> list[str]:
    """A sentence for each class that no evaluated example has."""
    counts = np.bincount(task.classes, minlength=len(task.labels))
    return [
        f'{task.name}: none of the {len(task.classes)} evaluated examples has the label "{label}": it has no recall '
        "and no F1, and means over classes leave it out."
        for label, count in zip(task.labels, counts.tolist())
        if not count
    ]


def uncalibrated(task: Task, predictions: Mapping[str, Prediction]) -> list[str]:
    """A sentence for each reason why systems, by name, have no temperature though one was to be fitted."""
    found: dict[str, list[str]] = {}
    for name, prediction in predictions.items():
        if prediction.calibration is not None and prediction.calibration.temperature is None:
            found.setdefault(prediction.calibration.reason, []).append(name)
    return [f"{task.name}: no calibration of {', '.join(names)}: {reason}." for reason, names in found.items()]


def below_constant(
    task: Task, systems: Sequence[Mapping[str, Any]], main: str, constant: Prediction
) -> list[dict[str, Any]]:
    """What the report must open with: the adapters and the base model that are below the constant answer, `main` first.

    Below in exact match, or in plain accuracy, of next_event that of the action's type: {task, system, metric, value,
    constant, answer, answer_share, rest_recall}, with the answer that a system gives most often and its macro recall on
    all other classes; these are null where none of its answers can be read.
    """
    asked = [one for one in systems if one["task"] == task.name and one["kind"] in ("adapter", "base_model")]
    levels = {EXACT_MATCH: float(exact_match(task, constant).mean())}
    levels |= {TYPE_ACCURACY if task.events else "accuracy": _right_classes(task, constant)}
    found = [_below(one, levels) for one in sorted(asked, key=lambda one: one["name"] != main)]
    return [one for one in found if one is not None]


def _right_classes(task: Task, prediction: Prediction) -> float:
    """Share of examples, each alike, whose action is right."""
    return float((predicted_classes(task, prediction) == task.classes).mean())


def _below(system: Mapping[str, Any], levels: Mapping[str, float]) -> dict[str, Any] | None:
    """The first metric in which a system is below the constant answer; None where it is in none."""
    for metric, level in levels.items():
        value = (system["metrics"].get(metric) or {}).get("value")
        # a hair of tolerance: what is equal in arithmetic must not be below for its last bit
        if value is None or value >= level - 1e-9:
            continue
        often, found = system["classes"]["most_frequent"], {"task": system["task"], "system": system["name"]}
        found |= {"metric": metric, "value": value, "constant": level}
        if often is None:
            return found | dict.fromkeys(("answer", "answer_share", "rest_recall"))
        shares = {"answer_share": often["share"]["value"], "rest_recall": often["rest_recall"]["value"]}
        return found | {"answer": often["label"]} | shares
    return None
