"""Logs of events through the whole of convert: files, manifest, summary, preview, and recipes that do not fit."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from recllm import schema
from recllm.convert import pipeline
from recllm.convert.pipeline import convert
from recllm.convert.preview import preview
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.recipe import Recipe

ACTIONS = {"view": "look at", "cart": "put into the cart", "buy": "buy"}
NEXT_ACTION = {"task": "next_action", "template": "next_action/events"}
OUTCOME = {"task": "outcome", "template": "outcome/sessions", "positive": ["buy"], "after": 2}
TASKS = [
    NEXT_ACTION,
    {"task": "next_event", "template": "next_event/events", "fields": {"typed": "text", "item": "item"}},
    OUTCOME,
    {"task": "action_on_item", "template": "action_on_item/items"},
    {"task": "next_item", "template": "next_item/sessions", "within_session": True},
]


def write_log(path: Path, items: bool = True, last: str = "view") -> None:
    """40 users with a few sessions each, hour by hour; the last session of each ends with `last`."""
    generator = np.random.default_rng(11)
    lines = ["user_id,session_id,timestamp,action,text" + ",item_id" * items]
    for user in range(40):
        for session in range(5):
            length = int(generator.integers(1, 9)) if session < 4 else 4
            for step in range(length):
                action = generator.choice(["view", "cart", "buy"], p=[0.7, 0.2, 0.1])
                if session == 4:
                    action = last if step == 3 else "view"
                text = f"words {step}" if action == "view" else ""
                item = "" if action == "buy" or not items else f",i{generator.integers(30)}"
                time = 100_000 * session + 1000 * user + 60 * step
                lines.append(f"u{user},s{session},{time},{action},{text}{item}" + "," * (items and not item))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def make_event_recipe(tmp_path):
    """A recipe over a generated log of events without a file of items; keywords replace sections."""
    write_log(tmp_path / "events.csv")

    def make(**sections: object) -> Recipe:
        document: dict = {
            "name": "events",
            "data": {"interactions": {"path": str(tmp_path / "events.csv")}},
            "actions": {"words": ACTIONS, "without_item": ["buy"], "attributes": ["text"]},
            "protocol": {
                "name": "p",
                "split": {
                    "method": "temporal",
                    "whole_sessions": True,
                    "valid_fraction": 0.2,
                    "test_fraction": 0.2,
                    "targets": "all",
                },
                "candidates": {"count": 5},
            },
            "prompt": {"max_items": 4},
            "tasks": TASKS,
            "model": {"name_or_path": "none"},
        }
        return Recipe.model_validate({**document, **sections})

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read(folder: Path, split: str) -> list[dict]:
    return pa.concat_tables([pq.read_table(path) for path in sorted((folder / split).iterdir())]).to_pylist()


def test_a_dataset_of_events(make_event_recipe, tmp_path, capsys):
    manifest = convert(make_event_recipe(), tmp_path / "dataset", workers=1)
    assert manifest["events"] is True
    entry = manifest["actions"]
    assert (entry["labels"], entry["words"]) == (list(ACTIONS), ACTIONS)
    for split in schema.SPLITS:
        rows = read(tmp_path / "dataset", split)
        assert pq.read_schema(tmp_path / "dataset" / split / "part-00000.parquet") == schema.EXAMPLES
        for task in ("next_action", "next_event", "outcome", "action_on_item"):
            found = Counter(row["label"] for row in rows if row["task"] == task)
            counted = entry["targets"][f"{split}/{task}"]
            assert found == Counter({label: count for label, count in counted.items() if count})
            assert list(counted) == (["yes", "no"] if task == "outcome" else list(ACTIONS))
        assert entry["sessions"][split] >= len({(row["user_index"], row["session"]) for row in rows})
    assert "test/next_item" not in entry["targets"]
    shown = capsys.readouterr().out
    assert f"  sessions: {entry['sessions']['all']}, with positions of train" in shown
    assert "  classes, test/outcome: no " in shown
    assert "sessions of one event" in shown


def test_counts_agree_with_the_log(make_event_recipe, tmp_path):
    manifest = convert(make_event_recipe(), tmp_path / "dataset", workers=1)
    dataset = Dataset.open(tmp_path / "dataset")
    sequences, entry = dataset.sequences, manifest["actions"]
    assert (dataset.is_events, dataset.actions, dataset.words) == (True, list(ACTIONS), list(ACTIONS.values()))
    assert entry["events_without_item"] == int((sequences.items == schema.NO_ITEM).sum()) > 0
    owners = np.repeat(np.arange(sequences.num_users), np.diff(sequences.offsets))
    sessions = list(zip(owners.tolist(), sequences.sessions.tolist()))
    assert entry["sessions"]["all"] == len(set(sessions))
    lengths = Counter(sessions)
    for split, code in schema.SPLIT_CODES.items():
        of_split = {session for session, found in zip(sessions, sequences.splits) if found == code}
        assert entry["sessions"][split] == len(of_split)
        single = sum(lengths[session] == 1 for session in of_split)
        assert entry["left_out"].get(f"{split}/next_action", {}).get("sessions_of_one_event", 0) == single
        reasons = entry["left_out"].get(f"{split}/outcome", {})
        assert sum(reasons.values()) + sum(entry["targets"][f"{split}/outcome"].values()) == len(of_split)


def test_bytes_do_not_depend_on_the_number_of_workers(make_event_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "SHARD_POSITIONS", 60)
    convert(make_event_recipe(), tmp_path / "one", workers=1)
    convert(make_event_recipe(), tmp_path / "three", workers=3)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_a_log_without_items(make_event_recipe, tmp_path):
    write_log(tmp_path / "events.csv", items=False)
    actions = {"words": ACTIONS, "without_item": "*", "attributes": ["text"]}
    manifest = convert(
        make_event_recipe(actions=actions, tasks=[NEXT_ACTION, OUTCOME]), tmp_path / "dataset", workers=1
    )
    assert manifest["counts"]["items"] == 0
    assert pq.read_table(tmp_path / "dataset" / "items.parquet").schema.names == [*schema.ITEMS.names, "text"]
    assert manifest["actions"]["events_without_item"] == manifest["counts"]["interactions"]
    assert Dataset.open(tmp_path / "dataset").num_items == 0
    with pytest.raises(UserError, match=r"task next_item asks about items and no event has one"):
        convert(make_event_recipe(actions=actions, tasks=[TASKS[-1]]), tmp_path / "dataset")


def test_items_that_users_had_are_no_candidates(make_event_recipe, tmp_path):
    """Counted without the events that have no item: -1 is none of the 30."""
    convert(make_event_recipe(), tmp_path / "dataset", workers=1)
    items = pq.read_table(tmp_path / "dataset" / "sequences.parquet")["items"].to_pylist()
    had = max(len({item for item in row if item >= 0}) for row in items)
    assert any(-1 in row and len(set(row)) == had + 1 for row in items)
    protocol = make_event_recipe().protocol.model_dump()
    convert(make_event_recipe(protocol={**protocol, "candidates": {"count": 30 - had + 1}}), tmp_path / "dataset")
    message = rf"had {had} of the 30 items, which leaves {30 - had} for the {31 - had} other"
    with pytest.raises(UserError, match=message):
        convert(make_event_recipe(protocol={**protocol, "candidates": {"count": 30 - had + 2}}), tmp_path / "dataset")


def test_a_class_that_a_split_lacks_is_warned_about(make_event_recipe, tmp_path, capsys):
    split = {
        "method": "temporal",
        "whole_sessions": True,
        "test_fraction": 0.17,
        "targets": "all",
    }  # last sessions only
    recipe = make_event_recipe(tasks=[NEXT_ACTION, OUTCOME], protocol={"name": "p", "split": split})
    manifest = convert(recipe, tmp_path / "dataset", workers=1)
    assert manifest["actions"]["targets"]["test/next_action"]["buy"] == 0
    shown = capsys.readouterr().out
    assert "warning: test/next_action has no example of cart, buy: it has no recall and no F1 there" in shown
    assert "warning: test/outcome has no example of yes: it has no recall and no F1 there" in shown
    assert "train/next_action has no example" not in shown


def test_rationales_that_are_missing_are_counted(make_event_recipe, tmp_path, capsys):
    """Left out of training; in valid and test they stay."""
    plain = convert(make_event_recipe(tasks=[NEXT_ACTION]), tmp_path / "plain", workers=1)["counts"]["examples"]
    manifest = convert(make_event_recipe(tasks=[{**NEXT_ACTION, "rationale": "text"}]), tmp_path / "dataset", workers=1)
    found = {split: read(tmp_path / "dataset", split) for split in schema.SPLITS}
    missing = {split: sum(row["rationale"] is None for row in rows) for split, rows in found.items()}
    assert missing["train"] == 0 < missing["valid"] < len(found["valid"])
    counted, shown = manifest["actions"]["without_rationale"], capsys.readouterr().out
    left_out = plain["train/next_action"] - len(found["train"])
    assert counted["train/next_action"] == left_out > 0
    assert f"warning: train/next_action: {left_out} examples have no rationale in the log and are left out\n" in shown
    for split in ("valid", "test"):
        assert len(found[split]) == plain[f"{split}/next_action"]
        assert counted[f"{split}/next_action"] == missing[split]
    assert f"warning: valid/next_action: {missing['valid']} examples have no rationale in the log: their" in shown


def test_no_rationale_at_all_leaves_nothing_to_train_on(make_event_recipe, tmp_path):
    log = tmp_path / "events.csv"
    make_event_recipe()
    log.write_text(re.sub(r"words \d", "", log.read_text()))
    count = convert(make_event_recipe(tasks=[NEXT_ACTION]), tmp_path / "plain", workers=1)["counts"]["examples"]
    message = (
        rf"split train has no example of the task next_action.*and {count['train/next_action']} were left out because "
        r'the log has no "text" of them, their rationale.*leave the task.s rationale out'
    )
    with pytest.raises(UserError, match=message):
        convert(make_event_recipe(tasks=[{**NEXT_ACTION, "rationale": "text"}]), tmp_path / "dataset", workers=1)


def test_the_manifest_of_a_dataset_names_the_actions_it_read(make_event_recipe, tmp_path):
    manifest = convert(make_event_recipe(), tmp_path / "dataset", workers=1)
    assert manifest["recipe"]["actions"]["words"] == ACTIONS
    assert manifest["counts"]["examples"]["test/next_action"] > 0


def test_preview_shows_events(make_event_recipe):
    text = preview(make_event_recipe(), 1)
    for name in ("next_action", "next_event", "outcome", "action_on_item", "next_item"):
        assert f"=== train {name}/" in text
        assert f"=== test {name}/" in text
    assert "[session] number 0 of the user, from 0" in text
    assert "earlier events (at most history.max_items)" in text
    assert '{"action": "look at", "typed": "words ' in text


def test_next_item_within_the_sessions_of_a_plain_log(make_recipe, tmp_path):
    lines = (tmp_path / "log.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    sessions = [f"{','.join(row)},{int(row[2]) // 4000}" for row in rows]
    (tmp_path / "log.csv").write_text("\n".join([lines[0] + ",session_id", *sessions]) + "\n")
    tasks = [{"task": "next_item", "template": "next_item/sessions", "within_session": True}]
    manifest = convert(make_recipe(tasks=tasks), tmp_path / "dataset", workers=1)
    assert (manifest["events"], manifest["actions"]) == (False, None)
    for row in read(tmp_path / "dataset", "train"):
        assert row["history_end"] % 4 in (1, 2, 3)
        assert row["session"] == row["history_end"] // 4
        assert sum(line.startswith("Title ") for line in row["prompt"][0]["content"].splitlines()) == min(
            row["history_end"] % 4, 3
        )


def test_sessions_are_asked_for_and_not_there(make_recipe, tmp_path):
    tasks = [{"task": "next_item", "template": "next_item/sessions", "within_session": True}]
    with pytest.raises(
        UserError, match=r"task next_item asks within sessions.*data\.interactions\.columns\.session_id"
    ):
        convert(make_recipe(tasks=tasks), tmp_path / "dataset")


class TestMisfitsStopBeforeAnyDataIsRead:
    @pytest.fixture(autouse=True)
    def _no_data(self, monkeypatch):
        def fail(*_: object, **__: object) -> None:
            raise AssertionError("data was read first")

        monkeypatch.setattr(pipeline, "prepare", fail)

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({**OUTCOME, "positive": []}, r"positive=\[\]: name the actions.*view, cart, buy"),
            ({**OUTCOME, "positive": list(ACTIONS)}, "but not all"),
            ({**OUTCOME, "positive": ["bye"]}, '"bye" is no action, known are view, cart, buy'),
            ({**NEXT_ACTION, "positive": ["buy"]}, r"task next_action has positive=.*only outcome"),
            ({**NEXT_ACTION, "after": 5}, r"task next_action has after=5, which only outcome"),
            ({**NEXT_ACTION, "fields": {"text": "text"}}, r"has fields=.*only next_event"),
            ({**TASKS[1], "fields": {"text": "txet"}}, r'text names "txet", actions.attributes has text, page'),
            ({**TASKS[1], "fields": {"action": "text"}}, '"action" is no key of a further field'),
            ({**TASKS[1], "fields": {" ": "text"}}, '" " is no key'),
            ({**TASKS[1], "fields": {"page": "page"}}, r'asks for "page", which prompts show.*actions.observed'),
            ({**NEXT_ACTION, "rationale": "why"}, r'rationale=\'why\' names "why", actions.attributes has text, page'),
            ({**NEXT_ACTION, "rationale": "page"}, r'asks for "page", which prompts show'),
            ({**TASKS[1], "rationale": "text"}, "fields asks for it too"),
            ({**TASKS[-1], "rationale": "text"}, r"task next_item has rationale='text', which next_action"),
            ({"task": "like", "template": "like/items", "within_session": True}, "within_session=True: next_item,"),
        ],
    )  # fmt: skip
    def test_of_tasks(self, make_event_recipe, tmp_path, entry, message):
        actions = {"words": ACTIONS, "attributes": ["text", "page"], "observed": ["page"]}
        with pytest.raises(UserError, match=message):
            convert(make_event_recipe(tasks=[entry], actions=actions), tmp_path / "dataset")

    @pytest.mark.parametrize("entry", TASKS[:4], ids=lambda entry: entry["task"])
    def test_actions_without_the_section(self, make_recipe, tmp_path, entry):
        with pytest.raises(UserError, match=rf"the task {entry['task']} asks about actions, and the recipe has none"):
            convert(make_recipe(tasks=[entry]), tmp_path / "dataset")

    def test_one_outcome_a_session_needs_all_its_positions(self, make_event_recipe, tmp_path):
        protocol = {"name": "p", "split": {"method": "temporal", "targets": "first"}}
        with pytest.raises(UserError, match=r"protocol\.split\.targets is first: set it to all"):
            convert(make_event_recipe(tasks=[OUTCOME], protocol=protocol), tmp_path / "dataset")

    @pytest.mark.parametrize("entry", [TASKS[0], TASKS[1], TASKS[-1]], ids=lambda entry: entry["task"])
    @pytest.mark.parametrize("split", [{"whole_sessions": True}, {"method": "session_holdout"}])
    def test_the_first_held_out_position_is_none_within_its_session(self, make_event_recipe, tmp_path, entry, split):
        protocol = {"name": "p", "split": {"targets": "first", **split}, "candidates": {"count": 5}}
        message = rf"the task {entry['task']} asks within sessions.*protocol\.split\.targets is first.*set it to all"
        with pytest.raises(UserError, match=message):
            convert(make_event_recipe(tasks=[entry], protocol=protocol), tmp_path / "dataset")
        for allowed in ({**split, "targets": "last"}, {"targets": "first"}):
            protocol = {"name": "p", "split": allowed, "candidates": {"count": 5}}
            with pytest.raises(AssertionError, match="data was read first"):
                convert(make_event_recipe(tasks=[entry], protocol=protocol), tmp_path / "dataset")
        recipe = make_event_recipe(tasks=[TASKS[3]], protocol={"name": "p", "split": {"targets": "first", **split}})
        with pytest.raises(AssertionError, match="data was read first"):  # asks about sessions' first events too
            convert(recipe, tmp_path / "dataset")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{{ acton }}", r'prompt.event: "acton" is no variable of events. did you mean "action"'),
            ("{{ action", "prompt.event, line 1"),
            ("{{ title }}", r"Known: action, item, pause_s, text"),
        ],
    )
    def test_of_the_line(self, make_event_recipe, tmp_path, line, message):
        with pytest.raises(UserError, match=message):
            convert(make_event_recipe(prompt={"event": line}), tmp_path / "dataset")

    def test_a_line_without_events(self, make_recipe, tmp_path):
        with pytest.raises(UserError, match=r"prompt\.event is .*has no events: add `actions`"):
            convert(make_recipe(prompt={"event": "{{ action }}!"}), tmp_path / "dataset")

    def test_words_that_are_control_tokens(self, make_event_recipe, tmp_path):
        actions = {"words": {**ACTIONS, "buy": "<|buy|>"}}
        with pytest.raises(UserError, match=r'"<\|buy\|>" of the action "buy" holds what chat formats'):
            convert(make_event_recipe(actions=actions, tasks=[NEXT_ACTION]), tmp_path / "dataset")

    @pytest.mark.parametrize("answers", ["", "answers: {yes: a, no: b}\n", 'answers: {"yes": a, maybe: b}\n'])
    def test_an_outcome_is_yes_or_no(self, make_event_recipe, tmp_path, answers):
        path = tmp_path / "mine.yaml"
        path.write_text(f"id: mine@1\ntask: outcome\n{answers}phrasings: [{{user: '{{{{ events }}}}'}}]\n")
        with pytest.raises(UserError, match="answers"):
            convert(make_event_recipe(tasks=[{**OUTCOME, "template": str(path)}]), tmp_path / "dataset")


def test_a_graph_starts_from_the_newest_items_whatever_happens_between(make_event_recipe, tmp_path, tiny_tokenizer):
    """Each item has a maker of its own; the prompts name those of the newest two items before the target's second."""
    (tmp_path / "kg.csv").write_text("head,relation,tail\n" + "".join(f"e{n},made by,maker-{n}.\n" for n in range(30)))
    (tmp_path / "links.csv").write_text("item_id,entity_id\n" + "".join(f"i{n},e{n}\n" for n in range(30)))
    template = tmp_path / "mine.yaml"
    template.write_text("id: mine@1\ntask: next_action\nphrasings: [{user: '{{ graph }}'}]\n")
    graph = {
        "triples": {"path": str(tmp_path / "kg.csv")},
        "links": {"path": str(tmp_path / "links.csv")},
        "retrieval": {"method": "khop", "hops": 1, "max_items": 2},
        "budget": 2000,
    }
    recipe = make_event_recipe(graph=graph, tasks=[{"task": "next_action", "template": str(template)}])
    convert(recipe, tmp_path / "dataset", workers=1, tokenizer=tiny_tokenizer.backend_tokenizer.to_str())
    dataset = Dataset.open(tmp_path / "dataset")
    ids, checked = dataset.items["item_id"].to_pylist(), 0
    for row in read(tmp_path / "dataset", "train"):
        items = dataset.history(row["user_index"], row["history_end"], 2)
        expected = {f"maker-{ids[item][1:]}." for item in items}
        assert set(re.findall(r"maker-\d+\.", row["prompt"][0]["content"])) == expected
        checked += len(expected)
    assert checked > 100


MILLION, SHOWN, READ = 1_000_000, 4, 200  # events of one session, prompt.max_items, history.max_items
CONVERT_AND_TELL = """
import re, sys
from pathlib import Path
from recllm.convert.pipeline import convert
from recllm.recipe import load_recipe

convert(load_recipe(sys.argv[1]), Path(sys.argv[2]), workers=1)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(f"peak_mib {int(peak[1]) / 1024}")
"""  # of this process alone: ru_maxrss of a child begins with what its parent held when it was started


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_one_session_of_a_million_events_is_converted_in_windows(tmp_path):
    """Every prompt shows the last events of the session, and memory does not grow with what they could have shown."""
    labels = list(ACTIONS)
    codes = np.random.default_rng(0).integers(len(labels), size=MILLION)
    columns = {
        "user_id": pa.array(["u"]).take(pa.array(np.zeros(MILLION, np.int64))),
        "session_id": pa.array(["s"]).take(pa.array(np.zeros(MILLION, np.int64))),
        "timestamp": pa.array(np.arange(MILLION)),
        "action": pa.array(labels).take(pa.array(codes)),
    }
    pq.write_table(pa.table(columns), tmp_path / "events.parquet")
    (tmp_path / "mine.yaml").write_text("id: mine@1\ntask: next_action\nphrasings: [{user: '{{ events }}'}]\n")
    document = {
        "name": "long",
        "data": {"interactions": {"path": str(tmp_path / "events.parquet")}},
        "actions": {"words": ACTIONS, "without_item": "*"},
        "protocol": {"name": "p", "split": {"method": "temporal", "targets": "all"}},
        "history": {"max_items": READ},
        "prompt": {"max_items": SHOWN, "event": "{{ action }}"},
        "tasks": [{"task": "next_action", "template": str(tmp_path / "mine.yaml")}],
        "model": {"name_or_path": "none"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    command = [sys.executable, "-c", CONVERT_AND_TELL, str(tmp_path / "recipe.yaml"), str(tmp_path / "dataset")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1].removeprefix("peak_mib ")) < 1536
    counts = json.loads((tmp_path / "dataset" / "manifest.json").read_text())["counts"]
    of_split = {"train": MILLION * 8 // 10 - 1, "valid": MILLION // 10, "test": MILLION // 10}  # the first is not asked
    assert counts["examples"] == {f"{split}/next_action": count for split, count in of_split.items()}
    dataset, begin, words = Dataset.open(tmp_path / "dataset"), 1, list(ACTIONS.values())
    for split, count in of_split.items():
        asked, last = 0, None
        for batch in dataset.example_batches(split, ["history_end", "gate_end", "prompt", "completion"]):
            ends = batch["history_end"].to_numpy()
            assert (ends == np.arange(begin + asked, begin + asked + len(ends))).all()
            assert batch["gate_end"].equals(batch["history_end"])
            prompts = pc.struct_field(batch["prompt"].flatten(), "content")
            lines = pc.add(pc.count_substring(prompts, "\n"), 1).to_numpy(zero_copy_only=False)
            assert (lines == np.minimum(ends, SHOWN)).all()
            asked, last = asked + len(ends), batch.slice(len(ends) - 1).to_pylist()[0]
        begin += asked
        assert (asked, last["history_end"]) == (count, begin - 1)
        said = [words[code] for code in codes[begin - 1 - SHOWN : begin]]
        assert last["prompt"][0]["content"].split("\n") == said[:-1]
        assert last["completion"][0]["content"] == said[-1]
    last = MILLION - 1  # of which the gate reads the last READ before it: without items, codes of events are actions
    assert dataset.read(0, last, READ).tolist() == codes[last - READ : last].tolist()
