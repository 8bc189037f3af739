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


def test_imports_without_torch():
    code = "import sys, recllm.data.dataset, recllm.data.sequences; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
