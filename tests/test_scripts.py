"""The scripts of reproduce/ and bench/: that they run at tiny sizes, resume, and compare what they say they compare."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(monkeypatch, capsys):
    """run(script, *arguments): a script as `python scripts/…` would run it, in this process; returns its output."""

    def go(script, *arguments):
        path = ROOT / "scripts" / script
        monkeypatch.syspath_prepend(str(path.parent))
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        threads = torch.get_num_threads()
        try:
            runpy.run_path(str(path), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr().out

    return go


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "reproduce"))
    import evidence

    return evidence


def test_synthetic_evidence_runs_resumes_and_reports(run, tmp_path):
    small = ["--work", tmp_path / "work", "--seeds", 0, "--knobs", 1, "--settings", "2:all", "2:2", "--workers", 1]
    small += ["--users", 80, "--steps", 2, "--base-steps", 2, "--output", tmp_path / "synthetic.md"]
    run("reproduce/synthetic.py", *small)
    path = tmp_path / "work" / "cells.jsonl"
    cells = [json.loads(line) for line in path.read_text().splitlines()]
    found = {(cell["setting"], cell["arm"]) for cell in cells}
    arms = ("lora", "ilora", "uniform", "shuffled", "oracle", "soft_token", "ilora@uniform", "ilora@shuffled")
    assert found >= {("2:all", arm) for arm in arms} | {("2:2", arm) for arm in ("ilora", "shuffled", "soft_token")}
    counts = [cell["parameters"] for cell in cells]
    assert max(counts) <= 1.02 * min(counts)  # equal within 2%
    assert all(len(cell["nats"]) == len(cell["users"]) and np.isfinite(cell["nats"]).all() for cell in cells)
    by_arm = {cell["arm"]: cell for cell in cells if cell["setting"] == "2:all"}
    # experts that all weigh the same, the same start and the same batches: the plain LoRA
    assert by_arm["uniform"]["nats"] == pytest.approx(by_arm["lora"]["nats"], abs=1e-3)
    assert by_arm["oracle"]["nats"] != pytest.approx(by_arm["lora"]["nats"], abs=1e-3)
    before = path.read_bytes()
    done = run("reproduce/synthetic.py", *small, "--report")
    assert path.read_bytes() == before
    text = (tmp_path / "synthetic.md").read_text()
    assert text in done
    assert "| oracle |" in text
    run("reproduce/synthetic.py", *small)  # every cell is there: nothing is trained
    assert path.read_bytes() == before


def test_movielens_evidence_runs_resumes_and_reports(run, tmp_path, movielens, tiny_model_folder):
    small = ["--work", tmp_path / "work", "--output", tmp_path / "gate.md", "--model", tiny_model_folder]
    small += ["--dtype", "float32", "--seeds", 0, "--windows", 2, "--steps", 1, "--max-windows", 20]
    small += ["--encoder-epochs", 1, "--set", "filter.min_rating=5", "filter.user_core=40"]
    run("reproduce/movielens.py", *small, "--arms", "lora", "ilora", "shuffled")
    path = tmp_path / "work" / "cells.jsonl"
    cells = [json.loads(line) for line in path.read_text().splitlines()]
    assert {cell["arm"] for cell in cells} == {"lora", "ilora", "shuffled", "ilora@uniform", "ilora@shuffled"}
    assert all(cell["users"] == cells[0]["users"] and cell["titles"] == cells[0]["titles"] for cell in cells)
    assert set(cells[0]["titles"]) == {2}
    nats = {cell["arm"]: cell["nats"] for cell in cells}
    assert nats["ilora@uniform"] == pytest.approx(nats["lora"], abs=0.05)  # one step: hardly a gate yet
    before = path.read_bytes()
    run("reproduce/movielens.py", *small, "--arms", "lora", "ilora")
    run("reproduce/movielens.py", *small, "--report")
    assert path.read_bytes() == before
    assert "windows of 2 titles" in (tmp_path / "gate.md").read_text()


def test_train_step_bench_prints_every_ratio(run, tiny_model_folder):
    small = ["--quick", "--dtype", "float32", "--model", tiny_model_folder, "--parts", "gated", "einsum"]
    line = json.loads(run("bench/train_step.py", *small).splitlines()[-1])
    assert set(line["gated_over_plain"]) == set(line["loop_over_gated"]) == {"smollm2", "wide"}
    assert line["einsum_layer_over_gated"] > 0
    assert line["step"]["wide"]["share_of_peak"] is None


def test_the_loop_of_the_bench_gives_our_formula(monkeypatch, tiny_llama):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "bench"))
    import train_step

    ours, loop = (train_step.make_model(tiny_llama(), method).eval() for method in ("gated", "loop"))
    state = {
        name: torch.randn_like(value) * 0.1 if "lora_" in name else value for name, value in ours.state_dict().items()
    }
    ours.load_state_dict(state)
    loop.load_state_dict(state)
    given = {"input_ids": torch.arange(12).view(2, 6), "gate_weights": torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25] * 4])}
    assert torch.allclose(ours(**given).logits, loop(**given).logits, atol=1e-4)


# ---- what the scripts share ----


def test_cells_survive_a_killed_run(evidence, tmp_path):
    cells = evidence.Cells(tmp_path / "cells.jsonl", ("arm", "seed"))
    cells.add({"arm": "lora", "seed": 0, "nats": [1.0]})
    with cells.path.open("a") as file:
        file.write('{"arm": "ilora", "se')
    assert list(cells.read()) == [("lora", 0)]
    cells.add({"arm": "ilora", "seed": 0, "nats": [2.0]})
    assert list(cells.read()) == [("lora", 0), ("ilora", 0)]
    cells.add({"arm": "lora", "seed": 0, "nats": [3.0]})
    assert cells.read()["lora", 0]["nats"] == [3.0]  # the newest counts


def test_differences_are_paired_and_count_titles(evidence):
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 3).tolist()
    noise = rng.normal(size=120)
    titles = [1, 2, 3] * 40
    cells = {
        arm: [
            {"arm": arm, "seed": s, "users": users, "titles": titles, "nats": (noise + shift).tolist()} for s in (0, 1)
        ]
        for arm, shift in (("lora", 0.0), ("ilora", -0.1))
    }
    gap = evidence.against(cells["ilora"], cells["lora"])
    assert gap.difference == pytest.approx(-0.1)
    assert gap.low == pytest.approx(-0.1)  # paired: what both share is gone
    assert gap.by_seed == pytest.approx([-0.1, -0.1])
    assert evidence.against(cells["ilora"], []) is None
    values, members = evidence._pooled(cells["lora"], "nats")
    assert values.mean() == pytest.approx(np.average(noise, weights=titles))
    assert len(np.unique(members)) == 80  # other seeds have other people
    same = [cell | {"same_people": True} for cell in cells["lora"]]
    assert len(np.unique(evidence._pooled(same, "nats")[1])) == 40
    rows = evidence.comparison_rows({**cells, "soft_token": []}, "lora")
    assert [row[0] for row in rows] == ["lora", "ilora"]
    other = [cell | {"users": users[::-1]} for cell in cells["lora"]]
    with pytest.raises(RuntimeError, match="other examples"):
        evidence.against(cells["ilora"], other)
