"""The pictures of a report: which figures of metrics.json go into which plot.

metrics.json (as dict), the ranks of predictions.parquet and gates.parquet enter; `Picture`s leave, drawn by plots.py.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recllm.evaluate import plots, reading
from recllm.evaluate.plots import HeatCell
from recllm.evaluate.reading import LOWER_IS_BETTER, Metrics
from recllm.evaluate.statistics import FEW_USERS


class Picture(NamedTuple):
    """One plot: `name` is its file in plots/, unique in the report."""

    name: str
    title: str
    svg: str
    caption: str = ""


# ---- a task ----


def known(system: Metrics, metric: str) -> bool:
    """Whether a system has a value of a metric."""
    return (system["metrics"].get(metric) or {}).get("value") is not None


def heading(metric: str, task: str) -> str:
    """A metric as the heading of a column or a plot, with an arrow where lower is better."""
    unit = "nats a title" if task.startswith("next_item") or task.startswith("attribute_to_item") else "nats an answer"
    plain = metric.removesuffix(BEFORE).removesuffix(AFTER)
    return (unit if metric == "nats" else metric) + (" ↓" if plain in LOWER_IS_BETTER else "")


BEFORE, AFTER = " as it is", " calibrated"  # of columns that show both


def of_metrics(task: str, systems: Sequence[Metrics], styles: Mapping[str, plots.Style], lead: str) -> list[Picture]:
    """One dot plot a metric, best on top."""
    made = []
    for metric in dict.fromkeys(("hit_rate@1", lead, "macro_f1", "nats", "auc", "macro_auc")):
        scored = [system for system in systems if known(system, metric)]
        if scored:
            rows = [_row(s["name"], s["metrics"][metric], styles) for s in scored]
            svg_name, title = _slug(task, metric), heading(metric, task)
            rows = _sorted(rows, metric)
            made.append(Picture(svg_name, title, plots.dots(svg_name, title, rows)))
    return made


def _row(name: str, estimate: Metrics, styles: Mapping[str, plots.Style]) -> plots.Row:
    return plots.Row(name, estimate["value"], estimate.get("low"), estimate.get("high"), styles[name])


def _sorted(rows: Iterable[plots.Row], metric: str) -> list[plots.Row]:
    return sorted(rows, key=lambda row: row.value, reverse=metric not in LOWER_IS_BETTER)


def of_ranks(
    task: str, predictions: pa.Table | None, num_candidates: int, styles: Mapping[str, plots.Style]
) -> list[Picture]:
    """Share of targets within the first k candidates, for every k."""
    if predictions is None or reading.is_closed(task) or reading.is_action(task) or reading.is_explained(task):
        return []
    mine = predictions.filter(pc.equal(predictions["task"], task))
    series = {}
    for name, style in styles.items():
        ranks = mine.filter(pc.equal(mine["system"], name))["rank"].drop_null().to_numpy()
        if len(ranks) > 0:
            ks = np.arange(1, num_candidates + 1)
            series[name] = (ks, np.searchsorted(np.sort(ranks), ks, side="right") / len(ranks), style)
    if not series:
        return []
    name, title = _slug(task, "ranks"), "Targets within the first k candidates"
    return [Picture(name, title, plots.lines(name, title, series, "k", limits=(0, 1.02)), "hit_rate@k for every k")]


def of_tests(metrics: Metrics, task: str, tests: Sequence[Metrics], styles: Mapping[str, plots.Style]) -> list[Picture]:
    """One forest plot a metric: the main system's difference to every other; filled where the test decides."""
    made = []
    for metric in dict.fromkeys(test["metric"] for test in tests):
        mine = [test for test in tests if test["metric"] == metric]
        main = mine[0]["a"]
        rows = [_difference(test, styles, metrics) for test in mine if test.get("difference") is not None]
        rows, far = _without_far(_sorted(rows, metric))
        better = "left" if metric in LOWER_IS_BETTER else "right"
        name, title = _slug(task, f"difference-{metric}"), f"{main} minus the other: {metric}"
        svg = plots.dots(name, title, rows, f"difference; {better} of the line: {main} is better", 0.0)
        outside = ", ".join(f"{row.label} ({reading.signed(row.value)})" for row in far)
        made.append(Picture(name, title, svg, f"too far off for this scale: {outside}" if far else ""))
    return made


def _without_far(rows: Sequence[plots.Row]) -> tuple[list[plots.Row], list[plots.Row]]:
    """(rows that share a readable scale, rows so far off that they would squeeze the others into one point)."""
    reach = {row.label: max(abs(end) for end in (row.value, row.low, row.high) if end is not None) for row in rows}
    ordered = sorted(reach.values())
    limit = next((small for small, large in pairwise(ordered) if small > 0.005 and large > 8 * small), None)
    if limit is None:
        return list(rows), []
    return [row for row in rows if reach[row.label] <= limit], [row for row in rows if reach[row.label] > limit]


def _difference(test: Metrics, styles: Mapping[str, plots.Style], metrics: Metrics) -> plots.Row:
    decided = reading.verdict(test, metrics["protocol"]["bootstrap"]["confidence"]) != "open"
    style = styles[test["b"]]._replace(filled=decided)
    return plots.Row(test["b"], test["difference"], test.get("low"), test.get("high"), style)


def of_segment(
    task: str, segment: str, values: Mapping[str, Metrics], metric: str, styles: Mapping[str, plots.Style]
) -> list[Picture]:
    """Small multiples: one dot plot of the metric for each value of a segment, all on one scale."""
    panels = {
        value: [_row(name, found[name][metric], styles) for name in styles if (found.get(name) or {}).get(metric)]
        for value, found in values.items()
    }
    ends = [
        end for rows in panels.values() for row in rows for end in (row.value, row.low, row.high) if end is not None
    ]
    if not ends:
        return []
    margin = 0.06 * (max(ends) - min(ends)) or 0.05
    limits = (min(ends) - margin, max(ends) + margin)  # the same in every panel: they are there to be compared
    made = []
    for number, (value, rows) in enumerate(panels.items()):
        name, title = _slug(task, segment, str(number)), f"{value}  ({size(values[value])})"
        made.append(Picture(name, title, plots.dots(name, title, rows, limits=limits, width=3.5)))
    return made


def size(found: Mapping[str, Any]) -> str:
    """How many examples a segment holds, and whether its users are too few for intervals."""
    examples = max((one.get("num_examples", 0) for one in found.values()), default=0)
    clusters = max((reading.num_clusters({"num_users": 0, **one}) for one in found.values()), default=0)
    return f"n = {examples}" + (", too few for intervals" if clusters < FEW_USERS else "")


# ---- actions ----

MAX_CLASSES = 14  # rows and columns of a confusion matrix: more are not readable


def of_actions(task: str, system: Metrics | None) -> list[Picture]:
    """The confusion matrix of a system, and how often it is right where it is sure."""
    if system is None or not system.get("classes"):
        return []
    return [_confusion(task, system), *_reliability(task, system)]


def _confusion(task: str, system: Metrics) -> Picture:
    classes, table = system["classes"]["per_class"], np.array(system["classes"]["confusion"], dtype=np.float64)
    number = np.array([one["support"] + one["predicted"] for one in classes])
    shown = np.sort(np.argsort(-number, kind="stable")[:MAX_CLASSES])
    columns = [*shown, len(classes)] if table[:, -1].any() else list(shown)
    heads = [*(one["label"] for one in classes), "unreadable"]
    total = np.maximum(table.sum(axis=1, keepdims=True), 1)
    cells = [
        [_confusion_cell(table[row, column], total[row, 0], len(classes), row == column) for column in columns]
        for row in shown
    ]
    rows = [f"{classes[row]['label']} ({classes[row]['support']})" for row in shown]
    name, title = _slug(task, "confusion"), f"What {system['name']} answers, by what is right"
    wide = [_column(heads[column]) for column in columns]
    svg = plots.heat_map(name, title, rows, wide, cells, "times an even share of the row")
    caption = "rows: the right label and its examples; bold: answered rightly"
    left = "" if len(shown) == len(classes) else f"; the {len(shown)} most frequent of {len(classes)} classes"
    return Picture(name, title, svg, caption + left)


def _confusion_cell(count: float, total: float, classes: int, right: bool) -> HeatCell:
    share = count / total
    return HeatCell(f"{share:.0%}" if count else "–", share * classes if count else None, right)


def _column(label: str) -> str:
    return label if len(label) <= 11 else f"{label[:10].rstrip()}…"


def _reliability(task: str, system: Metrics) -> list[Picture]:
    found = system.get("reliability")
    if not found:
        return []
    looks = {
        "before": ("as it is", plots.Style("orange", "o", False)),
        "after": ("calibrated", plots.Style("blue", "o")),
    }
    series = {}
    for when, bins in found.items():
        label, style = looks[when]
        count = max(1, sum(one["num_examples"] for one in bins))
        columns = [np.array([one[key] for one in bins]) for key in ("confidence", "accuracy", "num_examples")]
        series[label] = (columns[0], columns[1], columns[2] / count, style)
    name, title = _slug(task, "reliability"), f"How often {system['name']} is right where it is sure"
    svg = plots.reliability(name, title, series)
    return [Picture(name, title, svg, "on the diagonal confidence is what it says; area: share of the examples")]


def of_training(log: Sequence[Metrics], gate: Metrics | None) -> list[Picture]:
    """Loss, gate entropy and mean expert weights over the steps, as far as the log has them."""
    curves = {}
    for key, colour in (("loss", "blue"), ("eval_loss", "orange")):
        steps, values = _series(log, key)
        if len(steps):
            curves[key] = (steps, values, plots.Style(colour, "o"))
    faint = ["loss"] if "loss" in curves and len(curves["loss"][0]) >= 20 else []
    if faint:
        steps, values, style = curves["loss"]
        curves["running mean of 5"] = (steps, _running_mean(values, 5), style)
    name, title = "training-loss", "Training loss"
    caption = "nats a token of the completion" + ("; strong: mean of the last five entries" if faint else "")
    made = [Picture(name, title, plots.lines(name, title, curves, "step", faint=faint), caption)] if curves else []
    return made + _dro_training(log) + _gate_training(log, gate)


def _dro_training(log: Sequence[Metrics]) -> list[Picture]:
    """Weights and losses of the groups of distributionally robust optimisation."""
    made = []
    for kind, title, caption in (
        ("dro_weight", "Weight of each group in training", "groups that do badly weigh more and more"),
        ("dro_loss", "Loss of each group in training", "nats a token"),
    ):
        keys = [key for key in dict.fromkeys(key for entry in log for key in entry) if key.startswith(f"{kind}/")]
        series = {
            key.removeprefix(f"{kind}/"): (*_series(log, key), plots.expert_style(number))
            for number, key in enumerate(keys[:MAX_CLASSES])
        }
        series = {group: found for group, found in series.items() if len(found[0])}
        if not series:
            continue
        name = f"training-{kind.replace('_', '-')}"
        even = (1 / len(keys), "even") if kind == "dro_weight" else None
        left = "" if len(keys) <= MAX_CLASSES else f"; the first {MAX_CLASSES} of {len(keys)} groups"
        made.append(Picture(name, title, plots.lines(name, title, series, "step", even), caption + left))
    return made


def _gate_training(log: Sequence[Metrics], gate: Metrics | None) -> list[Picture]:
    made = []
    steps, entropy = _series(log, "gate_entropy")
    if len(steps):
        name, title = "training-entropy", "Gate entropy"
        largest = float(gate["max_entropy"]) if gate else float(np.max(entropy))
        curve, limits = {"entropy": (steps, entropy, plots.Style("blue", "o"))}, (0, max(largest, 0.01) * 1.12)
        svg = plots.lines(name, title, curve, "step", (largest, "uniform gate"), limits)
        made.append(Picture(name, title, svg, "nats; zero is one expert for everybody"))
    experts = sorted(_expert_keys(log).items())
    weights = {f"expert {number}": (*_series(log, key), plots.expert_style(number)) for number, key in experts}
    if weights:
        name, title = "training-experts", "Mean weight of each expert"
        top = min(1.05, 1.25 * max(float(np.max(ys)) for _, ys, _ in weights.values()))
        svg = plots.lines(name, title, weights, "step", (1 / len(weights), "uniform"), (0, top))
        made.append(Picture(name, title, svg, "of the training batches"))
    return made


def _series(log: Sequence[Metrics], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the entries that have a number under `key`; a diverged loss is none and leaves a gap."""
    points = [(entry["step"], entry[key]) for entry in log if _is_number(entry.get(key)) and "step" in entry]
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _expert_keys(log: Sequence[Metrics]) -> dict[int, str]:
    """Expert number → its key in the log: any that names an expert or the gate and ends in the number."""
    keys = dict.fromkeys(key for entry in log for key in entry)
    found = {key: re.fullmatch(r"\w*(?:expert|gate_weight)\w*?[_/]?(\d+)", key) for key in keys}
    return {int(match[1]): key for key, match in found.items() if match}


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last `width` values at each point, of fewer at the beginning."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def of_gate(gate: Metrics | None, gates: pa.Table | None) -> list[Picture]:
    """Weights, entropy and a map of the users, from gates.parquet."""
    if not gate or gates is None or not gates.num_rows:
        return []
    weights = np.stack(gates["weights"].to_numpy(zero_copy_only=False)).astype(np.float64)  # (N, K)
    shares = weights / weights.sum(axis=1, keepdims=True)  # of a softmax the weights themselves
    entropy = -np.sum(np.where(shares > 0, shares * np.log(np.maximum(shares, 1e-300)), 0.0), axis=1)
    number = f"{len(weights):,} examples" + (", mean over layers" if gate.get("num_layers") else "")
    title = "Gate weights of the evaluated examples"
    svg = plots.weight_histograms("gate-weights", title, weights, uniform_weight(gate))
    made = [Picture("gate-weights", title, svg, f"{number}; dashed: uniform")]
    if gate["max_entropy"] > 0:
        svg = plots.histogram("gate-entropy", "Entropy of the gate", entropy, "nats", (gate["max_entropy"], "uniform"))
        made.append(Picture("gate-entropy", "Entropy of the gate", svg, f"{number}; left: one expert decides"))
    made.append(_map_picture(gates, weights.shape[1]))
    return made + _layer_picture(gate)


def uniform_weight(gate: Metrics) -> float:
    """The weight of each expert that makes the plain LoRA."""
    return float(gate.get("uniform") or 1 / gate["num_experts"])


def _layer_picture(gate: Metrics) -> list[Picture]:
    """Mean weight of each expert in each layer, where every layer has its own gate."""
    if not gate.get("layer_means"):
        return []
    means, uniform = np.array(gate["layer_means"]), uniform_weight(gate)
    shown = shown_experts(means.std(axis=0))
    cells = [[HeatCell(f"{mean:.2f}", mean / uniform) for mean in line[shown]] for line in means]
    name, title = "gate-layers", "Mean gate weight by layer"
    svg = plots.heat_map(
        name, title, [f"layer {n}" for n in range(len(means))], _expert_names(shown), cells, "times the uniform weight"
    )
    return [Picture(name, title, svg, f"each layer has experts of its own{_left_out(shown, means.shape[1])}")]


# ---- whom each expert serves ----

MAX_EXPERTS = 12  # columns of a heat map: more are not readable


def shown_experts(spread: np.ndarray) -> np.ndarray:
    """Experts that a heat map shows, in order: all, or the MAX_EXPERTS with the largest spread (K,)."""
    return np.sort(np.argsort(-spread, kind="stable")[:MAX_EXPERTS])


def _expert_names(shown: np.ndarray) -> list[str]:
    return [f"expert {expert}" if len(shown) <= 6 else str(expert) for expert in shown]


def _left_out(shown: np.ndarray, experts: int) -> str:
    return "" if len(shown) == experts else f"; the {len(shown)} of {experts} experts that vary most"


def of_experts(found: Metrics | None, deviation: Sequence[float], confidence: float) -> list[Picture]:
    """A heat map of lifts for the item groups, and one for all user groups, from the entry `experts`."""
    made = []
    parts = (found or {}).get("parts") or []
    shown = shown_experts(np.array(deviation))
    for what, title in (("items", "What stands in the histories"), ("users", "Who the users are")):
        rows = [(part, group) for part in parts if part["what"] == what for group in part["groups"]]
        if not rows:
            continue
        several = len({part["name"] for part, _ in rows}) > 1
        labels = [f"{_short_part(part['name'])} {group['name']}" if several else group["name"] for part, group in rows]
        cells = [[_lift_cell(group["lifts"][expert]) for expert in shown] for _, group in rows]
        name = f"experts-{what}"
        svg = plots.heat_map(name, title, labels, _expert_names(shown), cells, "times the share of all users")
        caption = f"bold: the interval ({confidence:.0%} for all cells at once) leaves out 1"
        made.append(Picture(name, title, svg, caption + _left_out(shown, len(deviation))))
    return made


def _short_part(name: str) -> str:
    """Short enough to leave room for the group beside it."""
    short = {"head items in the history": "head items", "time since the last interaction": "idle"}
    return short.get(name, name)


def _lift_cell(lift: Metrics) -> HeatCell:
    if lift["value"] is None:
        return HeatCell("–", None)
    return HeatCell(f"{lift['value']:.2f}", lift["value"], reading.is_distinct(lift))


def _map_picture(gates: pa.Table, num_experts: int) -> Picture:
    """Each user once, at their last evaluated example."""
    users = gates["user_index"].to_numpy()
    last = np.sort(len(users) - 1 - np.unique(users[::-1], return_index=True)[1])
    x, y, strongest = (gates[name].to_numpy()[last] for name in ("x", "y", "strongest"))
    title = "Users by their strongest expert"
    drawn = "" if len(last) <= plots.MAX_POINTS else f", {plots.MAX_POINTS:,} of them drawn"
    svg = plots.user_map("gate-users", title, x, y, strongest, num_experts)
    return Picture("gate-users", title, svg, f"{len(last):,} users{drawn}; principal components of what the gate reads")


def _slug(*parts: str) -> str:
    """A file name: letters, digits and dashes.

    >>> _slug("next_item", "hit_rate@1")
    'next-item-hit-rate-1'
    """
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
