import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recllm.errors import UserError
from recllm.evaluate.compare import COLUMNS, Run, compare, compare_rows
from recllm.evaluate.evaluation import evaluate
from recllm.evaluate.figures import PREDICTIONS
from recllm.recipe import BootstrapSection

SCHEMA = pa.schema([PREDICTIONS.field(name) for name in COLUMNS])


@pytest.fixture(scope="module")
def reports(made, tmp_path_factory):
    """Two runs: the sequence encoder alone and popularity alone, the latter on fewer users."""
    folder, made_reports = tmp_path_factory.mktemp("reports"), []
    for name, count in {"sequence_encoder": 30, "popularity": 20}.items():
        section = made.recipe.evaluate.model_copy(update={"baselines": [name], "max_examples": count})
        recipe = made.recipe.model_copy(update={"name": f"run of {name}", "evaluate": section})
        evaluate(recipe, made.dataset, made.encoder, None, folder / name)
        made_reports.append(folder / name)
    return made_reports


def run(name, **rows):
    """example id → row."""
    return Run(name, pa.Table.from_pylist([{"example_id": key, **row} for key, row in rows.items()], SCHEMA))


def row(hit, user, candidates=(1, 2), **changes):
    values = {
        "task": "next_item",
        "rank": 1 if hit else 2,
        "valid": True,
        "nats": None,
        "user_index": user,
        "target": 1,
        "label": None,
    }
    return values | {"candidates": list(candidates)} | changes


def test_the_difference_is_on_shared_examples_only():
    a = run("a", **{f"e{n}": row(hit=n < 6, user=n) for n in range(10)})
    b = run("b", **{f"e{n}": row(hit=False, user=n) for n in reversed(range(2, 12))})
    found = compare_rows(a, b, "hit_rate@1", BootstrapSection())
    assert (found["difference"], found["num_examples"]) == (4 / 8, 8)
    assert (found["method"], found["p_value"]) == ("mcnemar", pytest.approx(2 * (1 / 2) ** 4))


def test_examples_are_paired_by_their_id():
    a = run("a", e0=row(True, 0), e1=row(False, 1), e2=row(True, 2))
    b = run("b", e2=row(True, 2), e1=row(False, 1), e0=row(True, 0))
    assert compare_rows(a, b, "hit_rate@1", BootstrapSection())["high"] == 0


def test_several_examples_of_a_user_take_the_bootstrap():
    a = run("a", **{f"e{n}": row(hit=True, user=n // 2) for n in range(10)})
    b = run("b", **{f"e{n}": row(hit=False, user=n // 2) for n in range(10)})
    assert compare_rows(a, b, "hit_rate@1", BootstrapSection())["method"] == "paired_bootstrap"


def test_an_invalid_row_is_a_miss():
    a = run("a", e0=row(hit=True, user=0), e1=row(hit=True, user=1, valid=False))
    assert compare_rows(a, a, "hit_rate@1", BootstrapSection())["difference"] == 0
    b = run("b", e0=row(hit=True, user=0), e1=row(hit=True, user=1))
    assert compare_rows(b, a, "mrr", BootstrapSection())["difference"] == 1 / 2


def test_other_candidates_are_refused():
    a, b = run("a", f=row(True, 1), e=row(True, 0)), run("b", f=row(True, 1), e=row(True, 0, candidates=(1, 3)))
    with pytest.raises(UserError, match="example e has other candidates in a than in b"):
        compare_rows(a, b, "hit_rate@1", BootstrapSection())


def test_no_shared_example_is_refused():
    with pytest.raises(UserError, match="share no example"):
        compare_rows(run("a", e=row(True, 0)), run("b", f=row(True, 0)), "mrr", BootstrapSection())


def test_reports_are_compared_on_what_they_share(reports):
    text = compare(reports)
    assert "20 of 30 and 20" in text
    assert "next_item, hit_rate@1" in text
    assert "next_item, ndcg@3" in text
    assert "like, accuracy" in text
    rows = [pq.read_table(folder / "predictions.parquet").to_pylist() for folder in reports]
    by_id = [{r["example_id"]: r["rank"] == 1 for r in part if r["task"] == "next_item"} for part in rows]
    shared = by_id[0].keys() & by_id[1].keys()
    difference = np.mean([by_id[0][e] for e in shared]) - np.mean([by_id[1][e] for e in shared])
    line = next(line for line in text.splitlines() if "run of sequence_encoder (sasrec)" in line)
    assert f"{difference:.4f}" in line


def test_one_metric_may_be_asked_for_and_an_unknown_one_is_refused(reports):
    assert "hit_rate@1" not in compare(reports, "valid_ratio")
    with pytest.raises(UserError, match='no metric "hit_rate@0"'):
        compare(reports, "hit_rate@0")
    with pytest.raises(UserError, match='no metric "nats"'):
        compare(reports, "nats")


def test_one_report_is_nothing_to_compare(reports):
    with pytest.raises(UserError, match="at least 2"):
        compare(reports[:1])


def test_a_folder_without_a_report_is_refused(reports, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        compare([reports[0], tmp_path])


def test_another_vocabulary_is_refused(reports, tmp_path):
    shutil.copytree(reports[0], tmp_path / "other")
    path = tmp_path / "other" / "metrics.json"
    document = json.loads(path.read_text())
    document["provenance"]["hashes"]["items"] = "0" * 64
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="another item vocabulary"):
        compare([reports[0], tmp_path / "other"])


def acts(name, hits, session, task="next_action", **more):
    """One example a hit, of a task about actions."""
    schema = SCHEMA.append(PREDICTIONS.field("session"))
    rows = [
        {"example_id": f"e{n}", "task": task, "user_index": 0, "label": "buy", "valid": True, "session": session[n]}
        | {"predicted": "buy" if hit else None}
        | {key: values[n] for key, values in more.items()}
        for n, hit in enumerate(hits)
    ]
    return Run(name, pa.Table.from_pylist(rows, schema))


def test_exact_match_of_actions_is_averaged_within_sessions_first():
    session = [0, 0, 0, 1, 2, 3, 4]
    a, b = acts("a", [1, 1, 1, 0, 0, 0, 0], session), acts("b", [0] * 7, session)
    found = compare_rows(a, b, "exact_match", BootstrapSection())
    assert found["difference"] == 1 / 5
    assert (found["num_examples"], found["num_sessions"], found["method"]) == (7, 5, "mcnemar_clustered")
    assert compare_rows(a, b, "accuracy", BootstrapSection())["difference"] == 3 / 7
    with pytest.raises(UserError, match="other sessions"):
        compare_rows(a, acts("b", [0] * 7, [9, *session[1:]]), "exact_match", BootstrapSection())


def test_exact_match_of_events_is_what_their_figures_say():
    session, said = [0, 1, 2, 3, 4], [[("exact", 1.0), ("type_accuracy", 1.0)]] * 5
    a = acts("a", [1] * 5, session, "next_event", figures=said)
    b = acts("b", [1] * 5, session, "next_event", figures=[[("exact", 0.0), ("type_accuracy", 1.0)]] * 5)
    assert compare_rows(a, b, "exact_match", BootstrapSection())["difference"] == 1
    assert compare_rows(a, b, "type_accuracy", BootstrapSection())["difference"] == 0


def test_reports_of_earlier_versions_have_no_sessions(reports, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(reports[0], old)
    table = pq.read_table(old / "predictions.parquet")
    pq.write_table(table.drop_columns(["session"]), old / "predictions.parquet")
    assert "next_item, hit_rate@1" in compare([old, reports[1]])
