"""The scripts of reproduce/ and bench/: that they run at tiny sizes, resume, and compare what they say they compare."""

import gzip
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
    other = ["--split", "valid", "--arms", "lora", "--rates", "lora=0.001,0.03", "--settings", "2:all"]
    said = run("reproduce/synthetic.py", *small, *other)  # another setting: another cell, in the same world
    assert "scored here: valid" in said
    assert "lora 0.001 and 0.03" in said
    assert len(path.read_text().splitlines()) == len(cells) + 1
    assert len(list(path.parent.glob("knob*"))) == 1
    with pytest.raises(SystemExit, match="are in one file"):
        run("reproduce/synthetic.py", *small, "--report")


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
    run("reproduce/movielens.py", *small, "--arms", "lora", "--steps", 2)  # other steps: not taken for finished
    assert [json.loads(line)["settings"]["steps"] for line in path.read_text().splitlines()].count(2) == 1
    run("reproduce/movielens.py", *small, "--arms", "soft_token", "--jobs", 2, "--seeds", 0, 1)
    made = [json.loads(line) for line in path.read_text().splitlines()]
    assert {cell["seed"] for cell in made if cell["arm"] == "soft_token"} == {0, 1}


def test_movielens_seeds_share_the_data_and_reports_are_made_again(
    run, tmp_path, movielens, tiny_model_folder, monkeypatch
):
    small = ["--work", tmp_path / "work", "--model", tiny_model_folder, "--dtype", "float32", "--windows", 2]
    small += ["--steps", 1, "--max-windows", 20, "--encoder-epochs", 1]
    small += ["--set", "filter.min_rating=5", "filter.user_core=40"]

    def evaluated(recipe, dataset, encoder, adapter, output):
        names = [adapter.name, *recipe.evaluate.adapters]
        output.mkdir(exist_ok=True)
        (output / "metrics.json").write_text(json.dumps({"systems": [{"name": name} for name in names]}))

    monkeypatch.setattr("recllm.evaluate.evaluation.evaluate", evaluated)
    monkeypatch.setattr("recllm.evaluate.evaluation.table_text", lambda document: "")
    run("reproduce/movielens.py", *small, "--seeds", 0, 1, "--arms", "lora", "ilora")
    cells = [json.loads(line) for line in (tmp_path / "work" / "cells.jsonl").read_text().splitlines()]
    assert all(cell["users"] == cells[0]["users"] and cell["history"] == cells[0]["history"] for cell in cells)
    assert len(list(tmp_path.glob("work/*/window2/dataset-*"))) == 1
    assert len(list(tmp_path.glob("work/*/encoder-seed*"))) == 2
    ask = [*small, "--seeds", 0, "--evaluate", "--arms", "lora", "ilora"]
    run("reproduce/movielens.py", *ask, "--keep")
    (report,) = tmp_path.glob("work/*/window2/seed0-*/report*/metrics.json")
    run("reproduce/movielens.py", *ask, "soft_token")  # an arm more: what is there is not taken for finished
    assert [system["name"] for system in json.loads(report.read_text())["systems"]] == [
        "ilora",
        "lora_arm",
        "soft_token_arm",
    ]
    assert not (report.parents[1] / "ilora").is_dir()  # all are in it
    said = ["--report", "--output", tmp_path / "gate.md"]
    heading = f"{report.parents[1].name}, {report.parent.name}: 20 candidates"
    assert heading in run("reproduce/movielens.py", *small, *said)
    report.parents[1].rename(report.parents[2] / "seed0-0123456789")  # a report of other settings
    assert "20 candidates" not in run("reproduce/movielens.py", *small, *said)
    (report.parents[2] / "seed0-0123456789").rename(report.parents[1])
    with pytest.raises(SystemExit, match="sigmoid, and the adapters of lora, ilora, soft_token are gone"):
        run("reproduce/movielens.py", *ask, "sigmoid")


@pytest.fixture
def actions_script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "reproduce"))
    import action_policies

    return action_policies


def test_action_evidence_runs_resumes_and_reports(run, tmp_path):
    small = ["--work", tmp_path / "work", "--seeds", 0, "--knobs", 1, "--workers", 1, "--settings", "4:all", "4:prompt"]
    small += ["--users", 60, "--sessions", 16, "--steps", 2, "--base-steps", 2, "--output", tmp_path / "actions.md"]
    run("reproduce/action_policies.py", *small)
    path = tmp_path / "work" / "cells.jsonl"
    cells = [json.loads(line) for line in path.read_text().splitlines()]
    arms = ("lora", "ilora", "uniform", "shuffled", "oracle", "soft_token", "ilora@uniform", "ilora@shuffled")
    reads = ("ilora", "shuffled", "soft_token", "ilora@uniform", "ilora@shuffled")
    found = [(cell["setting"], cell["arm"]) for cell in cells]
    assert sorted(found) == sorted([("4:all", arm) for arm in arms] + [("4:prompt", arm) for arm in reads])
    counts = [cell["parameters"] for cell in cells]
    assert max(counts) <= 1.02 * min(counts)  # equal within 2%
    first = cells[0]
    assert all(cell[name] == first[name] for cell in cells for name in ("users", "labels", "bayes"))
    assert all(len(cell["nats"]) == len(first["labels"]) and np.isfinite(cell["nats"]).all() for cell in cells)
    assert np.mean(np.array(first["labels"]) == 4) == pytest.approx(0.75, abs=0.1)  # "leave", of four actions and it
    limits = [first["bayes"][name]["nats"] for name in ("prompt", "all", "cluster")]
    assert limits == sorted(limits, reverse=True)
    by_arm = {cell["arm"]: cell for cell in cells if cell["setting"] == "4:all"}
    # experts that all weigh the same, the same start and the same batches: the plain LoRA
    assert by_arm["uniform"]["nats"] == pytest.approx(by_arm["lora"]["nats"], abs=1e-3)
    assert by_arm["oracle"]["nats"] != pytest.approx(by_arm["lora"]["nats"], abs=1e-3)
    before = path.read_bytes()
    (tmp_path / "actions.md").write_text("# Another part\n\nstays\n")
    done = run("reproduce/action_policies.py", *small, "--report")
    assert path.read_bytes() == before
    text = (tmp_path / "actions.md").read_text()
    assert text.startswith("# Another part\n\nstays\n\n# Synthetic sessions")
    assert "| oracle |" in text
    assert "| *always leave* |" in done
    run("reproduce/action_policies.py", *small)  # every cell is there: nothing is trained
    assert path.read_bytes() == before
    other = ["--split", "valid", "--arms", "lora", "--rates", "lora=0.001,0.03"]
    assert "scored here: valid" in run("reproduce/action_policies.py", *small, *other)
    assert len(path.read_text().splitlines()) == len(cells) + 1
    assert len(list(path.parent.glob("conflict*"))) == 1
    with pytest.raises(SystemExit, match="are in one file"):
        run("reproduce/action_policies.py", *small, "--report")
    with pytest.raises(SystemExit, match="SHOWN:all"):
        run("reproduce/action_policies.py", *small, "--settings", "4:2")
    with pytest.raises(SystemExit, match="multiple of 1/8"):
        run("reproduce/action_policies.py", *small, "--exit-rate", 0.7)


def test_action_evidence_has_recalls_as_means(actions_script):
    """Six examples: four of "leave" (action 2), of which three are right, one right of action 0, one wrong of 1."""
    cell = {"hits": [1, 1, 1, 0, 1, 0], "labels": [2, 2, 2, 2, 0, 1], "settings": {"world": {"num_actions": 2}}}
    found = actions_script.with_recalls(cell)
    assert np.mean(found["macro"]) == pytest.approx((3 / 4 + 1 + 0) / 3)
    assert np.mean(found["left"]) == pytest.approx(3 / 4)


def test_a_part_of_a_report_is_replaced_and_the_others_stay(evidence, tmp_path):
    path = tmp_path / "report.md"
    for heading, text in (("# One", "first"), ("# Two", "second"), ("# One", "## Under it\n\nagain")):
        evidence.write_part(path, heading, f"{heading}\n\n{text}\n")
    assert path.read_text() == "# One\n\n## Under it\n\nagain\n\n# Two\n\nsecond\n"


def test_arms_are_compared_by_any_metric_of_an_example(evidence):
    cells = seeds_with([0.1, 0.1, 0.1])
    for arm, shift in (("lora", 0.0), ("ilora", 0.5)):
        for cell in cells[arm]:
            cell["hits"] = [shift] * len(cell["users"])
    rows, _ = evidence.comparisons(cells, "lora", [], name="hits")
    assert rows[1][1:3] == ["0.500 [0.500, 0.500]", "+0.500 [+0.500, +0.500], p < 0.0001"]
    assert evidence.comparisons(cells, "lora", [])[0][1][2].startswith("-0.1")


def write_visits(folder):
    """A shop's log and a click log in the forms that the recipes ecommerce and yoochoose read."""
    rng = np.random.default_rng(0)
    pages = ["product_view", "add_to_cart", "cart", "purchase"]
    shop = ["user_id,session_id,event,timestamp,platform,acquisition_channel,user_lifecycle"]
    clicks = ["SessionId\tItemId\tTime"]
    for visit in range(80):  # ten users, who come once in ten days
        for place in range(5):
            page = pages[rng.integers(4)] if place else "home"
            time = np.datetime64("2024-01-01", "s") + 86_400 * visit + 60 * place
            shop.append(f"u{visit % 10},s{visit},{page},{str(time).replace('T', ' ')},mobile,email,new")
            clicks.append(f"{visit}\t{rng.integers(30)}\t{time.astype(int)}.5")
    (folder / "ecom.csv.gz").write_bytes(gzip.compress("\n".join(shop).encode()))
    for part, lines in (("train_full", clicks[:320]), ("test", [clicks[0], *clicks[320:]])):
        (folder / f"yoochoose-clicks-100k_{part}.txt").write_text("\n".join(lines) + "\n")


def test_real_action_evidence_runs_resumes_and_reports(run, tmp_path, long_model_folder):
    write_visits(tmp_path)
    small = ["--work", tmp_path / "work", "--output", tmp_path / "actions.md", "--seeds", 0, "--steps", 1]
    small += ["--runs", "ecommerce", "yoochoose", "--data", f"ecommerce={tmp_path}", f"yoochoose={tmp_path}"]
    small += ["--max-examples", 6, "--set", f"model.name_or_path={long_model_folder}", "model.dtype=float32"]
    small += ["encoder.max_epochs=1", "train.use_cpu=true", "protocol.bootstrap.samples=100", "tasks.0.dense_window=0"]
    run("reproduce/action_logs.py", *small)
    reports = {path: path.read_bytes() for path in tmp_path.glob("work/*/seed*/report/metrics.json")}
    assert len(reports) == 2
    assert len(list(tmp_path.glob("work/*/dataset"))) == 2  # beside the seeds, which share them
    assert not list(tmp_path.glob("work/*/seed*/ilora"))  # all is in the report
    for path, text in reports.items():
        names = {system["name"] for system in json.loads(text)["systems"]}
        assert {"ilora", "plain_lora", "ilora_uniform", "ilora_shuffled"} <= names
        took = json.loads((path.parents[1] / "seconds.json").read_text())
        assert {"encoder", "plain_lora", "ilora", "report"} <= set(took)
    done = run("reproduce/action_logs.py", *small, "--report")
    assert {path: path.read_bytes() for path in reports} == reports
    text = (tmp_path / "actions.md").read_text()
    assert text in done
    shop, clicks = text.split("## ")[1:]
    assert "| constant |" in shop
    assert "exact match" in shop
    assert "hit_rate@20, whole catalogue" in clicks
    assert "- nats of the answer, plain LoRA" in clicks
    assert "given seed 0" in shop


def test_real_action_evidence_averages_within_sessions(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "reproduce"))
    import action_logs

    rows = [
        {"example_id": name, "label": "buy", "predicted": said, "nats": nats, "full_rank": None}
        for name, said, nats in (("a", "buy", 1.0), ("b", "buy", 2.0), ("c", "view", 4.0), ("d", "buy", 8.0))
    ]
    found = action_logs._by_session(rows, {"a": 7, "b": 3, "c": 3, "d": 3})
    assert found["users"] == [3, 7]
    assert found["exact"] == pytest.approx([2 / 3, 1])
    assert found["nats"] == pytest.approx([14 / 3, 1])
    assert "hits" not in found  # no ranks
    rows[0]["predicted"] = None  # an answer that is none of the actions is wrong
    for row, rank in zip(rows, (20, 21, 0, 1)):  # 0: a beam has not found the target
        row["full_rank"] = rank
    found = action_logs._by_session(rows, {"a": 7, "b": 3, "c": 3, "d": 3})
    assert found["exact"][1] == 0
    assert found["hits"] == pytest.approx([1 / 3, 1])


@pytest.fixture
def graph_script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "reproduce"))
    import movielens_graph

    return movielens_graph


def test_graph_evidence_runs_resumes_and_reports(run, tmp_path, movielens, tiny_model_folder):
    few = ["filter.min_rating=5", "filter.user_core=40", "graph.retrieval.max_items=5", "tasks.0.max_train_targets=1"]
    small = ["--work", tmp_path / "work", "--output", tmp_path / "graph.md", "--model", tiny_model_folder]
    small += ["--dtype", "float32", "--seeds", 0, "--steps", 1, "--max-titles", 20, "--budget", 300]
    small += ["--encoder-epochs", 1, "--max-tokens", 4096, "--set", *few]
    run("reproduce/movielens_graph.py", *small, "--arms", "none", "khop", "two_stage", "--retrieval")
    path, retrieval = (tmp_path / "work" / f"{name}.jsonl" for name in ("cells", "retrieval"))
    assert not path.exists()
    found = {cell["arm"]: cell for cell in map(json.loads, retrieval.read_text().splitlines())}
    assert set(found) == {"khop", "two_stage"}
    run("reproduce/movielens_graph.py", *small, "--arms", "none", "khop", "two_stage")
    cells = [json.loads(line) for line in path.read_text().splitlines()]
    assert [cell["arm"] for cell in cells] == ["none", "khop", "two_stage"]
    none, khop, _ = cells
    assert sum(none["drawn"]) == 20
    assert all(none[name] == khop[name] for name in ("users", "positions", "classes", "drawn", "titles", "parameters"))
    assert none["prompt_tokens"] < khop["prompt_tokens"]
    assert not any(none["named"])
    for arm, cell in found.items():  # what convert wrote, counted by itself
        (manifest,) = tmp_path.glob(f"work/ml-100k-*/{arm}/dataset-*/manifest.json")
        said = json.loads(manifest.read_text())["graph"]["shown"]["test/next_item"]
        assert sum(cell["titles"]) == cell["prompts"] == said["with_graph"] + said["without_graph"]
        for name, count in (("triples", "triples"), ("tokens", "tokens"), ("with_graph", "with_graph")):
            assert np.dot(cell[name], cell["titles"]) == pytest.approx(said[count], rel=1e-3)
        assert np.dot(cell["unseen_named"], cell["titles"]) > 0
        assert np.average(cell["attribute_named"], weights=cell["titles"]) <= 1
    before = path.read_bytes(), retrieval.read_bytes()
    run("reproduce/movielens_graph.py", *small, "--arms", "none", "khop")
    run("reproduce/movielens_graph.py", *small, "--report")
    assert (path.read_bytes(), retrieval.read_bytes()) == before
    text = (tmp_path / "graph.md").read_text()
    assert "| two_stage |" in text.split("## What adapters gain")[0]
    assert "| khop |" in text.split("## What adapters gain")[1]
    run("reproduce/movielens_graph.py", *small, "--arms", "none", "--method", "ilora")
    made = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(cell["method"], cell["arm"]) for cell in made[3:]] == [("ilora", "none")]
    assert made[-1]["parameters"] > none["parameters"]  # the gate's


def test_graph_evidence_counts_what_subgraphs_name(graph_script, tmp_path, monkeypatch):
    """Three items and their makers; a prompt shows item 0 and its maker, who made item 1, too."""
    from types import SimpleNamespace

    from recllm.graph.store import Graph

    graph = Graph.of([0, 1, 2], [0, 0, 0], [3, 3, 4], num_entities=5, num_relations=1)
    knowledge = SimpleNamespace(graph=graph, linked=np.array([0, 1, 2, -1], dtype=np.int32))  # item 3: no link
    users, positions, targets = np.array([0, 0, 0]), np.array([1, 2, 3]), np.array([1, 2, 3])
    held = graph_script.Held(users, positions, targets, np.array(["head", "tail", "cold"]))
    sequences = SimpleNamespace(
        num_users=1, offsets=np.array([0, 4]), items=np.array([0, 1, 2, 3], np.int32), splits=np.array([1, 3, 3, 3])
    )
    dataset = SimpleNamespace(num_items=4, sequences=sequences)
    past = graph_script.Past.of(dataset)
    assert past.unseen(np.array([0, 0]), np.array([1, 2]), np.array([1, 1])).tolist() == [True, False]
    assert past.before(0, 2).tolist() == sorted(past.popularity[[0, 1]].tolist())
    prompts, entities = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 3, 0, 3, 2])
    found = graph_script.Entities(knowledge, prompts, entities).figures(held, past)
    assert found["with_graph"].tolist() == [True, True, True]
    assert found["target_named"].tolist() == [True, False, False]  # an item without a link is never named
    assert found["unseen_named"].tolist() == [1, 0, 0]
    assert found["by_chance"].tolist() == [1 / 3, 0, 0]  # items 1, 2 and 3 are left
    assert found["attribute_named"].tolist() == [True, False, False]  # maker 3 made item 1, maker 4 item 2
    assert found["attributes_named"].tolist() == [1, 0, 0]
    assert found["most_popular"].tolist()[1:] == [False, False]


def test_graph_evidence_chooses_the_same_titles_and_all_cold_ones(graph_script):
    classes = np.where(np.arange(50) % 10 == 3, "cold", "tail")
    held = graph_script.Held(*(np.arange(50) for _ in range(3)), classes)
    rows, drawn = graph_script.chosen(held, 10)
    assert drawn.sum() == 10
    assert set(rows[~drawn]) <= set(np.flatnonzero(classes == "cold")) <= set(rows)
    assert np.array_equal(rows, graph_script.chosen(held, 10)[0])


def test_paths_of_a_shipped_recipe_move_together(evidence):
    found = evidence.moved_paths("movielens_1m/next_item_kg_ilora", "data/ml-1m-dbpedia", "/there")
    from recllm.recipe import load_recipe

    recipe = load_recipe("movielens_1m/next_item_kg_ilora", found)
    assert recipe.data.interactions.path == [f"/there/mapping/{part}.txt" for part in ("train", "valid", "test")]
    assert recipe.graph.triples.entities.path == "/there/e_map.txt"
    assert "data/ml-1m-dbpedia" not in recipe.model_dump_json()


def test_train_step_bench_prints_every_ratio(run, tiny_model_folder):
    small = ["--quick", "--dtype", "float32", "--model", tiny_model_folder, "--parts", "gated", "einsum"]
    line = json.loads(run("bench/train_step.py", *small).splitlines()[-1])
    assert set(line["gated_over_plain"]) == set(line["loop_over_gated"]) == {"smollm2", "wide"}
    assert line["einsum_layer_over_gated"] > 0
    assert line["step"]["wide"]["share_of_peak"] is None


def test_train_step_bench_measures_dense_windows(run, tiny_model_folder):
    small = ["--quick", "--dtype", "float32", "--model", tiny_model_folder, "--parts", "dense"]
    line = json.loads(run("bench/train_step.py", *small).splitlines()[-1])
    rates = line["targets_per_s"]
    assert min(rates.values()) > 0
    assert line["dense_targets_per_s_over_single"] == pytest.approx(rates["dense"] / rates["single"], rel=0.01)


def test_train_step_bench_runs_trl(run, tiny_model_folder):
    pytest.importorskip("trl", reason="needs the extra trl")
    small = ["--quick", "--dtype", "float32", "--model", tiny_model_folder, "--parts", "trl"]
    line = json.loads(run("bench/train_step.py", *small).splitlines()[-1])
    spent = line["us_a_real_token"]
    assert min(spent.values()) > 0
    assert line["ours_over_trl"] == pytest.approx(spent["ours"] / spent["trl"], rel=0.01)
    # the same kind of examples under untrained LoRAs of one base model: near the loss of a uniform guess
    assert line["first_loss"]["ours"] == pytest.approx(line["first_loss"]["trl"], rel=0.2)


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
    later = {"arm": "ilora", "seed": 0, "users": users, "titles": titles, "nats": (noise - 0.3).tolist()}
    unordered = evidence.against([cells["ilora"][1], later], cells["lora"][::-1])  # as cells come out of several lanes
    assert unordered.by_seed == pytest.approx([-0.3, -0.1])
    values, _ = evidence._by_title(cells["lora"][0], cells["lora"][0]["nats"])
    assert values.mean() == pytest.approx(np.average(noise, weights=titles))
    rows, lines = evidence.comparisons({**cells, "soft_token": []}, "lora", [("ilora", "soft_token")])
    assert [row[0] for row in rows] == ["lora", "ilora"]
    assert not lines
    assert gap.given == "given seeds 0, 1"  # two seeds say nothing about others
    other = [cell | {"users": users[::-1]} for cell in cells["lora"]]
    with pytest.raises(RuntimeError, match="other examples"):
        evidence.against(cells["ilora"], other)


def seeds_with(shifts, **further):
    """Cells of lora and ilora, a seed a shift: ilora is lower by the shift, nearly the same for every user."""
    rng = np.random.default_rng(0)
    users, arms = np.repeat(np.arange(60), 2), {"lora": [], "ilora": []}
    common = {"users": users.tolist(), "titles": [1] * 120} | further
    for seed, shift in enumerate(shifts):
        base = rng.normal(size=120)
        for arm, nats in (("lora", base), ("ilora", base - shift + rng.normal(0, 0.01, 120))):
            arms[arm].append(common | {"arm": arm, "seed": seed, "nats": nats.tolist()})
    return arms


def test_seeds_that_disagree_widen_the_interval(evidence):
    from scipy import stats

    shifts = [0.3, -0.1, 0.2, -0.05, 0.1]  # within a seed every user agrees, between seeds nothing does
    cells = seeds_with(shifts)
    gap = evidence.against(cells["ilora"], cells["lora"])
    low, high = stats.t.interval(0.95, 4, np.mean(gap.by_seed), stats.sem(gap.by_seed))
    assert (gap.low, gap.high) == pytest.approx((low, high))
    assert gap.p_value == pytest.approx(stats.ttest_1samp(gap.by_seed, 0).pvalue)
    assert gap.low < 0 < gap.high
    assert not gap.given
    same = seeds_with(shifts[:3], same_people=True)
    gap = evidence.against(same["ilora"], same["lora"])
    assert gap.low < 0 < gap.high
    assert gap.p_value > 0.05
    assert not gap.given
    draws = np.std(gap.by_seed, ddof=1) / np.sqrt(3)  # of a mean of three; two degrees of freedom
    assert (gap.high - gap.low) / 2 == pytest.approx(stats.t.ppf(0.975, 2) * draws, rel=0.05)
    alone = evidence.against(same["ilora"][:1], same["lora"])
    assert alone.given == "given seed 0"
    assert alone.high < 0
    other = [cell | {"users": (np.array(cell["users"]) + cell["seed"]).tolist()} for cell in same["lora"]]
    with pytest.raises(RuntimeError, match="same examples"):
        evidence.interval(other)


def test_users_that_disagree_widen_the_interval_of_equal_seeds(evidence):
    cells = seeds_with([0.1, 0.1, 0.1], same_people=True)
    own = np.repeat(np.random.default_rng(1).normal(size=60), 2)  # of each user, the same under all seeds
    for cell in cells["ilora"]:
        cell["nats"] = (np.array(cell["nats"]) + own).tolist()
    gap = evidence.against(cells["ilora"], cells["lora"])
    assert (gap.high - gap.low) / 2 == pytest.approx(1.96 * np.std(own) / np.sqrt(60), rel=0.2)


def test_p_is_holms_over_the_table_and_the_lines_under_it(evidence):
    cells = seeds_with([0.11, 0.1, 0.12, 0.2, 0.15])
    cells["soft_token"] = seeds_with([0.02, -0.01, 0.03, 0.0, 0.01])["ilora"]
    for cell in cells["soft_token"]:
        cell["arm"] = "soft_token"
    pairs = [("ilora", "lora"), ("soft_token", "lora"), ("ilora", "soft_token")]
    p_values = [evidence.against(cells[a], cells[b]).p_value for a, b in pairs]
    rows, lines = evidence.comparisons(cells, "lora", [("ilora", "soft_token")])
    adjusted = evidence.holm(p_values)
    assert adjusted[2] > p_values[2]
    assert f"p {adjusted[0]:.4f}" in rows[1][2]
    assert f"p {adjusted[2]:.4f}" in lines[0]


def test_a_table_refuses_cells_of_other_settings(evidence):
    settings = {"steps": 300, "rates": [0.1, 0.2], "arm_version": 1}
    cells = [{"arm": "lora", "settings": settings}, {"arm": "ilora", "settings": settings | {"rates": [0.3, 0.2]}}]
    assert evidence.common_settings(cells) == {"steps": 300}  # rates are an arm's own
    for name, value in (("steps", 20), ("rates", [0.5, 0.2])):
        with pytest.raises(evidence.UserError, match=name):
            evidence.common_settings([*cells, {"arm": "lora", "settings": settings | {name: value}}])
    assert evidence.settings_hash(settings) != evidence.settings_hash(settings | {"steps": 20})
    old = {"arm": "ilora@shuffled", "settings": settings}, {"arm": "shuffled", "settings": settings}
    assert evidence.of_current_arms(old, {"shuffled": 2}) == [old[0]]


def test_each_example_takes_its_own_other_user(evidence):
    users = np.repeat([3, 5, 9], [50, 50, 100])
    rows = evidence.rows_of_others(users, np.random.default_rng(0))
    assert (users[rows] != users).all()
    assert all(len(set(users[rows][users == user])) == 2 for user in (3, 5, 9))  # no fixed partner
    with pytest.raises(RuntimeError, match="one user"):
        evidence.rows_of_others(np.zeros(3), np.random.default_rng(0))


def test_the_einsum_layer_of_the_bench_gives_our_formula(monkeypatch, tiny_llama):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "bench"))
    import train_step

    model = train_step.make_model(tiny_llama(), "gated")
    tuner, layer = model.base_model, model.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x, given = torch.randn(3, 5, layer.in_features), torch.randn(3, 64)
    results = []
    for variant in (layer.lora_variant["default"], train_step.EinsumVariant(tuner)):
        layer.lora_variant["default"] = variant
        results.append(train_step.run_layer(tuner, layer, x, given, None))
    assert isinstance(layer.lora_variant["default"], train_step.EinsumVariant)
    assert torch.allclose(*results, atol=1e-5)
    alone = train_step.run_layer(tuner, layer, x, given, torch.zeros_like(results[0]))
    assert torch.allclose(alone + layer.base_layer(x), results[0], atol=1e-5)
    train_step.agree(*results)
    with pytest.raises(RuntimeError, match="differ"):
        train_step.agree(results[0], results[0] * 1.2)
