"""The report for people. A folder with metrics.json, predictions.parquet and gates.parquet enters; report.html (one
self-contained file), report.md and plots/*.svg leave in the same folder.

What is bold and what the sentences claim is decided by the tests in metrics.json (reading.py), never here. Anything
that is missing is named as missing. The same inputs give the same bytes.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import PackageLoader, StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from recllm import files
from recllm.evaluate import pictures, plots, reading
from recllm.evaluate.pictures import Picture
from recllm.evaluate.reading import LOWER_IS_BETTER, Metrics
from recllm.evaluate.recommendations import hits_names
from recllm.evaluate.statistics import FEW_USERS

MISSING = "–"
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


def write(folder: Path) -> None:
    """Write report.html, report.md and plots/ beside the metrics.json of `folder`.

    Raises:
        UserError: metrics.json is missing or broken.
    """
    folder = Path(folder)
    metrics = files.read_json(folder / "metrics.json", "the figures that recllm evaluate writes")
    view = _view(
        metrics, _table(folder / "predictions.parquet", ["task", "system", "rank"]), _table(folder / "gates.parquet")
    )
    with files.replacing_folder(folder / "plots") as staging:
        for picture in _pictures(view):
            files.write_text(staging / f"{picture.name}.svg", plots.standalone(picture.svg))
    files.write_text(folder / "report.md", _environment(html=False).get_template("report.md.j2").render(view))
    files.write_text(folder / "report.html", _environment(html=True).get_template("report.html.j2").render(view))


def _table(path: Path, columns: list[str] | None = None) -> pa.Table | None:
    return pq.read_table(path, columns=columns) if path.is_file() else None


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
        "below": reading.below_constant(metrics),
        "warnings": _warnings(metrics),
        "collapse": reading.collapse_warning(gate),
        "light": plots.css_variables(dark=False),
        "dark": plots.css_variables(dark=True),
        "tasks": [_task(metrics, task, predictions, styles) for task in metrics["tasks"]],
        "training": pictures.of_training(metrics.get("training_log") or [], gate),
        "gate": _gate(gate),
        "gate_pictures": pictures.of_gate(gate, gates),
        "gate_note": _gate_note(metrics, gates),
        "experts": _experts(metrics),
        "audit_note": _audit_note(metrics),
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
    yield from view["experts"]["pictures"] if view["experts"] else ()


# ---- what a report opens with ----


def _facts(metrics: Metrics) -> list[tuple[str, str]]:
    """(name, value) pairs under the title."""
    provenance = metrics.get("provenance") or {}
    facts = [("split", str(metrics["split"])), ("protocol", str(metrics["protocol"]["name"]))]
    for task, evaluated in ((metrics.get("counts") or {}).get("evaluated") or {}).items():
        of = evaluated.get("of_examples")
        share = f" of {of:,}" if of and of != evaluated["examples"] else ""
        sessions = f"{evaluated['sessions']:,} sessions, " if "sessions" in evaluated else ""
        facts.append((task, f"{evaluated['examples']:,}{share} examples, {sessions}{evaluated['users']:,} users"))
    base = (provenance.get("base_model") or {}).get("name_or_path")
    facts += [("base model", str(base))] if base else []
    return facts + [(key, str(provenance[key])) for key in ("seed", "created") if provenance.get(key) is not None]


def _warnings(metrics: Metrics) -> list[str]:
    found = (metrics.get("audit") or {}).get("warnings") or []
    return [found] if isinstance(found, str) else [str(warning) for warning in found]


def _audit_note(metrics: Metrics) -> str:
    """What the audit of the split cannot see: items that a language model cannot tell apart."""
    colliding = (metrics.get("counts") or {}).get("colliding_texts")
    if not colliding:
        return ""
    return (
        f"{colliding:,} items share their text with another item: a language model cannot tell them apart, they tie "
        "among candidates, and a written title of theirs is no hit."
    )


def _confidence(metrics: Metrics) -> str:
    return f"{metrics['protocol']['bootstrap']['confidence']:.0%}"


# ---- one task ----


def _task(
    metrics: Metrics, task: str, predictions: pa.Table | None, styles: Mapping[str, plots.Style]
) -> dict[str, Any]:
    systems = [system for system in metrics["systems"] if system["task"] == task]
    tests = [test for test in metrics["comparisons"] if test["task"] == task]
    lead = reading.ranking_metric(metrics, task)
    main = next((system for system in systems if system["name"] == metrics["main_system"].get(task)), None)
    return {
        "name": task,
        "main": metrics["main_system"].get(task),
        "lead": lead,
        "unit": reading.unit(task),
        "notes": _notes(metrics, task),
        "sentences": reading.read(metrics, task),
        "tiles": _tiles(metrics, task, systems),
        "tables": _tables(metrics, task, systems, tests, styles),
        "classes": _classes(systems, main),
        "all_metrics": _all_metrics(metrics, systems, tests, styles),
        "pictures": pictures.of_metrics(task, systems, styles, lead)
        + pictures.of_actions(task, main)
        + pictures.of_ranks(task, predictions, metrics["protocol"]["candidates"]["count"], styles),
        "ranks_note": "" if predictions is not None else "predictions.parquet is missing: no curve of ranks.",
        "tests": _tests(metrics, tests),
        "against_plain": _tests(metrics, [t for t in metrics.get("against_plain") or [] if t["task"] == task]),
        "test_pictures": pictures.of_tests(metrics, task, tests, styles),
        "segments": _segments(metrics, task, styles, lead),
        "examples": _examples(metrics, task, styles),
    }


def _notes(metrics: Metrics, task: str) -> list[str]:
    """Sentences of a task, and those that are about no task."""
    others = tuple(f"{name}:" for name in metrics["tasks"] if name != task)
    return [note for note in metrics.get("notes") or [] if not note.startswith(others)]


def _tiles(metrics: Metrics, task: str, systems: Sequence[Metrics]) -> list[dict[str, str]]:
    """The main system's figures in large, each with the best of the others."""
    main = next((system for system in systems if system["name"] == metrics["main_system"].get(task)), None)
    tiles = []
    for metric in dict.fromkeys(("hit_rate@1", *reading.leading_metrics(metrics, task), "nats")):
        estimate = main["metrics"].get(metric) if main else None
        if not main or not estimate or estimate.get("value") is None:
            continue
        sign = -1 if metric in LOWER_IS_BETTER else 1
        others = [
            (s["metrics"][metric]["value"], s["name"]) for s in systems if s is not main and pictures.known(s, metric)
        ]
        best = max(others, key=lambda other: sign * other[0], default=None)
        tiles.append(
            {
                "metric": pictures.heading(metric, task),
                "value": _number(estimate["value"]),
                "interval": _interval(estimate),
                "other": f"best of the others: {best[1]} {_number(best[0])}" if best else "nothing to compare with",
            }
        )
    return tiles


def _tables(
    metrics: Metrics, task: str, systems: Sequence[Metrics], tests: Sequence[Metrics], styles: Mapping[str, plots.Style]
) -> list[Table]:
    """The headline table, the full catalogue's and that of generated answers."""
    confidence = metrics["protocol"]["bootstrap"]["confidence"]
    scored = {system["name"]: system["metrics"] for system in systems}
    full = {system["name"]: system.get("full_catalogue") for system in systems}
    if reading.is_action(task):
        return _action_tables(systems, tests, confidence, styles)
    if reading.is_closed(task):
        columns = sorted({metric for values in scored.values() for metric in values}, key=_natural)
        return [_system_table("Closed answers", "every example", systems, scored, columns, tests, confidence, styles)]
    if reading.is_explained(task):
        columns = ["supported", "valid_ratio", "nats"]
        note = "supported: the answer is a path of the graph from the history to the item; anything else is wrong"
        label = "every example"
        return [_system_table("Explanations", label, systems, scored, columns, tests, confidence, styles, note)]
    ks = sorted(metrics["protocol"]["ranking"]["k"])
    if reading.is_listed(task):
        columns = [name for k in ks for name in hits_names(k)] + ["valid_ratio", "finished", "unknown_share", "nats"]
        note = (
            "hits@k: one of the first k assets was bought in the window (preference), rose in it (profit), or both. "
            "Unfinished and unparsable answers are misses. Baselines answer with their best assets of those on offer; "
            "chance: the expected hits of assets drawn from them"
        )
        label = "every example"
        return [_system_table("Recommended assets", label, systems, scored, columns, tests, confidence, styles, note)]
    count = metrics["protocol"]["candidates"]["count"]
    if reading.is_ordered(task):
        columns = ["undcg/rank", "undcg/utility", "tau/utility", "tau/momentum", "tau/safety", "mrr"]
        columns += [*(f"hit_rate@{k}" for k in ks), "json_valid", "permutation_valid", "finished", "nats"]
        note = (
            "undcg: the order against the customer's utility, fitted to purchases before the date; gains are C for the "
            "best candidate down to 1 for the last (undcg/rank), or the utility less the least one (undcg/utility). "
            "tau: Kendall's, against utility, mean return (momentum) and little risk (safety). mrr and hit_rate: where "
            "the asset stands that the customer then bought first. What is not a list of every candidate once counts "
            "as 0 everywhere, which in tau is what chance has. fitted_utility is the order that completions teach, and "
            "so the ceiling of undcg and tau/utility; chance: the expectation over all orders"
        )
        label = f"every example, {count} candidates"
        return [_system_table("Ranked assets", label, systems, scored, columns, tests, confidence, styles, note)]
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
            reading.candidates_note(metrics, task),
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
                reading.beam_note(systems),
                missing="no full-catalogue ranking for this system",
            )
        )
    return tables + _otto_table(systems, styles, confidence) + _generation_table(systems, styles, confidence)


_ACTIONS_NOTE = (
    "exact_match: averaged within a session, then over sessions. macro: each class alike; weighted: by its examples; "
    "head: the most frequent classes that together hold half of training, tail: the others. A class without an example "
    "is left out of every mean; answers that cannot be read are wrong"
)
_PROBABILITIES_NOTE = (
    "grouped: within each user, weighted by examples; macro: the mean over classes, each against the rest. label_nats: "
    "−log p of the right label among the labels"
)


def _action_tables(
    systems: Sequence[Metrics], tests: Sequence[Metrics], confidence: float, styles: Mapping[str, plots.Style]
) -> list[Table]:
    """Answers, probabilities, and these before and after calibration."""
    scored = {system["name"]: system["metrics"] for system in systems}
    known = dict.fromkeys(name for values in scored.values() for name in values)
    fields = [name for name in known if name.startswith("rouge_l/")]
    columns = ["exact_match", "accuracy", "type_accuracy", *fields, "macro_f1", "weighted_f1", "macro_recall"]
    columns += ["macro_recall/head", "macro_recall/tail", "valid_ratio", "rationale_finished", "nats"]
    given = (systems, scored)
    made = [_system_table("Answers", "every example", *given, columns, tests, confidence, styles, _ACTIONS_NOTE)]
    columns = ["auc", "macro_auc", "grouped_auc", "macro_grouped_auc", "brier", "multiclass_brier"]
    columns += ["top_label_calibration_error", "label_nats"]
    if any(name in known for name in columns):
        able = [system for system in systems if any(name in system["metrics"] for name in columns)]
        title, label = "Probabilities", "every example"
        made.append(_system_table(title, label, able, scored, columns, tests, confidence, styles, _PROBABILITIES_NOTE))
    return made + _calibration_table(systems, styles, confidence) + _generation_table(systems, styles, confidence)


def _calibration_table(systems: Sequence[Metrics], styles: Mapping[str, plots.Style], confidence: float) -> list[Table]:
    able = [system for system in systems if system.get("calibration")]
    if not able:
        return []
    values, columns = {}, dict[str, None]()
    for system in able:
        found = system["calibration"]
        values[system["name"]] = {"temperature": {"value": found["temperature"], "is_exact": True}}
        for name in found["before"]:
            pair = {name + pictures.BEFORE: found["before"][name], name + pictures.AFTER: found["after"][name]}
            values[system["name"]] |= pair
            columns |= dict.fromkeys(pair)
    counts = {system["calibration"]["num_examples"] for system in able}
    note = (
        f"One temperature a system, fitted on {max(counts)} validation examples by the fewest nats (Guo et al. 2017); "
        "no answer changes"
    )
    title, label = "Calibrated probabilities", "every example"
    names = ["temperature", *columns]
    return [_system_table(title, label, able, values, names, [], confidence, styles, note, bold=False)]


def _otto_table(systems: Sequence[Metrics], styles: Mapping[str, plots.Style], confidence: float) -> list[Table]:
    """recall@k by action, where items are held against all that follows in the session."""
    able = {system["name"]: system["otto"] for system in systems if system.get("otto")}
    if not able:
        return []
    first = next(iter(able.values()))
    values = {
        name: {f"recall@{found['k']} {label}": one for label, one in found["recall"].items()}
        | {"score": found["score"]}
        for name, found in able.items()
    }
    to_find = ", ".join(f"{label} {count:,}" for label, count in first["possible"].items())
    note = (
        f"Of the items that follow in the session the share among the first {first['k']}, Σ hits / Σ min({first['k']}, "
        f"items) (OTTO – Recommender Systems Challenge, Kaggle 2022). To be found: {to_find}. One list for all "
        "actions, intervals over users"
    )
    note += f". Ranks of {found}" if (found := reading.beam_note(systems)) else ""
    columns = list(next(iter(values.values())))
    title, missing = "Items to come, by action", "no full-catalogue ranking for this system"
    return [
        _system_table(title, "full catalogue", systems, values, columns, [], confidence, styles, note, missing=missing)
    ]


def _classes(systems: Sequence[Metrics], main: Metrics | None) -> list[dict[str, Any]]:
    """The figures of each class, of the main system and of the constant answer."""
    shown = [system for system in systems if system.get("classes") and (system is main or system["name"] == "constant")]
    made = []
    for system in sorted(shown, key=lambda one: one is not main):
        found = system["classes"]["per_class"]
        rows = [
            {
                "label": one["label"],
                "words": one["words"],
                "part": "head" if one["head"] else "tail",
                "support": f"{one['support']:,}",
                "predicted": f"{one['predicted']:,}",
                "cells": [_cell(one[name]) for name in ("precision", "recall", "f1")],
            }
            for one in found
        ]
        made.append({"system": system["name"], "rows": rows})
    return made


def _generation_table(systems: Sequence[Metrics], styles: Mapping[str, plots.Style], confidence: float) -> list[Table]:
    written = [system for system in systems if system.get("generation")]
    if not written:
        return []
    values = {s["name"]: {k: s["generation"].get(k) for k in ("exact_hit", "valid_ratio")} for s in written}
    first = written[0]["generation"]
    note = f"{first.get('note') or ''}; at most {first['max_new_tokens']} new tokens. Invalid answers count as misses."
    columns = ["exact_hit", "valid_ratio"]
    label = "written answers" if reading.is_action(written[0]["task"]) else "written titles"
    return [
        _system_table("Free generation", label, written, values, columns, [], confidence, styles, note.lstrip("; "))
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
    bold: bool = True,
) -> Table:
    """Rows are systems in their order, columns those metrics that at least one system has."""
    columns = [metric for metric in columns if any((found or {}).get(metric) for found in values.values())]
    best = {
        metric: None  # nothing is tested, so nothing is bold
        if not bold or reading.num_clusters(systems[0]) < FEW_USERS
        else reading.supported_best(
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
    return Table(title, label, [pictures.heading(metric, systems[0]["task"]) for metric in columns], lines, note)


def _cell(estimate: Metrics | None, best: bool = False) -> Cell:
    if not estimate or estimate.get("value") is None:
        return Cell(MISSING)
    return Cell(_number(estimate["value"]), "" if estimate.get("is_exact") else _interval(estimate), best)


def _number(value: float) -> str:
    """
    >>> _number(0.25), _number(-12.3456)
    ('0.250', '−12.346')
    """
    return f"{value:.3f}".replace("-", "−")


def _interval(estimate: Metrics) -> str:
    if estimate.get("low") is None or estimate.get("high") is None:
        return MISSING
    return f"{_number(estimate['low'])} to {_number(estimate['high'])}"


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
    """Each segment as small multiples of the leading metric, and tables of it, in the whole catalogue too, and nats."""
    notes, shown = metrics.get("segment_notes") or {}, (lead, f"full {lead}", "nats")
    kinds = {system["name"]: system["kind"] for system in metrics["systems"]}
    return [
        {
            "name": name,
            "note": notes.get(name, ""),
            "pictures": pictures.of_segment(task, name, values, lead, styles),
            "tables": [t for m in shown if (t := _segment_table(task, values, m, kinds, styles)) is not None],
        }
        for name, found in ((metrics.get("segments") or {}).get(task) or {}).items()
        for values in [{value: _with_intervals(found[value]) for value in sorted(found, key=_natural)}]
    ]


def _with_intervals(found: Mapping[str, Metrics]) -> dict[str, Metrics]:
    """The figures of one segment; with fewer than FEW_USERS the bootstrap's interval means little: dropped."""
    return {
        name: {
            metric: {"value": value["value"]} if isinstance(value, dict) and _is_small(system) else value
            for metric, value in system.items()
        }
        for name, system in found.items()
    }


def _is_small(found: Metrics) -> bool:
    return reading.num_clusters(found) < FEW_USERS


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
    columns = [f"{value} ({pictures.size(found)})" for value, found in values.items()]
    return Table("", pictures.heading(metric, task), columns, lines)


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


# ---- gate ----


def _gate(gate: Metrics | None) -> dict[str, Any] | None:
    """The gate's table: mean, deviation and how often each expert is the strongest."""
    if not gate:
        return None
    none = gate.get("strongest_none", 0)  # examples with the same weight on every expert
    total = max(1, sum(gate["strongest_counts"]) + none)

    def row(name: str, colour: str, mean: str, deviation: str, count: int) -> dict[str, str]:
        strongest, share = f"{count:,}", f"{count / total:.0%}"
        return {"name": name, "colour": colour, "mean": mean, "deviation": deviation} | {
            "strongest": strongest,
            "share": share,
        }

    figures = zip(gate["mean_weights"], gate["deviation"], gate["strongest_counts"])
    experts = [
        row(f"expert {number}", plots.expert_style(number).colour, _number(mean), _number(deviation), count)
        for number, (mean, deviation, count) in enumerate(figures)
    ]
    experts += [row("none", "muted", MISSING, MISSING, none)] if none else []
    entropy = f"{_number(gate['mean_entropy'])} of at most {_number(gate['max_entropy'])} nats"
    return {"system": gate["system"], "experts": experts, "entropy": entropy, "about": _gate_kind(gate)}


def _gate_kind(gate: Metrics) -> str:
    """What kind of gate it is, and how evenly it uses its experts, in sentences."""
    kinds = {"sigmoid": "a sigmoid for each rank, plain LoRA at 0.5", "softmax": "a softmax over the experts"}
    kind = kinds.get(gate.get("type") or "softmax", str(gate.get("type")))
    layers = (
        f", one gate for each of {gate['num_layers']} layers; weights are means over layers"
        if gate.get("num_layers")
        else ""
    )
    found = gate.get("collapse")
    if not found:
        return f"The gate is {kind}{layers}."
    return (
        f"The gate is {kind}{layers}. Over {found['num_users']:,} examples whose weights differ between experts: "
        f"{found['entropy']:.0%} of the largest entropy in mean use, {found['largest_mean']:.0%} the largest share, "
        f"and one expert is the strongest for {found['top_expert_share']:.0%} of them"
        + ("." if found["collapsed"] else ": not collapsed.")
    )


def _gate_note(metrics: Metrics, gates: pa.Table | None) -> str:
    gate = metrics.get("gate")
    if not gate:
        methods = {
            system.get("method") for system in metrics["systems"] if system["name"] in metrics["main_system"].values()
        }
        if "soft_token" in methods:
            return "No gate: the adapter of this run adds a soft token to the prompt, its weights are the same for all."
        return "No gate: the adapter of this run is plain LoRA, the same for every user."
    return "" if gates is not None else f"{gate.get('file', 'gates.parquet')} is missing: no pictures of the gate."


# ---- whom each expert serves ----


def _experts(metrics: Metrics) -> dict[str, Any] | None:
    """Sentences, pictures and tables of the entry `experts`."""
    found, gate = metrics.get("experts"), metrics.get("gate")
    if not found or not gate:
        return None
    confidence = metrics["protocol"]["bootstrap"]["confidence"]
    return {
        "system": found["system"],
        "columns": [f"expert {expert}" for expert in range(gate["num_experts"])],
        "sentences": reading.about_experts(found),
        "pictures": pictures.of_experts(found, gate["deviation"], confidence),
        "notes": [*_grouping(found["item_groups"]), *found["notes"]],
        "num_users": f"{found['num_users']:,}",
        "parts": [{"name": part["name"], "rows": _lift_rows(part)} for part in found["parts"]],
    }


def _grouping(groups: Metrics | None) -> list[str]:
    """By which attribute items were grouped, and how that was decided."""
    if not groups:
        return []
    separators = {"": "one value an item", " ": "values separated by spaces"}
    how = separators.get(groups["separator"], f'values separated by "{groups["separator"]}"')
    guess = "; guessed, evaluate.item_groups names another" if groups["guessed"] else ""
    return [f"Items are grouped by their attribute {groups['column']} ({how}{guess})."]


def _lift_rows(part: Metrics) -> list[dict[str, Any]]:
    return [
        {
            "name": group["name"],
            "share": f"{group['share']:.1%}",
            "num_users": f"{group['num_users']:,}",
            "cells": [_lift_cell(lift) for lift in group["lifts"]],
        }
        for group in part["groups"]
    ]


def _lift_cell(lift: Metrics) -> Cell:
    if lift["value"] is None:
        return Cell(MISSING)
    interval = MISSING if lift["low"] is None else f"{lift['low']:.2f} to {lift['high']:.2f}"
    return Cell(f"{lift['value']:.2f}", interval, reading.is_distinct(lift))


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
