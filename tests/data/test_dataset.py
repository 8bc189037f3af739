import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recllm import schema
from recllm.data.dataset import Dataset
from recllm.errors import UserError

ITEM_IDS = ["a", "b", "c", "d"]


def sequences_table(items=((0, 1, 2), (3,), (2, 2))):
    users = len(items)
    return pa.table(
        {
            "user_index": pa.array(range(users), pa.int32()),
            "user_id": [f"u{user}" for user in range(users)],
            "user_key": pa.array(range(10, 10 + users), pa.uint64()),
            "items": pa.array([list(row) for row in items], pa.list_(pa.int32())),
            "timestamps": pa.array([list(range(5, 5 + len(row))) for row in items], pa.list_(pa.int64())),
            "splits": pa.array([[schema.TRAIN] * len(row) for row in items], pa.list_(pa.int8())),
            "actions": pa.nulls(users, pa.list_(pa.string())),
            "sessions": pa.nulls(users, pa.list_(pa.int32())),
        },
        schema=schema.SEQUENCES,
    )


def example(user, target, candidates=None):
    message = [{"role": "user", "content": "x"}]
    return {
        "example_id": f"next_item/u{user}/1", "task": "next_item", "user_index": user, "history_end": 1, "gate_end": 1,
        "timestamp": 6,
        "prompt": message, "completion": message, "target": target, "candidates": candidates, "label": None,
    }  # fmt: skip


def examples_table(*rows):
    return pa.Table.from_pylist(list(rows), schema=schema.EXAMPLES)


@pytest.fixture
def folder(tmp_path):
    items = pa.table(
        {
            "item_index": pa.array(range(4), pa.int32()),
            "item_id": ITEM_IDS,
            "title": ["A", "B", "C", "D"],
            "text": ["A (1990)", "B (1991)", "C (1992)", "D (1993)"],
        }
    )
    pq.write_table(items, tmp_path / "items.parquet")
    pq.write_table(sequences_table(), tmp_path / "sequences.parquet", row_group_size=2)
    for split, rows in (
        ("train", [[example(0, 1)], [example(2, 2)]]),
        ("valid", [[]]),
        ("test", [[example(0, 2, [2, 3]), example(1, 3, [3, 0])]]),
    ):
        (tmp_path / split).mkdir()
        for number, part in enumerate(rows):
            pq.write_table(examples_table(*part), tmp_path / split / f"part-{number:05d}.parquet")
    manifest = {"items_sha256": schema.vocabulary_sha256(ITEM_IDS), "recipe": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_opens_what_convert_wrote(folder):
    dataset = Dataset.open(folder)
    assert dataset.num_items == 4
    assert dataset.titles == ["A (1990)", "B (1991)", "C (1992)", "D (1993)"]
    assert dataset.vocabulary_sha256 == schema.vocabulary_sha256(ITEM_IDS)
    assert dataset.manifest["recipe"] == {}


def test_sequences_are_flat(folder):
    sequences = Dataset.open(folder).sequences
    assert sequences.offsets.tolist() == [0, 3, 4, 6]
    assert sequences.items.tolist() == [0, 1, 2, 3, 2, 2]
    assert sequences.timestamps.tolist() == [5, 6, 7, 5, 5, 6]
    assert sequences.splits.tolist() == [schema.TRAIN] * 6
    assert sequences.user_keys.tolist() == [10, 11, 12]
    assert sequences.user_ids[2].as_py() == "u2"
    dtypes = [getattr(sequences, name).dtype.name for name in ("offsets", "items", "timestamps", "splits", "user_keys")]
    assert dtypes == ["int64", "int32", "int64", "int8", "uint64"]


@pytest.mark.parametrize(
    ("user", "end", "most", "expected"),
    [(0, 3, 10, [0, 1, 2]), (0, 3, 2, [1, 2]), (0, 1, 2, [0]), (0, 0, 2, []), (2, 1, 5, [2]), (1, 1, 1, [3])],
)
def test_history_ends_before_the_position(folder, user, end, most, expected):
    assert Dataset.open(folder).history(user, end, most).tolist() == expected


@pytest.mark.parametrize(("user", "end"), [(3, 0), (-1, 0), (1, 2), (1, -1)])
def test_history_outside_the_sequences(folder, user, end):
    with pytest.raises(UserError, match=r"user_index|history_end"):
        Dataset.open(folder).history(user, end, 5)


def test_examples_of_all_parts_in_order_and_by_column(folder):
    dataset = Dataset.open(folder)
    assert dataset.examples("train")["user_index"].to_pylist() == [0, 2]
    assert dataset.examples("test", ["target", "candidates"]).to_pylist() == [
        {"target": 2, "candidates": [2, 3]}, {"target": 3, "candidates": [3, 0]},
    ]  # fmt: skip
    assert dataset.examples("valid").num_rows == 0
    assert dataset.examples("valid").schema.equals(schema.EXAMPLES)
    with pytest.raises(UserError, match=r'no split is called "dev": train, valid, test'):
        dataset.examples("dev")


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_batches_are_the_examples_in_pieces(folder, rows):
    table = examples_table(*(example(user % 3, user % 4) for user in range(5)))
    pq.write_table(table, folder / "train" / "part-00000.parquet", row_group_size=3)
    dataset = Dataset.open(folder)
    batches = list(dataset.example_batches("train", rows=rows))
    assert max(batch.num_rows for batch in batches) <= rows
    assert pa.Table.from_batches(batches).equals(dataset.examples("train"))
    light = list(dataset.example_batches("train", ["target", "prompt"], rows=rows))
    assert pa.Table.from_batches(light).equals(dataset.examples("train", ["target", "prompt"]))
    assert list(dataset.example_batches("valid")) == []


@pytest.mark.parametrize("rows", [[0], [1024], [1023, 1024, 2499], range(2500), []])
def test_chosen_examples_are_those_of_the_split(folder, rows):
    table = examples_table(*(example(user % 3, user % 4) for user in range(2000)))
    pq.write_table(table, folder / "train" / "part-00000.parquet", row_group_size=300)
    pq.write_table(table.slice(0, 500), folder / "train" / "part-00001.parquet")
    dataset = Dataset.open(folder)
    assert dataset.chosen_examples("train", np.array(rows, dtype=np.int64)).equals(
        dataset.examples("train").take(pa.array(rows, pa.int64()))
    )


def test_batches_are_read_when_they_are_asked_for(folder):
    pq.write_table(examples_table(example(3, 1)), folder / "train" / "part-00001.parquet")
    batches = Dataset.open(folder).example_batches("train")
    assert next(batches)["user_index"].to_pylist() == [0]
    with pytest.raises(UserError, match=r"part-00001.parquet: user_index 3 is outside the 3 users"):
        next(batches)
    (folder / "train" / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"part-00000.parquet: is no readable parquet file"):
        next(Dataset.open(folder).example_batches("train"))
    with pytest.raises(UserError, match=r'no column "score", columns there'):
        next(Dataset.open(folder).example_batches("test", ["score"]))
    with pytest.raises(UserError, match=r'no split is called "dev"'):
        next(Dataset.open(folder).example_batches("dev"))


@pytest.mark.parametrize("name", ["manifest.json", "items.parquet", "sequences.parquet", "test/part-00000.parquet"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_missing_and_corrupt_files_are_named(folder, name, damage):
    path = folder / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:20])
    expected = "test holds no parquet" if (damage, name[:4]) == ("missing", "test") else name
    with pytest.raises(UserError, match=expected):
        _ = Dataset.open(folder).sequences, Dataset.open(folder).examples("test")


def test_items_of_another_run(folder):
    items = pq.read_table(folder / "items.parquet")
    pq.write_table(items.slice(0, 3), folder / "items.parquet")
    with pytest.raises(UserError, match=r"items.parquet: vocabulary .* but the manifest says"):
        Dataset.open(folder)


def test_items_without_the_rendered_text(folder):
    pq.write_table(pq.read_table(folder / "items.parquet").drop_columns("text"), folder / "items.parquet")
    with pytest.raises(UserError, match=r'items.parquet: no column "text", columns there: item_index'):
        Dataset.open(folder)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_items_outside_the_vocabulary(folder, wrong):
    pq.write_table(examples_table(example(0, wrong)), folder / "train" / "part-00000.parquet")
    pq.write_table(examples_table(example(0, 1, [1, wrong])), folder / "test" / "part-00000.parquet")
    dataset = Dataset.open(folder)
    with pytest.raises(UserError, match=rf"item_index {wrong} in target is outside the vocabulary of 4 items"):
        dataset.examples("train")
    with pytest.raises(UserError, match=rf"item_index {wrong} in candidates is outside the vocabulary of 4 items"):
        dataset.examples("test")
    pq.write_table(sequences_table([[0, wrong]]), folder / "sequences.parquet")
    with pytest.raises(UserError, match=rf"sequences.parquet: item_index {wrong} in items is outside"):
        _ = Dataset.open(folder).sequences


@pytest.mark.parametrize("wrong", [-1, 3])
def test_users_outside_the_sequences(folder, wrong):
    pq.write_table(examples_table(example(wrong, 1)), folder / "train" / "part-00001.parquet")
    with pytest.raises(UserError, match=rf"part-00001.parquet: user_index {wrong} is outside the 3 users"):
        Dataset.open(folder).examples("train")


def test_lists_of_unequal_length(folder):
    table = sequences_table()
    shorter = pa.array([[5, 6], [5], [5, 6]], pa.list_(pa.int64()))
    pq.write_table(table.set_column(4, "timestamps", shorter), folder / "sequences.parquet")
    with pytest.raises(UserError, match=r"items, timestamps and splits of a user differ in length"):
        _ = Dataset.open(folder).sequences


def test_large_lists_read_alike(folder):
    table = sequences_table()
    large = table.set_column(3, "items", table["items"].cast(pa.large_list(pa.int32())))
    pq.write_table(large, folder / "sequences.parquet")
    assert np.array_equal(Dataset.open(folder).sequences.items, [0, 1, 2, 3, 2, 2])


LABELS = ["view", "search"]


@pytest.fixture
def events(folder):
    """An event dataset of three users: views of items, searches without one."""
    items = [[0, -1, 2], [-1], [2, 2]]
    actions = [["view", "search", "view"], ["search"], ["view", "view"]]
    sessions = [[0, 0, 1], [0], [0, 1]]
    table = sequences_table(items)
    table = table.set_column(6, "actions", pa.array(actions, pa.list_(pa.string())))
    table = table.set_column(7, "sessions", pa.array(sessions, pa.list_(pa.int32())))
    table = table.append_column("attribute:typed", pa.array([["", "tea", ""], ["x"], ["", ""]]))
    pq.write_table(table, folder / "sequences.parquet", row_group_size=2)
    words = {"view": "view", "search": "search for"}
    manifest = {"items_sha256": schema.vocabulary_sha256(ITEM_IDS), "events": True}
    manifest["actions"] = {"labels": LABELS, "words": words}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_events_have_actions_and_sessions(events):
    dataset = Dataset.open(events)
    assert dataset.is_events
    assert (dataset.actions, dataset.words) == (LABELS, ["view", "search for"])
    sequences = dataset.sequences
    assert sequences.items.tolist() == [0, -1, 2, -1, 2, 2]
    assert sequences.actions.tolist() == [0, 1, 0, 1, 0, 0]
    assert sequences.sessions.tolist() == [0, 0, 1, 0, 0, 1]
    assert (sequences.actions.dtype, sequences.sessions.dtype) == (np.int32, np.int32)


def test_other_datasets_have_neither(folder):
    dataset = Dataset.open(folder)
    assert not dataset.is_events
    assert (dataset.actions, dataset.words) == ([], [])
    assert dataset.sequences.actions is dataset.sequences.sessions is None
    assert np.array_equal(dataset.read(0, 3, 2), dataset.history(0, 3, 2))
    assert dataset.read(0, 3, 2).dtype == np.int32


@pytest.mark.parametrize(
    ("user", "end", "most", "history", "read"),
    [
        (0, 3, 9, [0, 2], [(0, 0), (-1, 1), (2, 0)]),
        (0, 3, 2, [0, 2], [(-1, 1), (2, 0)]),  # two items, though they lie three events back
        (0, 3, 1, [2], [(2, 0)]),
        (0, 2, 1, [0], [(-1, 1)]),
        (0, 3, 0, [], []),
        (1, 1, 5, [], [(-1, 1)]),
        (2, 0, 5, [], []),
    ],
)
def test_history_is_of_items_and_read_of_events(events, user, end, most, history, read):
    dataset = Dataset.open(events)
    assert dataset.history(user, end, most).tolist() == history
    codes = dataset.read(user, end, most)
    assert codes.dtype == np.int64
    assert codes.tolist() == [item + 1 + (4 + 1) * action for item, action in read]
    found = schema.items_of(codes, dataset.num_items).tolist(), schema.actions_of(codes, dataset.num_items).tolist()
    assert list(zip(*found)) == read
    with pytest.raises(UserError, match="history_end 9 is outside"):
        dataset.read(user, 9, most)


def test_the_vocabulary_of_events_is_of_items_and_actions(events, folder):
    found = Dataset.open(events).vocabulary_sha256
    assert found == schema.event_vocabulary_sha256(ITEM_IDS, LABELS)
    assert found != schema.event_vocabulary_sha256(ITEM_IDS, LABELS[::-1])
    assert found != schema.vocabulary_sha256(ITEM_IDS)


def test_actions_outside_the_vocabulary(events):
    manifest = json.loads((events / "manifest.json").read_text())
    manifest["actions"]["labels"] = ["view", "leave"]
    (events / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r'sequences.parquet: action "search" is none of .*convert again'):
        _ = Dataset.open(events).sequences


@pytest.mark.parametrize("wrong", [-2, 4])
def test_items_of_events_outside_the_vocabulary(events, wrong):
    table = pq.read_table(events / "sequences.parquet")
    items = pa.array([[0, wrong, 2], [-1], [2, 2]], pa.list_(pa.int32()))
    pq.write_table(table.set_column(3, "items", items), events / "sequences.parquet")
    with pytest.raises(UserError, match=rf"item_index {wrong} in items is outside the vocabulary of 4 items"):
        _ = Dataset.open(events).sequences


@pytest.mark.parametrize(
    ("place", "name", "values"),
    [
        (6, "actions", pa.array([["view", "view"], ["view", "view"], ["view", "view"]])),
        (6, "actions", pa.nulls(3, pa.list_(pa.string()))),
        (7, "sessions", pa.array([[0, 0], [0, 0], [0, 0]], pa.list_(pa.int32()))),
    ],
)
def test_actions_and_sessions_of_unequal_length(events, place, name, values):
    table = pq.read_table(events / "sequences.parquet")
    pq.write_table(table.set_column(place, name, values), events / "sequences.parquet")
    with pytest.raises(UserError, match=r"items, actions and sessions of a user differ in length: convert again"):
        _ = Dataset.open(events).sequences


def test_a_catalogue_without_items(events):
    items = pq.read_table(events / "items.parquet").slice(0, 0)
    pq.write_table(items, events / "items.parquet")
    table = pq.read_table(events / "sequences.parquet")
    nothing = pa.array([[-1, -1, -1], [-1], [-1, -1]], pa.list_(pa.int32()))
    pq.write_table(table.set_column(3, "items", nothing), events / "sequences.parquet")
    manifest = json.loads((events / "manifest.json").read_text()) | {"items_sha256": schema.vocabulary_sha256([])}
    (events / "manifest.json").write_text(json.dumps(manifest))
    dataset = Dataset.open(events)
    assert dataset.num_items == 0
    assert dataset.read(0, 3, 9).tolist() == [0, 1, 0]  # the action's number is the code
    assert dataset.history(0, 3, 9).tolist() == []


def test_imports_without_torch():
    code = "import sys, recllm.data.dataset, recllm.data.sequences; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
