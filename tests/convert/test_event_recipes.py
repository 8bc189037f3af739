"""The shipped recipes of logs of events, each on a small file of its own format."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recllm import schema
from recllm.convert.pipeline import convert
from recllm.convert.preview import preview
from recllm.data.dataset import Dataset
from recllm.recipe import load_recipe

START_S, DAY_S = 1_700_000_000, 86_400
USERS, SESSIONS, EVENTS = 12, 8, 6


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
    """The columns of OPeRA's action table that the recipe names, and some that it does not."""
    rows = []
    for user, session, seconds, place, number in visits():
        action = ("click", "input", "terminate")[number % 2 if place < EVENTS - 1 else 2]
        rows.append(
            {
                "session_id": f"{user}_{session}",
                "action_id": f"a{number}",
                "timestamp": iso(seconds),
                "action_type": action,
                "click_type": "product_link" if action == "click" else "",
                "semantic_id": "results.first" if action == "click" else "",
                "input_text": "rice cooker" if action == "input" else "",
                "url": f"https://shop.example/{number % 7}",
                "page_meta": '{"search_term": [{"term": ""}]}',
                "rationale": "It is cheap." if number % 3 == 0 else None,
            }
        )
    pl.DataFrame(rows).write_parquet(path)
    return [f"data.interactions.path={path}"]


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
    "social/action_ilora": ("events.jsonl", social),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reads_its_format(name, tmp_path):
    file, write = RECIPES[name]
    recipe = load_recipe(name, [*write(tmp_path / file), "model.name_or_path=none"])
    manifest = convert(recipe, tmp_path / "dataset", workers=1)
    assert manifest["counts"]["interactions"] == USERS * SESSIONS * EVENTS
    assert manifest["audit"]["shared_sessions"] == 0
    dataset = Dataset.open(tmp_path / "dataset")
    assert dataset.is_events == (recipe.actions is not None)
    for split in schema.SPLITS:
        table = dataset.examples(split)
        assert table.num_rows > 0
        assert table["session"].null_count == 0
    if dataset.is_events:
        assert manifest["actions"]["sessions"]["all"] == USERS * SESSIONS


def test_web_answers_are_whole_events_behind_a_rationale(tmp_path):
    text = preview(load_recipe("web/next_event_ilora", [*web(tmp_path / "a.parquet"), "model.name_or_path=none"]), 9)
    assert '\nIt is cheap.\n{"action": "click", "name": "results.first"}\n' in text
    assert '{"action": "type", "text": "rice cooker"}' in text
    assert "\ntype: rice cooker\n" in text
    assert "\npage: https://shop.example/" in text


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
