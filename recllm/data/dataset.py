"""Opens a dataset folder: what convert wrote, for training, evaluation and serving.

A folder enters; a `Dataset` leaves whose sequences are flat NumPy arrays and whose examples are read split by split.
Imports without torch.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recllm import files, schema
from recllm.errors import UserError


@dataclass(frozen=True)
class Sequences:
    """All users' sequences, oldest first; user u owns positions offsets[u]:offsets[u + 1]. U users, P positions."""

    offsets: npt.NDArray[np.int64]  # (U + 1,)
    items: npt.NDArray[np.int32]  # (P,) item_index; schema.NO_ITEM of events without one
    timestamps: npt.NDArray[np.int64]  # (P,) seconds since the epoch
    splits: npt.NDArray[np.int8]  # (P,) schema.UNUSED, TRAIN, VALID or TEST
    user_ids: pa.ChunkedArray  # (U,) text; user_ids[u].as_py() is one id
    user_keys: npt.NDArray[np.uint64]  # (U,)
    actions: npt.NDArray[np.int32] | None = None  # (P,) numbers of actions, of event datasets
    sessions: npt.NDArray[np.int32] | None = None  # (P,) number of the session within the user, of event datasets

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Dataset:
    """A dataset folder; nothing but the manifest and the items is read before it is asked for."""

    folder: Path
    manifest: dict[str, Any]
    items: pa.Table  # item_index, item_id, title, attributes, text

    @classmethod
    def open(cls, folder: Path) -> "Dataset":
        """Open what convert wrote.

        Raises:
            UserError: missing or corrupt file; items.parquet that is not the one of the manifest.
        """
        folder = Path(folder)
        manifest = files.read_json(folder / "manifest.json", "the manifest of a dataset written by `recllm convert`")
        items = _read(folder / "items.parquet")
        _require(folder / "items.parquet", items, [*schema.ITEMS.names, "text"])
        found = schema.vocabulary_sha256(items[schema.ITEM_ID].to_pylist())
        expected = manifest.get("items_sha256") if isinstance(manifest, dict) else None
        if found != expected:
            raise UserError(
                f"{folder}/items.parquet: vocabulary {found}, but the manifest says {expected}: "
                "the files come from different runs, convert again"
            )
        if not np.array_equal(items["item_index"].to_numpy(), np.arange(items.num_rows)):
            raise UserError(
                f"{folder}/items.parquet: item_index is not 0..{items.num_rows - 1} in row order: convert again"
            )
        return cls(folder, manifest, items)

    @property
    def num_items(self) -> int:
        """Size of the catalogue."""
        return self.items.num_rows

    @property
    def vocabulary_sha256(self) -> str:
        """schema.vocabulary_sha256 of this dataset's item ids, which was checked when the dataset was opened.

        Of an event dataset schema.event_vocabulary_sha256 of item ids and actions.
        """
        if not self.is_events:
            return str(self.manifest["items_sha256"])
        return schema.event_vocabulary_sha256(self.items[schema.ITEM_ID].to_pylist(), self.actions)

    @property
    def is_events(self) -> bool:
        """Whether a position is an event (an action, with an item or without) and not just an item."""
        return bool(self.manifest.get("events"))

    @property
    def actions(self) -> list[str]:
        """Labels of the actions in the order of their numbers; empty unless this is an event dataset."""
        return list(self.manifest["actions"]["labels"]) if self.is_events else []

    @property
    def words(self) -> list[str]:
        """The actions as prompts and answers write them, in the order of their numbers."""
        words = self.manifest["actions"]["words"] if self.is_events else []
        return [words[label] for label in self.actions] if isinstance(words, dict) else list(words)

    @cached_property
    def titles(self) -> list[str]:
        """Rendered item texts in item_index order, as prompts and answers show them."""
        return self.items["text"].to_pylist()

    @cached_property
    def sequences(self) -> Sequences:
        """Everything that users did, as flat arrays.

        Raises:
            UserError: missing or corrupt file; lists of unequal length; an item_index outside the vocabulary, or of an
                event dataset an action.
        """
        path = self.folder / "sequences.parquet"
        columns = ["user_index", "user_id", "user_key", "items", "timestamps", "splits"]
        table = _read(path, [*columns, "actions", "sessions"] if self.is_events else columns)
        if not np.array_equal(table["user_index"].to_numpy(), np.arange(table.num_rows)):
            raise UserError(f"{path}: user_index is not 0..{table.num_rows - 1} in row order: convert again")
        offsets, items = flat(table["items"])
        (time_offsets, times), (split_offsets, splits) = flat(table["timestamps"]), flat(table["splits"])
        if not (np.array_equal(offsets, time_offsets) and np.array_equal(offsets, split_offsets)):
            raise UserError(f"{path}: items, timestamps and splits of a user differ in length: convert again")
        self._check_items(path, items[items != schema.NO_ITEM] if self.is_events else items, "items")
        events = self._events(path, table, offsets) if self.is_events else ()
        return Sequences(offsets, items, times, splits, table["user_id"], table["user_key"].to_numpy(), *events)

    def _events(
        self, path: Path, table: pa.Table, offsets: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Numbers of the actions, and the sessions, of every position."""
        labels = pc.list_flatten(table["actions"])
        numbers = pc.index_in(labels, pa.array(self.actions, labels.type))
        session_offsets, sessions = flat(table["sessions"])
        if not all(np.array_equal(offsets, found) for found in (session_offsets, _offsets(table["actions"]))):
            raise UserError(f"{path}: items, actions and sessions of a user differ in length: convert again")
        if numbers.null_count:
            unknown = labels.filter(pc.is_null(numbers))[0].as_py()
            raise UserError(f'{path}: action "{unknown}" is none of the manifest\'s {self.actions}: convert again')
        return numbers.to_numpy().astype(np.int32), sessions.astype(np.int32)

    def history(self, user_index: int, history_end: int, max_items: int) -> npt.NDArray[np.int32]:
        """Items at positions [0, history_end) of a user, oldest first, at most the last `max_items`.

        A view; of an event dataset a copy, without the events that have no item.

        Raises:
            UserError: a user or a position that the sequences do not have.
        """
        if not self.is_events:
            return self.sequences.items[self._positions(user_index, history_end, max_items)]
        items = self.sequences.items[self._positions(user_index, history_end, history_end)]
        items = items[items != schema.NO_ITEM]
        return items[max(0, len(items) - max_items) :]

    def read(self, user_index: int, history_end: int, max_items: int) -> npt.NDArray[np.int32] | npt.NDArray[np.int64]:
        """What an encoder reads of positions [0, history_end) of a user, oldest first, at most the last `max_items`.

        The items; of an event dataset the codes of the events (schema.event_codes). Errors as `history`.
        """
        if not self.is_events:
            return self.history(user_index, history_end, max_items)
        place, actions = self._positions(user_index, history_end, max_items), self.sequences.actions
        assert actions is not None  # of an event dataset
        return schema.event_codes(self.sequences.items[place], actions[place], self.num_items)

    def _positions(self, user_index: int, history_end: int, most: int) -> slice:
        """Flat positions of the last `most` of [0, history_end) of a user."""
        sequences = self.sequences
        if not 0 <= user_index < sequences.num_users:
            raise UserError(f"user_index {user_index} is outside the {sequences.num_users} users of {self.folder}")
        start, end = sequences.offsets[user_index], sequences.offsets[user_index + 1]
        if not 0 <= history_end <= end - start:
            raise UserError(f"history_end {history_end} is outside the {end - start} interactions of user {user_index}")
        return slice(max(start, start + history_end - most), start + history_end)

    def examples(self, split: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All examples of a split in memory, in the order of its files, columns of schema.EXAMPLES.

        Ask for few columns, or use `example_batches`: prompts are far larger than everything else.

        Raises:
            UserError: unknown split, missing or corrupt file, user or item outside the vocabulary.
        """
        parts = self._parts(split)
        wanted = None if columns is None else list(columns)
        tables = [_read(part, wanted) for part in parts]
        for part, table in zip(parts, tables):
            self._check_examples(part, table)
        return pa.concat_tables(tables)

    def example_batches(
        self, split: str, columns: Sequence[str] | None = None, rows: int = 1024
    ) -> Iterator[pa.RecordBatch]:
        """The same examples in the same order, at most `rows` at a time; a row group is in memory, never a split.

        Raises:
            UserError: as `examples`, when the batch is reached.
        """
        for part in self._parts(split):
            for batch in _batches(part, None if columns is None else list(columns), rows):
                self._check_examples(part, batch)
                yield batch

    def chosen_examples(self, split: str, rows: npt.NDArray[np.int64]) -> pa.Table:
        """The examples at some rows of a split, rising, with all columns; of the others a row group is in memory.

        Raises:
            UserError: as `example_batches`.
        """
        begin, parts = 0, []
        for batch in self.example_batches(split):
            first, last = np.searchsorted(rows, (begin, begin + batch.num_rows))
            if first < last:
                parts.append(batch.take(pa.array(rows[first:last] - begin)))
            begin += batch.num_rows
        return pa.Table.from_batches(parts, None if parts else schema.EXAMPLES)

    def attribute_batches(self, name: str, rows: int = 256) -> Iterator[pa.StringArray]:
        """What the log says of each event under an attribute, position by position; `rows` users a batch.

        That column alone is read, and never as a whole: an attribute may be the text of a page.

        Raises:
            UserError: missing or corrupt file; an attribute that convert did not keep.
        """
        column = f"{schema.ATTRIBUTE}{name}"
        for batch in _batches(self.folder / "sequences.parquet", [column], rows):
            yield batch.column(column).flatten()

    def _parts(self, split: str) -> list[Path]:
        if split not in schema.SPLITS:
            raise UserError(f'no split is called "{split}": {", ".join(schema.SPLITS)}')
        parts = sorted((self.folder / split).glob("*.parquet"))
        if not parts:
            raise UserError(f"{self.folder}/{split} holds no parquet file: run `recllm convert` again")
        return parts

    def _check_examples(self, path: Path, table: pa.Table | pa.RecordBatch) -> None:
        if "target" in table.schema.names:
            self._check_items(path, table["target"].drop_null().to_numpy(), "target")
        if "candidates" in table.schema.names and len(flat := pc.list_flatten(table["candidates"])):
            self._check_items(path, flat.to_numpy(), "candidates")
        if "user_index" in table.schema.names and table.num_rows:
            lowest, highest = (pc.min_max(table["user_index"])[side].as_py() for side in ("min", "max"))
            users = self.sequences.num_users
            if lowest < 0 or highest >= users:
                wrong = lowest if lowest < 0 else highest
                raise UserError(
                    f"{path}: user_index {wrong} is outside the {users} users of sequences.parquet: convert again"
                )

    def _check_items(self, path: Path, items: npt.NDArray[np.int32], column: str) -> None:
        if len(items) and (items.min() < 0 or items.max() >= self.num_items):
            wrong = items.min() if items.min() < 0 else items.max()
            raise UserError(
                f"{path}: item_index {wrong} in {column} is outside the vocabulary of {self.num_items} items: "
                "convert again"
            )


def _read(path: Path, columns: list[str] | None = None) -> pa.Table:
    with _opened(path, columns) as file:
        return file.read(columns=columns)


def _batches(path: Path, columns: list[str] | None, rows: int) -> Iterator[pa.RecordBatch]:
    with _opened(path, columns) as file:
        yield from file.iter_batches(batch_size=rows, columns=columns)


@contextlib.contextmanager
def _opened(path: Path, columns: list[str] | None) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            _require(path, file.schema_arrow, columns or [])
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run `recllm convert` first") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is no readable parquet file ({str(error).splitlines()[0]}): convert again") from None


def _require(path: Path, table: Any, columns: Sequence[str]) -> None:
    names = table.names if isinstance(table, pa.Schema) else table.column_names
    if missing := [name for name in columns if name not in names]:
        raise UserError(f'{path}: no column "{missing[0]}", columns there: {", ".join(names)}: convert again')


def flat(column: pa.Array | pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """A list column as (offsets, values), without a Python object a row.

    >>> flat(pa.array([[7, 8], [], [9]]))
    (array([0, 2, 2, 3]), array([7, 8, 9]))
    """
    return _offsets(column), pc.list_flatten(column).to_numpy()


def _offsets(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int64]:
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def pad_left(rows: Sequence[npt.ArrayLike], value: int = -1) -> npt.NDArray[np.int64]:
    """(B, L) int64 from B rows of different length, `value` to the left of the shorter ones; L is at least 1.

    >>> pad_left([np.array([1, 2]), np.array([3])]).tolist()
    [[1, 2], [-1, 3]]
    """
    arrays = [np.asarray(row, dtype=np.int64) for row in rows]
    padded = np.full((len(arrays), max([1, *map(len, arrays)])), value, dtype=np.int64)
    for line, row in zip(padded, arrays, strict=True):
        line[len(line) - len(row) :] = row
    return padded
