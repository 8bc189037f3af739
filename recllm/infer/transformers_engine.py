"""Scoring and generating with Transformers.

Prompts (chat messages), answers and, for an adapter that reads histories (a gate, a soft token), one history, its
representation or its gate a prompt enter; log-likelihoods of the answers, the best titles of a catalogue, or generated
texts, leave.

Scoring reads each prompt once and keeps its keys and values. The answers of a prompt are merged into a trie, so that
equal beginnings are read once too, and all of the trie's inner tokens are read together in a second forward:

    prompt without its last token | last prompt token, trie of answer 1, 2, …      position of a trie token = its depth
    (keys and values kept)          a trie token sees the prompt, its ancestors and itself     behind the prompt

A 4D attention mask says who sees whom. An answer's last token is predicted and never read. This equals one forward per
(prompt, answer), which `TransformersEngine(…, share_prompts=False)` does: the way that is left for attention that
takes no such mask (flash attention, sliding windows, state-space layers).

With `one_forward` prompt and trie stand in one row and are read in one forward, under one mask. A closed set of short
answers costs then what reading its prompt does; the mask grows with the square of the row, so that long prompts with
many answers are cheaper in two.

Ranking a whole catalogue is a beam search over the trie of its titles (item_trie.py, beams.py). There the trie grows as
the search goes, and its tokens are appended to the prompt's keys and values depth by depth, under the same mask.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from recllm.data.dataset import pad_left
from recllm.errors import UserError
from recllm.infer.beams import Beam, Ranking, search
from recllm.infer.constrained import Grammar, Held
from recllm.infer.item_trie import ItemTrie
from recllm.infer.tokens import Generation, Prompt, Tokens, listed_by_default, per_token
from recllm.model.adapter import accepts_history

_LOGITS_BYTES = 512 << 20  # a batch's logits in fp32 stay below, whatever the vocabulary; four times that on a GPU

_PART_TOKENS = 2048  # of many answers read together: their mask grows with the square


class Trie(NamedTuple):
    """Answers of one prompt with shared beginnings merged. Node 0, the root, is the prompt's last token."""

    tokens: np.ndarray  # (S,) the tokens that are read
    depths: np.ndarray  # (S,) 0 for the root, 1 for an answer's first token
    visible: np.ndarray  # (S, S) bool: a node sees its ancestors and itself
    steps: list[tuple[np.ndarray, np.ndarray]]  # by answer: (nodes that predict, tokens predicted), equal length


class TransformersEngine:
    """Scores and generates with a model and its tokenizer, adapter or not.

    Args:
        model: a causal language model, or a PeftModel of this package or of stock PEFT.
        tokenizer: its tokenizer.
        batch_size: prompts in a forward at most.
        share_prompts: read each prompt once for all of its answers; None decides by the model's attention.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int, share_prompts: bool | None = None
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.config = model.config.get_text_config()
        self.tokens = Tokens.of(tokenizer, self.config)
        self.share_prompts = takes_tree_mask(self.config) if share_prompts is None else share_prompts
        self._separate_by_choice = share_prompts is False
        if self.share_prompts and not takes_tree_mask(self.config):
            raise UserError(
                f"share_prompts needs full attention with a mask of our own, this model has "
                f"{self.config._attn_implementation}: set model.attn_implementation to sdpa"
            )
        self.device = next(model.parameters()).device
        self._newest: tuple[list[list[int]], Trie] | None = None
        self._logits_bytes = _LOGITS_BYTES if self.device.type == "cpu" else 4 * _LOGITS_BYTES

    @torch.inference_mode()
    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[str]],
        histories: Sequence[np.ndarray] | None = None,
        gate_weights: np.ndarray | None = None,
        representations: np.ndarray | None = None,
        length_normalised: bool = False,
        progress: str | None = None,
        one_forward: bool = False,
    ) -> np.ndarray:
        """Log-likelihood in nats of each answer after its prompt, terminator included: (N, C) float64.

        Σ_t log p(answer_t | prompt, answer_<t), in fp32 from the model's logits; divided by the number of tokens where
        `length_normalised`. A prompt with fewer answers than the longest list has NaN in the remaining columns.

        Args:
            prompts: N lists of chat messages; one that ends in an assistant message is continued.
            answers: N lists of answers; one that ends in a newline is ended by it, any other by eos (model/chat.py).
                Prompts that are given the very same list share its trie.
            histories: N arrays of item indices for the gate or the soft token, oldest first.
            gate_weights: (N, K) or (N, layers, K), instead of histories.
            representations: (N, D) of the sequence encoder, instead of histories.
            progress: name for the progress bar; None shows none.
            one_forward: read each prompt together with all of its answers, in exactly one forward a batch: for closed
                sets. An engine made with share_prompts=False keeps to one row an answer.

        Raises:
            UserError: a prompt with its longest answer exceeds the model's context; one_forward for a model whose
                attention takes no mask of ours.
        """
        rows, candidates = self.tokens.pairs(prompts, answers)
        gates = self._gates(len(rows), histories, gate_weights, representations)
        scores = np.full((len(rows), max(map(len, candidates), default=0)), np.nan)
        score_batch = self._way(one_forward)
        with tqdm(total=len(rows), desc=progress, disable=progress is None, unit="prompt") as bar:
            for batch in self._batches(rows, candidates, one_forward):
                values = score_batch([rows[i] for i in batch], [candidates[i] for i in batch], gates, batch)
                for i, row in zip(batch, values, strict=True):
                    scores[i, : len(row)] = row
                bar.update(len(batch))
        return per_token(scores, candidates) if length_normalised else scores

    def num_tokens(self, answers: Sequence[Sequence[str]]) -> np.ndarray:
        """Tokens of each answer with its terminator, (N, C); 0 in the columns that a shorter list lacks."""
        return self.tokens.num_tokens(answers)

    def parts(self, answers: Sequence[str]) -> list[slice]:
        """Stretches of many answers, each small enough to be scored with one prompt: by the memory for logits."""
        most = min(_PART_TOKENS, self._logits_bytes // (4 * self.config.vocab_size))
        counts = self.num_tokens([[text] for text in answers])[:, 0].tolist()
        ends, held = [0], 0
        for position, count in enumerate(counts):
            if held and held + count > most:
                ends.append(position)
                held = 0
            held += count
        ends.append(len(counts))
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]

    @torch.inference_mode()
    def rank_titles(
        self,
        prompts: Sequence[Prompt],
        trie: ItemTrie,
        width: int,
        k: int | None = None,
        excluded: Sequence[npt.ArrayLike] | None = None,
        histories: Sequence[np.ndarray] | None = None,
        gate_weights: np.ndarray | None = None,
        representations: np.ndarray | None = None,
        length_normalised: bool = False,
        progress: str | None = None,
    ) -> list[Ranking]:
        """The best titles of a whole catalogue, by beam search: one ranking a prompt, in the order of the prompts.

        A title's score is what `score` gives it. With a width of at least the number of titles the ranking is exact.

        Args:
            prompts: N lists of chat messages; one that ends in an assistant message is continued.
            trie: of the catalogue, from this tokenizer and with the end that answers to these prompts have.
            width: beginnings of titles that are kept at each depth.
            k: titles in a ranking at most; None: as many as the width.
            excluded: N arrays of item indices that the prompt's user is not shown.
            histories: for the gate or the soft token; these three as in `score`.
            gate_weights: instead of histories.
            representations: instead of histories.
            length_normalised: rank by the mean over a title's tokens instead of their sum.
            progress: name for the progress bar; None shows none.

        Raises:
            UserError: a prompt with the longest title exceeds the model's context; all titles are excluded for a
                prompt; a trie of another tokenizer.
        """
        rows = self.tokens.for_ranking(prompts, trie)
        gates = self._gates(len(rows), histories, gate_weights, representations)
        beams = _beams(trie, len(rows), excluded, width, k, length_normalised)
        make_reader = _TreeReader if self.share_prompts else _PrefixReader
        with tqdm(total=len(rows), desc=progress, disable=progress is None, unit="prompt") as bar:
            for batch in self._ranking_batches(rows, min(width, trie.num_titles)):
                search([beams[i] for i in batch], make_reader(self, [rows[i] for i in batch], gates, batch))
                bar.update(len(batch))
        return [beam.ranking() for beam in beams]

    def check_ranking(self, prompts: Sequence[Prompt], trie: ItemTrie) -> None:
        """Find now what `rank_titles` would refuse of these prompts.

        Raises:
            UserError: a prompt with the longest title exceeds the model's context; a trie of another tokenizer.
        """
        self.tokens.for_ranking(prompts, trie)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        histories: Sequence[np.ndarray] | None = None,
        gate_weights: np.ndarray | None = None,
        representations: np.ndarray | None = None,
        max_new_tokens: int = 32,
        listed: Sequence[bool] | None = None,
        progress: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
    ) -> list[Generation]:
        """Greedy answers, one a prompt, in the order of the prompts; the model's own generation settings do not count.

        A `listed` answer (by default that of a prompt that ends in an assistant message) stops at its newline too, any
        other only at eos; neither is part of the text. One that reaches `max_new_tokens` first is not `finished`.

        With a `json_schema` each answer is held to what json.dumps(…, ensure_ascii=False) writes of the schema's
        values (json_grammar.py); it is one line and ends at eos, so `listed` does not matter.

        Raises:
            UserError: a prompt that with max_new_tokens exceeds the model's context; xgrammar is not installed, or a
                schema that cannot be kept.
        """
        grammar = self.tokens.grammar(json_schema)
        rows = self.tokens.for_generation(prompts, max_new_tokens)
        gates = self._gates(len(rows), histories, gate_weights, representations)
        listed = listed_by_default(prompts) if listed is None else listed
        texts: list[Generation | None] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        with tqdm(total=len(rows), desc=progress, disable=progress is None, unit="prompt") as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                made = self._generate(
                    [rows[i] for i in batch], [listed[i] for i in batch], gates, batch, max_new_tokens, grammar
                )
                for i, generation in zip(batch, made, strict=True):
                    texts[i] = generation
                bar.update(len(batch))
        return [text for text in texts if text is not None]

    def check(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[str]],
        max_new_tokens: int = 0,
        num_generated: int = 0,
        json_schema: Mapping[str, Any] | None = None,
    ) -> None:
        """Find now what `score`, and `generate` for the first `num_generated` prompts, would refuse.

        Raises:
            UserError: a prompt without answers; a prompt that with its longest answer, or with max_new_tokens, exceeds
                the model's context; a schema that cannot be kept.
        """
        self.tokens.grammar(json_schema)
        self.tokens.pairs(prompts, answers)
        self.tokens.for_generation(prompts[:num_generated], max_new_tokens)

    def _gates(
        self,
        count: int,
        histories: Sequence[np.ndarray] | None,
        gate_weights: np.ndarray | None,
        representations: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """What the model takes beside tokens, by its argument; nothing for a model that reads no history."""
        if not accepts_history(self.model):
            return {}
        possible = {"gate_weights": gate_weights, "representation": representations, "history_items": histories}
        given = {name: value for name, value in possible.items() if value is not None}
        if not given:
            raise UserError(
                "an adapter that reads histories needs those of its prompts, their representations or gate weights"
            )
        name = next(iter(given))
        if len(given[name]) != count:
            raise ValueError(f"{len(given[name])} {name} for {count} prompts: one a prompt is expected")
        return {name: given[name]}

    def _gates_of(self, gates: dict[str, Any], rows: Sequence[int]) -> dict[str, torch.Tensor]:
        for name in ("gate_weights", "representation"):
            if name in gates:  # (B, K), (B, layers, K) or (B, D)
                return {name: torch.as_tensor(np.asarray(gates[name])[list(rows)], dtype=torch.float32).to(self.device)}
        if "history_items" in gates:
            items = pad_left([gates["history_items"][i] for i in rows], -1)
            return {"history_items": torch.from_numpy(items).to(self.device)}  # (B, L)
        return {}

    def _way(self, one_forward: bool) -> Callable[..., list[list[float]]]:
        """How a batch is scored."""
        if one_forward and not (self.share_prompts or self._separate_by_choice):
            raise UserError(
                f"one_forward needs full attention with a mask of our own, this model has "
                f"{self.config._attn_implementation}: set model.attn_implementation to sdpa, or ask for one row an "
                "answer (share_prompts=False)"
            )
        if not self.share_prompts:
            return self._score_separately
        return self._score_at_once if one_forward else self._score_shared

    def _batches(
        self, rows: list[list[int]], candidates: list[list[list[int]]], one_forward: bool = False
    ) -> Iterator[list[int]]:
        """Prompts of similar length together, as many as the batch size and the memory for logits and mask allow.

        That memory bounds each of the two. In two forwards the mask is small: it has a row for each node of the tries.
        """
        vocabulary = self.config.vocab_size
        widths = [sum(len(answer) for answer in answers) for answers in candidates]
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), widths[i]))
        batch: list[int] = []
        for i in order:
            widest = max([widths[j] for j in batch] + [widths[i]])
            row_bytes = 4 * widest * vocabulary
            if one_forward:  # the newest row is the longest
                row_bytes = max(row_bytes, (len(rows[i]) + widest) ** 2 * (self.model.dtype.itemsize + 2))
            if batch and (len(batch) == self.batch_size or (len(batch) + 1) * row_bytes > self._logits_bytes):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _score_shared(
        self, rows: list[list[int]], candidates: list[list[list[int]]], gates: dict[str, Any], batch: Sequence[int]
    ) -> list[list[float]]:
        """Two forwards for all prompts of a batch and all of their answers."""
        given = self._gates_of(gates, batch)
        tries = [self._trie(row[-1], answers) for row, answers in zip(rows, candidates, strict=True)]
        read = max(map(len, rows)) - 1  # columns of the prompts without their last tokens
        width = max(len(trie.tokens) for trie in tries)
        input_ids = np.zeros((len(rows), width), dtype=np.int64)
        positions = np.zeros((len(rows), width), dtype=np.int64)
        sees = np.zeros((len(rows), width, read + width), dtype=bool)
        for b, (row, trie) in enumerate(zip(rows, tries, strict=True)):
            size = len(trie.tokens)
            input_ids[b, :size], positions[b, :size] = trie.tokens, len(row) - 1 + trie.depths
            sees[b, :, : len(row) - 1] = True
            sees[b, :size, read : read + size] = trie.visible
        logits = self.model(
            input_ids=torch.from_numpy(input_ids).to(self.device),
            attention_mask=self._additive(sees),
            position_ids=torch.from_numpy(positions).to(self.device),
            past_key_values=self._prefill(rows, read, given),
            **given,
        ).logits  # (B, S, V): column n is what trie node n predicts
        return [_sums(logits[b], trie.steps) for b, trie in enumerate(tries)]

    def _score_at_once(
        self, rows: list[list[int]], candidates: list[list[list[int]]], gates: dict[str, Any], batch: Sequence[int]
    ) -> list[list[float]]:
        """One forward for all prompts of a batch and all of their answers.

        A row is padding, prompt, trie without its root: right-aligned, so that logits are kept of the last columns.
        """
        tries = [self._trie(row[-1], answers) for row, answers in zip(rows, candidates, strict=True)]
        lengths = [len(row) + len(trie.tokens) - 1 for row, trie in zip(rows, tries, strict=True)]
        width, keep = max(lengths), max(len(trie.tokens) for trie in tries)
        input_ids = pad_left([np.array(row[:-1] + trie.tokens.tolist()) for row, trie in zip(rows, tries)], 0)
        positions = np.zeros((len(rows), width), dtype=np.int64)
        sees = np.broadcast_to(np.eye(width, dtype=bool), (len(rows), width, width)).copy()  # padding too: no row is 0
        for b, (row, trie) in enumerate(zip(rows, tries, strict=True)):
            begin, root = width - lengths[b], width - len(trie.tokens)
            positions[b, begin:root], positions[b, root:] = np.arange(len(row) - 1), len(row) - 1 + trie.depths
            sees[b, begin:root, begin:root] = np.tri(len(row) - 1, dtype=bool)
            sees[b, root:, begin:root] = True
            sees[b, root:, root:] = trie.visible
        logits = self.model(
            input_ids=torch.from_numpy(input_ids).to(self.device),
            attention_mask=self._additive(sees),
            position_ids=torch.from_numpy(positions).to(self.device),
            logits_to_keep=keep,
            use_cache=False,
            **self._gates_of(gates, batch),
        ).logits  # (B, S, V): the last of the S columns are the trie's
        return [_sums(logits[b, keep - len(trie.tokens) :], trie.steps) for b, trie in enumerate(tries)]

    def _trie(self, root: int, answers: list[list[int]]) -> Trie:
        """build_trie; the newest is kept, for prompts that are all asked about the same answers."""
        if self._newest is None or self._newest[0] is not answers:
            self._newest = answers, build_trie(root, answers)
        trie = self._newest[1]
        return trie._replace(tokens=np.concatenate([[root], trie.tokens[1:]]))

    def _prefill(self, rows: list[list[int]], read: int, given: dict[str, torch.Tensor]) -> Any:
        """Keys and values of the prompts without their last tokens, (B, read) columns; None where there are none.

        Padding stands to the right, so that plain causal attention needs no mask, which is the fastest; the padding's
        keys are hidden from the trie by its own mask.
        """
        if not read:
            return None
        input_ids = np.zeros((len(rows), read), dtype=np.int64)
        for line, row in zip(input_ids, rows, strict=True):
            line[: len(row) - 1] = row[:-1]
        ids = torch.from_numpy(input_ids).to(self.device)
        return self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **given).past_key_values

    def _additive(self, sees: np.ndarray) -> torch.Tensor:
        """(B, 1, S, T): 0 where a token sees another, the smallest number elsewhere; sdpa and eager both add it."""
        dtype = self.model.dtype
        allowed = torch.from_numpy(sees).to(self.device)
        mask = torch.full(allowed.shape, torch.finfo(dtype).min, dtype=dtype, device=self.device)
        return mask.masked_fill_(allowed, 0.0)[:, None]

    def _score_separately(
        self, rows: list[list[int]], candidates: list[list[list[int]]], gates: dict[str, Any], batch: Sequence[int]
    ) -> list[list[float]]:
        """One row per (prompt, answer): what scoring means, and C times the cost."""
        pairs = [(b, row + answer, len(answer)) for b, row in enumerate(rows) for answer in candidates[b]]
        values: list[list[float]] = [[] for _ in rows]
        for start in range(0, len(pairs), self.batch_size):
            part = pairs[start : start + self.batch_size]
            keep = max(length for _, _, length in part) + 1
            given = self._gates_of(gates, [batch[b] for b, _, _ in part])
            logits = self._last_logits([tokens for _, tokens, _ in part], keep, given)
            for (b, tokens, length), row in zip(part, logits, strict=True):
                step = (np.arange(keep - 1 - length, keep - 1), np.array(tokens[-length:]))
                values[b] += _sums(row, [step])
        return values

    def _last_logits(self, rows: list[list[int]], keep: int, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, keep, V): what the last tokens of whole rows predict, by one plain forward."""
        input_ids = pad_left([np.array(tokens) for tokens in rows], 0)
        mask = _mask([len(tokens) for tokens in rows], input_ids.shape[1])
        logits: torch.Tensor = self.model(
            input_ids=torch.from_numpy(input_ids).to(self.device),
            attention_mask=torch.from_numpy(mask).to(self.device),
            position_ids=torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0)).to(self.device),
            logits_to_keep=keep,
            use_cache=False,
            **given,
        ).logits
        return logits

    def _ranking_batches(self, rows: list[list[int]], width: int) -> Iterator[list[int]]:
        """Prompts of similar length together, as many as the batch size and the logits of their beams allow."""
        size = min(self.batch_size, max(1, self._logits_bytes // (4 * self.config.vocab_size * width)))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def _generate(
        self,
        rows: list[list[int]],
        listed: list[bool],
        gates: dict[str, Any],
        batch: Sequence[int],
        limit: int,
        grammar: Grammar | None,
    ) -> list[Generation]:
        eos = self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (eos or 0)
        input_ids = pad_left([np.array(row) for row in rows], pad)
        mask = _mask([len(row) for row in rows], input_ids.shape[1])
        settings = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=eos, pad_token_id=pad)
        held = None if grammar is None else Held(grammar, len(rows))
        with _blank_generation_config(self.model):
            output = self.model.generate(
                input_ids=torch.from_numpy(input_ids).to(self.device),
                attention_mask=torch.from_numpy(mask).to(self.device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([] if held is None else [held]),
                stopping_criteria=StoppingCriteriaList([_Newline(self.tokenizer, listed)]),
                **self._gates_of(gates, batch),
            )
        answers = output[:, input_ids.shape[1] :].tolist()
        if held is not None and grammar is not None:
            cut = [tokens[: held.stopped.get(row)] for row, tokens in enumerate(answers)]
            return [self.tokens.read_held(tokens, grammar) for tokens in cut]
        return [self.tokens.read(tokens, is_listed) for tokens, is_listed in zip(answers, listed, strict=True)]


class _TreeReader:
    """What beams ask of a batch of prompts, each read once: B rows, to which every depth's frontiers are appended.

    A frontier's tokens see what their parents saw, and themselves; nothing is copied or put in another order.
    """

    def __init__(
        self, engine: TransformersEngine, rows: list[list[int]], gates: dict[str, Any], batch: Sequence[int]
    ) -> None:
        self.engine, self.given, self.depth = engine, engine._gates_of(gates, batch), 0
        self.roots = [row[-1] for row in rows]
        self.ends = np.array([len(row) - 1 for row in rows])  # (B,) the root's position
        read = int(self.ends.max())
        self.cache = engine._prefill(rows, read, self.given)
        self.sees = np.arange(read) < self.ends[:, None, None]  # (B, 1, columns) what each frontier node sees of them

    def __call__(self, beams: Sequence[Beam]) -> list[np.ndarray]:
        """Log-probabilities of each beam's choices."""
        width = max(len(beam.frontier) for beam in beams)  # W: the frontiers that are narrower end in padding
        input_ids = np.zeros((len(beams), width), dtype=np.int64)
        origins = np.zeros((len(beams), width), dtype=np.int64)
        for b, beam in enumerate(beams):
            size = len(beam.frontier)
            input_ids[b, :size] = beam.tokens if self.depth else self.roots[b]
            origins[b, :size] = beam.origins
        itself = np.broadcast_to(np.eye(width, dtype=bool), (len(beams), width, width))
        self.sees = np.concatenate([np.take_along_axis(self.sees, origins[..., None], axis=1), itself], axis=2)
        positions = np.repeat((self.ends + self.depth)[:, None], width, axis=1)
        self.depth += 1
        return self._read(input_ids, positions, beams)

    def _read(self, input_ids: np.ndarray, positions: np.ndarray, beams: Sequence[Beam]) -> list[np.ndarray]:
        """Append the frontiers (B, W), in parts that the memory for logits allows: none sees another's node."""
        count, width = input_ids.shape
        part = max(1, min(_PART_TOKENS, self.engine._logits_bytes // (4 * self.engine.config.vocab_size * count)))
        asked = _Asked(beams)
        for start in range(0, width, part):
            end = min(start + part, width)
            output = self.engine.model(
                input_ids=torch.from_numpy(input_ids[:, start:end]).to(self.engine.device),
                attention_mask=self.engine._additive(self.sees[:, start:end, : self.sees.shape[2] - width + end]),
                position_ids=torch.from_numpy(positions[:, start:end]).to(self.engine.device),
                past_key_values=self.cache,
                use_cache=True,
                **self.given,
            )
            self.cache = output.past_key_values
            here = (asked.places >= start) & (asked.places < end)
            rows = asked.prompts[here] * (end - start) + asked.places[here] - start
            asked.answer(here, output.logits.flatten(0, 1), rows)
        return asked.by_beam()


class _PrefixReader:
    """The same with one row per (prompt, frontier node), read anew at each depth: what it means, and dear."""

    def __init__(
        self, engine: TransformersEngine, rows: list[list[int]], gates: dict[str, Any], batch: Sequence[int]
    ) -> None:
        self.engine, self.rows, self.gates, self.batch = engine, rows, gates, batch

    def __call__(self, beams: Sequence[Beam]) -> list[np.ndarray]:
        """Log-probabilities of each beam's choices."""
        prefixes = [(b, self.rows[b] + beam.trie.path(n)) for b, beam in enumerate(beams) for n in beam.frontier]
        asked = _Asked(beams)
        rows = np.cumsum([0] + [len(beam.frontier) for beam in beams])[asked.prompts] + asked.places
        for start in range(0, len(prefixes), self.engine.batch_size):
            part = prefixes[start : start + self.engine.batch_size]
            here = (rows >= start) & (rows < start + len(part))
            given = self.engine._gates_of(self.gates, [self.batch[b] for b, _ in part])
            logits = self.engine._last_logits([tokens for _, tokens in part], 1, given)[:, 0]
            asked.answer(here, logits, rows[here] - start)
        return asked.by_beam()


class _Asked:
    """The choices of many beams as flat arrays (C,), and their log-probabilities as they come in."""

    def __init__(self, beams: Sequence[Beam]) -> None:
        choices = [beam.choices for beam in beams]
        self.counts = [len(one.rows) for one in choices]
        self.prompts = np.repeat(np.arange(len(beams)), self.counts)
        self.places = np.concatenate([one.rows for one in choices])  # of the node asked about, in its own frontier
        self.tokens = np.concatenate([one.tokens for one in choices])
        self.log_probs = np.full(len(self.places), np.nan)

    def answer(self, which: np.ndarray, logits: torch.Tensor, rows: np.ndarray) -> None:
        """Fill in the choices of a mask (C,) from logits (S, V), by the row of each."""
        self.log_probs[which] = _log_probs(logits, rows, self.tokens[which])

    def by_beam(self) -> list[np.ndarray]:
        """One array a beam."""
        return np.split(self.log_probs, np.cumsum(self.counts)[:-1])


def _beams(
    trie: ItemTrie,
    count: int,
    excluded: Sequence[npt.ArrayLike] | None,
    width: int,
    k: int | None,
    length_normalised: bool,
) -> list[Beam]:
    if excluded is not None and len(excluded) != count:
        raise ValueError(f"{len(excluded)} arrays of excluded items for {count} prompts: one a prompt is expected")
    blocked = [trie.excluding(items) for items in excluded] if excluded is not None else [None] * count
    return [Beam(trie, width, k, own, length_normalised, f"prompt {i}") for i, own in enumerate(blocked)]


def takes_tree_mask(config: Any) -> bool:
    """Whether a model's attention obeys a 4D mask: full attention in every layer, by sdpa or eager.

    Flash attention knows padding only; a sliding window would be overruled by our mask; a state-space layer has none.
    """
    layers = getattr(config, "layer_types", None)  # absent: one kind of layer
    full = set(layers) == {"full_attention"} if layers else getattr(config, "sliding_window", None) is None
    return full and hasattr(config, "num_attention_heads") and config._attn_implementation in ("sdpa", "eager")


def build_trie(root: int, answers: Sequence[Sequence[int]]) -> Trie:
    """Merge the shared beginnings of token lists; tokens that nothing follows are predicted, not read.

    >>> trie = build_trie(1, [[5, 6, 9], [5, 7, 9]])
    >>> trie.tokens.tolist(), trie.depths.tolist()
    ([1, 5, 6, 7], [0, 1, 2, 2])
    >>> [(nodes.tolist(), tokens.tolist()) for nodes, tokens in trie.steps]
    [([0, 1, 2], [5, 6, 9]), ([0, 1, 3], [5, 7, 9])]
    """
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) → node
    parents, tokens, depths = [0], [root], [0]
    steps = []
    for answer in answers:
        path = [0]
        for token in answer[:-1]:
            key = (path[-1], token)
            if key not in nodes:
                nodes[key] = len(tokens)
                parents.append(path[-1])
                tokens.append(token)
                depths.append(depths[path[-1]] + 1)
            path.append(nodes[key])
        steps.append((np.array(path), np.array(answer)))
    visible = np.eye(len(tokens), dtype=bool)
    for node in range(1, len(tokens)):  # a parent always stands before its children
        visible[node] |= visible[parents[node]]
    return Trie(np.array(tokens, dtype=np.int64), np.array(depths, dtype=np.int64), visible, steps)


def _sums(logits: torch.Tensor, steps: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """Σ log p of each answer; logits (S, V) by predicting node, normalised in fp32."""
    nodes, tokens = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    values = _log_probs(logits, nodes, tokens)
    ends = np.cumsum([len(nodes) for nodes, _ in steps])
    return [float(part.sum()) for part in np.split(values, ends[:-1])]


def _log_probs(logits: torch.Tensor, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(C,) float64: log p of a token by a row of logits (S, V), for each pair of the two; normalised in fp32."""
    places, chosen = (torch.from_numpy(numbers.astype(np.int64)).to(logits.device) for numbers in (rows, tokens))
    values: np.ndarray = (logits[places, chosen].float() - _normalisers(logits)[places]).double().cpu().numpy()
    return values


def _normalisers(logits: torch.Tensor) -> torch.Tensor:
    """log Σ exp of each row of (S, V), in fp32.

    By way of log_softmax over blocks that fit the cache: ten times as fast as logsumexp over all rows on a CPU.
    """
    blocks = []
    for block in logits.split(8 if logits.device.type == "cpu" else 256):
        exact = block.float()
        blocks.append(exact[:, 0] - torch.log_softmax(exact, dim=-1)[:, 0])
    return torch.cat(blocks)


@contextlib.contextmanager
def _blank_generation_config(model: Any) -> Iterator[None]:
    """The model without generation settings of its own.

    Transformers fills what a config that is given leaves open from the model's: beams, a repetition penalty, banned
    tokens. Greedy decoding has none of them.
    """
    owner = model.get_base_model() if isinstance(model, PeftModel) else model
    before, owner.generation_config = owner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = before


def _mask(lengths: Sequence[int], width: int) -> np.ndarray:
    """(B, width) int64: 1 in the last `length` columns of each row."""
    return (np.arange(width) >= width - np.asarray(lengths)[:, None]).astype(np.int64)


class _Newline(StoppingCriteria):
    """Ends the rows that continue a list once they have written a newline."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, listed: Sequence[bool]) -> None:
        self.tokenizer, self.listed = tokenizer, listed

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,  # noqa: ARG002  # handed over by transformers, a newline does not need it
        **kwargs: Any,  # noqa: ARG002  # the same
    ) -> torch.Tensor:
        """(B,) bool: which rows are done."""
        ends = [
            listed and "\n" in self.tokenizer.decode([token])
            for listed, token in zip(self.listed, input_ids[:, -1].tolist(), strict=True)
        ]
        return torch.tensor(ends, device=input_ids.device)
