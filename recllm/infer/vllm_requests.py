"""What is asked of vLLM, and how its answers are read: for the engine that evaluates and for the server.

    a title's likelihood      its tokens are forced one after the other, and each step returns the forced one's log-
                              probability: the prompt's keys and values come from the prefix cache
    a node of the item trie   one step, which returns the log-probabilities of the allowed next tokens; where the trie
                              does not branch for a while its tokens are forced at once

Forcing is vLLM's own in model runner V2 (trace replay); model runner V1, which also runs on CPUs, gets `ForcedTokens`.
Log-probabilities are of the model's whole vocabulary, from raw logits. Imports vLLM.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from vllm import SamplingParams
from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from recllm.infer.beams import Beam
from recllm.infer.vllm_plugin.gates import GATE_WEIGHTS

FORCED = "recllm_forced_tokens"  # of extra_args: the tokens that ForcedTokens puts
TOP = 1024  # of a node with many children: the likeliest tokens, asked first

Gate = Any  # what a request sends as gate_weights: lists of numbers; None without


def forced(answer: Sequence[int], gate: Gate, runner_v2: bool) -> SamplingParams:
    """Parameters of a request that is made to write `answer`."""
    tokens = list(map(int, answer))
    extra = {} if gate is None else {GATE_WEIGHTS: gate}
    own: dict[str, Any] = {"trace_decode_token_ids": tokens} if runner_v2 else {}
    if not runner_v2:
        extra[FORCED] = tokens
    return SamplingParams(
        temperature=0, max_tokens=len(tokens), logprobs=0, ignore_eos=True, detokenize=False, extra_args=extra, **own
    )


def read_forced(output: Any, answer: Sequence[int]) -> float:
    """Σ log p of a forced answer, in nats.

    Raises:
        RuntimeError: the engine wrote other tokens: the score would be that of another title.
    """
    return float(sum(_steps(output, answer)))


def _steps(output: Any, answer: Sequence[int] | npt.NDArray[np.integer]) -> list[float]:
    """Log-probability of each forced token."""
    (written,) = output.outputs
    if list(written.token_ids) != list(answer):
        raise RuntimeError(f"vLLM wrote {list(written.token_ids)} where {list(answer)} was forced: its score is void")
    return [step[token].logprob for step, token in zip(written.logprobs, answer, strict=True)]


def next_tokens(tokens: npt.NDArray[np.integer], gate: Gate, everything: bool = False) -> SamplingParams:
    """Parameters of a one-step request for the log-probabilities of the tokens that may come next.

    Few are asked for by name. Of many the likeliest of the vocabulary are, which mostly hold the best of them;
    `everything` asks for the whole vocabulary.
    """
    asked: dict[str, Any] = {"logprobs": -1 if everything else TOP}
    if len(tokens) <= MAX_LOGPROB_TOKEN_IDS:
        asked = {"logprob_token_ids": tokens.tolist()}
    extra = None if gate is None else {GATE_WEIGHTS: gate}
    return SamplingParams(
        temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, flat_logprobs=True, extra_args=extra, **asked
    )


def read_next(output: Any, tokens: npt.NDArray[np.integer], width: int) -> npt.NDArray[np.float64] | None:
    """Log-probabilities of `tokens`, (C,): those that were not returned are −inf.

    None where the answer does not hold the best `width` + 1 of them for certain, so that everything has to be asked:
    with one more than a beam keeps, what it cuts is known to be at least as likely as what was not returned.

    Raises:
        RuntimeError: the engine returned other tokens than were asked for.
    """
    found = output.outputs[0].logprobs
    start, end = found.start_indices[0], found.end_indices[0]
    ids, values = np.array(found.token_ids[start:end]), np.array(found.logprobs[start:end], dtype=np.float64)
    order = np.argsort(ids, kind="stable")
    places = np.minimum(np.searchsorted(ids, tokens, sorter=order), len(ids) - 1)
    known = ids[order[places]] == tokens
    by_name = len(tokens) <= MAX_LOGPROB_TOKEN_IDS
    if not known.all() if by_name else len(np.unique(ids)) <= MAX_LOGPROB_TOKEN_IDS:
        raise RuntimeError(f"vLLM returned {len(ids)} log-probabilities that are not those asked for: they are void")
    if known.sum() < min(width + 1, len(tokens)):
        return None
    return np.where(known, values[order[places]], -np.inf)


class BeamDriver:
    """The beams of many prompts, step by step: what is asked of vLLM next, and what its answers mean.

        while asked := driver.requests():
            driver.take(outputs of the asked)

    Args:
        beams: one a prompt, fresh.
        rows: the prompts' token ids.
        gates: a gate a prompt; Nones without.
        runner_v2: of the engine.
    """

    def __init__(
        self, beams: Sequence[Beam], rows: Sequence[list[int]], gates: Sequence[Gate], runner_v2: bool
    ) -> None:
        self.beams, self.rows, self.gates, self.runner_v2 = beams, rows, gates, runner_v2
        self._known: list[dict[int, npt.NDArray[np.float64]]] = [{} for _ in beams]  # of a node's choices
        self._asked: list[_Asked] = []
        self._whole: set[tuple[int, int]] = set()  # nodes of which everything has to be asked

    def requests(self) -> list[tuple[list[int], SamplingParams]]:
        """Token ids and parameters of what has to be known next; none when all beams are done."""
        self._advance()
        self._asked = [
            self._ask(b, int(node))
            for b, beam in enumerate(self.beams)
            for node in beam.frontier
            if int(node) not in self._known[b]
        ]
        return [(asked.row, asked.params) for asked in self._asked]

    def take(self, outputs: Sequence[Any]) -> None:
        """The answers to `requests`, in their order."""
        for asked, output in zip(self._asked, outputs, strict=True):
            known = self._known[asked.beam]
            if len(asked.nodes) > 1:
                for node, value in zip(asked.nodes, _steps(output, asked.tokens), strict=True):
                    known[node] = np.array([value])
                continue
            width = 1 if (asked.beam, asked.nodes[0]) in self._whole else self.beams[asked.beam].width
            values = read_next(output, asked.tokens, width)
            if values is None:
                self._whole.add((asked.beam, asked.nodes[0]))
            else:
                known[asked.nodes[0]] = values

    def _advance(self) -> None:
        """Every beam as far as what is known reaches."""
        for beam, known in zip(self.beams, self._known):
            while not beam.done and all(int(node) in known for node in beam.frontier):
                beam.advance(np.concatenate([known[int(node)] for node in beam.frontier]))

    def _ask(self, b: int, node: int) -> "_Asked":
        beam, gate = self.beams[b], self.gates[b]
        row = self.rows[b] + beam.trie.path(node)
        nodes, tokens, ending = [], list[int](), node
        children = beam.trie.children_of([node], beam.blocked)
        while len(children.tokens) == 1:
            nodes.append(ending)
            tokens.append(int(children.tokens[0]))
            ending = int(children.nodes[0])
            children = beam.trie.children_of([ending], beam.blocked)
        if len(nodes) > 1:
            return _Asked(b, nodes, np.array(tokens), row, forced(tokens, gate, self.runner_v2))
        choices = beam.trie.children_of([node], beam.blocked).tokens
        return _Asked(b, [node], choices, row, next_tokens(choices, gate, everything=(b, node) in self._whole))


class _Asked(NamedTuple):
    """One request of a driver: of a node's choices, or of several nodes of which each has one."""

    beam: int
    nodes: list[int]
    tokens: npt.NDArray[np.integer]  # the node's choices, or each node's only one
    row: list[int]
    params: SamplingParams


class ForcedTokens(LogitsProcessor):
    """Model runner V1: a request with FORCED in its extra_args writes those tokens.

    Log-probabilities are taken from the raw logits, before this.
    """

    def __init__(
        self,
        vllm_config: Any,  # noqa: ARG002  # vLLM hands it over
        device: torch.device,
        is_pin_memory: bool,  # noqa: ARG002  # the same
    ) -> None:
        self.device = device
        self._asked: dict[int, tuple[list[int], list[int]]] = {}  # row → (tokens, those written so far)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what is no list of token ids.

        Raises:
            ValueError: anything else.
        """
        asked = (sampling_params.extra_args or {}).get(FORCED)
        if asked is None:
            return
        if not isinstance(asked, list) or not asked or not all(type(token) is int and token >= 0 for token in asked):
            raise ValueError(f"{FORCED} is {asked!r}, a list of token ids is expected")

    def is_argmax_invariant(self) -> bool:
        """It decides what greedy sampling takes."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Requests that come, go and move."""
        process_dict_updates(self._asked, batch_update, self._new)

    @staticmethod
    def _new(
        params: SamplingParams, _: list[int] | None, output_tokens: list[int]
    ) -> tuple[list[int], list[int]] | None:
        asked = (params.extra_args or {}).get(FORCED)
        return (asked, output_tokens) if asked else None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """(rows, V): the forced token of each such row far above the others."""
        due = [(row, asked[len(done)]) for row, (asked, done) in self._asked.items() if len(done) < len(asked)]
        if due:
            rows, tokens = torch.tensor(due, device=self.device).t()
            logits[rows, tokens] = torch.finfo(logits.dtype).max
        return logits
