"""Tests runs against each other: `recllm compare REPORT REPORT…`.

Report folders enter; a plain-text table leaves: the main system of each run against that of every other run, on the
examples that they share, with Holm's correction over the pairs of runs.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recllm import files
from recllm.errors import UserError
from recllm.evaluate import metrics, reading, statistics
from recllm.evaluate.action_figures import EXACT_MATCH
from recllm.evaluate.action_metrics import session_means
from recllm.evaluate.explanations import SUPPORTED
from recllm.evaluate.figures import Pair, compare_pairs, compare_sessions
from recllm.evaluate.next_events import EXACT
from recllm.evaluate.tasks import ACTION_KINDS, ASSETS, EXPLAIN, NEXT_EVENT, RANK_ASSETS
from recllm.recipe import BootstrapSection

SAME = ["target", "candidates", "label"]  # of an example in all reports
COLUMNS = ["task", "example_id", "user_index", *SAME, "rank", "nats", "valid", "predicted", "figures"]
SESSION = "session"  # a further column, which reports of earlier versions do not have


class Run(NamedTuple):
    """The main system of one report, for one task."""

    name: str
    rows: pa.Table  # COLUMNS of predictions.parquet, one row an example


def compare(report_folders: Sequence[Path], metric: str | None = None) -> str:
    """Pairwise paired tests between runs, as text.

    Args:
        report_folders: at least two, written by evaluate.
        metric: only this one, e.g. "hit_rate@1", "ndcg@10", "mrr", "accuracy", "exact_match", "nats"; None: one of
            each sort.

    Raises:
        UserError: one report, no report, another dataset or protocol, no shared example, other candidates, a metric
            that a report does not have.
    """
    folders = [Path(folder) for folder in report_folders]
    if len(folders) < 2:
        raise UserError(f"{len(folders)} report was given, at least 2 are needed to compare: name more report folders")
    documents = [files.read_json(folder / "metrics.json", "the figures of a report") for folder in folders]
    _check_same_ground(folders, documents)
    tasks = [task for task in documents[0]["tasks"] if all(task in document["tasks"] for document in documents)]
    if not tasks:
        raise UserError(f"{folders[0]} and the other reports share no task: they have nothing to compare")
    names = _run_names(folders, documents)
    lines = []
    for task in tasks:
        runs = [_read(folder, document, name, task) for folder, document, name in zip(folders, documents, names)]
        lines += _task_lines(task, runs, documents[0], metric)
    return "\n".join(lines)


def compare_rows(a: Run, b: Run, metric: str, section: BootstrapSection) -> dict[str, Any]:
    """a − b on the examples that both have, with interval and p-value.

    Raises:
        UserError: no shared example, or one with other candidates or another target.
    """
    place = pc.index_in(a.rows["example_id"], value_set=b.rows["example_id"].combine_chunks())
    shared = pc.is_valid(place)
    if not pc.any(shared).as_py():
        raise UserError(f"{a.name} and {b.name} share no example: evaluate both on the same split and max_examples")
    rows_a, rows_b = a.rows.filter(shared), b.rows.take(place.drop_null())
    for column in SAME:
        if rows_a[column].combine_chunks() != rows_b[column].combine_chunks():
            pairs = zip(rows_a["example_id"].to_pylist(), rows_a[column].to_pylist(), rows_b[column].to_pylist())
            example_id = next(name for name, one, other in pairs if one != other)
            raise UserError(
                f"example {example_id} has other {column} in {a.name} than in {b.name}: evaluate both on the same "
                "dataset folder"
            )
    about_actions = _is_kind(rows_a, *ACTION_KINDS)
    if about_actions and not rows_a[SESSION].equals(rows_b[SESSION]):
        raise UserError(f"{a.name} and {b.name} have other sessions: evaluate both on the same dataset folder")
    if metric == EXACT_MATCH and about_actions:
        sessions = rows_a[SESSION].to_numpy()
        means = [session_means(_right(rows, name), sessions) for rows, name in ((rows_a, a.name), (rows_b, b.name))]
        return compare_sessions([Pair(a.name, b.name, metric, *means)], rows_a.num_rows, section)[0]
    values_a, values_b = _values(rows_a, metric, a.name), _values(rows_b, metric, b.name)
    pair = Pair(a.name, b.name, metric, values_a, values_b)
    clusters = rows_a[SESSION if about_actions else "user_index"].to_numpy()
    return compare_pairs([pair], clusters, section, "sessions" if about_actions else "users")[0]


def _right(rows: pa.Table, name: str) -> np.ndarray:
    """(N,) 1 where all that is asked is right, of tasks about actions."""
    return _values(rows, EXACT if _is_kind(rows, NEXT_EVENT) else "accuracy", name)


def _values(rows: pa.Table, metric: str, name: str) -> np.ndarray:
    """One value an example (N,), read off predictions.parquet."""
    kind, _, cutoff = metric.partition("@")
    closed, valid = _is_closed(rows), rows["valid"].to_numpy()
    if not rows["figures"].null_count:  # of a bank's tasks: every metric is there
        found = [dict(row).get(metric) for row in rows["figures"].to_pylist()]
        if None not in found:
            return np.array(found, dtype=np.float64)
    if metric == "nats" and not rows["nats"].null_count:
        return rows["nats"].to_numpy()
    if metric == "valid_ratio":
        return metrics.valid_ratio(valid)
    if metric == "supported" and _is_kind(rows, EXPLAIN):
        return pc.equal(rows["predicted"], SUPPORTED).to_numpy().astype(np.float64)
    if metric == "accuracy" and closed:
        right = pc.fill_null(pc.equal(rows["predicted"], rows["label"]), False)
        return right.to_numpy().astype(np.float64)
    if kind in ("hit_rate", "ndcg", "mrr") and not closed and (metric == "mrr" or cutoff.strip("0").isdigit()):
        rank = np.where(valid, rows["rank"].to_numpy(), metrics.NO_RANK)
        k = int(cutoff) if cutoff else None
        if kind == "mrr":
            return metrics.mrr(rank, k)
        assert k is not None  # only mrr goes without a cut-off: the condition above
        return metrics.hit_rate(rank, k) if kind == "hit_rate" else metrics.ndcg(rank, k)
    raise UserError(
        f'{name} has no metric "{metric}": hit_rate@k, ndcg@k, mrr@k, mrr, valid_ratio, for language models nats; '
        "accuracy of closed tasks, exact_match of tasks about actions, type_accuracy of next_event, supported of "
        "explanations, hits@k/both, …/preference and …/profit of assets, undcg/rank, tau/utility and others of "
        "rank_assets"
    )


def _is_closed(rows: pa.Table) -> bool:
    # a closed task has no ranks
    return bool(rows["rank"].null_count) and not _is_kind(rows, EXPLAIN, ASSETS, RANK_ASSETS, NEXT_EVENT)


def _is_kind(rows: pa.Table, *kinds: str) -> bool:
    return bool(rows.num_rows) and rows["task"][0].as_py().partition(".")[0] in kinds


def _check_same_ground(folders: list[Path], documents: list[dict[str, Any]]) -> None:
    for folder, document in zip(folders[1:], documents[1:]):
        for what, first, own in (
            (
                "item vocabulary",
                documents[0]["provenance"]["hashes"]["items"],
                document["provenance"]["hashes"]["items"],
            ),
            ("split", documents[0]["split"], document["split"]),
            ("protocol.split", documents[0]["protocol"]["split"], document["protocol"]["split"]),
            ("protocol.candidates", documents[0]["protocol"]["candidates"], document["protocol"]["candidates"]),
        ):
            if first != own:
                raise UserError(
                    f"{folder} has another {what} ({_short(own)}) than {folders[0]} ({_short(first)}): only runs "
                    "on the same dataset and protocol can be compared"
                )


def _read(folder: Path, document: dict[str, Any], name: str, task: str) -> Run:
    system = document["main_system"][task]
    path = folder / "predictions.parquet"
    wanted = [("system", "=", system), ("task", "=", task)]
    try:
        known = [name for name in (*COLUMNS, SESSION) if name != SESSION or name in pq.read_schema(path).names]
        rows = pq.read_table(path, columns=known, filters=wanted)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: no readable predictions ({str(error).splitlines()[0]}): evaluate again") from None
    return Run(f"{name} ({system})", rows)


def _task_lines(task: str, runs: list[Run], document: dict[str, Any], metric: str | None) -> list[str]:
    section = BootstrapSection.model_validate(document["protocol"]["bootstrap"])
    lines = []
    for name in [metric] if metric else _metrics_of(runs, document):
        tests = [compare_rows(a, b, name, section) for a, b in combinations(runs, 2)]
        adjusted = statistics.holm([np.nan if test["p_value"] is None else test["p_value"] for test in tests])
        lines += ["", f"{task}, {name}: a - b, {section.confidence:.0%} interval over {reading.unit(task)}"]
        rows = [["a", "b", "a - b", "interval", "p", "p (Holm)", "test", "shared examples"]]
        rows += [_row(test, p, runs) for test, p in zip(tests, adjusted)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines += ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
    return lines


def _metrics_of(runs: list[Run], document: dict[str, Any]) -> list[str]:
    cutoffs = document["protocol"]["ranking"]["k"]
    closed = _is_closed(runs[0].rows)
    ranked = [f"hit_rate@{min(cutoffs)}", f"ndcg@{max(cutoffs)}"]
    if _is_kind(runs[0].rows, EXPLAIN, ASSETS, RANK_ASSETS):
        ranked = reading.leading_metrics(document, runs[0].rows["task"][0].as_py())
    names = ["accuracy"] if closed else ranked
    if _is_kind(runs[0].rows, *ACTION_KINDS):
        names = [EXACT_MATCH, "type_accuracy"] if _is_kind(runs[0].rows, NEXT_EVENT) else [EXACT_MATCH]
    return names if any(run.rows["nats"].null_count for run in runs) else [*names, "nats"]


def _row(test: dict[str, Any], p_holm: float, runs: list[Run]) -> list[str]:
    counts = {run.name: run.rows.num_rows for run in runs}
    shared = f"{test['num_examples']} of {counts[test['a']]} and {counts[test['b']]}"
    interval = "-" if test["low"] is None else f"[{_number(test['low'])}, {_number(test['high'])}]"
    p_values = [_number(test["p_value"]), _number(p_holm)]
    return [test["a"], test["b"], _number(test["difference"]), interval, *p_values, test["method"], shared]


def _run_names(folders: list[Path], documents: list[dict[str, Any]]) -> list[str]:
    """The recipes' names; the folders instead where two are equal."""
    names = [document["name"] for document in documents]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.4f}"


def _short(value: Any) -> str:
    return str(value)[:12] + "…" if isinstance(value, str) and len(value) > 12 else str(value)
