"""Examples → batches.

Arrow batches of examples (schema.EXAMPLES) and a tokenizer enter; left-padded tensors leave, with the loss on the
completion only and what the adapter reads of each user: histories, representations or gate weights. Where not every
token is to count the same (weights.py), examples carry their class and the length of their rationale.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from accelerate.utils import tqdm
from transformers import PreTrainedTokenizerBase

from recllm.data.dataset import Dataset, pad_left
from recllm.errors import UserError
from recllm.model.chat import RememberingEncoder

IGNORE = -100  # label of a position without loss
COLUMNS = ["example_id", "user_index", "gate_end", "prompt", "completion"]  # what training reads of an example
WEIGHED = [*COLUMNS, "task", "label", "rationale"]  # and where not every token counts the same
Array = npt.NDArray[Any]


class Row(NamedTuple):
    """One tokenised example."""

    input_ids: Array  # prompt and completion, int32
    completion_tokens: int  # how many of them, at the end, carry the loss
    user_index: int
    gate_end: int  # the gate reads positions [0, gate_end) of this user
    given: tuple[str, Array] | None = None  # a forward argument of the adapter and this row's value of it
    example: int | None = None  # its number, where not every example counts the same: see TokenizedExamples.numbered
    history: Array | None = None  # what an encoder reads of this user, where it was read with the row (streaming.py)


class Told(NamedTuple):
    """What N examples say beside their texts."""

    kinds: list[tuple[str, str | None]]  # task and label, each pair once
    kind_numbers: Array  # (N,) places in `kinds`
    rationale_tokens: Array  # (N,) how many of the completion's tokens, from its first, are the rationale


def without_loss(index: int) -> int:
    """The index under which TokenizedExamples has the same example without loss.

    >>> without_loss(0)
    -1
    """
    return ~index


class TokenizedExamples(torch.utils.data.Dataset):
    """Examples tokenised once; token ids lie in one flat array, so that a million examples stay a few hundred MB."""

    def __init__(
        self, tokens: Array, lengths: Array, completion_tokens: Array, user_indices: Array, gate_ends: Array
    ) -> None:
        """`tokens` holds the ids of all N examples, one after the other; the others are (N,), as in `Row`."""
        self.lengths, self.completion_tokens = lengths, completion_tokens
        self.user_indices, self.gate_ends = user_indices, gate_ends
        self.argument: str | None = None
        self.table: Array = np.empty(0)  # with `argument`: see give()
        self.told: Told | None = None  # of examples that were read with the columns WEIGHED
        self.numbered = False  # each row carries its number: the trainer weighs it
        self._tokens = tokens
        self._offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.lengths)

    def give(self, argument: str, table: Array) -> None:
        """Have each row carry its own line of `table` (N, …): what the adapter's forward gets as `argument`.

        "representation" (N, D) or "gate_weights" (N, K); the table may be memory-mapped.

        Raises:
            UserError: it does not have one line for each example.
        """
        if len(table) != len(self):
            raise UserError(f"{argument} has {len(table)} rows, the examples are {len(self)}: give one row for each")
        self.argument, self.table = argument, table

    def __getitem__(self, index: int) -> Row:
        """One example; ~index (`without_loss`) is the same example with no loss on any token."""
        example = ~index if index < 0 else index
        tokens = self._tokens[self._offsets[example] : self._offsets[example + 1]]
        completion = 0 if index < 0 else int(self.completion_tokens[example])
        given = None if self.argument is None else (self.argument, self.table[example])
        number = example if self.numbered else None
        return Row(tokens, completion, int(self.user_indices[example]), int(self.gate_ends[example]), given, number)


def tokenize(
    batches: Iterable[pa.RecordBatch],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    split: str = "train",
    total: int | None = None,
) -> TokenizedExamples:
    """Tokenise every example; none is cut or dropped.

    Args:
        batches: columns COLUMNS, or WEIGHED: the examples then tell their kinds and rationales (`told`).
        tokenizer: of the base model.
        max_tokens: the base model's context.
        split: named in errors.
        total: number of examples, for the progress bar.

    Raises:
        UserError: no example, examples longer than `max_tokens`, a completion that does not begin with its rationale.
    """
    encode = RememberingEncoder(tokenizer)
    tokens = array("i")
    columns = [array("q") for _ in range(4)]  # length, completion tokens, user_index, gate_end
    kinds, told = dict[tuple[str, str | None], int](), [array("q") for _ in range(2)]  # kind, rationale tokens
    too_long = TooLong(max_tokens, split)
    with tqdm(total=total, desc=f"tokenise {split}", unit="example", unit_scale=True) as progress:
        for batch in batches:
            for example_id, user_index, gate_end, prompt, completion in rows_of(batch):
                prompt_ids, completion_ids = encode(prompt, completion)
                check_ids(split, example_id, len(prompt_ids), len(completion_ids))
                tokens.extend(prompt_ids)
                tokens.extend(completion_ids)
                length = len(prompt_ids) + len(completion_ids)
                too_long.see(length, example_id)
                for column, value in zip(columns, (length, len(completion_ids), user_index, gate_end)):
                    column.append(value)
            if "rationale" in batch.schema.names:
                for kind, rationale_tokens in _told(batch, encode, split):
                    told[0].append(kinds.setdefault(kind, len(kinds)))
                    told[1].append(rationale_tokens)
            progress.update(batch.num_rows)
    if not columns[0]:
        raise UserError(f'the dataset has 0 "{split}" examples, at least 1 is needed: check split and filters, convert')
    too_long.check(len(columns[0]))
    examples = TokenizedExamples(
        np.frombuffer(tokens, dtype=np.int32), *(np.frombuffer(column, dtype=np.int64) for column in columns)
    )
    if kinds:
        examples.told = Told(list(kinds), *(np.frombuffer(column, dtype=np.int64) for column in told))
    return examples


def rows_of(batch: pa.RecordBatch) -> Iterator[tuple[str, int, int, list[dict[str, str]], list[dict[str, str]]]]:
    """Values of COLUMNS row by row; messages are taken apart as flat columns, which is faster than row by row."""
    plain = [batch.column(name).to_pylist() for name in COLUMNS[:3]]
    return zip(*plain, _messages(batch.column("prompt")), _messages(batch.column("completion")), strict=True)


def _told(
    batch: pa.RecordBatch, encode: RememberingEncoder, split: str
) -> Iterator[tuple[tuple[str, str | None], int]]:
    """(task, label) of each row, and how many tokens its rationale has."""
    plain = [batch.column(name).to_pylist() for name in ("example_id", "task", "label", "rationale")]
    for example_id, task, label, rationale, completion in zip(*plain, _messages(batch.column("completion"))):
        if rationale is not None and not completion[0]["content"].startswith(f"{rationale}\n"):
            raise UserError(
                f'"{split}" example {example_id}: its completion does not begin with the line "{rationale}", which is '
                "its rationale: convert again"
            )
        yield (task, label), 0 if rationale is None else encode.count_before_last_line(completion)


def _messages(column: pa.ListArray) -> Iterator[list[dict[str, str]]]:
    flat = column.flatten()
    fields = (flat.field(flat.type.get_field_index(name)).to_pylist() for name in ("role", "content"))
    messages = iter([{"role": role, "content": content} for role, content in zip(*fields)])
    for count in column.value_lengths().to_pylist():
        yield [next(messages) for _ in range(count)]


def check_ids(split: str, example_id: str, prompt: int, completion: int) -> None:
    """Refuse an example without prompt or completion tokens.

    Raises:
        UserError: with its name.
    """
    if not prompt or not completion:
        raise UserError(
            f'"{split}" example {example_id}: {prompt} prompt and {completion} completion tokens, '
            "at least 1 of each is needed: check the template and the item texts"
        )


class TooLong:
    """Counts examples beyond the context and keeps the longest one's name."""

    def __init__(self, max_tokens: int, split: str) -> None:
        self.max_tokens, self.split = max_tokens, split
        self.count, self.longest, self.example_id = 0, 0, ""

    def see(self, length: int, example_id: str) -> None:
        """One example, of `length` tokens."""
        if length > self.max_tokens:
            self.count += 1
            if length > self.longest:
                self.longest, self.example_id = length, example_id

    def check(self, examples: int) -> None:
        """Refuse those that are too long, of so many examples.

        Raises:
            UserError: there are any; names the longest.
        """
        if self.count:
            raise UserError(
                f'{self.count} of {examples} "{self.split}" examples are longer than the base model\'s context of '
                f"{self.max_tokens} tokens (the longest, {self.example_id}, has {self.longest}): "
                "lower prompt.max_items or tasks.dense_window and convert again"
            )


class Collator:
    """Rows → one batch, every row right-aligned.

    input_ids, attention_mask, position_ids, labels are (B, T) int64; labels are -100 outside the completion.
    logits_to_keep is the longest completion + 1: the language-model head runs over so many last positions only.
    representation (B, D) or gate_weights (B, …) float32 where the examples carry them (`TokenizedExamples.give`);
    otherwise, where rows carry their histories or with `histories`, history_items (B, L) int64: item indices or event
    codes oldest first, -1 to the left of shorter histories. examples (B,) int64, their numbers, where the examples are
    numbered.
    """

    def __init__(self, pad_token_id: int, histories: Dataset | None = None, max_items: int = 200) -> None:
        self.pad_token_id = pad_token_id
        self.histories = histories
        self.max_items = max_items

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Pad and stack."""
        input_ids = torch.from_numpy(pad_left([row.input_ids for row in rows], self.pad_token_id))
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        completions = torch.tensor([row.completion_tokens for row in rows])
        from_the_end = torch.arange(input_ids.shape[1], 0, -1)  # (T,): T, T-1, …, 1
        mask = (from_the_end <= lengths[:, None]).long()  # from lengths: a pad id may be a real token (eos)
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            "labels": torch.where(from_the_end <= completions[:, None], input_ids, IGNORE),
            "logits_to_keep": max(int(completions.max()), 1) + 1,
        }
        if given := [row.given for row in rows if row.given is not None]:
            values = np.stack([np.asarray(value, dtype=np.float32) for _, value in given])
            batch[given[0][0]] = torch.from_numpy(values)
        elif carried := [row.history for row in rows if row.history is not None]:
            batch["history_items"] = torch.from_numpy(pad_left(carried))
        elif self.histories is not None:
            histories = [self.histories.read(row.user_index, row.gate_end, self.max_items) for row in rows]
            batch["history_items"] = torch.from_numpy(pad_left(histories))
        if numbers := [row.example for row in rows if row.example is not None]:
            batch["examples"] = torch.tensor(numbers)
        return batch
