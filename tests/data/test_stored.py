import pickle

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recllm import schema
from recllm.data import stored as module
from recllm.data.spool import Spool
from recllm.data.stored import StoredSequences, shards

LENGTHS = np.array([5, 1, 30, 2, 2, 2, 1])


def test_shards_cover_every_user_once():
    assert shards(LENGTHS, 10) == [(0, 2), (2, 3), (5, 2)]  # the long user is not cut
    assert shards(LENGTHS, 1000) == [(0, 7)]
    assert shards(LENGTHS, 10, 2, 6) == [(2, 3), (5, 1)]


@pytest.fixture
def stored(tmp_path):
    """LENGTHS in row groups of up to 20 interactions."""
    begins = np.cumsum(LENGTHS) - LENGTHS
    frame = pl.DataFrame(
        {
            "user_index": np.arange(7),
            "user_id": [f"u{n}" for n in range(7)],
            "user_key": np.arange(7),
            **{name: [list(range(b, b + n)) for b, n in zip(begins, LENGTHS)] for name in ("items", "timestamps")},
            "splits": [[1] * n for n in LENGTHS],
            "actions": [None] * 7,
            "sessions": [None] * 7,
        },
        schema_overrides={"actions": pl.List(pl.String), "sessions": pl.List(pl.Int32)},
    )
    table = frame.to_arrow().cast(schema.SEQUENCES)
    with pq.ParquetWriter(tmp_path / "sequences.parquet", schema.SEQUENCES) as writer:
        for begin, rows in shards(LENGTHS, 20):
            writer.write_table(table.slice(begin, rows))
    return StoredSequences(tmp_path / "sequences.parquet", LENGTHS)


@pytest.mark.parametrize("positions", [1, 4, 10, 20])
def test_batches_are_the_file_cut_by_shards(stored, positions):
    batches = list(stored.batches(positions))
    assert [batch.num_rows for batch in batches] == [rows for _, rows in shards(LENGTHS, positions)]
    assert pa.Table.from_batches(batches).equals(pq.read_table(stored.path))


def test_the_first_batch_costs_one_row_group(stored, monkeypatch):
    cut, cut_at = list[int](), module._cut_at
    monkeypatch.setattr(module, "_cut_at", lambda ends, *rest: cut.append(len(ends)) or cut_at(ends, *rest))
    next(stored.batches(10))
    assert cut == [2]  # users, of 7
    stored.cut(10)
    assert cut == [2, *(group.num_rows for group in groups(stored.path))]  # each user once


def groups(path):
    metadata = pq.read_metadata(path)
    return [metadata.row_group(number) for number in range(metadata.num_row_groups)]


def test_a_batch_is_sent_without_the_rest_of_its_row_group(stored):
    whole = len(pickle.dumps(pa.Table.from_batches(stored.batches(10**6))))
    assert len(pickle.dumps(list(stored.batches(1))[-1])) < whole


def test_further_columns_travel_with_their_users(stored):
    columns = {"user": [f"about {n}" for n in range(7)], "ledger": [["line"] * n for n in range(7)]}
    further = {name: pa.array(values) for name, values in columns.items()}
    batches = list(StoredSequences(stored.path, LENGTHS, further).batches(10))
    for name, values in columns.items():
        assert [value for batch in batches for value in batch.column(name).to_pylist()] == values
        assert batches[0].schema.field(name).type == further[name].type


def test_rows_come_back_by_bucket_in_their_order(tmp_path):
    spool = Spool(tmp_path / "rows", [("user", np.uint32), ("order", np.int64)])
    rows = np.array([(n, -n) for n in range(10)], spool.dtype)
    spool.scatter(rows[:6], np.array([2, 0, 2, 0, 2, 2]))
    spool.scatter(rows[6:], np.array([0, 2, 0, 2]))
    assert [spool.read(bucket)["user"].tolist() for bucket in range(3)] == [[1, 3, 6, 8], [], [0, 2, 4, 5, 7, 9]]
    assert sorted(row["order"] for rows in spool.chunks() for row in rows) == list(range(-9, 1))
    spool.clear()
    assert list(spool.chunks()) == []
