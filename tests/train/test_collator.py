import numpy as np
import pytest
import torch

from recllm.errors import UserError
from recllm.model import chat
from recllm.model.chat import encode
from recllm.train.collator import COLUMNS, IGNORE, Collator, Row, tokenize


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
        row = Row(np.array([1, 2], dtype=np.int32), 1, example["user_index"], example["gate_end"])
        shown = collator([row])["history_items"][0]
        titles = example["completion"][0]["content"].splitlines()
        begin = dataset.sequences.offsets[example["user_index"]]
        before = dataset.sequences.items[begin : begin + example["gate_end"]].tolist()
        assert [i for i in shown.tolist() if i >= 0] == before
        assert example["gate_end"] == example["history_end"]  # of a window; a continued list's lies before the list
        window = dataset.sequences.items[begin + example["history_end"] :][: len(titles)]
        assert [dataset.titles[i] for i in window] == titles


def batches(dataset, split="train"):
    return dataset.example_batches(split, COLUMNS, rows=7)


@pytest.mark.parametrize("split", ["train", "valid"])  # valid: prompts that end in an unfinished answer
def test_tokenizing_gives_the_ids_of_encode_in_order(dataset, tiny_tokenizer, split, monkeypatch):
    for limit in (1 << 18, 5):  # 5: what is remembered is forgotten again and again
        monkeypatch.setattr(chat, "REMEMBERED_LINES", limit)
        monkeypatch.setattr(chat, "REMEMBERED_PROMPTS", limit)
        tokenized = tokenize(batches(dataset, split), tiny_tokenizer, 10_000, split)
        examples = dataset.examples(split, COLUMNS).to_pylist()
        assert len(tokenized) == len(examples)
        for number, example in enumerate(examples):
            row = tokenized[number]
            prompt, completion = encode(tiny_tokenizer, example["prompt"], example["completion"])
            assert row.input_ids.tolist() == prompt + completion
            assert row.completion_tokens == len(completion)
            assert (row.user_index, row.gate_end) == (example["user_index"], example["gate_end"])
            assert tokenized.lengths[number] == len(prompt) + len(completion)


def test_a_line_is_tokenised_once(dataset, tiny_tokenizer, monkeypatch):
    lines, turns = [], []
    tokenise, template = chat._encode_lines, chat._turn_ids
    monkeypatch.setattr(chat, "_encode_lines", lambda own, new: lines.extend(new) or tokenise(own, new))
    monkeypatch.setattr(chat, "_turn_ids", lambda own, new: turns.append(new) or template(own, new))
    tokenize(batches(dataset), tiny_tokenizer, 10_000)
    assert len(lines) == len(set(lines)) == dataset.num_items
    contents = [turn[0]["content"] for turn in turns]
    assert len(contents) == len(set(contents)) < 10  # a dense task asks everybody in one of a few phrasings


def test_examples_longer_than_the_context_are_counted_not_cut(dataset, tiny_tokenizer):
    lengths = tokenize(batches(dataset, "valid"), tiny_tokenizer, 10_000).lengths
    limit = int(lengths.max()) - 1
    over = int((lengths > limit).sum())
    with pytest.raises(UserError, match=rf'{over} of {len(lengths)} "valid" .* {limit} tokens .*prompt\.max_items'):
        tokenize(batches(dataset, "valid"), tiny_tokenizer, limit, "valid")


@pytest.mark.parametrize("split", ["train", "valid"])
def test_no_examples_is_an_error_that_names_the_split(tiny_tokenizer, split):
    with pytest.raises(UserError, match=f'0 "{split}" examples'):
        tokenize([], tiny_tokenizer, 100, split)
