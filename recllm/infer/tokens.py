"""Prompts and answers as token ids, checked against the model's context: the same for every engine.

Chat messages and texts enter; token ids leave (model/chat.py says how an answer is tokenised and ended).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from recllm.errors import UserError
from recllm.infer.constrained import Grammar, compile_grammar
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

    def grammar(self, json_schema: Mapping[str, Any] | None) -> Grammar | None:
        """What holds answers to a JSON schema, compiled once for a tokenizer; None without a schema.

        Raises:
            UserError: xgrammar is not installed; a schema or a tokenizer that it does not take (constrained.py).
        """
        return None if json_schema is None else compile_grammar(json_schema, self.tokenizer, self.vocabulary)

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

    def read_held(self, tokens: Ids, grammar: Grammar) -> Generation:
        """Tokens that were held to a grammar, up to eos, letter by letter as they stand.

        Raises:
            RuntimeError: a finished text that is none of the grammar's: the engine did not hold it.
        """
        finished = grammar.end in tokens
        kept = tokens[: tokens.index(grammar.end)] if finished else tokens
        # a special token within a string was allowed as the text that it is
        text = str(self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if finished and not grammar.accepts(text):
            raise RuntimeError(f"the engine wrote {text!r}, which its JSON schema does not allow")
        return Generation(text, finished)


def continued(prompts: Sequence[Prompt], lines: Sequence[str]) -> list[Prompt]:
    """Prompts whose answers have begun with a line each: what follows it is scored or generated next.

    An answer with a rationale is asked for in two steps, with the same tokens as in training (model/chat.py):

        rationales = engine.generate(prompts, listed=[True] * len(prompts), …)      up to its newline, or cut off
        engine.score(continued(prompts, [made.text for made in rationales]), labels, …)

    A rationale that was cut off is ended here, as the answer has to begin somewhere: count those not `finished`.

    >>> continued([[{"role": "user", "content": "Next?"}]], ["They compared two."])[0][-1]
    {'role': 'assistant', 'content': 'They compared two.\\n'}
    """
    longer: list[Prompt] = []
    for prompt, line in zip(prompts, lines, strict=True):
        begun = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
        turns = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
        longer.append([*turns, {"role": "assistant", "content": f"{begun}{line}\n"}])
    return longer


def per_token(scores: np.ndarray, candidates: Sequence[Sequence[Ids]]) -> np.ndarray:
    """Scores of answers (N, C) divided by the number of their tokens; NaN stays where a list is shorter."""
    lengths = np.ones_like(scores)
    for row, answers in zip(lengths, candidates):
        row[: len(answers)] = [len(answer) for answer in answers]
    return scores / lengths


def listed_by_default(prompts: Sequence[Prompt]) -> list[bool]:
    """Whether each answer continues a list: that of a prompt that ends in an assistant message."""
    return [prompt[-1]["role"] == "assistant" for prompt in prompts]
