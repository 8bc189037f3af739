import dataclasses
import itertools
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm import schema
from recllm.convert import examples as examples_module
from recllm.convert.examples import OUTPUT, convert_batch
from recllm.schema import TEST, TRAIN, VALID

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "convert_prompts.txt"
TASKS = [
    {"task": "next_item", "template": "next_item/films"},
    {"task": "next_item", "template": "next_item/items", "dense_window": 4},
    {"task": "next_item_among", "template": "next_item_among/items"},
    {"task": "like", "template": "like/items"},
]


def content(messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def one_user(make_batch) -> pa.RecordBatch:
    codes = [TRAIN] * 5 + [VALID, TEST]
    labels = ["like", "dislike", "like", "like", "dislike", "like", "dislike"]
    return make_batch({"anna": [(10 + n, 100 * n, code, labels[n]) for n, code in enumerate(codes)]})


def test_columns_are_those_of_the_schema(make_batch, make_converter):
    examples = convert_batch(one_user(make_batch), make_converter())
    assert examples.schema == OUTPUT
    assert examples.select(schema.EXAMPLES.names).schema == schema.EXAMPLES
    assert examples.column("split").to_pylist() == ["train"] * 4 + ["valid", "test"]
    assert examples.column("example_id").to_pylist() == [f"next_item/anna/{position}" for position in range(1, 7)]
    examples.validate(full=True)


def test_ordinary_next_item(make_batch, make_converter):
    example = convert_batch(one_user(make_batch), make_converter()).to_pylist()[-1]
    ((role, text),) = content(example["prompt"])
    assert role == "user"
    assert "\nItem 13\nItem 14\nItem 15\n" in text  # the last prompt.max_items=3, oldest first
    assert "Item 12" not in text
    assert "Item 16" not in text
    assert content(example["completion"]) == [("assistant", "Item 16")]
    assert (example["target"], example["history_end"], example["timestamp"]) == (16, 6, 600)
    (*_, before) = convert_batch(one_user(make_batch), make_converter(before_list=True)).to_pylist()
    assert example["gate_end"] == before["gate_end"] == 6  # nothing continues a list here
    assert example["label"] is None
    assert sorted(set(example["candidates"])) == sorted(example["candidates"])
    assert 16 in example["candidates"]
    assert not set(example["candidates"]) & set(range(10, 16))


def test_dense_windows_and_their_continuation(make_batch, make_converter):
    converter = make_converter(dense_window=3)
    old, new, valid, test = convert_batch(one_user(make_batch), converter).to_pylist()
    assert content(old["completion"]) == [("assistant", "Item 10\nItem 11\n")]
    assert (old["history_end"], old["target"], old["timestamp"], old["candidates"]) == (0, 11, 0, None)
    assert [role for role, _ in content(old["prompt"])] == ["user"]
    assert "Item" not in content(old["prompt"])[0][1]
    assert content(new["completion"]) == [("assistant", "Item 12\nItem 13\nItem 14\n")]
    assert (new["history_end"], new["target"], new["timestamp"]) == (2, 14, 200)
    assert content(valid["prompt"])[1:] == [("assistant", "Item 12\nItem 13\nItem 14\n")]
    assert content(valid["completion"]) == [("assistant", "Item 15\n")]
    assert content(test["prompt"])[1:] == [("assistant", "Item 13\nItem 14\nItem 15\n")]
    assert (test["history_end"], test["target"]) == (6, 16)
    assert all(example["gate_end"] == example["history_end"] for example in (old, new, valid, test))
    before = convert_batch(one_user(make_batch), make_converter(dense_window=3, before_list=True)).to_pylist()
    assert [example["gate_end"] for example in before] == [0, 2, 2, 3]


def test_a_random_start_shows_the_first_titles_of_a_window_without_loss(make_batch, make_converter):
    """As a held-out example does: a list in the answer that the completion continues, and a gate that has read it."""
    users = {f"u{number}": [(item, item, TRAIN) for item in range(10, 14)] for number in range(40)}
    plain = convert_batch(make_batch(users), make_converter(dense_window=4)).to_pylist()
    found = convert_batch(make_batch(users), make_converter(dense_window=4, dense_start="random")).to_pylist()
    assert len(found) == len(plain) == 40
    starts = [example["history_end"] for example in found]
    assert set(starts) == {0, 1, 2, 3}
    for example, start in zip(found, starts):
        titles = [f"Item {item}\n" for item in range(10, 14)]
        assert content(example["prompt"])[1:] == ([("assistant", "".join(titles[:start]))] if start else [])
        assert content(example["completion"]) == [("assistant", "".join(titles[start:]))]
        assert (example["gate_end"], example["target"]) == (start, 13)
        assert example["timestamp"] == 10 + start
    again = convert_batch(make_batch(users), make_converter(dense_window=4, dense_start="random")).to_pylist()
    assert again == found


def test_dense_prompt_without_history_is_the_instruction_alone(make_batch, make_converter):
    batch = make_batch({"new": [(1, 5, TEST)], "old": [(2, 5, TRAIN), (3, 6, TEST)]})
    alone, continued = convert_batch(batch, make_converter(dense_window=3)).to_pylist()
    assert [role for role, _ in content(alone["prompt"])] == ["user"]
    assert [role for role, _ in content(continued["prompt"])] == ["user", "assistant"]


def test_among_lists_its_candidates_also_in_training(make_batch, make_converter):
    converter = make_converter("next_item_among", "next_item_among/items")
    for example in convert_batch(one_user(make_batch), converter).to_pylist():
        listed = "\n".join(f"Item {item}" for item in example["candidates"])
        assert f"\n{listed}\n" in example["prompt"][0]["content"]
        assert content(example["completion"]) == [("assistant", f"Item {example['target']}")]


def test_like_asks_about_the_target_and_answers_in_the_templates_words(make_batch, make_converter):
    examples = convert_batch(one_user(make_batch), make_converter("like", "like/items")).to_pylist()
    assert [example["label"] for example in examples] == ["dislike", "like", "like", "dislike", "like", "dislike"]
    assert [content(e["completion"]) for e in examples[:2]] == [[("assistant", "No")], [("assistant", "Yes")]]
    text = examples[-1]["prompt"][0]["content"]
    assert "Item 13: Yes\nItem 14: No\nItem 15: Yes\n" in text
    assert "Item 16" in text


def test_tasks_share_the_candidates_of_a_position(make_batch, make_converter):
    batch = one_user(make_batch)
    free = convert_batch(batch, make_converter())
    among = convert_batch(batch, make_converter("next_item_among", "next_item_among/items"))
    dense = convert_batch(batch, make_converter(dense_window=3))
    assert free.column("candidates").to_pylist()[-2:] == among.column("candidates").to_pylist()[-2:]
    assert free.column("candidates").to_pylist()[-2:] == dense.column("candidates").to_pylist()[-2:]


def test_system_messages_of_some_phrasings(make_batch, make_converter):
    converter = make_converter()
    task = converter.tasks[0]
    phrasings = [task.template.phrasings[0], task.template.phrasings[1].model_copy(update={"system": "Be brief."})]
    template = dataclasses.replace(task.template, phrasings=tuple(phrasings))
    converter = dataclasses.replace(converter, tasks=(dataclasses.replace(task, template=template),))
    users = {f"u{n}": [(1, 1, TRAIN), (2, 2, TRAIN), (3, 3, TEST)] for n in range(20)}
    seen = set()
    for example in convert_batch(make_batch(users), converter).to_pylist():
        roles = tuple(message["role"] for message in example["prompt"])
        begins = example["prompt"][-1]["content"].startswith("I watched")
        assert roles == (("user",) if begins else ("system", "user"))
        seen.add(roles)
    assert len(seen) == 2


def test_every_phrasing_is_used(many_users, make_converter):
    examples = convert_batch(many_users, make_converter())
    begins = {messages[0]["content"].split("\n")[0] for messages in examples.column("prompt").to_pylist()}
    assert len(begins) == 3


@pytest.mark.parametrize("task", [TASKS[0], TASKS[2]])
def test_what_users_had_is_gathered_once_a_batch(many_users, make_converter, monkeypatch, task):
    """A history is not looked at for every example: one user of 100,000 interactions would take hours."""
    converter, seen = make_converter(**task), []
    taken = type(converter.sampler).taken
    monkeypatch.setattr(examples_module, "PIECE", 20)
    monkeypatch.setattr(type(converter.sampler), "taken", lambda *a: seen.append(len(a[2])) or taken(*a))
    convert_batch(many_users, converter)
    assert seen == [pc.sum(pc.list_value_length(many_users.column("items"))).as_py()]


def test_text_about_the_user_stands_in_every_task(many_users, make_converter):
    told = many_users.append_column("user", pa.array([f"person {number}" for number in range(37)]))
    for task in TASKS:
        converter = make_converter(**task)
        with_user, without = (convert_batch(batch, converter).to_pylist() for batch in (told, many_users))
        for one, other in zip(with_user, without, strict=True):
            about, rest = one["prompt"][0]["content"].split("\n\n", 1)
            assert about.endswith(f": person {one['user_index']}")
            assert rest == other["prompt"][0]["content"]
            one["prompt"][0]["content"] = rest
            assert one == other


@pytest.mark.parametrize("parts", [3, 16])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task['task']}-{task.get('dense_window', 0)}")
def test_any_partition_of_the_users_gives_the_same_examples(many_users, make_converter, task, parts):
    converter = make_converter(**task, max_train_targets=6)
    whole = pa.Table.from_batches([convert_batch(many_users, converter)]).sort_by("example_id").to_pylist()
    cuts = np.linspace(0, many_users.num_rows, parts + 1).astype(int)
    batches = [many_users.slice(a, b - a) for a, b in itertools.pairwise(cuts)]
    pieces = [convert_batch(batch, converter) for batch in reversed(batches)]
    assert pa.Table.from_batches(pieces).sort_by("example_id").to_pylist() == whole
    assert len({example["example_id"] for example in whole}) == len(whole)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=25), min_size=1, max_size=4
    ),
    st.sampled_from([*TASKS, {"task": "next_item", "dense_window": 3, "dense_start": "random"}]),
    st.integers(0, 5),
    st.booleans(),
)
def test_no_gate_and_no_prompt_sees_a_target(make_batch, make_converter, users, task, shown, before_list):
    """Random roles and gaps in time, ties among them; titles are unique in a sequence, so text shows what is seen."""
    made = {}
    for number, events in enumerate(users):
        times = np.cumsum([gap for gap, _ in events]).tolist()
        made[f"u{number}"] = [(position, times[position], code, "like") for position, (_, code) in enumerate(events)]
    converter = make_converter(**task, prompt_max_items=shown, before_list=before_list)
    for example in convert_batch(make_batch(made), converter).to_pylist():
        events = made[f"u{example['user_index']}"]
        check_example(example, events, task, shown, before_list)
        for moved in (example["history_end"] - 1, example["history_end"] + 1):  # what the check is for, it catches
            if 0 <= moved <= len(events):
                with pytest.raises((AssertionError, IndexError)):
                    check_example({**example, "history_end": moved}, events, task, shown, before_list)
        with pytest.raises(AssertionError):
            check_example({**example, "gate_end": example["gate_end"] + 1}, events, task, shown, before_list)


def check_example(example: dict, events: list[tuple], task: dict, shown: int, before_list: bool) -> None:
    """One example against its user's raw sequence: all that the gate and the prompt read lies before the target."""
    begin, dense = example["history_end"], bool(task.get("dense_window"))
    titles = [f"Item {event[0]}" for event in events]
    completion = example["completion"][0]["content"].splitlines()
    targets = events[begin : begin + (len(completion) if dense else 1)]
    if task["task"] != "like":
        assert completion == titles[begin : begin + len(completion)]
    assert targets[-1][0] == example["target"]
    assert targets[0][1] == example["timestamp"]
    assert {code for _, _, code, _ in targets} == {schema.SPLIT_CODES[example["split"]]}
    assert all(time <= example["timestamp"] for _, time, *_ in events[:begin])
    text = "\n".join(message["content"] for message in example["prompt"])
    random = task.get("dense_start") == "random" and example["split"] == "train"
    if not random:
        continued = before_list and dense and example["split"] != "train"
        assert example["gate_end"] == (max(0, begin - shown) if continued else begin)
    if random:
        listed = [line for line in text.splitlines() if line.startswith("Item ")]
        assert listed == titles[begin - len(listed) : begin]
        assert len(listed) + len(completion) <= task["dense_window"]
        assert example["gate_end"] == (begin - len(listed) if before_list else begin)
    elif task["task"] == "next_item":
        expected = [] if dense and example["split"] == "train" else titles[max(0, begin - shown) : begin]
        assert [line for line in text.splitlines() if line.startswith("Item ")] == expected


def test_converter_travels_to_another_process(many_users, make_converter):
    converter = make_converter("next_item_among", "next_item_among/items")
    again = pickle.loads(pickle.dumps(converter))
    assert convert_batch(many_users, again).equals(convert_batch(many_users, converter))


def test_no_users_give_no_examples(many_users, make_converter):
    empty = convert_batch(many_users.slice(0, 0), make_converter())
    assert (empty.num_rows, empty.schema) == (0, OUTPUT)


def test_golden_prompts(make_batch, make_converter):
    """Written by hand once from the templates; a change of a template's text must raise its version."""
    blocks = []
    for task in TASKS:
        converter = make_converter(**task)
        example = convert_batch(one_user(make_batch), converter).to_pylist()[-1]
        template = converter.tasks[0].template
        lines = [f"##### {template.id} {example['example_id']}"]
        for message in example["prompt"] + example["completion"]:
            lines += [f"--- {message['role']}", message["content"]]
        blocks.append("\n".join(lines))
    assert "\n".join(blocks) + "\n" == GOLDEN.read_text(encoding="utf-8")
