"""Predictions → figures: metrics with intervals, paired comparisons, segments, predictions.parquet.

Tasks and the predictions of every system enter; the parts of metrics.json leave (evaluation.py says what it holds).
Every resampling starts from the protocol's seed, so that all systems see the same resamples.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recllm.data.dataset import Dataset
from recllm.evaluate import action_figures, action_metrics, metrics, statistics
from recllm.evaluate.action_figures import EXACT_MATCH
from recllm.evaluate.asset_rankings import SIGNED
from recllm.evaluate.baselines import item_counts, training_interactions
from recllm.evaluate.explanations import SUPPORTED, UNREADABLE, counted
from recllm.evaluate.language_model import System
from recllm.evaluate.next_events import TYPE_ACCURACY
from recllm.evaluate.statistics import Estimate, as_json
from recllm.evaluate.tasks import EXPLAIN, ON_ITEM, QUESTION, Prediction, Task, predicted_labels, valid_rows
from recllm.recipe import BootstrapSection, Protocol
from recllm.schema import NO_ITEM, actions_of, items_of

Floats = npt.NDArray[np.float64]

HEAD_SHARE = 0.2
HISTORY_BUCKETS = ((1, 5), (6, 10), (11, 20), (21, 50), (51, 200))
SEGMENT_NOTES = {
    "target popularity": "head: targets among the most frequent 20% of the items in training; tail: the other items of "
    "training; cold: cold-start items, without any interaction in training",
    "history length": "interactions of the user before the cut-off of the example",
    "user": "in training: the user has interactions in training; new: none",
    "asked in training": "yes: training has a question about the same item, or an explanation of it; no: it has none",
    "taste": "of their own: the utility is fitted to the customer's purchases before the date; of all customers: to "
    "those of all, where the customer's are too few",
}


def example_metrics(task: Task, prediction: Prediction, cutoffs: Sequence[int]) -> dict[str, Floats]:
    """Metrics that are means over examples, each (N,): ranking metrics, accuracy, supported or hits; valid_ratio, nats.

    Of a bank's tasks a prediction without answers is chance. With a rationale rationale_finished is the share of
    rationales that ended by themselves.
    """
    valid = valid_rows(prediction)
    if task.judge is not None:
        written = prediction.generations
        table = task.judge.chance(cutoffs) if written is None else task.judge.figures(written, cutoffs)
    elif task.events is not None:
        known = task.events.figures(prediction.generations or [])
        table = {name: known[name] for name in (TYPE_ACCURACY, "valid_ratio")}
    elif task.is_explained:
        verdicts = np.array(prediction.verdicts)
        table = {"supported": (verdicts == SUPPORTED).astype(np.float64)}
        table["valid_ratio"] = metrics.valid_ratio(verdicts != UNREADABLE)
    elif task.is_closed:
        table = {"accuracy": metrics.accuracy(task.right_column, predicted_labels(prediction))}
        table["valid_ratio"] = metrics.valid_ratio(valid)
    else:
        table = metrics.ranking(metrics.ranks(prediction.scores, task.right_column), valid, cutoffs)
    if prediction.rationales is not None:
        table["rationale_finished"] = np.array([done for _, done in prediction.rationales], dtype=np.float64)
    return table if prediction.nats is None else table | {"nats": prediction.nats}


def system_entries(
    task: Task,
    systems: Sequence[System],
    titles: list[str],
    protocol: Protocol,
    training: npt.NDArray[np.int64] | None = None,
) -> list[dict[str, Any]]:
    """The entries of `systems` for one task; of tasks about actions `training` (C,) counts the labels of training."""
    cutoffs, predictions = protocol.ranking.k, [system.predictions[task.name] for system in systems]
    tables = [example_metrics(task, prediction, cutoffs) for prediction in predictions]
    full_tables = [_full_metrics(prediction, cutoffs) for prediction in predictions]
    found = estimates([*tables, *full_tables], task.clusters, protocol.bootstrap)
    scored, full, further = found[: len(systems)], found[len(systems) :], [dict[str, Any]() for _ in systems]
    if task.is_action:
        assert training is not None
        further = action_figures.entries(task, predictions, protocol, training)
        scored = [more.pop("metrics") | own for own, more in zip(scored, further, strict=True)]
    elif task.is_closed:
        closed = closed_figures(task, predictions, protocol.bootstrap)
        scored = [own | more for own, more in zip(scored, closed, strict=True)]
    return [
        {
            "name": system.name,
            "kind": system.kind,
            "method": system.method,
            "has_gate": system.has_gate,
            "task": task.name,
            "description": system.description,
            **size_of(task, np.arange(len(task.target))),
            "metrics": figures,
            "full_catalogue": ranked or None,
            "beam": prediction.beam,
            "generation": generation_figures(task, prediction, titles, protocol),
            "verdicts": _verdicts(task, prediction),
            **more,
        }
        for system, prediction, figures, ranked, more in zip(systems, predictions, scored, full, further, strict=True)
    ]


def size_of(task: Task, rows: npt.NDArray[np.int64]) -> dict[str, int]:
    """How many examples, users and, of tasks about actions, sessions some rows of a task have."""
    found = {"num_examples": len(rows), "num_users": len(np.unique(task.users[rows]))}
    return found | ({"num_sessions": len(np.unique(task.clusters[rows]))} if task.is_action else {})


def _verdicts(task: Task, prediction: Prediction) -> dict[str, int] | None:
    """How often each verdict was given on explanations; of next_event why answers could not be read."""
    if task.events is not None:
        return task.events.reasons(prediction.generations or [])
    return None if prediction.verdicts is None else counted(prediction.verdicts)


def _full_metrics(prediction: Prediction, cutoffs: Sequence[int]) -> dict[str, Floats]:
    if prediction.full_rank is None:
        return {}
    return metrics.ranking(prediction.full_rank, np.ones(len(prediction.full_rank), bool), cutoffs)


def estimates(
    tables: Sequence[dict[str, Floats]], users: npt.NDArray, section: BootstrapSection
) -> list[dict[str, Any]]:
    """Mean and interval of each column of each table; all are about the same examples, whose users are drawn once."""
    columns = [values for table in tables for values in table.values()]
    if not columns:
        return [{} for _ in tables]
    rng = np.random.default_rng(section.seed)
    values = np.stack(columns, axis=1)
    found = iter(statistics.bootstrap_means(values, users, rng, section.samples, section.confidence))
    return [
        {name: as_json(_signed(next(found), table) if name in SIGNED else next(found)) for name in table}
        for table in tables
    ]


def _signed(estimate: Estimate, table: dict[str, Floats]) -> Estimate:
    """Of a mean within [−1, 1]: where no example differs, its interval is by the bound that holds within [0, 1].

    With a width w of that bound, all ones are at least 1 − 2 w; all zeros, of answers that are no ranking, are τ ≠ 0 in
    a share of at most w: −w to w. All −1 have no interval. Chance, a table without answers, is 0 exactly.

    >>> answers = {"permutation_valid": np.zeros(9)}
    >>> _signed(Estimate(1.0, 0.75, 1.0), answers), _signed(Estimate(0.0, 0.0, 0.25), answers)
    (Estimate(value=1.0, low=0.5, high=1.0), Estimate(value=0.0, low=-0.25, high=0.25))
    """
    if "permutation_valid" not in table:
        return Estimate(estimate.value, estimate.value, estimate.value)
    if estimate.value == -1:
        return Estimate(-1.0, math.nan, math.nan)
    if estimate.value == 1:
        return estimate._replace(low=2 * estimate.low - 1)
    return estimate._replace(low=-estimate.high) if estimate.value == estimate.low == 0 else estimate


def closed_figures(
    task: Task, predictions: Sequence[Prediction], section: BootstrapSection
) -> list[dict[str, dict[str, float | None]]]:
    """By system: balanced accuracy, F1 of each label and, with probabilities, AUC, Brier score, calibration."""
    tables = [_closed_statistics(task, prediction) for prediction in predictions]
    asked = [statistic for table in tables for statistic in table.values()]
    rng = np.random.default_rng(section.seed)
    found = iter(statistics.bootstrap_statistics(asked, task.clusters, rng, section.samples, section.confidence))
    return [{name: as_json(next(found)) for name in table} for table in tables]


def _closed_statistics(task: Task, prediction: Prediction) -> dict[str, Callable[[Floats], Floats]]:
    label, predicted = task.right_column, predicted_labels(prediction)
    found: dict[str, Callable[[Floats], Floats]] = {
        "balanced_accuracy": lambda w: metrics.balanced_accuracy(label, predicted, w)
    }
    for place, name in enumerate(task.labels):
        found[f"f1 {name}"] = functools.partial(metrics.f1, label, predicted, place)
    if prediction.has_probabilities and len(task.labels) == 2:
        probability, positive = positive_probability(prediction.scores), label == 0
        found["auc"] = lambda w: metrics.auc(probability, positive, w)
        found["brier"] = lambda w: w @ metrics.brier(probability, positive) / w.sum(axis=1)
        found["calibration_error"] = lambda w: metrics.calibration_error(probability, positive, w)
    return found


def positive_probability(scores: Floats) -> Floats:
    """Probability of the first label (N,): softmax of the answers' log-likelihoods (N, C)."""
    shifted = np.exp(scores - np.max(scores, axis=1, keepdims=True))
    return shifted[:, 0] / shifted.sum(axis=1)


def generation_figures(
    task: Task, prediction: Prediction, titles: list[str], protocol: Protocol
) -> dict[str, Any] | None:
    """Free answers, on the first examples: valid_ratio, and exact_hit, those that are right.

    Titles are matched to the catalogue, labels to the words of the answers, events are read as JSON.
    """
    written = prediction.free if task.events is not None else prediction.generations
    if written is None or task.judge is not None or task.is_explained:
        return None
    count, note = len(written), "an answer with anything around it cannot be read"
    if task.events is not None:
        known = task.events.figures(written)
        table = {"valid_ratio": known["valid_ratio"], "exact_hit": known["exact"]}
    else:
        found, right, note = _matched(task, written, titles, note)
        table = {"valid_ratio": metrics.valid_ratio(found != NO_ITEM), "exact_hit": metrics.accuracy(right, found)}
    return {
        "num_examples": count,
        "max_new_tokens": protocol.decoding.max_new_tokens,
        "note": f"the first {count} of {len(task.target)} evaluated examples; {note}",
        **estimates([table], task.clusters[:count], protocol.bootstrap)[0],
    }


def _matched(
    task: Task, written: Sequence[tuple[str, bool]], titles: Sequence[str], note: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], str]:
    """What was written and what is right, as numbers of labels or items, and a note on the reading."""
    if task.is_closed:
        return match_words(written, task.words), task.right_column[: len(written)], note
    found = match_titles(written, titles)
    return found, task.target[: len(written)], "a title of several items is no hit"


SEVERAL_ITEMS = -2


def match_words(generations: Sequence[tuple[str, bool]], words: Sequence[str]) -> npt.NDArray[np.int64]:
    """The label whose words each answer is, letter by letter but for white space around it; -1 where it is none.

    >>> match_words([("buy ", True), ("buy", False), ("buy it", True)], ["view", "buy"]).tolist()
    [1, -1, -1]
    """
    known = {text: place for place, text in enumerate(words)}
    return np.array([known.get(text.strip(), -1) if done else -1 for text, done in generations], dtype=np.int64)


def match_titles(generations: Sequence[tuple[str, bool]], titles: Sequence[str]) -> npt.NDArray[np.int64]:
    """Item index of each generated title: the whole text must be a title, but for case and white space.

    NO_ITEM where it is none, or did not end by itself: invalid. SEVERAL_ITEMS where items share the title: valid, and
    never a hit, as it does not name one.

    >>> match_titles([(" heat", True), ("Heat", False), ("Heat 2", True)], ["Heat", "Up"]).tolist()
    [0, -1, -1]
    """
    known: dict[str, int] = {}
    for index, title in enumerate(titles):
        key = _normalised(title)
        known[key] = SEVERAL_ITEMS if key in known else index
    return np.array([known.get(_normalised(text), NO_ITEM) if done else NO_ITEM for text, done in generations])


def _normalised(title: str) -> str:
    return " ".join(title.casefold().split())


# ---- comparisons ----


def comparisons(task: Task, systems: Sequence[System], main: str, protocol: Protocol) -> list[dict[str, Any]]:
    """The main system against every other, on the same examples; Holm within each metric."""
    by_name = {s.name: example_metrics(task, s.predictions[task.name], protocol.ranking.k) for s in systems}
    names = [name for name in compared_metrics(task, protocol) if name in by_name[main]]
    pairs = [
        Pair(main, other, name, by_name[main][name], table[name])
        for name in names
        for other, table in by_name.items()
        if other != main and name in table
    ]
    tests = compare_pairs(pairs, task.clusters, protocol.bootstrap, _unit(task))
    if task.is_action:
        exact = {s.name: action_figures.exact_match(task, s.predictions[task.name]) for s in systems}
        of_sessions = [Pair(main, b, EXACT_MATCH, exact[main], values) for b, values in exact.items() if b != main]
        tests = compare_sessions(of_sessions, len(task.target), protocol.bootstrap) + tests
    return _adjusted(task, tests, "metric")


def _unit(task: Task) -> str:
    return "sessions" if task.is_action else "users"


def against_plain(task: Task, systems: Sequence[System], protocol: Protocol) -> list[dict[str, Any]]:
    """Nats of every other adapter and control against each plain LoRA adapter; Holm within each plain LoRA."""
    adapters = [system for system in systems if system.kind in ("adapter", "control")]
    found = {system.name: system.predictions[task.name].nats for system in adapters}
    nats = {name: values for name, values in found.items() if values is not None}
    plain = [system.name for system in adapters if system.method == "lora" and system.name in nats]
    pairs = [
        Pair(name, other, "nats", values, nats[other])
        for other in plain
        for name, values in nats.items()
        if name != other
    ]
    return _adjusted(task, compare_pairs(pairs, task.clusters, protocol.bootstrap, _unit(task)), "b")


def _adjusted(task: Task, tests: Sequence[dict[str, Any]], within: str) -> list[dict[str, Any]]:
    """The tests with p_holm, adjusted within each value of the key `within`."""
    entries = []
    for value in dict.fromkeys(test[within] for test in tests):
        mine = [test for test in tests if test[within] == value]
        for entry, p_holm in zip(mine, statistics.holm([_nan(entry["p_value"]) for entry in mine])):
            entries.append({"task": task.name, **entry, "p_holm": _json_number(p_holm)})
    return entries


def compared_metrics(task: Task, protocol: Protocol) -> list[str]:
    """The means over examples that are tested; of tasks about actions exact match is tested beside them."""
    if task.events is not None:
        return [TYPE_ACCURACY, "nats"]
    if task.is_action:
        return ["nats"]  # accuracy is exact match but for the weight of sessions
    if task.judge is not None:
        return [*task.judge.leading(protocol.ranking.k), "nats"]
    if task.is_explained:
        return ["supported", "nats"]
    if task.is_closed:
        return ["accuracy", "nats"]
    return [f"hit_rate@{min(protocol.ranking.k)}", f"ndcg@{max(protocol.ranking.k)}", "nats"]


class Pair(NamedTuple):
    """Two systems' values of one metric on the same examples."""

    a: str
    b: str
    metric: str
    values_a: Floats  # (N,)
    values_b: Floats  # (N,)


def compare_pairs(
    pairs: Sequence[Pair], users: npt.NDArray, section: BootstrapSection, unit: str = "users"
) -> list[dict[str, Any]]:
    """a − b of each pair with its interval and p-value; the users (N,), or sessions, are drawn once for all pairs.

    McNemar's exact test for hits where each user has one example; it takes examples as independent, so otherwise, and
    for all that is not 0 or 1, the paired bootstrap over users. The interval is the bootstrap's in any case. With fewer
    than statistics.FEW_USERS users there is no p-value.
    """
    if not pairs:
        return []
    rng = np.random.default_rng(section.seed)
    gaps = np.stack([pair.values_a - pair.values_b for pair in pairs], axis=1)
    found = statistics.paired_differences(gaps, users, rng, section.samples, section.confidence)
    size = {"num_examples": len(users), f"num_{unit}": len(np.unique(users))}
    return [_test_entry(pair, difference, size, unit) for pair, difference in zip(pairs, found, strict=True)]


def compare_sessions(pairs: Sequence[Pair], num_examples: int, section: BootstrapSection) -> list[dict[str, Any]]:
    """a − b of exact match, one value a session, by McNemar's test: exact where each session has one example.

    Otherwise the test for clusters (Durkalski et al. 2003), whose statistic is about these very means. The interval is
    the paired bootstrap's over sessions.
    """
    if not pairs:
        return []
    count = len(pairs[0].values_a)
    entries = compare_pairs(pairs, np.arange(count), section, "sessions")
    if count == num_examples:
        return entries
    for entry, pair in zip(entries, pairs, strict=True):
        entry["num_examples"] = num_examples
        if count >= statistics.FEW_USERS:
            entry["method"] = "mcnemar_clustered"
            entry["p_value"] = statistics.clustered_mcnemar(pair.values_a - pair.values_b)
    return entries


def _test_entry(pair: Pair, found: statistics.Difference, size: dict[str, int], unit: str) -> dict[str, Any]:
    binary = pair.metric.startswith("hit_rate@") or pair.metric in ("accuracy", "supported", EXACT_MATCH, TYPE_ACCURACY)
    method, p_value, clusters = "paired_bootstrap", found.p_value, size[f"num_{unit}"]
    if binary and clusters == size["num_examples"] and clusters >= statistics.FEW_USERS:
        method, p_value = "mcnemar", statistics.mcnemar(pair.values_a, pair.values_b)
    return {
        "a": pair.a,
        "b": pair.b,
        "metric": pair.metric,
        "difference": _json_number(found.difference),
        "low": _json_number(found.low),
        "high": _json_number(found.high),
        "p_value": _json_number(p_value),
        "method": method,
        **size,
    }


# ---- segments ----


def segments(task: Task, systems: Sequence[System], dataset: Dataset, protocol: Protocol) -> dict[str, Any]:
    """Segment name → value → system → figures; values without examples are absent. "full M" is M in the catalogue."""
    full = f"ndcg@{max(protocol.ranking.k)}"
    columns = [*compared_metrics(task, protocol), f"full {full}"]
    tables = {}
    for system in systems:
        prediction = system.predictions[task.name]
        ranked = _full_metrics(prediction, protocol.ranking.k)
        tables[system.name] = example_metrics(task, prediction, protocol.ranking.k)
        tables[system.name] |= {f"full {full}": ranked[full]} if ranked else {}
    right = {s.name: action_figures.right_rows(task, s.predictions[task.name]) for s in systems if task.is_action}
    result: dict[str, Any] = {}
    for segment, (values, order) in segment_values(task, dataset).items():
        result[segment] = {}
        for value in order:
            rows = np.flatnonzero(values == value)
            if not len(rows):
                continue
            parts = [{c: table[c][rows] for c in columns if c in table} for table in tables.values()]
            found = estimates(parts, task.clusters[rows], protocol.bootstrap)
            found = [a | b for a, b in zip(_exact_matches(task, right, rows, protocol) or [{}] * len(found), found)]
            size = size_of(task, rows)
            result[segment][value] = {name: part | size for name, part in zip(tables, found, strict=True)}
    return result


def _exact_matches(
    task: Task, right: dict[str, Floats], rows: npt.NDArray[np.int64], protocol: Protocol
) -> list[dict[str, Any]]:
    """Exact match of some rows of a task about actions, by system; nothing of other tasks."""
    sessions = task.clusters[rows]
    means = [{EXACT_MATCH: action_metrics.session_means(values[rows], sessions)} for values in right.values()]
    return estimates(means, np.arange(len(np.unique(sessions))), protocol.bootstrap) if means else []


def segment_values(task: Task, dataset: Dataset) -> dict[str, tuple[npt.NDArray, list[str]]]:
    """Segment name → the value of each example (N,) and the values in the order of a table."""
    length = task.examples.history_end
    buckets = {f"{low}-{high}": (length >= low) & (length <= high) for low, high in HISTORY_BUCKETS}
    buckets = {"0": length == 0, **buckets, f">{HISTORY_BUCKETS[-1][1]}": length > HISTORY_BUCKETS[-1][1]}
    lengths = np.select(list(buckets.values()), list(buckets), default="0")
    sequences = dataset.sequences
    user = np.repeat(np.arange(sequences.num_users), np.diff(sequences.offsets))
    seen = np.bincount(user[training_interactions(dataset)], minlength=sequences.num_users) > 0
    users = np.where(seen[task.users], "in training", "new")
    found = {"history length": (lengths, list(buckets)), "user": (users, ["in training", "new"])}
    if task.judge is not None:
        found |= {name: (values, sorted(set(values.tolist()))) for name, values in task.judge.groups.items()}
    if (task.target == NO_ITEM).any() or (task.is_action and task.kind != ON_ITEM):
        return found  # no item is asked about
    if task.kind in (QUESTION, EXPLAIN):
        train = dataset.examples("train", ["task", "target"])
        known = train["target"].filter(pc.equal(train["task"], task.kind)).to_numpy()
        found["asked in training"] = np.where(np.isin(task.target, known), "yes", "no"), ["yes", "no"]
    popular = popularity_classes(item_counts(dataset))[task.target]
    return {"target popularity": (popular, ["head", "tail", "cold"]), **found}


def popularity_classes(counts: npt.NDArray[np.int64]) -> npt.NDArray:
    """head, tail or cold of each item (num_items,): head is the most frequent fifth of the items that occur.

    >>> popularity_classes(np.array([9, 1, 1, 1, 1, 0])).tolist()
    ['head', 'tail', 'tail', 'tail', 'tail', 'cold']
    """
    order = np.argsort(-counts, kind="stable")
    classes = np.where(counts > 0, "tail", "cold")
    classes[order[: math.ceil(HEAD_SHARE * int((counts > 0).sum()))]] = "head"
    return classes


# ---- examples and predictions ----


def example_entries(
    task: Task, systems: Sequence[System], dataset: Dataset, count: int, shown: int = 10
) -> list[dict[str, Any]]:
    """Some evaluated examples, spread over the table, with what each system made of them."""
    rows = np.unique(np.linspace(0, len(task.target) - 1, min(count, len(task.target))).astype(int))
    return [_example_entry(task, systems, dataset, int(row), shown) for row in rows]


def _example_entry(task: Task, systems: Sequence[System], dataset: Dataset, row: int, shown: int) -> dict[str, Any]:
    titles, user, end = dataset.titles, int(task.users[row]), int(task.examples.history_end[row])
    return {
        "task": task.name,
        "example_id": task.examples.example_ids[row],
        "user_id": dataset.sequences.user_ids[user].as_py(),
        "history": history_lines(dataset, user, end, shown),
        "history_length": end,
        "target": None if task.target[row] == NO_ITEM or task.events is not None else titles[task.target[row]],
        "label": right[row] if (right := task.right_texts) else None,
        "systems": {s.name: _example_system(task, s.predictions[task.name], titles, row) for s in systems},
    }


def history_lines(dataset: Dataset, user: int, end: int, shown: int) -> list[str]:
    """The last `shown` of what a user did before a position: titles, of events with the words of the action."""
    titles = dataset.titles
    if not dataset.is_events:
        return [titles[item] for item in dataset.history(user, end, shown)]
    codes, words = dataset.read(user, end, shown).astype(np.int64), dataset.words
    pairs = zip(actions_of(codes, dataset.num_items).tolist(), items_of(codes, dataset.num_items).tolist())
    return [words[action] if item == NO_ITEM else f"{words[action]}: {titles[item]}" for action, item in pairs]


def _example_system(task: Task, prediction: Prediction, titles: list[str], row: int, top: int = 5) -> dict[str, Any]:
    scores = prediction.scores[row]
    order = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")[:top]
    texts = task.words if task.candidates is None else [titles[item] for item in task.candidates[row]]
    texts = texts if task.choices is None else task.choices[row]
    few = prediction.generations or []
    rank = None if not task.is_ranked else int(metrics.ranks(scores[None], task.right_column[row : row + 1])[0])
    return {
        "rank": rank,
        "full_rank": None if prediction.full_rank is None else int(prediction.full_rank[row]),
        "top": [
            {"text": texts[c], "score": _json_number(scores[c]), "target": bool(c == task.right_column[row])}
            for c in order
        ],
        "text": few[row][0] if row < len(few) else None,
        "valid": bool(valid_rows(prediction)[row]),
    }


PREDICTIONS = pa.schema(
    [
        ("system", pa.string()),
        ("task", pa.string()),
        ("example_id", pa.string()),
        ("user_index", pa.int32()),
        ("target", pa.int32()),
        ("candidates", pa.list_(pa.int32())),
        ("scores", pa.list_(pa.float64())),
        ("rank", pa.int32()),
        ("full_rank", pa.int32()),
        ("nats", pa.float64()),
        ("text", pa.string()),
        ("valid", pa.bool_()),
        ("label", pa.string()),
        ("predicted", pa.string()),
        # of a bank's tasks every metric of this example, of next_event what is known of it
        ("figures", pa.map_(pa.string(), pa.float64())),
        ("session", pa.int64()),  # of event datasets: equal for the examples of a session
        ("rationale", pa.string()),  # that was written before the answer
    ]
)


def predictions_table(task: Task, system: System, cutoffs: Sequence[int]) -> pa.Table:
    """One system's rows of predictions.parquet, one an example, nothing dropped."""
    prediction, count = system.predictions[task.name], len(task.target)
    valid, predicted = valid_rows(prediction), list[str | None]([None] * count)
    if task.is_closed:
        predicted = [task.labels[place] if place >= 0 else None for place in predicted_labels(prediction)]
    if task.events is not None:
        places = action_figures.predicted_classes(task, prediction)
        valid, predicted = places >= 0, [task.labels[place] if place >= 0 else None for place in places]
    if prediction.verdicts is not None:
        predicted = list(prediction.verdicts)
    texts: list[str | None] = [text for text, _ in prediction.generations or []]
    nothing = [None] * count
    columns = {
        "system": [system.name] * count,
        "task": [task.name] * count,
        "example_id": task.examples.example_ids,
        "user_index": task.users,
        "target": [None if item == NO_ITEM else item for item in task.target.tolist()],
        "candidates": nothing if task.candidates is None else list(task.candidates),
        "scores": list(prediction.scores),
        "rank": nothing if not task.is_ranked else metrics.ranks(prediction.scores, task.right_column),
        "full_rank": nothing if prediction.full_rank is None else prediction.full_rank,
        "nats": nothing if prediction.nats is None else prediction.nats,
        "text": texts + [None] * (count - len(texts)),
        "valid": valid,
        "label": task.right_texts or nothing,
        "predicted": predicted,
        "figures": _figures_of(task, prediction, cutoffs),
        "session": nothing if task.sessions is None else task.sessions,
        "rationale": nothing if prediction.rationales is None else [text for text, _ in prediction.rationales],
    }
    return pa.table(
        {field.name: pa.array(columns[field.name], type=field.type) for field in PREDICTIONS}, schema=PREDICTIONS
    )


def _figures_of(task: Task, prediction: Prediction, cutoffs: Sequence[int]) -> list[Any]:
    """(N,) names and values of what is written and judged; null elsewhere."""
    if task.events is not None:
        return _rows(task.events.figures(prediction.generations or []))
    return [None] * len(task.target) if task.judge is None else _rows(example_metrics(task, prediction, cutoffs))


def _rows(table: dict[str, Floats]) -> list[list[tuple[str, float]]]:
    """Columns (N,) as N lists of names and values, without those that are undefined."""
    rows = zip(*(column.tolist() for column in table.values()))
    return [[(name, value) for name, value in zip(table, values) if not math.isnan(value)] for values in rows]


# ---- JSON ----


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
