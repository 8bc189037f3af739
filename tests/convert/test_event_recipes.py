"""The shipped recipes of logs of events, each on a small file of its own format."""

import csv
import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recllm import schema
from recllm.convert.pipeline import convert
from recllm.convert.preview import preview
from recllm.convert.templates import load_template
from recllm.data.dataset import Dataset
from recllm.recipe import load_recipe

LOGS = Path(__file__).resolve().parent.parent / "data" / "logs"
START_S, DAY_S = 1_700_000_000, 86_400
USERS, SESSIONS, EVENTS = 12, 8, 6
WEEKS, PAGE = 12, 2000  # of a fixture, written anew; characters of a page that prompts show


def visits(seed: int = 0) -> list[tuple[int, int, int, int, int]]:
    """(user, session, seconds, place in the session, a number to draw with), a session a day."""
    generator = np.random.default_rng(seed)
    return [
        (user, session, START_S + DAY_S * session + 3600 * user + 60 * place, place, int(generator.integers(1 << 30)))
        for user in range(USERS)
        for session in range(SESSIONS)
        for place in range(EVENTS)
    ]


def iso(seconds: int) -> str:
    return str(np.datetime64(seconds, "s")) + "Z"


def ecommerce(path: Path) -> list[str]:
    pages = ["home", "product_view", "add_to_cart", "cart", "purchase"]
    lines = ["user_id,session_id,event,timestamp,platform,acquisition_channel,user_cohort,user_lifecycle"]
    for user, session, seconds, place, number in visits():
        page = "home" if place < 3 else pages[number % 5]
        time = iso(seconds).replace("T", " ")[:-1]
        lines.append(f"user_{user},s{user}-{session},{page},{time},mobile,organic,2024-01,new")
    path.write_text("\n".join(lines) + "\n")
    return [f"data.interactions.path={path}"]


def otto(path: Path) -> list[str]:
    lines: dict[int, list[dict]] = {}
    for user, _, seconds, place, number in visits():
        kind = ("clicks", "carts", "orders")[number % 3 if place else 0]
        lines.setdefault(user, []).append({"aid": 1000 + number % 40, "ts": 1000 * seconds, "type": kind})
    text = [json.dumps({"session": user, "events": events}) for user, events in lines.items()]
    path.write_text("\n".join(text) + "\n")
    return [f"data.interactions.path={path}", "protocol.candidates.count=3"]


def yoochoose(path: Path) -> list[str]:
    rows = [f"{8 * user + session}\t{number % 40}\t{seconds}.5" for user, session, seconds, _, number in visits()]
    path.write_text("\n".join(["SessionId\tItemId\tTime", *rows]) + "\n")
    return [f"data.interactions.path={path}"]


def web(path: Path) -> list[str]:
    """OPeRA's action table with all its columns, a week of the fixture after the other, on pages of several lengths."""
    rows = []
    for week, line in weeks("opera_actions.jsonl"):
        row = json.loads(line)
        row["session_id"] = f"{week}_{row['session_id']}"
        row["timestamp"] = later(row["timestamp"], week)
        row["simplified_html"] += "<p>tea</p> " * (week % 3 * 400)  # up to 8,800 characters
        rows.append(row)
    pl.DataFrame(rows, infer_schema_length=None).write_parquet(path)
    return [f"data.interactions.path={path}"]


def shop_r1(path: Path) -> list[str]:
    """Sessions of steps as Shop-R1 has them, a week of the fixture after the other."""
    lines = []
    for week, line in weeks("shop_r1_sessions.jsonl"):
        session = json.loads(line)
        for step in session["steps"]:
            step["timestamp"] = later(step["timestamp"], week)
            step["context"] += "<p>lamp</p> " * (week % 3 * 400)
        lines.append(json.dumps(session | {"session_id": f"{week}_{session['session_id']}"}))
    path.write_text("\n".join(lines) + "\n")
    return [f"data.interactions.path={path}"]


def weeks(fixture: str) -> list[tuple[int, str]]:
    lines = (LOGS / fixture).read_text(encoding="utf-8").splitlines()
    return [(week, line) for week in range(WEEKS) for line in lines]


def later(time: str, week: int) -> str:
    return (datetime.fromisoformat(time) + timedelta(weeks=week)).isoformat()


def social(path: Path) -> list[str]:
    lines = []
    for user, _, seconds, place, number in visits():
        action = "ignore" if place < 2 else ("follow", "like", "repost", "reply", "quote", "ignore")[number % 6]
        thread, text = f"What of {number % 9}?\n\nI wonder.", "So do I!" if action in ("reply", "quote") else ""
        lines.append(
            {"user_id": f"u{user}", "timestamp": iso(seconds), "action": action, "thread": thread, "text": text}
        )
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    personas = path.with_suffix(".csv")
    personas.write_text("\n".join(["user_id,persona", *(f"u{n},a sailor of {20 + n}" for n in range(USERS))]) + "\n")
    return [f"data.interactions.path={path}", f"data.users.path={personas}", 'prompt.user="{{ persona }}"']


RECIPES: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "ecommerce/action_ilora": ("log.csv", ecommerce),
    "ecommerce/outcome_ilora": ("log.csv", ecommerce),
    "otto/action_on_item_ilora": ("train.jsonl", otto),
    "otto/next_item_ilora": ("train.jsonl", otto),
    "yoochoose/next_item_ilora": ("clicks.txt", yoochoose),
    "web/next_event_ilora": ("action.parquet", web),
    "web/shop_r1_next_event_ilora": ("sessions.jsonl", shop_r1),
    "social/action_ilora": ("events.jsonl", social),
}


# (events, sessions) of the files that are not made of `visits`; Shop-R1's third session has no step
COUNTS = {"web/next_event_ilora": (12 * WEEKS, 4 * WEEKS), "web/shop_r1_next_event_ilora": (7 * WEEKS, 3 * WEEKS)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reads_its_format(name, tmp_path):
    file, write = RECIPES[name]
    recipe = load_recipe(name, [*write(tmp_path / file), "model.name_or_path=none"])
    manifest = convert(recipe, tmp_path / "dataset", workers=1)
    events, sessions = COUNTS.get(name, (USERS * SESSIONS * EVENTS, USERS * SESSIONS))
    assert manifest["counts"]["interactions"] == events
    assert manifest["audit"]["shared_sessions"] == 0
    dataset = Dataset.open(tmp_path / "dataset")
    assert dataset.is_events == (recipe.actions is not None)
    for split in schema.SPLITS:
        table = dataset.examples(split)
        assert table.num_rows > 0
        assert table["session"].null_count == 0
    if dataset.is_events:
        assert manifest["actions"]["sessions"]["all"] == sessions


def converted(name: str, folder: Path) -> list[dict]:
    """Examples of train, valid and test that a recipe makes of its small file."""
    file, write = RECIPES[name]
    convert(load_recipe(name, [*write(folder / file), "model.name_or_path=none"]), folder / "dataset", workers=1)
    dataset = Dataset.open(folder / "dataset")
    return [row for split in schema.SPLITS for row in dataset.examples(split).to_pylist()]


def told(rows: list[dict]) -> set[str]:
    return {row["completion"][0]["content"] for row in rows}


def shown_pages(rows: list[dict], first: str) -> set[str]:
    """What prompts show of the event that is asked about; `first`: the name with which it begins."""
    texts = ["\n".join(message["content"] for message in row["prompt"]) for row in rows]
    found = [re.search(rf"^{first}: .*(\n.+)*", text, flags=re.MULTILINE) for text in texts]
    assert all(found)
    return {one.group() for one in found if one}


def test_operas_answers_are_whole_events_behind_a_rationale(tmp_path):
    rows = converted("web/next_event_ilora", tmp_path)
    title = "search_result.green_tea.product_title"
    assert f'It is the cheapest of the three\n{{"action": "click", "name": "{title}"}}' in told(rows)
    shown = "\n".join(row["prompt"][0]["content"] for row in rows)
    assert "\ntype nav_bar.search_input: green tea\n" in shown


def test_operas_prompts_show_the_address_and_the_page_cut_to_a_stated_length(tmp_path):
    pages = shown_pages(converted("web/next_event_ilora", tmp_path), "url")
    short = {page for page in pages if not page.endswith("...")}
    assert 'url: https://shop.example/s?k=tea\npage: ‹html> ‹body>‹div name="search_result">Green tea‹/div>' in next(
        page for page in short if "k=tea" in page
    )
    assert any(page.endswith("‹/html>") for page in short)  # whole
    long = pages - short
    assert {PAGE - 20 < len(page) <= PAGE for page in long} == {True}  # cut at a space
    assert f"{PAGE:,} characters" in recipe_text("web/next_event_ilora").replace("\n# ", " ")


def test_shop_r1s_answers_and_contexts(tmp_path):
    rows = converted("web/shop_r1_next_event_ilora", tmp_path)
    assert 'Brass goes with the desk.\n{"action": "click", "name": "search_results.brass_lamp"}' in told(rows)
    assert 'They have none.\n{"action": "terminate"}' in told(rows)
    shown = "\n".join(row["prompt"][0]["content"] for row in rows)
    assert "\ntype and submit search_input: desk lamp\n" in shown
    pages = shown_pages(rows, "context")
    assert "context: ‹html>desk lamp: 3 results‹/html>" in pages
    assert {PAGE - 20 < len(page) <= PAGE for page in pages if page.endswith("...")} == {True}
    assert f"{PAGE:,} characters" in recipe_text("web/shop_r1_next_event_ilora").replace("\n# ", " ")


def recipe_text(name: str) -> str:
    from recllm import assets

    return assets.find("recipes", name).read_text(encoding="utf-8")


def test_pages_are_asked_about_in_the_words_of_events():
    """The two templates differ in how much they show of the context, and in nothing else."""
    plain, cut = (load_template(f"next_event/{name}", "next_event") for name in ("events", "pages"))
    shorter = f"{{{{ context | truncate({PAGE}, leeway=0) }}}}"
    assert [one.user.replace("{{ context }}", shorter) for one in plain.phrasings] == [
        one.user for one in cut.phrasings
    ]


def plain_log(path: Path) -> Path:
    """What README asks of an event log: user_id, session_id, event and timestamp, and nothing else."""
    full = path.with_name("full.csv")
    ecommerce(full)
    with full.open(encoding="utf-8") as old, path.open("w", newline="", encoding="utf-8") as new:
        writer = csv.DictWriter(new, ["user_id", "session_id", "event", "timestamp"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(csv.DictReader(old))
    return path


def test_a_log_of_four_columns_needs_two_overrides_of_the_shop_recipe(tmp_path, monkeypatch, capsys):
    """README's second main job, as a command line."""
    from recllm.cli import main

    plain_log(tmp_path / "events.csv")
    monkeypatch.chdir(tmp_path)
    command = ["convert", "ecommerce/action_ilora", "data.interactions.path=events.csv", "model.name_or_path=none"]
    assert main([*command, "output_dir=without"]) != 0  # the recipe reads three columns more
    assert 'no column "platform" for platform' in capsys.readouterr().err
    assert main([*command, "actions.attributes=[]", "actions.observed=[]", "output_dir=run"]) == 0
    dataset = Dataset.open(tmp_path / "run" / "dataset")
    assert dataset.manifest["counts"]["interactions"] == USERS * SESSIONS * EVENTS
    prompts = [row["prompt"][0]["content"] for row in dataset.examples("test").to_pylist()]
    assert prompts
    assert any("\nhome page\nhome page\n" in text for text in prompts)  # action words alone
    assert not any(name in text for text in prompts for name in ("platform", "acquisition", "lifecycle"))


def test_social_prompts_show_the_thread_and_the_persona(tmp_path):
    recipe = load_recipe("social/action_ilora", [*social(tmp_path / "e.jsonl"), "model.name_or_path=none"])
    text = preview(recipe, 3)
    assert ": a sailor of 20\n\n" in text
    assert "\nthread: What of " in text
    assert "? I wonder.\n" in text  # on one line
    assert "So do I!" not in text


def test_rating_bands_are_actions(make_recipe, tmp_path):
    """The ratings of conftest's log are 1 to 5."""
    recipe = make_recipe(
        filter={"rating_bands": {"low": 1, "middle": 3, "high": 4}},
        actions={"words": {"low": "1 or 2 stars", "middle": "3 stars", "high": "4 or 5 stars"}, "session_gap_s": 1500},
        tasks=[{"task": "action_on_item", "template": "action_on_item/items"}],
    )
    convert(recipe, tmp_path / "dataset", workers=1)
    dataset = Dataset.open(tmp_path / "dataset")
    log = pl.read_csv(tmp_path / "log.csv").sort("user_id", "timestamp")
    band = {1: "low", 2: "low", 3: "middle", 4: "high", 5: "high"}
    rated = {(user, item): band[rating] for user, item, _, rating in log.iter_rows()}
    users, ids = dataset.sequences.user_ids.to_pylist(), dataset.items["item_id"].to_pylist()
    for split in schema.SPLITS:
        for row in dataset.examples(split).to_pylist():
            assert row["label"] == rated[users[row["user_index"]], ids[row["target"]]]
            assert row["completion"][0]["content"] == recipe.actions.words[row["label"]]


def test_a_rating_below_all_bands_is_an_error_unless_dropped(make_recipe, tmp_path):
    from recllm.errors import UserError

    actions = {"words": {"middle": "3 stars", "high": "4 or 5 stars"}}
    tasks = [{"task": "action_on_item", "template": "action_on_item/items"}]
    shape = {"filter": {"rating_bands": {"middle": 3, "high": 4}}, "tasks": tasks}
    with pytest.raises(UserError, match=r"\d+ events have no rating in any band.*drop_unknown"):
        convert(make_recipe(actions=actions, **shape), tmp_path / "dataset")
    manifest = convert(make_recipe(actions={**actions, "drop_unknown": True}, **shape), tmp_path / "dataset", workers=1)
    kept = pl.read_csv(tmp_path / "log.csv").filter(pl.col("rating") >= 3).height
    assert manifest["counts"]["after_unknown_actions"] == kept


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"rating_bands": {"high": 4, "low": 1}}, "lowest band first"),
        ({"rating_bands": {"a": 1}}, "give two or more"),
        ({"rating_bands": {"a": 1, "b": 1}}, "lowest band first"),
        ({"rating_bands": {"a": 1, "b": 2}, "like_at": 4}, "take one of them"),
    ],
)
def test_bands_that_do_not_fit(make_recipe, filters, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(filter=filters)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "files", "counts"),
    [
        ("ecommerce/action_ilora", ["ecom-events/ecom.csv.gz"], {"interactions": 31_106, "users": 600, "items": 0}),
        ("otto/action_on_item_ilora", ["otto-sample/train.jsonl"], {"interactions": 862, "users": 20, "items": 510}),
        (
            "yoochoose/next_item_ilora",
            [f"yoochoose-100k/yoochoose-clicks-100k_{part}.txt" for part in ("train_full", "test")],
            {"interactions": 83_846, "items": 2_933},
        ),
    ],
)
def test_a_recipe_reads_the_real_log(shared_data, tmp_path, name, files, counts):
    paths = ", ".join(str(shared_data / file) for file in files)
    path = f"[{paths}]" if len(files) > 1 else paths
    recipe = load_recipe(name, [f"data.interactions.path={path}", "model.name_or_path=none"])
    manifest = convert(recipe, tmp_path / "dataset", workers=1)
    assert {key: manifest["counts"][key] for key in counts} == counts
    assert manifest["audit"]["shared_sessions"] == 0
    assert manifest["audit"]["train_histories_with_test_targets"] == 0


@pytest.mark.shared
def test_the_shares_that_the_outcome_recipe_tells_are_those_of_its_log(shared_data, tmp_path):
    """Sessions with a purchase among all, and the answers yes among those that are asked about."""
    name, path = "ecommerce/outcome_ilora", str(shared_data / "ecom-events" / "ecom.csv.gz")
    recipe = load_recipe(name, [f"data.interactions.path={path}", "model.name_or_path=none"])
    targets = convert(recipe, tmp_path / "dataset", workers=1)["actions"]["targets"]
    bought = pl.read_csv(path).group_by("user_id", "session_id").agg((pl.col("event") == "purchase").any())
    text = recipe_text(name).replace("\n# ", " ")
    assert f"Of its {bought.height:,} sessions {bought['event'].mean():.1%} hold a purchase." in text
    share = {split: found["yes"] / sum(found.values()) for split, found in targets.items()}
    assert f"{share['train/outcome']:.1%} of training and {share['test/outcome']:.1%} of test come to one" in text
