"""Rendered examples to look at before anything is written.

A `Recipe` enters; text leaves: the first training and test examples of each task with their token counts.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from recllm.convert.examples import Converter, iterate_examples
from recllm.convert.pipeline import set_up
from recllm.errors import UserError
from recllm.recipe import Recipe

Message = dict[str, str]
TokenCounter = Callable[[list[Message], list[Message]], tuple[int, int]]  # (prompt, completion) → their tokens
POSITIONS = 4096  # interactions converted at a time until enough examples are found


def preview(recipe: Recipe, count: int, count_tokens: TokenCounter | None = None, tokenizer: str | None = None) -> str:
    """The first `count` examples of train and of test for every task, as text; nothing is written.

    Args:
        recipe: the run.
        count: examples of each task and split.
        count_tokens: tokens of a prompt and of its completion; the caller has the tokenizer. None prints characters.
        tokenizer: as `recllm.convert.pipeline.convert`.

    Raises:
        UserError: as `recllm.convert.pipeline.convert`; `count` below 1.
    """
    if count < 1:
        raise UserError(f"preview of {count} examples: ask for 1 or more, e.g. --preview 3")
    with tempfile.TemporaryDirectory(prefix="recllm-preview-") as folder:
        prepared, converter, _ = set_up(recipe, Path(folder), tokenizer)
        shown = _shown(prepared.sequences.batches(POSITIONS), converter, count, count_tokens)
    return "\n\n".join(block for blocks in shown.values() for block in blocks)


def _shown(
    batches: Iterable[pa.RecordBatch], converter: Converter, count: int, count_tokens: TokenCounter | None
) -> dict[tuple[str, str], list[str]]:
    shown: dict[tuple[str, str], list[str]] = {
        (split, task.name): [] for split in ("train", "test") for task in converter.tasks
    }
    for batch in batches:
        for split, task, examples in iterate_examples(batch, converter):
            blocks = shown.get((split, task))
            if blocks is not None and len(blocks) < count:
                wanted = examples.slice(0, count - len(blocks)).to_pylist()
                blocks += [_block(split, example, converter, count_tokens) for example in wanted]
        if all(len(blocks) >= count for blocks in shown.values()):
            break
    return shown


def _block(split: str, example: dict[str, Any], converter: Converter, count_tokens: TokenCounter | None) -> str:
    """One example: where it stands, its messages, its candidates, its length."""
    lines = [f"=== {split} {example['example_id']} ==="]
    for message in example["prompt"]:
        lines += [f"[prompt: {message['role']}]", message["content"]]
    for message in example["completion"]:
        lines += [f"[completion: {message['role']}]", message["content"]]
    if example["label"] is not None:
        lines.append(f"[label] {example['label']}")
    if example["choices"] is not None:
        lines.append("[choices] " + " | ".join(example["choices"]))
    if example["candidates"] is not None:
        lines.append("[candidates] " + " | ".join(converter.texts[item].as_py() for item in example["candidates"]))
    if example["session"] is not None:
        lines.append(f"[session] number {example['session']} of the user, from 0")
    read = "items" if converter.events is None else "events"
    lines.append(f"[gate] reads the {example['gate_end']} earlier {read} (at most history.max_items)")
    return "\n".join([*lines, _length(example, count_tokens)])


def _length(example: dict[str, Any], count_tokens: TokenCounter | None) -> str:
    parts = Counter({side: sum(len(m["content"]) for m in example[side]) for side in ("prompt", "completion")})
    unit = "characters"
    if count_tokens is not None:
        parts["prompt"], parts["completion"] = count_tokens(example["prompt"], example["completion"])
        unit = "tokens"
    return f"[length] prompt {parts['prompt']} {unit}, completion {parts['completion']} {unit}"
