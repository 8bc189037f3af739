"""Examples → batches.

An Arrow table of examples (schema.EXAMPLES) and a tokenizer enter; left-padded tensors leave, with the loss on the
completion only and, for an instance-wise adapter, the histories that its gate reads.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import tqdm
from transformers import PreTrainedTokenizerBase

from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.model.chat import encode

IGNORE = -100  # label of a position without loss
COLUMNS = ["example_id", "user_index", "history_end", "prompt", "completion"]  # what training reads of an example


class Row(NamedTuple):
    """One tokenised example."""

    input_ids: np.ndarray  # prompt and completion, int32
    completion_tokens: int  # how many of them, at the end, carry the loss
    user_index: int
    history_end: int  # the gate reads positions [0, history_end) of this user


class TokenizedExamples(torch.utils.data.Dataset):
    """Examples tokenised once; token ids lie in one flat array, so that a million examples stay a few hundred MB."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
        self.completion_tokens = np.array([row.completion_tokens for row in rows], dtype=np.int64)
        self.user_indices = np.array([row.user_index for row in rows], dtype=np.int64)
        self.history_ends = np.array([row.history_end for row in rows], dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self._tokens = np.concatenate([row.input_ids for row in rows]) if len(rows) else np.empty(0, np.int32)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> Row:
        """One example."""
        tokens = self._tokens[self._offsets[index] : self._offsets[index + 1]]
        return Row(
            tokens, int(self.completion_tokens[index]), int(self.user_indices[index]), int(self.history_ends[index])
        )


def tokenize(examples: pa.Table, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> TokenizedExamples:
    """Tokenise every example; none is cut or dropped.

    Raises:
        UserError: no example, or examples longer than `max_tokens` (the base model's context).
    """
    if not examples.num_rows:
        raise UserError("the dataset has 0 training examples, at least 1 is needed: check split and filters, convert")
    rows: list[Row] = []
    too_long: list[tuple[int, str]] = []
    with tqdm(total=examples.num_rows, desc="tokenise", unit="example", unit_scale=True) as progress:
        for batch in examples.to_batches(max_chunksize=1000):
            for example in batch.to_pylist():
                row = _row(example, tokenizer)
                rows.append(row)
                if len(row.input_ids) > max_tokens:
                    too_long.append((len(row.input_ids), example["example_id"]))
            progress.update(batch.num_rows)
    _check_lengths(too_long, len(rows), max_tokens)
    return TokenizedExamples(rows)


def _row(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Row:
    prompt, completion = encode(tokenizer, example["prompt"], example["completion"])
    if not prompt or not completion:
        raise UserError(
            f"example {example['example_id']}: {len(prompt)} prompt and {len(completion)} completion tokens, "
            "at least 1 of each is needed: check the template and the item texts"
        )
    tokens = np.array(prompt + completion, dtype=np.int32)
    return Row(tokens, len(completion), example["user_index"], example["history_end"])


def _check_lengths(too_long: list[tuple[int, str]], count: int, max_tokens: int) -> None:
    if too_long:
        tokens, example_id = max(too_long)
        raise UserError(
            f"{len(too_long)} of {count} examples are longer than the base model's context of {max_tokens} tokens "
            f"(the longest, {example_id}, has {tokens}): lower prompt.max_items or tasks.dense_window and convert again"
        )


class Collator:
    """Rows → one batch, every row right-aligned.

    input_ids, attention_mask, position_ids, labels are (B, T) int64; labels are -100 outside the completion.
    logits_to_keep is the longest completion + 1: the language-model head runs over so many last positions only.
    history_items (B, L) int64, item indices oldest first, -1 to the left of shorter histories; only with `histories`.
    """

    def __init__(self, pad_token_id: int, histories: Dataset | None = None, max_items: int = 200) -> None:
        self.pad_token_id = pad_token_id
        self.histories = histories
        self.max_items = max_items

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Pad and stack."""
        input_ids = pad_left([row.input_ids for row in rows], self.pad_token_id)
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        completions = torch.tensor([row.completion_tokens for row in rows])
        from_the_end = torch.arange(input_ids.shape[1], 0, -1)  # (T,): T, T-1, …, 1
        mask = (from_the_end <= lengths[:, None]).long()  # from lengths: a pad id may be a real token (eos)
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            "labels": torch.where(from_the_end <= completions[:, None], input_ids, IGNORE),
            "logits_to_keep": int(completions.max()) + 1,
        }
        if self.histories is not None:
            batch["history_items"] = pad_left(
                [self.histories.history(row.user_index, row.history_end, self.max_items) for row in rows]
            )
        return batch


def pad_left(rows: Sequence[np.ndarray], value: int = -1) -> torch.Tensor:
    """(B, L) int64 from B rows of different length, `value` to the left of the shorter ones; L is at least 1.

    >>> pad_left([np.array([1, 2]), np.array([3])]).tolist()
    [[1, 2], [-1, 3]]
    """
    longest = max((len(row) for row in rows), default=0)
    padded = np.full((len(rows), max(1, longest)), value, dtype=np.int64)
    for line, row in zip(padded, rows):
        if len(row):
            line[-len(row) :] = row
    return torch.from_numpy(padded)
