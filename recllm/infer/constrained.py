"""Holding generated tokens to a grammar, with xgrammar.

A JSON schema and a tokenizer enter; a compiled `Grammar` leaves, and for Transformers a logits processor that allows a
row what the grammar allows after the tokens it has written, and the end of the answer only where the grammar ends.
vLLM is sent the grammar's text, and does the same with the same library. xgrammar is imported when a grammar is
compiled, and not before.
"""

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from recllm.errors import UserError
from recllm.infer.json_grammar import json_grammar

_COMPILERS: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[int, Any]]" = weakref.WeakKeyDictionary()


class Grammar(NamedTuple):
    """A grammar for one tokenizer."""

    text: str  # EBNF
    compiled: Any  # xgrammar.CompiledGrammar
    end: int  # the token that ends an answer

    def matcher(self) -> Any:
        """The state of one answer, at its beginning."""
        import xgrammar

        return xgrammar.GrammarMatcher(self.compiled, override_stop_tokens=[self.end])

    def accepts(self, text: str) -> bool:
        """Whether a whole text is one of the grammar's."""
        matcher = self.matcher()
        return bool(matcher.accept_string(text) and matcher.is_completed())


def compile_grammar(schema: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Grammar:
    """The grammar of a JSON schema, compiled once for a tokenizer (xgrammar's compiler remembers them).

    Args:
        schema: as `json_grammar` reads it.
        tokenizer: whose tokens are allowed.
        vocabulary: width of the model's logits, which may be larger than the tokenizer's.

    Raises:
        UserError: xgrammar is not installed, or cannot read the tokenizer; a tokenizer without eos; a schema that
            `json_grammar` or xgrammar refuses.
    """
    try:
        import xgrammar
    except ImportError as error:
        raise UserError(
            f'an answer under a JSON schema needs xgrammar ({error}): run `pip install "recllm[actions]"`'
        ) from None
    text = json_grammar(schema)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no eos token to end an answer with: set one")
    compilers = _COMPILERS.setdefault(tokenizer, {})
    try:
        if vocabulary not in compilers:
            info = xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=vocabulary, stop_token_ids=[tokenizer.eos_token_id]
            )
            compilers[vocabulary] = xgrammar.GrammarCompiler(info, max_threads=1)
        compiled = compilers[vocabulary].compile_grammar(text)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"xgrammar refuses the JSON schema {dict(schema)!r} for the tokenizer of {tokenizer.name_or_path}: {error}"
        ) from error
    return Grammar(text, compiled, tokenizer.eos_token_id)


class Held(LogitsProcessor):
    """Holds each row of one call of generate() to a grammar; a row that has ended is left alone.

    A row whose scores have a NaN says nothing any more: it is ended there, and `stopped` has how many tokens it had
    written, which are no finished answer.

    Args:
        grammar: of all rows.
        count: rows.
    """

    def __init__(self, grammar: Grammar, count: int) -> None:
        self.matchers, self.end = [grammar.matcher() for _ in range(count)], grammar.end
        self.steps = 0
        self.stopped: dict[int, int] = {}  # row → tokens written before the NaN

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, V): −inf where a row's grammar does not allow the token.

        Raises:
            UserError: a row may write nothing, because no token of the tokenizer begins what the schema asks for.
        """
        import xgrammar

        if self.steps:
            self._accept(input_ids[:, -1].tolist())
        open_rows = [row for row in range(len(self.matchers)) if self._is_open(row)]
        unknown = scores.isnan().any(dim=-1).tolist()
        for row in [row for row in open_rows if unknown[row]]:
            self.stopped[row] = self.steps
            open_rows.remove(row)
            scores[row] = -torch.inf
            scores[row, self.end] = 0
        self.steps += 1
        allowed = xgrammar.allocate_token_bitmask(len(self.matchers), scores.shape[1])
        for row in open_rows:
            self.matchers[row].fill_next_token_bitmask(allowed, row)
        xgrammar.apply_token_bitmask_inplace(scores, allowed.to(scores.device), vocab_size=scores.shape[1])
        if torch.isneginf(scores.amax(dim=-1)).any():
            raise UserError("no token of the tokenizer goes on with an answer under the JSON schema: take other words")
        return scores

    def _is_open(self, row: int) -> bool:
        return row not in self.stopped and not self.matchers[row].is_terminated()

    def _accept(self, tokens: list[int]) -> None:
        for row, (matcher, token) in enumerate(zip(self.matchers, tokens, strict=True)):
            if self._is_open(row) and not matcher.accept_token(token):
                raise RuntimeError(f"token {token} was written against the grammar")
