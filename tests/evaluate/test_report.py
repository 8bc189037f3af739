"""The report says what the tests say, shows what is there, names what is missing, and carries nothing active."""

import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recllm.errors import UserError
from recllm.evaluate import pictures, plots, reading, report


def _load(name: str) -> ModuleType:
    path = Path(__file__).with_name(f"{name}.py")  # tests/ is no package: pytest runs with importlib
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


synthetic = _load("synthetic_report")


class Tags(HTMLParser):
    """Every tag with its attributes, and whether each opened one is closed in order."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def written(folder: Path, document: dict[str, Any] | None = None) -> str:
    synthetic.write(folder, document)
    report.write(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    written(path)
    return path


def html(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def only(tests: list[dict[str, Any]], verdicts: dict[tuple[str, str], str]) -> list[dict[str, Any]]:
    """The tests with the wanted outcome, in the direction that is better for the metric."""
    shift = {"ahead": 1.0, "behind": -1.0, "open": 0.0}
    found = []
    for test in tests:
        outcome = verdicts.get((test["b"], test["metric"]), "open")
        sign = -1 if test["metric"] in reading.LOWER_IS_BETTER else 1
        middle = sign * shift[outcome] * 0.2
        p_holm = 0.5 if outcome == "open" else 0.001
        found.append(test | {"difference": middle, "low": middle - 0.1, "high": middle + 0.1, "p_holm": p_holm})
    return found


def sentences(verdicts: dict[tuple[str, str], str]) -> str:
    document = synthetic.metrics()
    document["comparisons"] = only(document["comparisons"], verdicts)
    return "\n".join(sentence.text for sentence in reading.read(document, "next_item"))


# ---- the page ----


def test_the_page_is_one_well_formed_file_without_scripts_or_addresses(folder: Path) -> None:
    tags = Tags(html(folder))
    assert tags.open == []
    assert not {"script", "link", "iframe", "object", "img", "image"} & {tag for tag, _ in tags.found}
    for _, attributes in tags.found:
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#")
    assert "http" not in html(folder)
    assert not re.search(r"url\((?!#)|@import", html(folder))


def test_ids_are_unique_and_every_reference_has_its_target(folder: Path) -> None:
    # Several SVG pictures share one page: their clip paths and markers must not be each other's.
    tags = Tags(html(folder)).found
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = [str(attributes["href"])[1:] for _, attributes in tags if attributes.get("href")]
    assert set(used) | set(re.findall(r"url\(#([^)]+)\)", html(folder))) <= set(ids)


def test_the_same_inputs_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    written(tmp_path)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.suffix in {".html", ".md", ".svg"})
    assert len(names) > 15
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_title_or_a_system_name_cannot_become_markup(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>|\"'&$x_1$"
    document = synthetic.metrics()
    document["examples"][0]["history"][0] = document["examples"][0]["target"] = attack
    document["examples"][0]["systems"]["ilora"]["top"][0]["text"] = attack
    document["examples"][0]["systems"]["ilora"]["text"] = attack
    document["name"] = document["description"] = attack
    document["audit"]["warnings"] = attack
    for entry in document["systems"] + document["comparisons"]:
        for key in ("name", "b"):
            if entry.get(key) == "plain":
                entry[key] = attack
    page = written(tmp_path, document)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert Tags(page).open == []
    assert "<script" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    for picture in (tmp_path / "plots").iterdir():
        assert "<script" not in picture.read_text(encoding="utf-8")


def test_markdown_shows_every_picture_from_a_file_that_exists(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert linked
    assert {Path(path) for path in linked} == {path.relative_to(folder) for path in (folder / "plots").iterdir()}
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(re.search(r"(?<!\\)\|$", row) for row in rows)


def test_pictures_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "old.svg").write_text("", encoding="utf-8")
    written(tmp_path)
    assert not (tmp_path / "plots" / "old.svg").exists()


def test_candidates_and_catalogue_are_labelled(folder: Path) -> None:
    assert "sampled (20 candidates)" in html(folder)
    assert "full catalogue" in html(folder)
    missing = len(synthetic.SYSTEMS) - len(synthetic.FULL_CATALOGUE)
    assert html(folder).count("no full-catalogue ranking for this system") == missing


def test_warnings_stand_before_the_results(folder: Path, tmp_path: Path) -> None:
    warning = synthetic.metrics()["audit"]["warnings"][0]
    assert html(folder).index(warning) < html(folder).index("What the numbers say")
    assert 'class="warning"' not in written(tmp_path, synthetic.metrics() | {"audit": {"shared_sessions": 0}})


def test_every_hash_seed_and_version_is_in_the_provenance(folder: Path) -> None:
    provenance = html(folder)[html(folder).index('id="provenance"') :]
    for value in ("ab" * 32, "cd" * 32, "ef" * 32, "recllm evaluate synthetic", "2.13.0", "temporal_20"):
        assert value in provenance


def test_ten_examples_with_the_target_marked(folder: Path) -> None:
    document = synthetic.metrics()
    assert html(folder).count('<details class="example"') == 10
    hits = sum(e["target"] for example in document["examples"] for s in example["systems"].values() for e in s["top"])
    assert html(folder).count('class="hit"') == hits > 0


def test_a_closed_task_has_its_own_table(tmp_path: Path) -> None:
    page = written(tmp_path, synthetic.closed_task())
    assert "Closed answers" in page
    assert "balanced_accuracy" in page
    assert "ilora is ahead of constant" in page


def test_a_second_closed_task_is_read_as_the_first(tmp_path: Path) -> None:
    document = synthetic.closed_task()
    document["tasks"][-1] = "like.2"
    document["main_system"]["like.2"] = document["main_system"].pop("like")
    for entry in document["systems"] + document["comparisons"]:
        entry["task"] = entry["task"].replace("like", "like.2")
    page = written(tmp_path, document)
    assert "Closed answers" in page
    assert "ilora is ahead of constant" in page


# ---- actions ----


@pytest.fixture(scope="module")
def acted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("actions")
    written(folder, synthetic.action_task())
    return folder


SAID = (
    "Below the constant answer: on next_action, ilora has an exact match of 0.200, always giving the most frequent "
    'answer of training has 0.500. 97.0% of its answers are "leave the shop", and its mean recall on all other classes '
    "is 0.7%."
)


def test_a_report_opens_with_a_model_below_the_constant(acted: Path) -> None:
    assert (acted / "report.md").read_text(encoding="utf-8").splitlines()[0] == f"> ▼ **{SAID}**"
    page = (acted / "report.html").read_text(encoding="utf-8")
    main = page[page.index("<main>") :]
    assert main.index(SAID.replace('"', "&#34;")) < main.index("<header>") < main.index("<h1>")
    assert reading.below_constant(synthetic.action_task()) == [SAID]


def test_the_footnote_says_which_figures_have_no_interval(acted: Path) -> None:
    """Of classes only where classes are shown."""
    for name in ("report.md", "report.html"):
        text = (acted / name).read_text(encoding="utf-8")
        assert "has no interval where all resamples are alike, nor has a class that fewer than 5 sessions hold;" in text
        assert "has no interval where all resamples are alike; fewer than 2 users have no interval" in text


def test_the_table_of_items_to_come_says_that_beams_found_them() -> None:
    systems = [one for one in synthetic.action_task()["systems"] if one["task"] == "next_item"]
    styles = plots.system_styles({system["name"]: system["kind"] for system in systems})
    for system in systems:
        system["beam"] = None
    (table,) = report._otto_table(systems, styles, 0.95)
    assert table.note.endswith("One list for all actions, intervals over users")
    next(one for one in systems if one["name"] == "ilora")["beam"] = {
        "width": 25,
        "k": 20,
        "exact": 0.5,
        "recall": None,
    }
    (table,) = report._otto_table(systems, styles, 0.95)
    assert table.note.endswith(
        ". Ranks of language models by beams of 25: a target that a beam does not find is a miss; known to be exact: "
        "ilora 50%"
    )


def test_a_report_that_is_not_below_opens_with_its_name(folder: Path) -> None:
    assert "Below the constant" not in (folder / "report.html").read_text(encoding="utf-8")
    assert (folder / "report.md").read_text(encoding="utf-8").startswith("# ")


def test_answers_that_cannot_be_read_at_all_are_said_so() -> None:
    document = synthetic.action_task()
    document["below_constant"][0] |= {"answer": None, "answer_share": None, "rest_recall": None}
    assert reading.below_constant(document)[0].endswith("None of its answers can be read.")
    ilora = next(s for s in document["systems"] if (s["task"], s["name"]) == ("next_action", "ilora"))
    ilora["classes"]["most_frequent"] = None
    said = [sentence.text for sentence in reading.read(document, "next_action")]
    assert "None of the answers of ilora can be read." in said


def test_what_actions_are_read_by(acted: Path) -> None:
    page = (acted / "report.html").read_text(encoding="utf-8")
    for title in ("Answers", "Probabilities", "Calibrated probabilities", "Items to come, by action"):
        assert f"<h3>{title}<span" in page
    assert "Each class: ilora" in page
    assert "Each class: constant" in page
    assert "Each class: markov" not in page
    assert "60 sessions, 40 users" in page
    assert "bootstrap over sessions" in page
    assert "bootstrap over users" in page  # of the ranking
    assert "view 90, buy 12, search 0" in page
    lines = (acted / "report.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith("| rate |"))
    assert row == "| rate | rate | tail | 0 | 0 | 0.200 (0.170 to 0.230) | – (–) | – (–) |".replace("– (–)", "–")
    temperatures = next(line for line in lines if line.startswith("| ilora | 2.500 |"))
    assert "0.300 (0.270 to 0.330) | 0.150 (0.120 to 0.180)" in temperatures


def test_notes_stand_in_their_own_task(acted: Path) -> None:
    page = (acted / "report.html").read_text(encoding="utf-8")
    assert page.count("evaluated examples has the label") == 1
    assert page.index('id="next_action"') < page.index("evaluated examples has the label")


def test_sentences_of_actions_are_about_sessions() -> None:
    said = [sentence.text for sentence in reading.read(synthetic.action_task(), "next_action")]
    assert (
        "constant, which needs no language model, is ahead of ilora in exact_match: +0.300 [+0.250, +0.350]" in said[0]
    )
    assert any(
        "97.0% of the answers of ilora are" in text and "right in 15.0% of the examples" in text for text in said
    )
    assert any("A temperature of 2.50, fitted on 80 validation examples" in text for text in said)
    assert any("With 120 examples of 60 sessions, differences in exact_match" in text for text in said)


def test_pictures_of_actions(acted: Path) -> None:
    confusion = (acted / "plots" / "next-action-confusion.svg").read_text(encoding="utf-8")
    for text in ("view (60)", "leave the…", "unreadable", "97%"):
        assert f">{text}<" in confusion
    assert (acted / "plots" / "next-action-reliability.svg").is_file()
    weights = (acted / "plots" / "training-dro-weight.svg").read_text(encoding="utf-8")
    for text in ("view", "add_to_cart", "buy", "even"):
        assert f">{text}<" in weights
    assert (acted / "plots" / "training-dro-loss.svg").is_file()
    # each group is a curve of its own, and no expert of a gate
    assert len(pictures.of_training(synthetic.metrics()["training_log"], None)) == 3
    assert len(pictures.of_training(synthetic.action_task()["training_log"], None)) == 3 + 2


def test_many_classes_leave_the_rare_ones_out_of_the_picture() -> None:
    system = next(s for s in synthetic.action_task()["systems"] if (s["task"], s["name"]) == ("next_action", "ilora"))
    classes = [system["classes"]["per_class"][0] | {"label": f"c{n}", "support": n, "predicted": 0} for n in range(20)]
    table = [[0] * 20 + [0] for _ in range(20)]
    system["classes"] |= {"per_class": classes, "confusion": table}
    picture = pictures.of_actions("next_action", system)[0]
    assert "the 14 most frequent of 20 classes" in picture.caption
    assert ">c19 (19)<" in picture.svg
    assert ">c5 (5)<" not in picture.svg
    assert "unreadable" not in picture.svg


def test_the_page_of_actions_is_well_formed(acted: Path) -> None:
    text = (acted / "report.html").read_text(encoding="utf-8")
    assert Tags(text).open == []
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_items_that_share_their_text_are_told(tmp_path: Path) -> None:
    said = "30 items share their text with another item"
    document = synthetic.metrics()
    assert said not in written(tmp_path, document)
    document["counts"]["colliding_texts"] = 30
    assert said in written(tmp_path, document)
    assert said in (tmp_path / "report.md").read_text(encoding="utf-8")


# ---- missing pieces ----


def test_few_users_have_no_interval_no_test_and_nothing_bold(tmp_path: Path) -> None:
    document = synthetic.metrics() | {"examples": [], "experts": None}
    undefined = {"low": None, "high": None}
    for test in document["comparisons"]:
        test |= {**undefined, "p_value": None, "p_holm": None, "num_users": 1, "num_examples": 1}
    for system in document["systems"]:
        system |= {"num_users": 1, "full_catalogue": None, "generation": None}
        system["metrics"] = {name: value | undefined for name, value in system["metrics"].items()}
    page = written(tmp_path, document)
    assert "1 users are too few to compare systems: at least 5 are needed." in page
    assert "is ahead of" not in page
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| +0.010 | – | – | – | not decided |" in text
    assert "| **" not in text


def test_disjoint_intervals_of_four_users_make_nothing_bold(tmp_path: Path) -> None:
    document = synthetic.metrics() | {"comparisons": [], "examples": [], "experts": None}
    (best,) = [system for system in document["systems"] if system["name"] == "item_to_item"]
    best["metrics"]["hit_rate@1"] = synthetic.estimate(0.9)
    written(tmp_path, document)
    assert "| **" in (tmp_path / "report.md").read_text(encoding="utf-8")
    for system in document["systems"]:
        system["num_users"] = 4
    written(tmp_path, document)
    assert "| **" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_log_entry_without_its_loss_leaves_the_curve(tmp_path: Path) -> None:
    document = synthetic.metrics()
    del document["training_log"][3]["loss"]
    document["training_log"][5]["loss"] = float("nan")
    document["training_log"][7]["loss"] = None
    (picture,) = [p for p in pictures.of_training(document["training_log"], None) if p.name == "training-loss"]
    whole = [entry for number, entry in enumerate(document["training_log"]) if number not in (3, 5, 7)]
    (expected,) = [p for p in pictures.of_training(whole, None) if p.name == "training-loss"]
    assert picture.svg == expected.svg


def test_a_gate_that_is_exactly_uniform_has_no_strongest_expert(tmp_path: Path) -> None:
    document = synthetic.metrics()
    document["gate"] |= {"strongest_counts": [0, 0, 0, 0], "strongest_none": synthetic.EXAMPLES}
    synthetic.write(tmp_path, document)
    table = pq.read_table(tmp_path / "gates.parquet")
    none = pa.array([-1] * len(table), pa.int32())
    pq.write_table(
        table.set_column(table.column_names.index("strongest"), "strongest", none), tmp_path / "gates.parquet"
    )
    report.write(tmp_path)
    assert f"| none | – | – | {synthetic.EXAMPLES} (100%) |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    picture = (tmp_path / "plots" / "gate-users.svg").read_text(encoding="utf-8")
    assert "none: all weigh the same" in picture
    assert "expert 0" not in picture


def test_missing_files_are_named(tmp_path: Path) -> None:
    synthetic.write(tmp_path)
    (tmp_path / "predictions.parquet").unlink()
    (tmp_path / "gates.parquet").unlink()
    report.write(tmp_path)
    assert "predictions.parquet is missing" in html(tmp_path)
    assert "gates.parquet is missing" in html(tmp_path)


def test_plain_lora_without_a_log_reports_what_it_has(tmp_path: Path) -> None:
    document = synthetic.metrics() | {
        "gate": None,
        "training_log": [],
        "segments": {},
        "examples": [],
        "comparisons": [],
    }
    synthetic.write(tmp_path, document)
    (tmp_path / "gates.parquet").unlink()
    report.write(tmp_path)
    for text in ("plain LoRA", "no training curve", "No segments", "No examples", "No comparisons"):
        assert text in html(tmp_path)


def test_figures_may_be_null(tmp_path: Path) -> None:
    document = synthetic.metrics()
    document["systems"][0]["metrics"]["ndcg@10"] = {"value": None, "low": None, "high": None}
    document["systems"][1]["metrics"]["mrr"] = {"value": 0.5, "low": None, "high": None}
    document["comparisons"][0] |= {"difference": None, "low": None, "high": None, "p_value": None, "p_holm": None}
    document["comparisons"][1] |= {"difference": None, "low": None, "high": None, "p_value": None, "p_holm": None}
    assert report.MISSING in written(tmp_path, document)


def test_no_metrics_is_an_error_with_a_next_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.json does not exist.*Run the stage"):
        report.write(tmp_path)


def test_a_segment_of_few_users_shows_no_interval(tmp_path: Path) -> None:
    document = synthetic.metrics()
    for system in document["segments"]["next_item"]["target popularity"]["cold"].values():
        system |= {"num_examples": 1, "num_users": 1}
    assert "cold (n = 1, too few for intervals)" in written(tmp_path, document)


def test_segments_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    document = synthetic.metrics()
    parts = document["segments"]["next_item"]["history length"]
    document["segments"]["next_item"]["history length"] = {key: parts[key] for key in ("11-20", "21-50", "1-5", "6-10")}
    page = written(tmp_path, document)
    places = [page.index(f"{key} (n = ") for key in ("1-5", "6-10", "11-20", "21-50")]
    assert places == sorted(places)


# ---- bold and sentences are decided by the tests ----


def values(**named: tuple[float, float, float]) -> dict[str, Any]:
    return {name: dict(zip(("value", "low", "high"), figures)) for name, figures in named.items()}


def test_bold_needs_disjoint_intervals_where_there_is_no_test() -> None:
    apart = values(a=(0.5, 0.4, 0.6), b=(0.2, 0.1, 0.3))
    touching = values(a=(0.5, 0.3, 0.6), b=(0.2, 0.1, 0.3))
    assert reading.supported_best(apart, "mrr", [], 0.95) == "a"
    assert reading.supported_best(touching, "mrr", [], 0.95) is None
    assert reading.supported_best(apart, "nats", [], 0.95) == "b"
    assert reading.supported_best(values(a=(0.5, 0.4, 0.6)), "mrr", [], 0.95) is None


@pytest.mark.parametrize(("p_holm", "best"), [(0.001, "a"), (0.2, None)])
def test_bold_follows_the_paired_test_where_there_is_one(p_holm: float, best: str | None) -> None:
    overlapping = values(a=(0.5, 0.3, 0.7), b=(0.4, 0.2, 0.6))
    test = {"a": "b", "b": "a", "metric": "mrr", "difference": -0.1, "low": -0.15, "high": -0.05, "p_holm": p_holm}
    assert reading.supported_best(overlapping, "mrr", [test], 0.95) == best


def test_bold_needs_every_other_system_beaten() -> None:
    figures = values(a=(0.5, 0.45, 0.55), b=(0.2, 0.1, 0.3), c=(0.44, 0.4, 0.46))
    assert reading.supported_best(figures, "mrr", [], 0.95) is None


@pytest.mark.parametrize("outcome", ["ahead", "behind", "open"])
@pytest.mark.parametrize("metric", ["ndcg@10", "nats"])
def test_verdict_knows_the_direction_of_the_metric(metric: str, outcome: str) -> None:
    (test,) = only([synthetic.comparison("sasrec", metric, 0, 0, 1.0)], {("sasrec", metric): outcome})
    assert reading.verdict(test, 0.95) == outcome


def test_an_interval_with_zero_is_open_whatever_p_says() -> None:
    test = synthetic.comparison("sasrec", "ndcg@10", 0.01, 0.02, 0.001)
    assert reading.verdict(test, 0.95) == "open"


def test_a_baseline_that_wins_is_named() -> None:
    text = sentences({("popularity", "ndcg@10"): "behind", ("random", "ndcg@10"): "ahead"})
    assert "popularity, which needs no language model, is ahead of ilora in ndcg@10: +0.200 [+0.100, +0.300]" in text
    assert "ilora is ahead of random (+0.200) in ndcg@10." in text
    assert "No difference shown between ilora and plain, base_model, sasrec or item_to_item in ndcg@10" in text


UNIFORM, SHUFFLED, PLAIN = ("ilora_uniform", "nats"), ("ilora_shuffled", "nats"), ("plain", "nats")
BOTH = {UNIFORM: "ahead", SHUFFLED: "ahead"}


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        ({**BOTH, PLAIN: "ahead"}, "the gate helps on this data"),
        ({PLAIN: "ahead"}, "the gate is not shown to help on this data"),
        ({UNIFORM: "ahead"}, "a gate of another user does as well"),
        ({SHUFFLED: "ahead"}, "no gain shown"),
        ({UNIFORM: "behind", SHUFFLED: "ahead"}, "the gate hurts on this data: it is behind the uniform gate"),
        ({}, "the gate is not shown to help on this data"),
    ],
)
def test_the_gate_helps_only_when_both_controls_and_plain_lora_are_behind(
    verdicts: dict[tuple[str, str], str], said: str
) -> None:
    text = sentences(verdicts)
    assert f"Measured in nats, {said}" in text or (said == "no gain shown" and said in text)
    assert ("Measured in nats, the gate helps" in text) == (len(verdicts) == 3 and set(verdicts.values()) == {"ahead"})


@pytest.mark.parametrize(
    ("plain", "said"),
    [("open", "but is not shown to beat a plain LoRA"), ("behind", "but a plain LoRA without one is ahead of it")],
)
def test_a_gate_that_its_adapter_needs_is_no_gain_over_plain_lora(plain: str, said: str) -> None:
    text = sentences({**BOTH, PLAIN: plain})
    assert "Measured in nats, this adapter needs its gate" in text
    assert said in text
    assert "the gate helps" not in text


def test_without_a_plain_lora_no_gain_is_claimed() -> None:
    document = synthetic.metrics()
    document["comparisons"] = [t for t in only(document["comparisons"], BOTH) if t["b"] != "plain"]
    document["systems"] = [system for system in document["systems"] if system["name"] != "plain"]
    text = "\n".join(sentence.text for sentence in reading.read(document, "next_item"))
    assert "whether it beats a plain LoRA is not tested here: add evaluate.adapters: {lora: FOLDER}" in text
    assert "the gate helps" not in text


def test_one_control_alone_does_not_show_that_the_gate_helps() -> None:
    document = synthetic.metrics()
    tests = only(document["comparisons"], {UNIFORM: "ahead"})
    document["comparisons"] = [test for test in tests if test["b"] != "ilora_shuffled"]
    text = "\n".join(sentence.text for sentence in reading.read(document, "next_item"))
    assert "one of the two controls was not run" in text
    assert "the gate helps" not in text


def test_a_gate_without_any_effect_is_called_that() -> None:
    document = synthetic.metrics()
    for test in document["comparisons"]:
        if test["b"] in {"ilora_uniform", "ilora_shuffled"}:
            test |= {"difference": 0.0, "low": 0.0, "high": 0.0, "p_holm": 1.0}
    text = "\n".join(sentence.text for sentence in reading.read(document, "next_item"))
    assert "the gate changes nothing on this data" in text


@pytest.mark.parametrize(
    ("outcome", "said"),
    [("ahead", "likelier than"), ("behind", "less likely than"), ("open", "is not shown to change")],
)
def test_what_training_did_is_read_from_the_base_model(outcome: str, said: str) -> None:
    assert said in sentences({("base_model", "nats"): outcome})


def test_a_collapsed_gate_is_named() -> None:
    document = synthetic.metrics()
    assert "has collapsed" not in "\n".join(sentence.text for sentence in reading.read(document, "next_item"))
    document["gate"]["collapse"] |= {"collapsed": True, "largest_mean": 0.97, "stuck_experts": 0.75}
    text = "\n".join(sentence.text for sentence in reading.read(document, "next_item"))
    assert "The gate has collapsed: one expert holds 97% of the mean weight, and 75% of the experts" in text


def test_a_collapsed_gate_is_a_warning_before_the_results(folder: Path, tmp_path: Path) -> None:
    assert "Collapsed gate" not in html(folder)
    page = written(tmp_path, synthetic.layered())
    assert page.index("Collapsed gate") < page.index("What the numbers say")
    assert "**Collapsed gate**" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "one gate for each of 30 layers" in page
    assert "has collapsed in 80% of the layers; mean over layers: one expert holds 97%" in page
    assert "layer 29" in (tmp_path / "plots" / "gate-layers.svg").read_text(encoding="utf-8")


# ---- whom each expert serves ----


def test_experts_have_pictures_with_readable_values_and_a_table(folder: Path) -> None:
    picture = (folder / "plots" / "experts-items.svg").read_text(encoding="utf-8")
    groups = synthetic.metrics()["experts"]["parts"][0]["groups"]
    for group in groups:
        assert group["name"].replace("'", "&apos;") in picture or group["name"] in picture
        for lift in group["lifts"]:
            assert f">{lift['value']:.2f}</text>" in picture
            assert f"{lift['low']:.2f} to {lift['high']:.2f}" in html(folder)
    assert "guessed, evaluate.item_groups names another" in html(folder)


def test_experts_that_nothing_distinguishes_are_called_that(tmp_path: Path) -> None:
    document = synthetic.metrics()
    for part in document["experts"]["parts"]:
        for group in part["groups"]:
            group["lifts"] = [{"value": 1.1, "low": 0.9, "high": 1.3}] * 4
    page = written(tmp_path, document)
    assert "Nothing distinguishes the experts" in page
    assert "Expert 0 serves" not in page


def test_the_surest_share_of_an_expert_is_told_not_the_largest() -> None:
    document = synthetic.metrics()["experts"] | {"parts": [{"name": "genres", "what": "items", "groups": []}]}
    unsure, sure = {"value": 3.0, "low": 1.1, "high": 8.2}, {"value": 1.5, "low": 1.4, "high": 1.6}
    for name, lift in (("Western", unsure), ("Drama", sure)):
        document["parts"][0]["groups"].append({"name": name, "share": 0.1, "num_users": 9, "lifts": [lift]})
    (sentence,) = reading.about_experts(document)
    assert sentence.text.startswith(
        "Expert 0 serves histories with 1.50 times [1.40, 1.60] the usual share of Drama; 1 more"
    )


def test_too_few_users_are_said_so() -> None:
    found = synthetic.metrics()["experts"] | {"num_users": 3}
    for part in found["parts"]:
        for group in part["groups"]:
            group["lifts"] = [{"value": 2.0, "low": None, "high": None}] * 4
    assert [s.text for s in reading.about_experts(found)] == ["3 users are too few to say whom each expert serves."]


def test_many_experts_are_cut_to_those_that_vary_most() -> None:
    shown = pictures.shown_experts(plots.np.arange(40.0))
    assert shown.tolist() == list(range(28, 40))


def test_heat_colours_are_told_apart_from_even_in_both_directions() -> None:
    assert [plots.heat_colour(r) for r in (0.0, 0.5, 0.8, 1.0, 1.04, 1.06, 9.0)] == [
        "below_4", "below_4", "below_2", "even", "even", "above_1", "above_4",
    ]  # fmt: skip


@pytest.mark.parametrize("theme", [0, 1])
def test_ink_is_legible_on_every_heat_colour(theme: int) -> None:
    def luminance(colour: str) -> float:  # WCAG 2.1
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink = luminance(plots.PALETTE["ink"][theme])
    for name, colours in plots.PALETTE.items():
        if name.startswith(("above_", "below_", "even")):
            bright, dark = sorted((ink, luminance(colours[theme])), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, name


def test_nats_against_plain_lora_have_a_table(folder: Path) -> None:
    assert "Nats against plain LoRA" in html(folder)
    assert "ilora_shuffled − plain" in html(folder)


def test_a_soft_token_is_spoken_of_as_one() -> None:
    document = synthetic.metrics()
    tests = only(document["comparisons"], {UNIFORM: "ahead"})
    for entry in document["systems"] + tests:
        for key in ("name", "a", "b"):
            if str(entry.get(key, "")).startswith("ilora"):
                entry[key] = entry[key].replace("ilora", "soft_token").replace("_uniform", "_without_token")
        entry["method"] = "soft_token" if entry.get("method") == "ilora" else entry.get("method")
    document["comparisons"], document["main_system"] = tests, {"next_item": "soft_token"}
    text = "\n".join(sentence.text for sentence in reading.read(document, "next_item"))
    assert "Measured in nats, a soft token of another user does as well" in text
    assert "against no soft token" in text


# ---- pictures ----


def test_a_system_keeps_its_colour_and_differs_from_the_others() -> None:
    kinds = {name: kind for name, (kind, _, _) in synthetic.SYSTEMS.items()}
    styles = plots.system_styles(kinds)
    assert len({style.colour for style in styles.values()}) == len(kinds)
    assert not styles["ilora_uniform"].filled
    assert styles["ilora"].filled


def test_colours_become_variables_that_the_page_defines(folder: Path) -> None:
    defined = set(re.findall(r"--([a-z_0-9]+):#", html(folder)))
    assert set(re.findall(r"var\(--([a-z_0-9]+)\)", html(folder))) - {"c"} <= defined | {"page", "soft"}
    for light, _ in plots.PALETTE.values():
        assert html(folder).count(light) <= 2  # the style sheet's own lines: no picture keeps a literal colour
    assert len({light for light, _ in plots.PALETTE.values()}) == len(plots.PALETTE)


def test_a_far_difference_does_not_squeeze_the_others_and_is_still_told(folder: Path) -> None:
    picture = (folder / "plots" / "next-item-difference-nats.svg").read_text(encoding="utf-8")
    assert "base_model" not in picture
    assert "too far off for this scale: base_model (−3.300)" in html(folder)


def test_a_huge_map_draws_a_fixed_choice_of_users() -> None:
    many = plots.np.arange(3 * plots.MAX_POINTS) % 7
    svg = plots.user_map("map", "Users", many.astype(float), many.astype(float), many % 2, 2)
    assert plots.MAX_POINTS <= svg.count("<use ") < plots.MAX_POINTS + 50


def test_a_value_a_hair_above_the_largest_possible_is_still_drawn() -> None:
    level = 1.3862943
    at, above = (
        plots.histogram("h", "Entropy", plots.np.array([v]), "nats", (level, "uniform")) for v in (level, 1.3863)
    )
    assert at == above
