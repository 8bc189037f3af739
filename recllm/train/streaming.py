"""Training examples that no process holds: read, tokenised and put in order on the way (`train.streaming: true`).

dataset/train/part-*.parquet and, of adapters that read histories, sequences.parquet enter; the rows of one process
leave, in the order of an epoch. In memory are a buffer of tokenised rows, a few row groups, and a few numbers for each
row group of the dataset.

The order of an epoch hangs on (seed, epoch), the number of processes and train.buffer_size alone:

- the row groups of all files are cut into stretches of at most STRETCH rows; these are shuffled and stand one after the
  other: N rows. A buffer so mixes buffer_size / STRETCH places of the dataset;
- process r of W has the rows [N·r/W, N·(r+1)/W) of them, so that processes differ by one row at most, and each reads
  its own stretches and at both ends a part of one;
- its rows are shuffled within buffers, train.buffer_size after train.buffer_size, and there put together by length;
  of these groups of like length a shuffled order is drawn that is the same in all processes.

Every process then fills its rows up to the same number of whole batches with rows without loss. Each example so counts
exactly once in the loss of an epoch. In each step the processes wait for the one with the longest batch: their batches
are of like length, but not of the same.

A run that goes on begins at the buffer it had come to; what precedes it is not read again.

Examples that are longer than the context are found before the first step, by a look at all texts (`check_lengths`):
only where a text has more bytes than the context has tokens, it is tokenised for that.
"""

import functools
import sys
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from accelerate.utils import gather_object, tqdm
from transformers import PreTrainedTokenizerBase, TrainingArguments

from recllm import schema
from recllm.data.dataset import Dataset, flat
from recllm.errors import UserError
from recllm.model.chat import RememberingEncoder, framing_bytes
from recllm.recipe import Recipe
from recllm.train.collator import COLUMNS, Row, TooLong, check_ids, rows_of
from recllm.train.order import order_of
from recllm.train.representations import STATISTICS_HISTORIES
from recllm.train.weights import weighs

KEYS = ("streaming", "buffer_size")  # of the recipe's train section: no arguments of transformers'
BUFFER_SIZE = 16_384  # rows in memory, as text and then tokenised: 300 tokens each are 20 MiB of ids
STRETCH = 1024  # rows: a row group, of at most 8,192, is read once for each; that costs little beside tokenising it
ORDER = 2  # version of the order of an epoch: a run goes on from checkpoints of its own order alone
STRATEGIES = ("group_by_length", "random")
GROUPS_HELD = 4  # row groups of sequences.parquet, about 8 MiB each
STATISTICS_SHARE = 1024  # histories of one row group, and more only where there are few row groups
PROBED = 256  # rows among which those with the longest histories check the saved adapter
SKIPPED = Row(np.zeros(1, np.int32), 0, 0, 0, history=np.empty(0, np.int64))  # for rows that a resumed run throws away
Array = npt.NDArray[Any]


# ---- what the recipe says ----


def is_streaming(recipe: Recipe) -> bool:
    """Whether examples are streamed.

    Raises:
        UserError: streaming or buffer_size of the recipe's train section have values that do not fit.
    """
    streaming, size = recipe.train.get("streaming", False), recipe.train.get("buffer_size")
    if not isinstance(streaming, bool):
        raise UserError(f"train.streaming={streaming!r}: true or false is expected")
    if size is not None and not streaming:
        raise UserError(f"train.buffer_size={size} belongs to train.streaming=true: set that, or leave it out")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise UserError(f"train.buffer_size={size!r}: a number of rows, 1 or more, is expected")
    return streaming


def check_streaming(recipe: Recipe, arguments: TrainingArguments, gate_inputs: Any = None) -> None:
    """Refuse what needs all examples at once, or would count some twice or never.

    Raises:
        UserError: a weighted loss, evaluation during training, tables for the gate, several or lasting workers, or
            an order that streaming does not have.
    """
    workers, evaluates = arguments.dataloader_num_workers, str(getattr(arguments.eval_strategy, "value", "no"))
    refused = {
        "the recipe's loss section weighs tokens by counts over all examples": weighs(recipe.loss),
        f"train.eval_strategy={evaluates} holds all of the valid split": evaluates != "no",
        "gate_inputs has a row for every example": bool(gate_inputs),
        f"train.dataloader_num_workers={workers}, and only 0 or 1 keep the order": workers > 1,
        "train.dataloader_persistent_workers would repeat the first epoch": arguments.dataloader_persistent_workers,
        "train.auto_find_batch_size would cut it otherwise on the way": arguments.auto_find_batch_size,
        "train.dataloader_drop_last would leave examples out": arguments.dataloader_drop_last,
        f"train.train_sampling_strategy={arguments.train_sampling_strategy} is none of {', '.join(STRATEGIES)}": (
            arguments.train_sampling_strategy not in STRATEGIES
        ),
    }
    if faults := [text for text, wrong in refused.items() if wrong]:
        raise UserError(
            f"train.streaming reads each example once, as it comes: {faults[0]}. Leave that out, or streaming"
        )


def buffer_size_of(recipe: Recipe) -> int:
    """Rows of a buffer that the recipe asks for, or the default."""
    size = recipe.train.get("buffer_size")
    return BUFFER_SIZE if size is None else int(size)


# ---- the files ----


class Piece(NamedTuple):
    """Consecutive rows of one row group."""

    path: str
    group: int
    first: int  # within the group
    rows: int


def row_groups(paths: Sequence[Path]) -> list[Piece]:
    """All row groups of some Parquet files, by their footers alone.

    Raises:
        UserError: a file that is missing or no Parquet file, or has not the columns of examples.
    """
    found = []
    for path in paths:
        metadata, names = _readable(path, _footer, path)
        if missing := [name for name in COLUMNS if name not in names]:
            raise UserError(f'{path}: no column "{missing[0]}": convert again')
        found += [Piece(str(path), group, 0, rows) for group, rows in enumerate(metadata) if rows]
    return found


def _footer(path: Path) -> tuple[list[int], list[str]]:
    with pq.ParquetFile(path) as file:
        return [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)], file.schema_arrow.names


def cut(pieces: Sequence[Piece], begin: int, end: int) -> list[Piece]:
    """Rows [begin, end) of pieces that stand one after the other.

    >>> [tuple(piece) for piece in cut([Piece("a", 0, 0, 5), Piece("a", 1, 0, 5)], 3, 7)]
    [('a', 0, 3, 2), ('a', 1, 0, 2)]
    """
    ends = list(accumulate(piece.rows for piece in pieces))
    found: list[Piece] = []
    for place in range(bisect_right(ends, begin), len(pieces) if begin < end else 0):
        before = ends[place] - pieces[place].rows
        if before >= end:
            break
        first, last = max(begin, before), min(end, ends[place])
        found.append(pieces[place]._replace(first=pieces[place].first + first - before, rows=last - first))
    return found


def stretches_of(group: Piece) -> list[Piece]:
    """A row group in stretches of at most STRETCH rows.

    >>> [tuple(piece) for piece in stretches_of(Piece("a", 3, 0, 1500))]
    [('a', 3, 0, 1024), ('a', 3, 1024, 476)]
    """
    begins = range(0, group.rows, STRETCH)
    return [group._replace(first=begin, rows=min(STRETCH, group.rows - begin)) for begin in begins]


def read_pieces(pieces: list[Piece]) -> Iterator[dict[str, Any]]:
    """Their examples, COLUMNS of each; a row group is in memory at a time.

    Raises:
        UserError: a file that cannot be read.
    """
    for path, group, first, rows in pieces:
        table = _readable(Path(path), _group, path, group, COLUMNS)
        for batch in table.slice(first, rows).combine_chunks().to_batches(max_chunksize=1024):
            for values in rows_of(batch):
                yield dict(zip(COLUMNS, values))


def _keyed(pieces: list[Piece]) -> Iterator[tuple[int, dict[str, Any]]]:
    return iter(enumerate(read_pieces(pieces)))


def _group(path: str, group: int, columns: list[str]) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, columns=columns)


def _readable(path: Path, read: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return read(*arguments)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run `recllm convert` first") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is no readable parquet file ({str(error).splitlines()[0]}): convert again") from None


def most_tokens(table: pa.Table, framing: Callable[[tuple[str, ...]], int]) -> Array:
    """A bound on the tokens of each example of a table with `prompt` and `completion`, (N,) int64, by its bytes.

    A token has at least one byte of the text, and a tokenizer may begin each line with a token of its own (▁). One that
    makes texts longer before it cuts them may exceed the bound: it is then found out when the example is read.

    Args:
        table: its examples.
        framing: what a prompt of messages of these roles has beside their contents and lines, at most.
    """
    bytes_of = np.zeros(table.num_rows, np.int64)
    for name in ("prompt", "completion"):
        column = table[name].combine_chunks()
        flat, ends = column.flatten(), np.append(0, np.cumsum(column.value_lengths().to_numpy()))
        contents, roles = (flat.field(flat.type.get_field_index(field)) for field in ("content", "role"))
        lines = pc.count_substring(contents, "\n").to_numpy() + 2  # a newline is a line's end; the last one has none
        sizes = np.append(0, np.cumsum(pc.binary_length(contents).to_numpy() + lines))
        bytes_of += sizes[ends[1:]] - sizes[ends[:-1]]
        if name == "prompt":
            joined = pc.binary_join(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), roles), "\n")
            kinds = joined.dictionary_encode()
            of_kind = [framing(tuple(kind.split("\n"))) for kind in kinds.dictionary.to_pylist()]
            bytes_of += np.array(of_kind, np.int64)[kinds.indices.to_numpy()]
    return bytes_of


class StoredHistories:
    """Histories of some users at a time: only the row groups of sequences.parquet that hold them are read."""

    def __init__(self, dataset: Dataset, max_items: int) -> None:
        self.path, self.max_items = dataset.folder / "sequences.parquet", max_items
        self.num_items, self.is_events = dataset.num_items, dataset.is_events
        self.actions = pa.array(dataset.actions, pa.string())
        rows = _readable(self.path, _footer, self.path)[0]
        self.begins = list(accumulate(rows, initial=0))  # user_index of each row group's first user, and U
        self._held: OrderedDict[int, tuple[Array, Array]] = OrderedDict()

    def read(self, users: Sequence[int], ends: Sequence[int]) -> list[Array]:
        """What Dataset.read gives of each user's positions [0, end).

        Raises:
            UserError: a user, position, item or action that the dataset does not have; a file that cannot be read.
        """
        groups = [self._group_of(int(user)) for user in users]
        found: list[Array] = [np.empty(0, np.int64)] * len(groups)
        for place in sorted(range(len(groups)), key=groups.__getitem__):
            offsets, values = self._values(groups[place])
            user, end = int(users[place]) - self.begins[groups[place]], int(ends[place])
            start = offsets[user]
            if not 0 <= end <= offsets[user + 1] - start:
                raise UserError(
                    f"gate_end {end} is outside the {offsets[user + 1] - start} interactions of user {users[place]} of "
                    f"{self.path}: convert again"
                )
            found[place] = values[max(start, start + end - self.max_items) : start + end].copy()
        return found

    def _group_of(self, user: int) -> int:
        if not 0 <= user < self.begins[-1]:
            raise UserError(f"user_index {user} is outside the {self.begins[-1]} users of {self.path}: convert again")
        return bisect_right(self.begins, user) - 1

    def _values(self, group: int) -> tuple[Array, Array]:
        """Offsets of a row group's users, and items or event codes, one user after the other."""
        if group not in self._held:
            self._held[group] = _readable(self.path, self._read_group, group)
            while len(self._held) > GROUPS_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(group)
        return self._held[group]

    def _read_group(self, group: int) -> tuple[Array, Array]:
        columns = ["user_index", "items", *(["actions"] if self.is_events else [])]
        table = _group(str(self.path), group, columns)
        if not np.array_equal(table["user_index"].to_numpy(), np.arange(*self.begins[group : group + 2])):
            raise UserError(f"{self.path}: user_index is not the number of the row: convert again")
        offsets, items = flat(table["items"])
        lowest = schema.NO_ITEM if self.is_events else 0
        if len(items) and (items.min() < lowest or items.max() >= self.num_items):
            raise UserError(f"{self.path}: an item_index is outside the vocabulary of {self.num_items}: convert again")
        if not self.is_events:
            return offsets, items
        numbers = pc.index_in(pc.list_flatten(table["actions"]), self.actions)
        if numbers.null_count or len(numbers) != len(items):
            raise UserError(f"{self.path}: actions that the manifest does not have, or too few: convert again")
        return offsets, schema.event_codes(items, numbers.to_numpy(), self.num_items)


# ---- the rows of a process ----


class Share(NamedTuple):
    """Which part of the examples a process has, and in what amounts it uses them."""

    rank: int
    processes: int
    batch_size: int
    accumulation: int  # batches of an optimizer step


class StreamedExamples(torch.utils.data.IterableDataset):
    """The training examples of one process, an epoch at a time."""

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        share: Share,
        *,
        seed: int,
        buffer_size: int = BUFFER_SIZE,
        by_length: bool = True,
        histories: StoredHistories | None = None,
    ) -> None:
        """
        Args:
            dataset: whose split "train" is read.
            tokenizer: of the base model.
            max_tokens: the base model's context.
            share: of this process.
            seed: of the order.
            buffer_size: rows that are shuffled and put together by length at once; rounded up to whole steps.
            by_length: batches hold rows of like length.
            histories: read for each row, of adapters that need them.

        Raises:
            UserError: no example; a file that cannot be read.
        """
        self.encode, self.max_tokens, self.share, self.seed = RememberingEncoder(tokenizer), max_tokens, share, seed
        step = share.batch_size * share.accumulation
        self.buffer_size, self.group_size = -(-buffer_size // step) * step, step if by_length else 0
        self.histories = histories
        self.groups = row_groups(sorted((dataset.folder / "train").glob("*.parquet")))
        self.num_examples = sum(piece.rows for piece in self.groups)  # of all processes
        if not self.num_examples:
            raise UserError(
                'the dataset has 0 "train" examples, at least 1 is needed: check split and filters, convert'
            )
        self.epoch: Callable[[], int] = lambda: 0  # the trainer says which
        self.skip = 0  # rows at the beginning of the next epoch that are not wanted: SKIPPED stands for each

    # ---- how many ----

    @property
    def bounds(self) -> tuple[int, int]:
        """The rows [begin, end) of an epoch's order that this process has."""
        rank, processes = self.share.rank, self.share.processes
        return self.num_examples * rank // processes, self.num_examples * (rank + 1) // processes

    def __len__(self) -> int:
        """Rows that this process yields, those without loss among them: the same for all processes.

        Alone, a last batch may be smaller, and none is without loss.
        """
        if self.share.processes == 1:
            return self.num_examples
        most = -(-self.num_examples // self.share.processes)
        return -(-most // self.share.batch_size) * self.share.batch_size

    # ---- in what order ----

    def __iter__(self) -> Iterator[Row]:
        epoch, (begin, end), skip = self.epoch(), self.bounds, min(self.skip, len(self))
        yield from (SKIPPED for _ in range(skip))
        number = min(skip, end - begin) // self.buffer_size
        at, last = number * self.buffer_size, None
        stream = iter(self._stream(epoch, begin + at, end))
        while examples := list(islice(stream, self.buffer_size)):
            rows = self._rows(examples)
            for place in self._order(rows, epoch, number):
                last = rows[place]
                if at >= skip:
                    yield last
                at += 1
            number += 1
        if (left := len(self) - max(at, skip)) > 0:
            filling = (last or self.first(1)[0])._replace(completion_tokens=0)
            yield from (filling for _ in range(left))

    def _stream(self, epoch: int, begin: int, end: int) -> Any:
        """The rows [begin, end) of an epoch's order as a datasets.IterableDataset, whose shards are stretches."""
        from datasets.iterable_dataset import ExamplesIterable, IterableDataset

        stretches = [part for group in self.groups for part in stretches_of(group)]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(stretches))
        pieces = cut([stretches[number] for number in order], begin, end)
        if not pieces:
            return ()
        # from_generator would lock a file in the user's cache, at home: all processes of a cluster, in every epoch
        return IterableDataset(ExamplesIterable(_keyed, {"pieces": pieces}))

    def _order(self, rows: list[Row], epoch: int, number: int) -> list[int]:
        """Of a buffer of this process, which is the `number`-th of the epoch."""
        lengths = np.array([len(row.input_ids) for row in rows])
        fewest = self.num_examples // self.share.processes - number * self.buffer_size  # left to any process
        return order_of(
            lengths,
            self.group_size,
            np.random.default_rng([self.seed, epoch, self.share.rank, number]),
            longest_first=epoch == number == 0,
            groups_generator=np.random.default_rng([self.seed, epoch, number]),  # without the rank: like meets like
            num_groups=min(fewest, self.buffer_size) // self.group_size if self.group_size else None,
        )

    def _rows(self, examples: list[dict[str, Any]]) -> list[Row]:
        rows = [self._row(**example) for example in examples]
        if self.histories is None:
            return rows
        histories = self.histories.read([row.user_index for row in rows], [row.gate_end for row in rows])
        return [row._replace(history=history) for row, history in zip(rows, histories, strict=True)]

    def _row(self, example_id: str, user_index: int, gate_end: int, prompt: Any, completion: Any) -> Row:
        prompt_ids, completion_ids = self.encode(prompt, completion)
        check_ids("train", example_id, len(prompt_ids), len(completion_ids))
        if (length := len(prompt_ids) + len(completion_ids)) > self.max_tokens:
            raise UserError(
                f'the "train" example {example_id} has {length} tokens, the base model\'s context is '
                f"{self.max_tokens}: lower prompt.max_items or tasks.dense_window and convert again"
            )
        ids = np.array([*prompt_ids, *completion_ids], dtype=np.int32)
        return Row(ids, len(completion_ids), user_index, gate_end)

    # ---- how long ----

    def check_lengths(self) -> None:
        """Look at the texts of all examples, each process at its part: none may be longer than the context.

        Raises:
            UserError: some are; names the longest and how many, in all processes. A file that cannot be read.
        """
        framing = functools.cache(functools.partial(framing_bytes, self.encode.tokenizer))
        pieces, too_long = cut(self.groups, *self.bounds), TooLong(self.max_tokens, "train")
        total = sum(piece.rows for piece in pieces)
        if self.max_tokens == sys.maxsize:  # the model names no context
            return
        with tqdm(total=total, desc="check lengths", unit="example", unit_scale=True) as progress:
            for path, group, first, rows in pieces:
                table = _readable(Path(path), _group, path, group, COLUMNS).slice(first, rows)
                doubtful = np.flatnonzero(most_tokens(table, framing) > self.max_tokens)
                for batch in table.take(pa.array(doubtful)).combine_chunks().to_batches():
                    for example_id, _, _, prompt, completion in rows_of(batch):
                        too_long.see(sum(map(len, self.encode(prompt, completion))), example_id)
                progress.update(rows)
        parts = gather_object([(too_long.longest, too_long.example_id, too_long.count)])
        too_long.longest, too_long.example_id, _ = max(parts)
        too_long.count = sum(count for _, _, count in parts)
        too_long.check(self.num_examples)

    # ---- some of them ----

    def first(self, count: int) -> list[Row]:
        """The first rows of the dataset, the same for all processes."""
        return self._rows(list(read_pieces(cut(self.groups, 0, count))))

    def probe(self, count: int) -> list[Row]:
        """Of the first rows those whose gate has read most."""
        return sorted(self.first(PROBED), key=lambda row: -row.gate_end)[:count]

    def statistics_histories(self) -> list[Array]:
        """Histories by which the gate standardises, none of them empty: all of them, or of many a seeded choice.

        Row groups are drawn, and of each its share: reading single rows would cost as much as reading all.

        Raises:
            UserError: as StoredHistories.read.
        """
        assert self.histories is not None
        generator = np.random.default_rng([self.seed, 0])
        share = max(STATISTICS_SHARE, -(-STATISTICS_HISTORIES // len(self.groups)))
        found: list[Array] = []
        for number in generator.permutation(len(self.groups)):
            path, group = self.groups[number][:2]
            table = _readable(Path(path), _group, path, group, ["user_index", "gate_end"])
            users, ends = (table[name].to_numpy() for name in table.column_names)
            chosen = np.flatnonzero(ends)
            if len(chosen) > share:
                chosen = np.sort(generator.choice(chosen, share, replace=False))
            found += self.histories.read(users[chosen], ends[chosen])
            if len(found) >= STATISTICS_HISTORIES:
                break
        return found[:STATISTICS_HISTORIES]
