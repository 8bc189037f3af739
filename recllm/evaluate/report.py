"""The report for people. A folder with metrics.json, predictions.parquet and gates.parquet enters; report.html (one
self-contained file), report.md and plots/*.svg leave in the same folder.

What is bold and what the sentences claim is decided by the tests in metrics.json (reading.py), never here. Anything
that is missing is named as missing. The same inputs give the same bytes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jinja2 import PackageLoader, StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from recllm import files
from recllm.evaluate import plots, reading
from recllm.evaluate.reading import LOWER_IS_BETTER, Metrics

MISSING = "–"
FEW_USERS = 5  # a segment with fewer users is shown without intervals
SEGMENT_ORDER = ("head", "tail", "cold")
KINDS = {"adapter": "adapter", "control": "control", "base_model": "base model", "baseline": "baseline"}


class Cell(NamedTuple):
    """One figure of a table: text, its interval as text, and whether it may be bold."""

    text: str
    interval: str = ""
    best: bool = False


class Line(NamedTuple):
    """One row of a table; `note` stands in place of the cells where there are none."""

    name: str
    kind: str
    style: plots.Style
    cells: list[Cell]
    note: str = ""


class Table(NamedTuple):
    """A table of systems; `label` says which candidates it is about."""

    title: str
    label: str
    columns: list[str]
    lines: list[Line]
    note: str = ""


class Picture(NamedTuple):
    """One plot: `name` is its file in plots/, unique in the report."""

    name: str
    title: str
    svg: str
    caption: str = ""


def write(folder: Path) -> None:
    """Write report.html, report.md and plots/ beside the metrics.json of `folder`.

    Raises:
        UserError: metrics.json is missing or broken.
    """
    folder = Path(folder)
    metrics = files.read_json(folder / "metrics.json", "the figures that recllm evaluate writes")
    view = _view(metrics, _table(folder / "predictions.parquet"), _table(folder / "gates.parquet"))
    with files.replacing_folder(folder / "plots") as staging:
        for picture in _pictures(view):
            files.write_text(staging / f"{picture.name}.svg", plots.standalone(picture.svg))
    files.write_text(folder / "report.md", _environment(html=False).get_template("report.md.j2").render(view))
    files.write_text(folder / "report.html", _environment(html=True).get_template("report.html.j2").render(view))


def _table(path: Path) -> pa.Table | None:
    return pq.read_table(path) if path.is_file() else None


def _environment(html: bool) -> SandboxedEnvironment:
    environment = SandboxedEnvironment(
        loader=PackageLoader("recllm", "evaluate"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(md=_markdown, themed=lambda svg: Markup(plots.themed(svg)))
    return environment


def _markdown(value: object) -> str:
    r"""Text that Markdown and its HTML take literally, also inside a table.

    >>> _markdown("a|b <i> *c*")
    'a\\|b &lt;i&gt; \\*c\\*'
    """
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")
    text = re.sub(r"([\\`*{}\[\]|#~$])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # inside a word, as in next_item, it is literal anyway


def _view(metrics: Metrics, predictions: pa.Table | None, gates: pa.Table | None) -> dict[str, Any]:
    """Everything the templates show, as text, tables and pictures."""
    styles = plots.system_styles({system["name"]: system["kind"] for system in metrics["systems"]})
    gate = metrics.get("gate")
    return {
        "name": metrics["name"],
        "description": metrics.get("description") or "",
        "facts": _facts(metrics),
        "confidence": _confidence(metrics),
        "warnings": _warnings(metrics),
        "light": plots.css_variables(dark=False),
        "dark": plots.css_variables(dark=True),
        "tasks": [_task(metrics, task, predictions, styles) for task in metrics["tasks"]],
        "training": _training(metrics.get("training_log") or [], gate),
        "gate": _gate(gate),
        "gate_pictures": _gate_pictures(gate, gates),
        "gate_note": _gate_note(gate, gates),
        "audit": _flatten({k: v for k, v in (metrics.get("audit") or {}).items() if k != "warnings"}),
        "provenance": _provenance(metrics),
    }


def _pictures(view: Mapping[str, Any]) -> Iterator[Picture]:
    for task in view["tasks"]:
        yield from task["pictures"]
        yield from task["test_pictures"]
        for segment in task["segments"]:
            yield from segment["pictures"]
    yield from view["training"]
    yield from view["gate_pictures"]


# ---- what a report opens with ----


def _facts(metrics: Metrics) -> list[tuple[str, str]]:
    """(name, value) pairs under the title."""
    provenance = metrics.get("provenance") or {}
    facts = [("split", str(metrics["split"])), ("protocol", str(metrics["protocol"]["name"]))]
    for task, evaluated in ((metrics.get("counts") or {}).get("evaluated") or {}).items():
        of = evaluated.get("of_examples")
        share = f" of {of:,}" if of and of != evaluated["examples"] else ""
        facts.append((task, f"{evaluated['examples']:,}{share} examples, {evaluated['users']:,} users"))
    base = (provenance.get("base_model") or {}).get("name_or_path")
    facts += [("base model", str(base))] if base else []
    return facts + [(key, str(provenance[key])) for key in ("seed", "created") if provenance.get(key) is not None]


def _warnings(metrics: Metrics) -> list[str]:
    found = (metrics.get("audit") or {}).get("warnings") or []
    return [found] if isinstance(found, str) else [str(warning) for warning in found]


def _confidence(metrics: Metrics) -> str:
    return f"{metrics['protocol']['bootstrap']['confidence']:.0%}"


# ---- one task ----


def _task(
    metrics: Metrics, task: str, predictions: pa.Table | None, styles: Mapping[str, plots.Style]
) -> dict[str, Any]:
    systems = [system for system in metrics["systems"] if system["task"] == task]
    tests = [test for test in metrics["comparisons"] if test["task"] == task]
    lead = reading.ranking_metric(metrics, task)
    return {
        "name": task,
        "main": metrics["main_system"].get(task),
        "lead": lead,
        "sentences": reading.read(metrics, task),
        "tiles": _tiles(metrics, task, systems, lead),
        "tables": _tables(metrics, task, systems, tests, styles),
        "all_metrics": _all_metrics(metrics, systems, tests, styles),
        "pictures": _metric_pictures(task, systems, styles, lead) + _rank_pictures(task, predictions, styles),
        "ranks_note": "" if predictions is not None else "predictions.parquet is missing: no curve of ranks.",
        "tests": _tests(metrics, tests),
        "test_pictures": _test_pictures(metrics, task, tests, styles),
        "segments": _segments(metrics, task, styles, lead),
        "examples": _examples(metrics, task, styles),
    }


def _tiles(metrics: Metrics, task: str, systems: Sequence[Metrics], lead: str) -> list[dict[str, str]]:
    """The main system's figures in large, each with the best of the others."""
    main = next((system for system in systems if system["name"] == metrics["main_system"].get(task)), None)
    tiles = []
    for metric in dict.fromkeys(("hit_rate@1", lead, "nats")):
        estimate = main["metrics"].get(metric) if main else None
        if not main or not estimate or estimate.get("value") is None:
            continue
        sign = -1 if metric in LOWER_IS_BETTER else 1
        others = [(s["metrics"][metric]["value"], s["name"]) for s in systems if s is not main and _known(s, metric)]
        best = max(others, key=lambda other: sign * other[0], default=None)
        tiles.append(
            {
                "metric": _heading(metric, task),
                "value": _number(estimate["value"]),
                "interval": _interval(estimate),
                "other": f"best of the others: {best[1]} {_number(best[0])}" if best else "nothing to compare with",
            }
        )
    return tiles


def _known(system: Metrics, metric: str) -> bool:
    return (system["metrics"].get(metric) or {}).get("value") is not None


def _tables(
    metrics: Metrics, task: str, systems: Sequence[Metrics], tests: Sequence[Metrics], styles: Mapping[str, plots.Style]
) -> list[Table]:
    """The headline table, the full catalogue's and that of generated answers."""
    confidence = metrics["protocol"]["bootstrap"]["confidence"]
    scored = {system["name"]: system["metrics"] for system in systems}
    full = {system["name"]: system.get("full_catalogue") for system in systems}
    if task == "like":
        columns = sorted({metric for values in scored.values() for metric in values}, key=_natural)
        return [_system_table("Closed answers", "every example", systems, scored, columns, tests, confidence, styles)]
    count = metrics["protocol"]["candidates"]["count"]
    ks = sorted(metrics["protocol"]["ranking"]["k"])
    columns = [f"hit_rate@{k}" for k in ks] + [f"ndcg@{ks[-1]}", "mrr"]
    sampled = f"sampled ({count} candidates)"
    tables = [
        _system_table(
            "Ranking among candidates",
            sampled,
            systems,
            scored,
            [*columns, "nats", "valid_ratio"],
            tests,
            confidence,
            styles,
            str(metrics.get("candidates_label") or ""),
        ),
    ]
    if any(full.values()):
        # The paired tests are on the candidates: here only disjoint intervals make a figure bold.
        tables.append(
            _system_table(
                "Ranking among all items",
                "full catalogue",
                systems,
                full,
                columns,
                [],
                confidence,
                styles,
                missing="no full-catalogue ranking for this system",
            )
        )
    return tables + _generation_table(systems, styles, confidence)


def _generation_table(systems: Sequence[Metrics], styles: Mapping[str, plots.Style], confidence: float) -> list[Table]:
    written = [system for system in systems if system.get("generation")]
    if not written:
        return []
    values = {s["name"]: {k: s["generation"].get(k) for k in ("exact_hit", "valid_ratio")} for s in written}
    first = written[0]["generation"]
    note = f"{first.get('note') or ''}; at most {first['max_new_tokens']} new tokens. Invalid answers count as misses."
    columns = ["exact_hit", "valid_ratio"]
    return [
        _system_table(
            "Free generation", "written titles", written, values, columns, [], confidence, styles, note.lstrip("; ")
        )
    ]


def _all_metrics(
    metrics: Metrics, systems: Sequence[Metrics], tests: Sequence[Metrics], styles: Mapping[str, plots.Style]
) -> Table:
    values = {system["name"]: system["metrics"] for system in systems}
    columns = sorted({metric for found in values.values() for metric in found}, key=_natural)
    confidence = metrics["protocol"]["bootstrap"]["confidence"]
    return _system_table("Every metric", "", systems, values, columns, tests, confidence, styles)


def _system_table(
    title: str,
    label: str,
    systems: Sequence[Metrics],
    values: Mapping[str, Metrics | None],
    columns: Sequence[str],
    tests: Sequence[Metrics],
    confidence: float,
    styles: Mapping[str, plots.Style],
    note: str = "",
    missing: str = "not scored",
) -> Table:
    """Rows are systems in their order, columns those metrics that at least one system has."""
    columns = [metric for metric in columns if any((found or {}).get(metric) for found in values.values())]
    best = {
        metric: reading.supported_best(
            {name: (v or {}).get(metric) for name, v in values.items()}, metric, tests, confidence
        )
        for metric in columns
    }
    lines = []
    for system in systems:
        name, found = system["name"], values.get(system["name"])
        cells = [_cell((found or {}).get(metric), best[metric] == name) for metric in columns]
        kind = str(KINDS.get(system["kind"], system["kind"]))
        lines.append(Line(name, kind, styles[name], cells if found else [], "" if found else missing))
    return Table(title, label, [_heading(metric, systems[0]["task"]) for metric in columns], lines, note)


def _cell(estimate: Metrics | None, best: bool = False) -> Cell:
    if not estimate or estimate.get("value") is None:
        return Cell(MISSING)
    return Cell(_number(estimate["value"]), _interval(estimate), best)


def _heading(metric: str, task: str) -> str:
    unit = "nats an answer" if task == "like" else "nats a title"
    return (unit if metric == "nats" else metric) + (" ↓" if metric in LOWER_IS_BETTER else "")


def _number(value: float) -> str:
    """
    >>> _number(0.25), _number(-12.3456)
    ('0.250', '−12.346')
    """
    return f"{value:.3f}".replace("-", "−")


def _interval(estimate: Metrics) -> str:
    if estimate.get("low") is None or estimate.get("high") is None:
        return ""
    return f"{_number(estimate['low'])} to {_number(estimate['high'])}"


# ---- pictures of a task ----


def _metric_pictures(
    task: str, systems: Sequence[Metrics], styles: Mapping[str, plots.Style], lead: str
) -> list[Picture]:
    """One dot plot a metric, best on top."""
    pictures = []
    for metric in dict.fromkeys(("hit_rate@1", lead, "nats", "auc")):
        known = [system for system in systems if _known(system, metric)]
        if known:
            rows = [_row(s["name"], s["metrics"][metric], styles) for s in known]
            svg_name, title = _slug(task, metric), _heading(metric, task)
            rows = _sorted(rows, metric)
            pictures.append(Picture(svg_name, title, plots.dots(svg_name, title, rows)))
    return pictures


def _row(name: str, estimate: Metrics, styles: Mapping[str, plots.Style]) -> plots.Row:
    return plots.Row(name, estimate["value"], estimate.get("low"), estimate.get("high"), styles[name])


def _sorted(rows: Iterable[plots.Row], metric: str) -> list[plots.Row]:
    return sorted(rows, key=lambda row: row.value, reverse=metric not in LOWER_IS_BETTER)


def _rank_pictures(task: str, predictions: pa.Table | None, styles: Mapping[str, plots.Style]) -> list[Picture]:
    """Share of targets within the first k candidates, for every k."""
    if predictions is None or task == "like":
        return []
    mine = predictions.filter(pc.equal(predictions["task"], task))
    series = {}
    for name, style in styles.items():
        ranks = mine.filter(pc.equal(mine["system"], name))["rank"].drop_null().to_numpy()
        if len(ranks) > 0:
            ks = np.arange(1, len(mine["candidates"][0]) + 1)
            series[name] = (ks, np.searchsorted(np.sort(ranks), ks, side="right") / len(ranks), style)
    if not series:
        return []
    name, title = _slug(task, "ranks"), "Targets within the first k candidates"
    return [Picture(name, title, plots.lines(name, title, series, "k", limits=(0, 1.02)), "hit_rate@k for every k")]


def _test_pictures(
    metrics: Metrics, task: str, tests: Sequence[Metrics], styles: Mapping[str, plots.Style]
) -> list[Picture]:
    """One forest plot a metric: the main system's difference to every other; filled where the test decides."""
    pictures = []
    for metric in dict.fromkeys(test["metric"] for test in tests):
        mine = [test for test in tests if test["metric"] == metric]
        main = mine[0]["a"]
        rows = [_difference(test, styles, metrics) for test in mine if test.get("difference") is not None]
        rows, far = _without_far(_sorted(rows, metric))
        better = "left" if metric in LOWER_IS_BETTER else "right"
        name, title = _slug(task, f"difference-{metric}"), f"{main} minus the other: {metric}"
        svg = plots.dots(name, title, rows, f"difference; {better} of the line: {main} is better", 0.0)
        outside = ", ".join(f"{row.label} ({_signed(row.value)})" for row in far)
        pictures.append(Picture(name, title, svg, f"too far off for this scale: {outside}" if far else ""))
    return pictures


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


def _tests(metrics: Metrics, tests: Sequence[Metrics]) -> list[dict[str, str]]:
    """The comparisons as text, by metric."""
    confidence = metrics["protocol"]["bootstrap"]["confidence"]
    words = {"ahead": "{a} ahead", "behind": "{b} ahead", "open": "not decided"}
    order = list(dict.fromkeys(test["metric"] for test in tests))
    rows = []
    for test in sorted(tests, key=lambda test: order.index(test["metric"])):
        found = reading.verdict(test, confidence)
        rows.append(
            {
                "metric": test["metric"],
                "a": test["a"],
                "b": test["b"],
                "difference": _signed(test.get("difference")),
                "interval": _interval(test),
                "p_value": _probability(test.get("p_value")),
                "p_holm": _probability(test.get("p_holm")),
                "method": str(test.get("method") or "").replace("_", " "),
                "examples": str(test["num_examples"]),
                "verdict": found,
                "words": words[found].format(a=test["a"], b=test["b"]),
            }
        )
    return rows


def _signed(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.3f}".replace("-", "−")


def _probability(p: float | None) -> str:
    return MISSING if p is None else reading.probability(p)


# ---- segments and examples ----


def _segments(metrics: Metrics, task: str, styles: Mapping[str, plots.Style], lead: str) -> list[dict[str, Any]]:
    """Each segment as small multiples of the leading metric, and tables of it and of nats."""
    notes = metrics.get("segment_notes") or {}
    kinds = {system["name"]: system["kind"] for system in metrics["systems"]}
    return [
        {
            "name": name,
            "note": notes.get(name, ""),
            "pictures": _small_multiples(task, name, values, lead, styles),
            "tables": [t for m in (lead, "nats") if (t := _segment_table(task, values, m, kinds, styles)) is not None],
        }
        for name, found in ((metrics.get("segments") or {}).get(task) or {}).items()
        for values in [{value: _with_intervals(found[value]) for value in sorted(found, key=_natural)}]
    ]


def _with_intervals(found: Mapping[str, Metrics]) -> dict[str, Metrics]:
    """The figures of one segment; with fewer than FEW_USERS the bootstrap's interval means little: dropped."""
    return {
        name: {
            metric: {"value": value["value"]} if isinstance(value, dict) and system["num_users"] < FEW_USERS else value
            for metric, value in system.items()
        }
        for name, system in found.items()
    }


def _natural(text: str) -> tuple[Any, ...]:
    """Sort key: head, tail, cold; numbers by size; the open end last.

    >>> sorted([">200", "6-10", "51-200", "1-5"], key=_natural)
    ['1-5', '6-10', '51-200', '>200']
    """
    if text in SEGMENT_ORDER:
        return (SEGMENT_ORDER.index(text), "", 0)
    number = re.search(r"\d+", text)
    prefix = text[: number.start()].strip("><") if number else text
    return (0, prefix, int(number[0]) + text.startswith(">") if number else 0)


def _small_multiples(
    task: str, segment: str, values: Mapping[str, Metrics], metric: str, styles: Mapping[str, plots.Style]
) -> list[Picture]:
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
    pictures = []
    for number, (value, rows) in enumerate(panels.items()):
        name, title = _slug(task, segment, str(number)), f"{value}  ({_size(values[value])})"
        pictures.append(Picture(name, title, plots.dots(name, title, rows, limits=limits, width=3.5)))
    return pictures


def _size(found: Mapping[str, Any]) -> str:
    examples, users = (max((s.get(key, 0) for s in found.values()), default=0) for key in ("num_examples", "num_users"))
    return f"n = {examples}" + (", too few for intervals" if users < FEW_USERS else "")


def _segment_table(
    task: str, values: Mapping[str, Metrics], metric: str, kinds: Mapping[str, str], styles: Mapping[str, plots.Style]
) -> Table | None:
    names = [name for name in styles if any((found.get(name) or {}).get(metric) for found in values.values())]
    if not names:
        return None
    lines = [
        Line(
            name,
            KINDS.get(kinds[name], kinds[name]),
            styles[name],
            [_cell((found.get(name) or {}).get(metric)) for found in values.values()],
        )
        for name in names
    ]
    columns = [f"{value} ({_size(found)})" for value, found in values.items()]
    return Table("", _heading(metric, task), columns, lines)


def _examples(metrics: Metrics, task: str, styles: Mapping[str, plots.Style]) -> list[dict[str, Any]]:
    """Example predictions; the style of every system goes with it."""
    shown = []
    for example in metrics.get("examples") or []:
        if example["task"] == task:
            systems = [
                {"name": name, "style": style, **_example_system(example["systems"][name])}
                for name, style in styles.items()
                if name in example["systems"]
            ]
            earlier = max(0, example.get("history_length", 0) - len(example["history"]))
            shown.append({**example, "systems": systems, "earlier": earlier})
    return shown


def _example_system(found: Metrics) -> dict[str, Any]:
    top = [
        {"text": t["text"], "score": _number(t["score"]), "target": bool(t["target"])} for t in found.get("top") or []
    ]
    return {
        "rank": found.get("rank"),
        "full_rank": found.get("full_rank"),
        "top": top[:5],
        "text": found.get("text"),
        "valid": found.get("valid", True),
    }


# ---- training and gate ----


def _training(log: Sequence[Metrics], gate: Metrics | None) -> list[Picture]:
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
    pictures = [Picture(name, title, plots.lines(name, title, curves, "step", faint=faint), caption)] if curves else []
    return pictures + _gate_training(log, gate)


def _gate_training(log: Sequence[Metrics], gate: Metrics | None) -> list[Picture]:
    pictures = []
    steps, entropy = _series(log, "gate_entropy")
    if len(steps):
        name, title = "training-entropy", "Gate entropy"
        largest = float(gate["max_entropy"]) if gate else float(np.max(entropy))
        curve, limits = {"entropy": (steps, entropy, plots.Style("blue", "o"))}, (0, max(largest, 0.01) * 1.12)
        svg = plots.lines(name, title, curve, "step", (largest, "uniform gate"), limits)
        pictures.append(Picture(name, title, svg, "nats; zero is one expert for everybody"))
    experts = sorted(_expert_keys(log).items())
    weights = {f"expert {number}": (*_series(log, key), plots.expert_style(number)) for number, key in experts}
    if weights:
        name, title = "training-experts", "Mean weight of each expert"
        top = min(1.05, 1.25 * max(float(np.max(ys)) for _, ys, _ in weights.values()))
        svg = plots.lines(name, title, weights, "step", (1 / len(weights), "uniform"), (0, top))
        pictures.append(Picture(name, title, svg, "of the training batches"))
    return pictures


def _series(log: Sequence[Metrics], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(entry["step"], entry[key]) for entry in log if entry.get(key) is not None]
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


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


def _gate(gate: Metrics | None) -> dict[str, Any] | None:
    """The gate's table: mean, deviation and how often each expert is the strongest."""
    if not gate:
        return None
    total = max(1, sum(gate["strongest_counts"]))
    experts = [
        {
            "name": f"expert {number}",
            "colour": plots.expert_style(number).colour,
            "mean": _number(mean),
            "deviation": _number(deviation),
            "strongest": f"{count:,}",
            "share": f"{count / total:.0%}",
        }
        for number, (mean, deviation, count) in enumerate(
            zip(gate["mean_weights"], gate["deviation"], gate["strongest_counts"])
        )
    ]
    entropy = f"{_number(gate['mean_entropy'])} of at most {_number(gate['max_entropy'])} nats"
    return {"system": gate["system"], "experts": experts, "entropy": entropy}


def _gate_note(gate: Metrics | None, gates: pa.Table | None) -> str:
    if not gate:
        return "No gate: the adapter of this run is plain LoRA, the same for every user."
    return "" if gates is not None else f"{gate.get('file', 'gates.parquet')} is missing: no pictures of the gate."


def _gate_pictures(gate: Metrics | None, gates: pa.Table | None) -> list[Picture]:
    if not gate or gates is None or not gates.num_rows:
        return []
    weights = np.stack(gates["weights"].to_numpy(zero_copy_only=False)).astype(np.float64)  # (N, K)
    entropy = -np.sum(np.where(weights > 0, weights * np.log(np.maximum(weights, 1e-300)), 0.0), axis=1)
    number = f"{len(weights):,} examples"
    title = "Gate weights of the evaluated examples"
    pictures = [
        Picture(
            "gate-weights", title, plots.weight_histograms("gate-weights", title, weights), f"{number}; dashed: uniform"
        )
    ]
    if gate["max_entropy"] > 0:
        svg = plots.histogram("gate-entropy", "Entropy of the gate", entropy, "nats", (gate["max_entropy"], "uniform"))
        pictures.append(Picture("gate-entropy", "Entropy of the gate", svg, f"{number}; left: one expert decides"))
    return [*pictures, _map_picture(gates, weights.shape[1])]


def _map_picture(gates: pa.Table, num_experts: int) -> Picture:
    """Each user once, at their last evaluated example."""
    users = gates["user_index"].to_numpy()
    last = np.sort(len(users) - 1 - np.unique(users[::-1], return_index=True)[1])
    x, y, strongest = (gates[name].to_numpy()[last] for name in ("x", "y", "strongest"))
    title = "Users by their strongest expert"
    drawn = "" if len(last) <= plots.MAX_POINTS else f", {plots.MAX_POINTS:,} of them drawn"
    svg = plots.user_map("gate-users", title, x, y, strongest, num_experts)
    return Picture("gate-users", title, svg, f"{len(last):,} users{drawn}; principal components of what the gate reads")


# ---- provenance ----


def _provenance(metrics: Metrics) -> list[tuple[str, list[tuple[str, str]]]]:
    """(section, rows) of everything needed to repeat the run."""
    provenance = dict(metrics.get("provenance") or {})
    plain = {key: value for key, value in provenance.items() if not isinstance(value, dict)}
    sections = [("run", plain)] + [(key, value) for key, value in provenance.items() if isinstance(value, dict)]
    sections += [("protocol", metrics["protocol"]), ("counts", metrics.get("counts") or {})]
    return [(name, rows) for name, value in sections if (rows := _flatten(value))]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mapping → (dotted key, text) rows; lists of plain values in one row.

    >>> _flatten({"a": {"b": 1}, "c": [1, 2], "d": None})
    [('a.b', '1'), ('c', '1, 2'), ('d', 'none')]
    """
    rows: list[tuple[str, str]] = []
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            rows += _flatten(inner, f"{prefix}{key}.")
        elif isinstance(inner, list):
            rows.append((f"{prefix}{key}", ", ".join(_plain(item) for item in inner)))
        else:
            rows.append((f"{prefix}{key}", _plain(inner)))
    return rows


def _plain(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _slug(*parts: str) -> str:
    """A file name: letters, digits and dashes.

    >>> _slug("next_item", "hit_rate@1")
    'next-item-hit-rate-1'
    """
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
