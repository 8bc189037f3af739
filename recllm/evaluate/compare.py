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
from recllm.evaluate import metrics, statistics
from recllm.evaluate.figures import compare_pair
from recllm.recipe import BootstrapSection


class Run(NamedTuple):
    """The main system of one report, for one task."""

    name: str
    rows: dict[str, dict[str, Any]]  # example id → its row of predictions.parquet


def compare(report_folders: Sequence[Path], metric: str | None = None) -> str:
    """Pairwise paired tests between runs, as text.

    Args:
        report_folders: at least two, written by evaluate.
        metric: only this one, e.g. "hit_rate@1", "ndcg@10", "mrr", "accuracy", "nats"; None: one of each sort.

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
    shared = [example_id for example_id in a.rows if example_id in b.rows]
    if not shared:
        raise UserError(f"{a.name} and {b.name} share no example: evaluate both on the same split and max_examples")
    for example_id in shared:
        for column in ("candidates", "target", "label"):
            if a.rows[example_id][column] != b.rows[example_id][column]:
                raise UserError(
                    f"example {example_id} has other {column} in {a.name} than in {b.name}: evaluate both on the same "
                    "dataset folder"
                )
    users = np.array([a.rows[example_id]["user_index"] for example_id in shared])
    values = [_values([run.rows[example_id] for example_id in shared], metric, run.name) for run in (a, b)]
    return compare_pair(a.name, b.name, metric, values[0], values[1], users, section)


def _values(rows: list[dict[str, Any]], metric: str, name: str) -> np.ndarray:
    """One value an example (N,), read off predictions.parquet."""
    kind, _, cutoff = metric.partition("@")
    closed = rows[0]["rank"] is None
    if metric == "nats" and all(row["nats"] is not None for row in rows):
        return np.array([row["nats"] for row in rows])
    if metric == "valid_ratio":
        return metrics.valid_ratio(np.array([row["valid"] for row in rows]))
    if metric == "accuracy" and closed:
        return np.array([float(row["predicted"] == row["label"]) for row in rows])
    if kind in ("hit_rate", "ndcg", "mrr") and not closed and (metric == "mrr" or cutoff.strip("0").isdigit()):
        rank = np.array([row["rank"] if row["valid"] else metrics.NO_RANK for row in rows])
        k = int(cutoff) if cutoff else None
        return {"hit_rate": metrics.hit_rate, "ndcg": metrics.ndcg, "mrr": metrics.mrr}[kind](rank, k)  # type: ignore
    raise UserError(
        f'{name} has no metric "{metric}": hit_rate@k, ndcg@k, mrr@k, mrr, valid_ratio, for language models nats; '
        "accuracy of closed tasks"
    )


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
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: no readable predictions ({str(error).splitlines()[0]}): evaluate again") from None
    mine = pc.and_(pc.equal(table["system"], system), pc.equal(table["task"], task))
    rows = table.filter(mine).drop_columns(["scores", "text"]).to_pylist()
    return Run(f"{name} ({system})", {row["example_id"]: row for row in rows})


def _task_lines(task: str, runs: list[Run], document: dict[str, Any], metric: str | None) -> list[str]:
    section = BootstrapSection.model_validate(document["protocol"]["bootstrap"])
    lines = []
    for name in [metric] if metric else _metrics_of(runs, document):
        tests = [compare_rows(a, b, name, section) for a, b in combinations(runs, 2)]
        adjusted = statistics.holm([np.nan if test["p_value"] is None else test["p_value"] for test in tests])
        lines += ["", f"{task}, {name}: a - b, {section.confidence:.0%} interval over users"]
        rows = [["a", "b", "a - b", "interval", "p", "p (Holm)", "test", "shared examples"]]
        rows += [_row(test, p, runs) for test, p in zip(tests, adjusted)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines += ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
    return lines


def _metrics_of(runs: list[Run], document: dict[str, Any]) -> list[str]:
    rows = [row for run in runs for row in run.rows.values()]
    cutoffs = document["protocol"]["ranking"]["k"]
    closed = bool(rows) and rows[0]["rank"] is None
    names = ["accuracy"] if closed else [f"hit_rate@{min(cutoffs)}", f"ndcg@{max(cutoffs)}"]
    return [*names, "nats"] if rows and all(row["nats"] is not None for row in rows) else names


def _row(test: dict[str, Any], p_holm: float, runs: list[Run]) -> list[str]:
    counts = {run.name: len(run.rows) for run in runs}
    shared = f"{test['num_examples']} of {counts[test['a']]} and {counts[test['b']]}"
    interval = f"[{_number(test['low'])}, {_number(test['high'])}]"
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
