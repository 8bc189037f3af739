"""Prompts and answers as token ids, checked against the model's context: the same for every engine.

Chat messages and texts enter; token ids leave (model/chat.py says how an answer is tokenised and ended).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from recllm.errors import UserError
from recllm.infer.item_trie import ItemTrie
from recllm.model.chat import answer_ids, prompt_ids

Prompt = Sequence[dict[str, str]]
Ids = list[int]


class Generation(NamedTuple):
    """A generated answer; `finished` says that it ended by itself (eos, or the newline of a list) within the limit."""

    text: str
    finished: bool


class Tokens:
    """Tokenises for one model.

    Args:
        tokenizer: the model's.
        context: tokens that the model reads at most; None: not limited.
        vocabulary: token ids that the model knows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int | None, vocabulary: int) -> None:
        self.tokenizer, self.context, self.vocabulary = tokenizer, context, vocabulary

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, config: Any) -> "Tokens":
        """By the text config of a model."""
        return cls(tokenizer, getattr(config, "max_position_embeddings", None), config.vocab_size)

    def num_tokens(self, answers: Sequence[Sequence[str]]) -> np.ndarray:
        """Tokens of each answer with its terminator, (N, C); 0 in the columns that a shorter list lacks."""
        counts = np.zeros((len(answers), max(map(len, answers), default=0)), dtype=np.int64)
        known: dict[str, int] = {}
        for row, texts in zip(counts, answers):
            for column, text in enumerate(texts):
                if text not in known:
                    known[text] = len(answer_ids(self.tokenizer, text))
                row[column] = known[text]
        return counts

    def pairs(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> tuple[list[Ids], list[list[Ids]]]:
        """Prompts and the answers to each; one list of texts for many prompts stays one list.

        Raises:
            UserError: a prompt without answers; a prompt that with its longest answer exceeds the context.
        """
        if len(prompts) != len(answers):
            raise ValueError(
                f"{len(prompts)} prompts and {len(answers)} lists of answers: one list a prompt is expected"
            )
        known: dict[str, Ids] = {}  # a catalogue's titles come again and again
        lists: dict[int, list[Ids]] = {}
        rows = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        candidates = []
        for texts in answers:
            if id(texts) not in lists:
                if not texts:
                    raise UserError("a prompt has 0 answers to score, at least 1 is needed: check its candidates")
                for text in texts:
                    if text not in known:
                        known[text] = answer_ids(self.tokenizer, text)
                lists[id(texts)] = [known[text] for text in texts]
            candidates.append(lists[id(texts)])
        self.check_lengths([len(row) + max(map(len, texts)) for row, texts in zip(rows, candidates)])
        return rows, candidates

    def for_ranking(self, prompts: Sequence[Prompt], trie: ItemTrie) -> list[Ids]:
        """Prompts whose answers are looked for in a trie.

        Raises:
            UserError: a prompt that with the longest title exceeds the context; a trie of another tokenizer.
        """
        if (highest := int(trie.tokens.max())) >= self.vocabulary:
            raise UserError(
                f"the trie has the token {highest}, the model knows 0 to {self.vocabulary - 1}: build the trie with "
                "the model's own tokenizer"
            )
        rows = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        self.check_lengths([len(row) + trie.depth for row in rows])
        return rows

    def for_generation(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Ids]:
        """Prompts that are continued freely.

        Raises:
            UserError: a prompt that with max_new_tokens exceeds the context.
        """
        rows = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        advice = f"lower protocol.decoding.max_new_tokens ({max_new_tokens} of them), or prompt.max_items and convert"
        self.check_lengths([len(row) + max_new_tokens for row in rows], f"{advice} again")
        return rows

    def check_lengths(self, lengths: list[int], advice: str = "lower prompt.max_items and convert again") -> None:
        """Refuse rows beyond the context.

        Raises:
            UserError: names the longest.
        """
        if self.context and lengths and max(lengths) > self.context:
            raise UserError(
                f"prompt {int(np.argmax(lengths))} with its answer has {max(lengths)} tokens, the model reads at most "
                f"{self.context}: {advice}"
            )

    def read(self, tokens: Ids, listed: bool) -> Generation:
        """Generated tokens as text, up to eos, or to the newline of a `listed` answer; neither is part of it."""
        eos = self.tokenizer.eos_token_id
        finished = eos is not None and eos in tokens
        kept = tokens[: tokens.index(eos)] if eos is not None and finished else tokens
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        if listed and "\n" in text:
            text, finished = text.split("\n", 1)[0], True
        return Generation(text, finished)


def per_token(scores: np.ndarray, candidates: Sequence[Sequence[Ids]]) -> np.ndarray:
    """Scores of answers (N, C) divided by the number of their tokens; NaN stays where a list is shorter."""
    lengths = np.ones_like(scores)
    for row, answers in zip(lengths, candidates):
        row[: len(answers)] = [len(answer) for answer in answers]
    return scores / lengths


def listed_by_default(prompts: Sequence[Prompt]) -> list[bool]:
    """Whether each answer continues a list: that of a prompt that ends in an assistant message."""
    return [prompt[-1]["role"] == "assistant" for prompt in prompts]
