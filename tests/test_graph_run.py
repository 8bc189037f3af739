"""The whole line with a knowledge graph on a tiny model: what it says, in prompts, questions and explanations."""

import csv
import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from recllm import assets, stages
from recllm.cli import main
from recllm.convert import knowledge
from recllm.convert.pipeline import convert
from recllm.errors import UserError
from recllm.evaluate.evaluation import evaluate
from recllm.graph import explain
from recllm.recipe import load_recipe

COLOURS, MAKERS, ITEMS = ("red", "green", "blue", "grey"), 8, 40
UNLINKED = {"i39", "i38"}
PRICED_AT = 1100  # of the triples with a time: users act from 1000 to about 1180
TASKS = [
    {"task": "next_item", "template": "next_item/films_graph", "dense_window": 4},
    {"task": "next_item_among", "template": "next_item_among/films_paths", "max_train_targets": 1},
    {"task": "item_to_attribute", "template": "item_to_attribute/items", "max_train_targets": 1},
    {"task": "attribute_to_item", "template": "attribute_to_item/items", "max_train_targets": 1},
    {"task": "explain", "template": "explain/films", "max_train_targets": 1},
    {"task": "like", "template": "like/films_graph", "max_train_targets": 1},
]
METHODS = ("random", "khop", "pagerank", "two_stage", "parallel")


def write_graph(folder: Path) -> dict:
    """Every film has a maker and a colour, and from PRICED_AT + its number on a price; returns the graph section."""
    rows = [["head", "relation", "tail", "timestamp"]]
    for item in range(ITEMS):
        rows.append([f"e{item}", "made by", f"maker {item % MAKERS}", ""])
        rows.append([f"e{item}", "has colour", COLOURS[item % len(COLOURS)], ""])
        rows.append([f"e{item}", "costs", f"{item} crowns", str(PRICED_AT + item)])
    for name, table in (
        ("triples", rows),
        ("links", [["item_id", "entity_id"], *([f"i{i}", f"e{i}"] for i in range(ITEMS) if f"i{i}" not in UNLINKED)]),
    ):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(table)
    return {
        "triples": {"path": str(folder / "triples.csv")},
        "links": {"path": str(folder / "links.csv")},
        "retrieval": {"method": "khop", "max_triples": 30},
        "budget": 400,  # of the tiny tokenizer: a token a byte
    }


@pytest.fixture
def graph_recipe(tiny_recipe: Path, long_model_folder: Path) -> Path:
    document = yaml.safe_load(tiny_recipe.read_text())
    document |= {"graph": write_graph(tiny_recipe.parent), "tasks": TASKS, "filter": {"like_at": 3}}
    document["protocol"] = {
        "name": "small",
        "split": {"method": "temporal", "valid_fraction": 0.2, "test_fraction": 0.2},
        "candidates": {"count": 6},
    }
    document["model"]["name_or_path"] = str(long_model_folder)
    rows = log_of(tiny_recipe)
    write_log(tiny_recipe, [(user, item, 2 + place % 2 * 2, time) for place, (user, item, time) in enumerate(rows)])
    tiny_recipe.write_text(yaml.safe_dump(document))
    return tiny_recipe


def log_of(recipe: Path) -> list[tuple[str, ...]]:
    """The interactions, without the header."""
    return [tuple(line.split(",")) for line in (recipe.parent / "interactions.csv").read_text().splitlines()[1:]]


def write_log(recipe: Path, rows: list[tuple]) -> None:
    """(user, item, rating, time)."""
    lines = ["user_id,item_id,rating,timestamp", *(",".join(map(str, row)) for row in rows)]
    (recipe.parent / "interactions.csv").write_text("\n".join(lines) + "\n")


def converted(recipe: Path, output: Path, *overrides: str, workers: int = 1) -> tuple[dict, list[dict]]:
    """The manifest, and every example."""
    loaded = load_recipe(recipe, list(overrides))
    manifest = convert(loaded, output, workers, stages.graph_tokenizer(loaded))
    rows = [
        row | {"split": part.parent.name} for part in sorted(output.glob("*/part-*.parquet")) for row in _rows(part)
    ]
    return manifest, rows


def _rows(part: Path) -> list[dict]:
    return pq.read_table(part).to_pylist()


def of_task(rows: list[dict], task: str) -> list[dict]:
    return [row for row in rows if row["task"] == task]


def asked(row: dict) -> str:
    return "\n".join(message["content"] for message in row["prompt"])


def answer(row: dict) -> str:
    return row["completion"][-1]["content"]


def number(title: str) -> int:
    return int(title.removeprefix("Film "))


def test_run_goes_from_triples_to_the_report(graph_recipe, capsys):
    assert main(["run", str(graph_recipe)]) == 0
    run = load_recipe(graph_recipe).output
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    assert metrics["tasks"] == [task["task"] for task in TASKS]
    by_task = {task: [s for s in metrics["systems"] if s["task"] == task] for task in metrics["tasks"]}
    for task in ("next_item", "next_item_among", "attribute_to_item"):
        assert {"ilora", "ilora_uniform", "base_model", "popularity", "sasrec"} <= {s["name"] for s in by_task[task]}
    for task, baselines in (("item_to_attribute", {"most_frequent_answer", "random"}), ("explain", {"constant_path"})):
        assert {s["kind"] for s in by_task[task]} == {"adapter", "control", "base_model", "baseline"}
        assert {s["name"] for s in by_task[task] if s["kind"] == "baseline"} == baselines  # answers are no items
        compared = {(test["a"], test["b"]) for test in metrics["comparisons"] if test["task"] == task}
        assert compared >= {("ilora", name) for name in baselines}
    assert {"ilora", "ilora_uniform", "base_model"} <= {s["name"] for s in by_task["like"]}
    assert {"adapter", "control", "base_model", "baseline"} == {s["kind"] for s in by_task["like"]}
    shown = json.loads((run / "dataset" / "manifest.json").read_text())["graph"]["shown"]
    assert all(shown[f"{split}/like"]["with_graph"] > 0 for split in ("train", "valid", "test"))
    for system in by_task["item_to_attribute"]:
        assert 0 <= system["metrics"]["hit_rate@1"]["value"] <= 1
    for system in by_task["explain"]:
        assert sum(system["verdicts"].values()) == system["num_examples"]
        assert set(system["verdicts"]) <= set(explain.VERDICTS)
        share = system["verdicts"].get("supported", 0) / system["num_examples"]
        assert system["metrics"]["supported"]["value"] == pytest.approx(share)
    assert "Explanations" in (run / "report" / "report.md").read_text()
    assert main(["run", str(graph_recipe)]) == 0
    assert capsys.readouterr().out.count("up to date") == len(stages.STAGES)

    triples = graph_recipe.parent / "triples.csv"
    triples.write_text(triples.read_text() + "e1,made by,maker 7,\n")
    assert main(["run", str(graph_recipe)]) == 0
    assert capsys.readouterr().out.count("up to date") == 0


def test_baselines_answer_questions_and_explain_by_what_training_says(graph_recipe, tmp_path, capsys):
    only = ["evaluate.baselines=[random]", "evaluate.max_examples=null"]
    _, rows = converted(graph_recipe, tmp_path / "dataset", *only)
    recipe = load_recipe(graph_recipe, only)
    metrics = evaluate(recipe, tmp_path / "dataset", tmp_path / "encoder", None, tmp_path / "report")
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    systems = {(system["task"], system["name"]): system for system in metrics["systems"]}
    told = {row["system"]: {} for row in _rows(tmp_path / "report" / "predictions.parquet")}
    for row in _rows(tmp_path / "report" / "predictions.parquet"):
        told[row["system"]][row["example_id"]] = row

    counts, hits = Counter((row["relation"], row["label"]) for row in of_task(train, "item_to_attribute")), []
    for row in of_task(test, "item_to_attribute"):
        scores = [counts[row["relation"], choice] for choice in row["choices"]]
        assert told["most_frequent_answer"][row["example_id"]]["scores"] == scores
        hits.append(sorted(scores)[-1] == counts[row["relation"], row["label"]] > sorted(scores)[-2])
    assert systems["item_to_attribute", "most_frequent_answer"]["metrics"]["hit_rate@1"]["value"] == np.mean(hits)
    assert max(counts.values()) > 1
    assert systems["item_to_attribute", "random"]["kind"] == "baseline"

    forms = Counter(re.sub(r"Film \d+", "…", row["label"]) for row in of_task(train, "explain"))
    relation, hub = re.fullmatch(r"… -\[(.+)\]-> (.+) <-\[\1\]- …", forms.most_common(1)[0][0]).groups()
    verdicts = Counter()
    for row in of_task(test, "explain"):
        written = told["constant_path"][row["example_id"]]
        start, through, end = explain.read(written["text"])[0]
        assert re.sub(r"Film \d+", "…", written["text"]) in forms
        assert through == hub
        assert end in asked(row)
        ties = {"made by": (f"maker {number(start) % MAKERS}", f"maker {number(end) % MAKERS}")}
        ties["has colour"] = (COLOURS[number(start) % 4], COLOURS[number(end) % 4])
        assert (written["predicted"] == "supported") == (ties[relation] == (hub, hub))
        verdicts[written["predicted"]] += 1
    assert systems["explain", "constant_path"]["verdicts"] == verdicts
    assert 0 < verdicts["supported"] < sum(verdicts.values())

    for task in ("item_to_attribute", "explain"):
        trained = {row["target"] for row in of_task(train, task)}
        sizes = Counter("yes" if row["target"] in trained else "no" for row in of_task(test, task))
        segment = metrics["segments"][task]["asked in training"]
        assert {value: found[metrics["main_system"][task]]["num_examples"] for value, found in segment.items()} == sizes
    report, table = (tmp_path / "report" / "report.md").read_text(), capsys.readouterr().out
    assert "asked in training" in report
    for name in ("most_frequent_answer", "constant_path"):
        assert name in report
        assert name in table


@pytest.mark.parametrize("method", METHODS)
def test_no_prompt_knows_what_is_newer_than_its_cut_off(graph_recipe, tmp_path, method):
    manifest, rows = converted(graph_recipe, tmp_path / "dataset", f"graph.retrieval.method={method}")
    told = 0
    for row in rows:
        for crowns in map(int, re.findall(r"(\d+) crowns", asked(row) + answer(row))):
            told += 1
            assert PRICED_AT + crowns < row["timestamp"]
    assert told > 20  # some prices are old enough
    shown = manifest["graph"]["shown"]
    assert all(entry.get("not_older_than_cutoff", 0) == 0 for entry in shown.values())
    assert sum(entry.get("timed_triples", 0) for entry in shown.values()) > 0
    assert manifest["graph"]["time_range"] == [PRICED_AT, PRICED_AT + ITEMS - 1]


def test_a_subgraph_hangs_on_the_history_and_keeps_to_its_budget(graph_recipe, tmp_path, tiny_tokenizer):
    manifest, rows = converted(graph_recipe, tmp_path / "dataset", "graph.budget=90")
    shown, tokens = 0, 0
    for row in of_task(rows, "explain"):
        found = re.search(r"(?:known of them|may help|lexicon of films):\n(.*?)\n\n", asked(row), re.DOTALL)
        if found is None:
            continue
        shown, count = shown + 1, len(tiny_tokenizer(found[1])["input_ids"])
        tokens += count
        assert 0 < count <= 90
        assert "Film " in found[1]  # an entity is called what its item is called
        assert not re.search(r"\be\d+\b", found[1])
    entries = [entry for place, entry in manifest["graph"]["shown"].items() if place.endswith("/explain")]
    assert shown == sum(entry["with_graph"] for entry in entries) > 0
    assert tokens == sum(entry["tokens"] for entry in entries)


@pytest.mark.parametrize("module_name", ["retrieve", "paths"])
def test_what_is_newer_than_its_cut_off_ends_the_conversion(graph_recipe, tmp_path, monkeypatch, module_name):
    """The guard behind retrieval: were it to ignore cut-offs, nothing would be written."""
    told, found = [], getattr(knowledge, module_name)

    def ignores_cutoffs(graph, seeds, *rest):
        told.append(len(seeds.cutoffs))
        return found(graph, dataclasses.replace(seeds, cutoffs=np.full_like(seeds.cutoffs, 10**9)), *rest)

    triples = graph_recipe.parent / "triples.csv"  # makers are known from some day on, and paths lead over them
    triples.write_text(re.sub(r"(maker \d),$", rf"\1,{PRICED_AT}", triples.read_text(), flags=re.MULTILINE))
    tasks = f"tasks=[{json.dumps(TASKS[0])}, {json.dumps(TASKS[1])}]"
    converted(graph_recipe, tmp_path / "true", tasks)
    monkeypatch.setattr(knowledge, module_name, ignores_cutoffs)
    with pytest.raises(RuntimeError, match=r"/\w+: [1-9]\d* triples .* not older than their cut-off: a defect"):
        converted(graph_recipe, tmp_path / "dataset", tasks)
    assert told
    assert not (tmp_path / "dataset").exists()


def test_a_budget_too_small_for_a_triple_is_said_and_counted(graph_recipe, tmp_path, capsys):
    """Beside it what has no link at all: it goes without a subgraph whatever the budget."""
    write_log(graph_recipe, [*log_of(graph_recipe), ("lonely", "i38", 4, 1001), ("lonely", "i39", 4, 1002)])
    task = f"tasks=[{json.dumps({'task': 'next_item', 'template': 'next_item/films_graph'})}]"
    enough, rows = converted(graph_recipe, tmp_path / "enough", task)
    said = capsys.readouterr().out
    assert "graph.budget" not in said
    sequences = {row["user_index"]: row for row in _rows(tmp_path / "enough" / "sequences.parquet")}
    items = [row["item_id"] for row in _rows(tmp_path / "enough" / "items.parquet")]
    without = Counter()
    for row in rows:
        had = {items[item] for item in sequences[row["user_index"]]["items"][: row["history_end"]]}
        without[row["split"]] += had <= UNLINKED
    assert [row["example_id"] for row in rows if "/lonely/" in row["example_id"]] == ["next_item/lonely/1"]
    assert without["train"] >= 1
    for split in ("train", "valid", "test"):
        entry = enough["graph"]["shown"][f"{split}/next_item"]
        assert (entry["without_graph"], entry["budget_too_small"]) == (without[split], 0)

    small, rows = converted(graph_recipe, tmp_path / "small", task, "graph.budget=5")
    listed = []
    for split in ("test", "train", "valid"):
        entry, examples = small["graph"]["shown"][f"{split}/next_item"], small["counts"]["examples"]
        assert (entry["with_graph"], entry["without_graph"]) == (0, examples[f"{split}/next_item"])
        assert entry["budget_too_small"] == entry["without_graph"] - without[split] > 0
        listed.append((f"{split}/next_item", entry["budget_too_small"]))
    assert not any("made by" in asked(row) for row in rows)
    said = capsys.readouterr().out
    total, places = sum(count for _, count in listed), ", ".join(f"{place} {count}" for place, count in listed)
    assert f"warning: {total} examples go without a subgraph, because graph.budget, 5 tokens," in said
    assert f"({places}): raise graph.budget" in said


def test_questions_are_about_what_the_graph_says_and_about_nothing_else(graph_recipe, tmp_path):
    manifest, rows = converted(graph_recipe, tmp_path / "dataset", "tasks.2.relations=[made by, has colour]")
    items = pq.read_table(tmp_path / "dataset" / "items.parquet").to_pylist()
    for row in of_task(rows, "item_to_attribute"):
        item = number(items[row["target"]]["title"])
        right = f"maker {item % MAKERS}" if row["label"].startswith("maker") else COLOURS[item % len(COLOURS)]
        assert row["label"] == right == answer(row)
        assert row["choices"].count(right) == 1
        assert len(set(row["choices"])) == len(row["choices"]) == 6
        assert items[row["target"]]["item_id"] not in UNLINKED
    kinds = {row["label"].split()[0] for row in of_task(rows, "item_to_attribute")}
    assert kinds == {"maker"}  # four colours are too few for six choices
    left_out = {
        place: entry["left_out"] for place, entry in manifest["graph"]["shown"].items() if entry.get("left_out")
    }
    assert any(place.endswith("/item_to_attribute") for place in left_out)


def test_a_description_fits_its_item(graph_recipe, tmp_path):
    _, rows = converted(graph_recipe, tmp_path / "dataset")
    for row in of_task(rows, "attribute_to_item"):
        item = number(answer(row))
        said = dict(re.findall(r"(made by|has colour|costs): (.+)", asked(row)))
        assert said
        expected = {"made by": f"maker {item % MAKERS}", "has colour": COLOURS[item % 4], "costs": f"{item} crowns"}
        assert said == {relation: expected[relation] for relation in said}
        assert answer(row) not in asked(row)


def test_explanations_are_paths_from_the_history_to_the_item(graph_recipe, tmp_path):
    _, rows = converted(graph_recipe, tmp_path / "dataset")
    explained = of_task(rows, "explain")
    assert explained
    for row in explained:
        names, relations, forward = explain.read(answer(row))
        assert len(relations) == 2
        assert forward == [True, False]
        first, through, last = names
        listed = re.search(r"(?:oldest first|order of watching|newest last):\n(.*?)\n\n", asked(row), re.DOTALL)[1]
        assert first != last
        assert last in asked(row)
        where = {"made by": number(first) % MAKERS, "has colour": number(first) % 4}[relations[0]]
        assert relations[0] == relations[1]
        assert through == (f"maker {where}" if relations[0] == "made by" else COLOURS[where])
        assert number(last) % (MAKERS if relations[0] == "made by" else 4) == where
        if len(listed.splitlines()) < 4:  # the prompt shows all that there was
            assert first in listed.splitlines()


@pytest.mark.parametrize("method", METHODS)
def test_the_film_that_is_asked_about_is_told_of(graph_recipe, tmp_path, tiny_tokenizer, method):
    """Whether it is liked is asked around it: from the history alone, two steps lead to no price of another film."""
    task = f"tasks=[{json.dumps(TASKS[5] | {'max_train_targets': None})}]"
    budget = 120  # of some 30 bytes a triple: some of many
    overrides = [f"graph.retrieval.method={method}", "graph.format=lines", f"graph.budget={budget}"]
    manifest, rows = converted(graph_recipe, tmp_path / "dataset", task, *overrides)
    items = [row["title"] for row in _rows(tmp_path / "dataset" / "items.parquet")]
    priced, hidden, tokens, made = 0, 0, 0, Counter()
    for row in rows:
        lines = [line for line in asked(row).splitlines() if re.fullmatch(r"\(.+, .+, .+\)", line)]
        tokens += (used := len(tiny_tokenizer("\n".join(lines))["input_ids"]))
        assert used <= budget
        film, item = items[row["target"]], number(items[row["target"]])
        made[f"({film}, made by, maker {item % MAKERS})" in lines] += f"i{item}" not in UNLINKED
        is_known = PRICED_AT + item < row["timestamp"]
        is_shown = f"({film}, costs, {item} crowns)" in lines
        assert is_known or not is_shown
        priced, hidden = priced + is_shown, hidden + (not is_known)
        assert answer(row) == {"like": "Yes", "dislike": "No"}[row["label"]]
    assert hidden > 0
    assert tokens == sum(entry["tokens"] for entry in manifest["graph"]["shown"].values())
    if method == "random":  # of all triples around history and film alike
        assert made[True] > 0
    else:
        assert priced > 0
        assert made[True] > 10 * made[False]


@pytest.mark.parametrize("method", ["khop", "two_stage"])
def test_what_is_done_with_a_film_is_asked_around_it(graph_recipe, tmp_path, method):
    """As with like: from the history alone the budget would go to what stands around other films."""
    template = tmp_path / "graph.yaml"
    template.write_text(
        "id: action@1\ntask: action_on_item\n"
        "phrasings: [{user: '{{ graph }}|{{ answered_history }}|{{ target }}|{{ choices }}'}]\n"
    )
    overrides = [
        f"graph.retrieval.method={method}",
        "graph.format=lines",
        "filter={rating_bands: {low: 1, high: 3}}",
        "actions={words: {low: dull, high: fine}, session_gap_s: 3600}",
    ]
    task = {"task": "action_on_item", "template": str(template)}
    manifest, rows = converted(graph_recipe, tmp_path / "dataset", f"tasks=[{json.dumps(task)}]", *overrides)
    items = [row["title"] for row in _rows(tmp_path / "dataset" / "items.parquet")]
    told, hidden = Counter(), 0
    for row in rows:
        film, item, lines = items[row["target"]], number(items[row["target"]]), asked(row).split("|")[0].splitlines()
        told[f"({film}, made by, maker {item % MAKERS})" in lines] += f"i{item}" not in UNLINKED
        hidden += (is_newer := PRICED_AT + item >= row["timestamp"])
        assert not (is_newer and f"({film}, costs, {item} crowns)" in lines)
        assert answer(row) in ("dull", "fine")
    assert hidden > 0
    assert told[True] > 10 * told[False]
    assert sum(entry["not_older_than_cutoff"] for entry in manifest["graph"]["shown"].values()) == 0


def test_what_is_asked_about_a_film_hangs_on_no_answer(graph_recipe, tmp_path):
    """Every rating turned around: the answers are others, and of the prompts only what was rated before."""
    task = f"tasks=[{json.dumps(TASKS[5])}]"
    _, rows = converted(graph_recipe, tmp_path / "dataset", task)
    write_log(graph_recipe, [(user, item, 6 - int(rating), time) for user, item, rating, time in log_of(graph_recipe)])
    _, turned = converted(graph_recipe, tmp_path / "turned", task)
    for row, other in zip(rows, turned, strict=True):
        assert {answer(row), answer(other)} == {"Yes", "No"}
        assert asked(row) == re.sub(": (Yes|No)$", _turned, asked(other), flags=re.MULTILINE)


def _turned(found: re.Match) -> str:
    return {"Yes": ": No", "No": ": Yes"}[found[1]]


def test_candidates_stand_with_the_paths_that_lead_to_them(graph_recipe, tmp_path):
    _, rows = converted(graph_recipe, tmp_path / "dataset")
    items = pq.read_table(tmp_path / "dataset" / "items.parquet").to_pylist()
    with_path = 0
    for row in of_task(rows, "next_item_among"):
        titles = [items[item]["title"] for item in row["candidates"]]
        lines = [line for line in asked(row).splitlines() if line.split(": ")[0] in titles and line not in titles]
        for line in lines:
            candidate, _, path = line.partition(": ")
            if (parsed := explain.read(path)) is not None:
                with_path += 1
                assert parsed[0][-1] == candidate
    assert with_path > 0


def test_the_dataset_is_the_same_from_any_number_of_workers(graph_recipe, tmp_path):
    one = converted(graph_recipe, tmp_path / "one", "graph.retrieval.method=random")
    two = converted(graph_recipe, tmp_path / "two", "graph.retrieval.method=random", workers=2)
    assert one == two


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_its_own_prompts(graph_recipe, tmp_path, method):
    manifest, rows = converted(graph_recipe, tmp_path / "dataset", f"graph.retrieval.method={method}")
    assert manifest["recipe"]["graph"]["retrieval"]["method"] == method
    entry = manifest["graph"]["shown"]["test/next_item"]
    assert entry["with_graph"] > 0
    assert entry["triples"] > entry["with_graph"]
    assert len({asked(row) for row in of_task(rows, "next_item")}) > 10


@pytest.mark.parametrize("by", ["recipe", "template"])
def test_recipe_or_template_decide_how_a_subgraph_is_written(graph_recipe, tmp_path, by):
    task, overrides = TASKS[4], ["graph.format=lines"]
    if by == "template":
        text = assets.find("prompts", "explain/films").read_text()
        (tmp_path / "mine.yaml").write_text(f"graph_format: lines\n{text}")
        task, overrides = task | {"template": str(tmp_path / "mine.yaml")}, []
    _, rows = converted(graph_recipe, tmp_path / "dataset", f"tasks=[{json.dumps(task)}]", *overrides)
    shown = [line for row in rows for line in asked(row).splitlines() if "made by" in line]
    assert shown
    assert all(re.fullmatch(r"\((Film \d+|e3[89]), made by, maker \d\)", line) for line in shown)  # two have no link


def test_gates_and_sequences_do_not_hang_on_the_graph(graph_recipe, tmp_path):
    _, with_graph = converted(graph_recipe, tmp_path / "with")
    _, without = converted(graph_recipe, tmp_path / "without", "graph=null", f"tasks=[{json.dumps(TASKS[0])}]")
    same = ("example_id", "gate_end", "history_end", "timestamp", "target", "candidates", "completion")
    for row, other in zip(of_task(with_graph, "next_item"), without, strict=True):
        assert {name: row[name] for name in same} == {name: other[name] for name in same}
        assert len(asked(row)) >= len(asked(other))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["graph=null"], "next_item_among|item_to_attribute asks what a knowledge graph says"),
        (["graph.retrieval.allow=[made bi]"], "made bi"),
        (["tasks.2.relations=[colour of]"], "colour of"),
        (["tasks.0.relations=[made by]"], "next_item has relations"),
        (["graph.links.path={folder}/nothing.csv"], "nothing.csv"),
        (["graph.triples.timestamp_unit=us", "data.interactions.path={log}"], "set graph.triples.timestamp_unit"),
        ([f"tasks=[{json.dumps(TASKS[0] | {'template': 'next_item/films'})}]"], "no template of its tasks uses"),
    ],
)
def test_bad_input_is_an_error_that_names_it(graph_recipe, tmp_path, overrides, message):
    log = tmp_path / "today.csv"  # of this century, as times in microseconds of the same days
    head, *rows = (graph_recipe.parent / "interactions.csv").read_text().splitlines()
    parts = [row.rpartition(",") for row in rows]
    log.write_text("\n".join([head, *(f"{before},{1_700_000_000 + int(time)}" for before, _, time in parts)]) + "\n")
    if any("{log}" in override for override in overrides):
        triples = graph_recipe.parent / "triples.csv"
        triples.write_text(re.sub(r",(\d{4})$", r",170000\1", triples.read_text(), flags=re.MULTILINE))
    named = [override.replace("{folder}", str(tmp_path)).replace("{log}", str(log)) for override in overrides]
    with pytest.raises(UserError, match=message):
        converted(graph_recipe, tmp_path / "dataset", *named)
    assert not (tmp_path / "dataset").exists()


def test_a_graph_that_says_nothing_of_a_task_is_an_error(graph_recipe, tmp_path):
    with pytest.raises(UserError, match=r"item_to_attribute: of [1-9]"):
        converted(graph_recipe, tmp_path / "dataset", "tasks.2.relations=[has colour]")


@pytest.mark.slow  # the real model's tokenizer
def test_the_shipped_recipe_shows_films_and_asks_of_them(movielens, smollm2, tmp_path):
    """Unchanged but for its folder: subgraphs of next_item and explain, questions and descriptions from the graph."""
    recipe = load_recipe("movielens/next_item_kg_ilora", [f"output_dir={tmp_path}"])
    manifest = convert(recipe, tmp_path / "dataset", 1, stages.graph_tokenizer(recipe))
    shown, examples = manifest["graph"]["shown"], manifest["counts"]["examples"]
    tasks = ("next_item", "item_to_attribute", "attribute_to_item", "explain")
    assert {name.partition("/")[2] for name in examples} == set(tasks)
    for split in ("train", "valid", "test"):
        rows = [row for part in sorted((tmp_path / "dataset" / split).iterdir()) for row in _rows(part)]
        for task in ("next_item", "explain"):
            entry, of_it = shown[f"{split}/{task}"], of_task(rows, task)
            facts = re.compile(r": (?:stars|directed by|written by|has genre|released in|spoken in|made in) ")
            said = [found for row in of_it if (found := set(facts.findall(asked(row))))]
            assert entry["with_graph"] + entry["without_graph"] == len(of_it) == examples[f"{split}/{task}"]
            assert entry["with_graph"] > 0.8 * len(of_it)
            assert entry["budget_too_small"] == 0
            assert entry["triples"] > 15 * entry["with_graph"]
            assert 150 < entry["tokens"] / entry["with_graph"] <= 200
            assert len(said) == entry["with_graph"]
            assert not {": spoken in ", ": made in "} & set.union(*said)  # the recipe denies them
        for row in of_task(rows, "item_to_attribute"):
            assert row["label"] == answer(row)
            assert row["label"] in row["choices"]
            assert row["relation"] in asked(row)
        assert all(": " in asked(row) for row in of_task(rows, "attribute_to_item"))
        for row in of_task(rows, "explain"):
            names, relations, _ = explain.read(answer(row))
            assert names[0] in asked(row)
            assert names[-1] in asked(row)
            assert not {"spoken in", "made in"} & set(relations)


@pytest.mark.slow  # the real model's tokenizer
def test_the_shipped_recipe_ranks_candidates_with_the_paths_to_them(movielens, smollm2, tmp_path):
    manifest, rows = of_shipped("movielens/rank_kg_ilora", tmp_path)
    titles = [row["title"] for row in _rows(tmp_path / "dataset" / "items.parquet")]
    paths = 0
    for row in rows:
        assert answer(row) == titles[row["target"]]
        (listed,) = {part for part in asked(row).split("\n\n") if re.search(r"these 20|20 films to choose", part)}
        for item, line in zip(row["candidates"], listed.splitlines()[-20:], strict=True):
            if line != titles[item]:
                names, relations, _ = explain.read(line.removeprefix(f"{titles[item]}: "))
                assert names[-1] == titles[item] != names[0]
                assert not {"spoken in", "made in"} & set(relations)  # the recipe denies them
                paths += 1
    assert paths > 4 * len(rows)
    for entry in manifest["graph"]["shown"].values():
        assert entry["with_graph"] > 0.8 * (entry["with_graph"] + entry["without_graph"])
        assert 150 < entry["tokens"] / entry["with_graph"] <= 200  # half the budget, the rest is for paths


@pytest.mark.slow  # as above
def test_the_shipped_recipe_asks_whether_a_film_is_liked_around_it(movielens, smollm2, tmp_path):
    manifest, rows = of_shipped("movielens/like_kg_ilora", tmp_path)
    titles = [row["title"] for row in _rows(tmp_path / "dataset" / "items.parquet")]
    told = 0
    for row in rows:
        heads = (f"{titles[row['target']]}: ", f'"{titles[row["target"]]}": ')  # quoted where a name holds signs
        told += any(line.startswith(heads) for line in asked(row).splitlines())  # nobody rates a film twice
    linked = manifest["graph"]["counts"]["linked_items"] / len(titles)
    assert told > 0.8 * linked * len(rows)
    assert {answer(row) for row in rows} == {"Yes", "No"}
    for entry in manifest["graph"]["shown"].values():
        assert entry["with_graph"] > 0.95 * (entry["with_graph"] + entry["without_graph"])
        assert 150 < entry["tokens"] / entry["with_graph"] <= 200


def of_shipped(name: str, folder: Path) -> tuple[dict, list[dict]]:
    """The manifest and every example of a shipped recipe, with one training target a user."""
    recipe = load_recipe(name, [f"output_dir={folder}", "tasks.0.max_train_targets=1"])
    manifest = convert(recipe, folder / "dataset", 1, stages.graph_tokenizer(recipe))
    return manifest, [row for part in sorted((folder / "dataset").glob("*/part-*.parquet")) for row in _rows(part)]


def test_serving_refuses_an_adapter_whose_prompts_show_a_graph(graph_recipe, tmp_path):
    from recllm.data.dataset import Dataset
    from recllm.serve.catalogue import NextItemPrompts

    converted(graph_recipe, tmp_path / "dataset")
    with pytest.raises(UserError, match="knowledge graph, which `recllm serve` does not hold"):
        NextItemPrompts.of(Dataset.open(tmp_path / "dataset"))


def test_items_without_a_link_are_counted(graph_recipe, tmp_path):
    manifest, _ = converted(graph_recipe, tmp_path / "dataset")
    counts = manifest["graph"]["counts"]
    assert counts["linked_items"] == ITEMS - len(UNLINKED)
    assert counts["items_without_link"] == len(UNLINKED)
    linked = np.load(tmp_path / "dataset" / "graph" / "item_entities.npy")
    assert (linked == -1).sum() == len(UNLINKED)


def test_items_of_the_cut_off_second_lead_nowhere(graph_recipe, tmp_path):
    """Where several things were done in one second the graph starts from what is older, and the manifest counts it."""
    log = log_of(graph_recipe)
    write_log(graph_recipe, [(user, item, rating, int(time) // 20 * 20) for user, item, rating, time in log])
    task = TASKS[4] | {"max_train_targets": None}
    manifest, rows = converted(graph_recipe, tmp_path / "dataset", f"tasks=[{json.dumps(task)}]")
    sequences = {row["user_index"]: row for row in _rows(tmp_path / "dataset" / "sequences.parquet")}
    items = pq.read_table(tmp_path / "dataset" / "items.parquet").to_pylist()
    for row in rows:
        had = sequences[row["user_index"]]
        older = {
            items[item]["title"]
            for item, time in zip(had["items"][: row["history_end"]], had["timestamps"], strict=False)
            if time < row["timestamp"]
        }
        assert explain.read(answer(row))[0][0] in older
    assert sum(entry["with_items_of_the_cutoff_second"] for entry in manifest["graph"]["shown"].values()) > 0


def test_two_items_that_are_one_entity_are_called_as_the_prompt_calls_them(graph_recipe, tmp_path):
    links = graph_recipe.parent / "links.csv"
    links.write_text(links.read_text() + "i38,e0\n")
    manifest, rows = converted(graph_recipe, tmp_path / "dataset", f"tasks=[{json.dumps(TASKS[4])}]")
    items = pq.read_table(tmp_path / "dataset" / "items.parquet").to_pylist()
    for row in rows:
        names = explain.read(answer(row))[0]
        assert names[-1] == items[row["target"]]["title"]
        assert names[-1] in asked(row)
        assert names[0] in asked(row)
    assert manifest["graph"]["counts"]["linked_items"] == ITEMS - 1


def test_questions_show_no_subgraph(graph_recipe, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "id: m@1\ntask: item_to_attribute\nphrasings: [{user: '{{ graph }} {{ target }} {{ relation }}'}]\n"
    )
    task = TASKS[2] | {"template": str(mine)}
    with pytest.raises(UserError, match='"graph" is no variable'):
        converted(graph_recipe, tmp_path / "dataset", f"tasks=[{json.dumps(task)}]")


def test_the_best_paths_spend_the_budget(graph_recipe, tmp_path):
    """A path through a maker, whom few films share, goes before one through a colour that every fourth film has."""
    _, rows = converted(
        graph_recipe,
        tmp_path / "dataset",
        f"tasks=[{json.dumps(TASKS[1])}]",
        "graph.budget=80",
        "protocol.candidates.count=20",
    )
    items = pq.read_table(tmp_path / "dataset" / "items.parquet").to_pylist()
    kept = []
    for row in rows:
        titles = {items[item]["title"] for item in row["candidates"]}
        lines = [line.partition(": ") for line in asked(row).splitlines()]
        paths = [explain.read(path) for title, _, path in lines if title in titles]
        kept += [parsed[1][0] for parsed in paths if parsed is not None]
        assert sum(parsed is not None for parsed in paths) <= 1  # with ": " a path has over 50 bytes, a token each
    assert kept
    assert kept.count("made by") > kept.count("has colour")
