import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from recllm.recipe import RetrievalSection

ROOT = Path(__file__).resolve().parents[2]


def test_bench_gets_the_same_answers_from_both_engines(tmp_path):
    pytest.importorskip("duckdb")
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "graph.py"), "--triples", "3000", "6000"]
    options = ["--users", "40", "--converted-users", "60", "--repeats", "1", "--batch", "16"]
    options += ["--folder", str(tmp_path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    first, second, together = [json.loads(line) for line in done.stdout.splitlines()]
    assert (first["triples"], second["triples"]) == (3000, 6000)
    assert first["answers_equal"] is True
    assert first["triples_reached_per_user"] > first["triples_shown_per_user"] > 20
    assert together["sizes"] == [first, second]
    assert {"duckdb_over_ours", "duckdb_plain_over_ours", "ms_per_1000_users", "peak_rss_mib"} <= set(together)
    assert together["size_ratio"] == 6000 / 3000
    assert "conversion" not in second  # as DuckDB, only at the first size
    if first["tokenizer"] is None:
        assert "not in the cache" in first["conversion_note"]
        assert together["conversion_examples_per_cpu_s"] == {}
    else:
        assert set(together["conversion_examples_per_cpu_s"]) == set(
            get_args(RetrievalSection.model_fields["method"].annotation)
        )
        assert len({found["examples"] for found in together["conversion"].values()}) == 1
        for method, found in together["conversion"].items():
            assert found["examples_per_cpu_s"] == together["conversion_examples_per_cpu_s"][method] > 0
            assert 0.9 < found["with_graph"] / found["examples"] <= 1
            assert 100 < found["tokens_shown"] <= 200
    assert list(tmp_path.iterdir()) == []  # tidied up


def test_the_comparison_sees_a_difference(monkeypatch):
    import numpy as np

    from recllm.graph.retrieve import khop
    from recllm.graph.store import Graph
    from recllm.graph.subgraphs import Seeds
    from recllm.graph.walk import Rules

    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "bench"))
    import graph as bench

    world = Graph.of([0, 0, 3], [0, 0, 0], [1, 2, 1], [5, 6, 7], num_entities=4, num_relations=1)
    mine = khop(world, Seeds.of([[0], [3]], [9, 9]), Rules())
    columns = ("prompts", "heads", "relations", "tails", "times", "scores", "hops")
    same = {name.removesuffix("s"): getattr(mine, name).astype(float) for name in columns} | {"hop": mine.hops}
    same["prompt"] = mine.prompts
    bench.check_best(mine, same, 0)
    bench.check_all(mine, same, 0)
    for name in ("tail", "time"):
        with pytest.raises(SystemExit, match="not the same"):
            bench.check_all(mine, same | {name: same[name] + 1}, 0)
        with pytest.raises(SystemExit, match="other triples"):
            bench.check_best(mine, same | {name: same[name] + (np.arange(len(mine.heads)) == 0)}, 0)
    with pytest.raises(AssertionError):
        bench.check_best(mine, same | {"score": same["score"] * 1.01}, 0)
    with pytest.raises(SystemExit, match="other numbers"):
        bench.check_best(mine, same | {"prompt": same["prompt"] * 0}, 0)
