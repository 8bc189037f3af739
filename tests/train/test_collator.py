import numpy as np
import pyarrow as pa
import pytest
import torch

from recllm import schema
from recllm.errors import UserError
from recllm.train.collator import COLUMNS, IGNORE, Collator, Row, pad_left, tokenize


def rows() -> list[Row]:
    return [
        Row(np.array([5, 6, 7, 8, 9], dtype=np.int32), 2, 0, 3),
        Row(np.array([5, 1, 2], dtype=np.int32), 1, 1, 0),
    ]


def test_a_batch_is_left_padded_with_the_loss_on_the_completion():
    batch = Collator(pad_token_id=2)(rows())  # 2 is also the last token of the second row, as eos is a pad token
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [2, 2, 5, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORE] * 3 + [8, 9], [IGNORE] * 4 + [2]]
    assert batch["logits_to_keep"] == 2 + 1
    assert "history_items" not in batch


def test_histories_end_where_the_example_says(dataset):
    batch = Collator(0, dataset, max_items=2)(rows())
    first = dataset.sequences.items[:3].tolist()
    assert batch["history_items"].tolist() == [first[1:], [-1, -1]]
    assert batch["history_items"].dtype == torch.int64


def test_no_gate_of_a_dense_window_sees_a_target(dataset):
    examples = dataset.examples("train")
    collator = Collator(0, dataset, max_items=50)
    for example in examples.to_pylist():
        row = Row(np.array([1, 2], dtype=np.int32), 1, example["user_index"], example["history_end"])
        shown = collator([row])["history_items"][0]
        titles = example["completion"][0]["content"].splitlines()
        begin = dataset.sequences.offsets[example["user_index"]]
        before = dataset.sequences.items[begin : begin + example["history_end"]].tolist()
        assert [i for i in shown.tolist() if i >= 0] == before
        window = dataset.sequences.items[begin + example["history_end"] :][: len(titles)]
        assert [dataset.titles[i] for i in window] == titles


def test_padding_of_nothing_is_one_column():
    assert pad_left([np.array([]), np.array([])]).tolist() == [[-1], [-1]]


def test_tokenizing_keeps_order_and_every_token(dataset, tiny_tokenizer):
    examples = dataset.examples("train", COLUMNS)
    tokenized = tokenize(examples, tiny_tokenizer, 10_000)
    assert len(tokenized) == examples.num_rows
    for number in (0, examples.num_rows - 1):
        example, row = examples.slice(number, 1).to_pylist()[0], tokenized[number]
        assert (row.user_index, row.history_end) == (example["user_index"], example["history_end"])
        completion = row.input_ids[-row.completion_tokens :]
        assert tiny_tokenizer.decode(completion) == example["completion"][0]["content"]
        assert tokenized.lengths[number] == len(row.input_ids)


def test_examples_longer_than_the_context_are_counted_not_cut(dataset, tiny_tokenizer):
    lengths = tokenize(dataset.examples("train", COLUMNS), tiny_tokenizer, 10_000).lengths
    limit = int(lengths.max()) - 1
    over = int((lengths > limit).sum())
    with pytest.raises(UserError, match=rf"{over} of {len(lengths)} examples .* {limit} tokens .*prompt\.max_items"):
        tokenize(dataset.examples("train", COLUMNS), tiny_tokenizer, limit)


def test_no_examples_is_an_error(tiny_tokenizer):
    with pytest.raises(UserError, match="0 training examples"):
        tokenize(pa.Table.from_pylist([], schema=schema.EXAMPLES), tiny_tokenizer, 100)
