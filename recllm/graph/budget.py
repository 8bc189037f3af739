"""Subgraphs within a budget of tokens.

Ranked triples of N prompts, a `Verbaliser`, a tokenizer and a number of tokens enter; texts that keep to the budget
leave, with which triples they show and how many tokens they have.

Triples are taken best first, each that still fits whole; one that does not is passed over, and a later, shorter one
may be taken. Where a triple stands changes what it costs (the first of a head pays for the head), so costs are those
of the text as it is then, separators included, and no other rule than "best first, each that fits" decides.

Counting. A text is a chain of pieces that each begin with a blank or a line (verbalise.py), and a tokenizer whose
tokens never span such a place counts a text as the sum of its pieces, and a piece as the sum of its words, each of
them measured once behind another one.
`is_additive` says whether a tokenizer is one; then the sums are the exact numbers, and no text is tokenised. For any
other tokenizer the sums are a first guess, every text is tokenised, and those over the budget are cut again.
"""

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from recllm.data.prices import DAY_S
from recllm.graph import verbalise
from recllm.graph.segments import ranges
from recllm.graph.store import ALWAYS
from recllm.graph.subgraphs import Subgraphs
from recllm.graph.verbalise import LAST, NEXT_LINE, NEXT_PART, NEXT_TAIL, Flags, Ints, Layout, Pieces, Verbaliser

Small = npt.NDArray[np.int32]  # tokens of pieces: no text has 2^31

_BEFORE = "a"  # a piece is measured behind this
_SPANS = re.compile(r"[^\s] |\n\S")  # a token that holds this spans two pieces
# What pieces may begin and end with: letters of several scripts and cases, marks, digits, punctuation, symbols.
_EDGES = [
    *"aZéßñİŉ5٣½-–('\")…:;,.!?&/#<>{}[]_$€+™|=%*~^`日の한אعกе🎬",
    *("42", "'s", "'S", "n't", "e\u0301", "\u0301", "\u200d", "👩\u200d🚀", "ﬁ", "Ab", "aB", "1st", "...", '"}],'),
    *(">;", "{|"),
]  # fmt: skip
_SAMPLE = 256  # names of the graph that a tokenizer is tried on


class Fitted(NamedTuple):
    """Texts of N prompts within a budget."""

    texts: list[str]  # "" where nothing fits or nothing is there
    kept: Ints  # (N,) triples that a text shows
    tokens: Ints  # (N,) of a text by itself, without special tokens
    is_kept: Flags  # (M,) which triples
    num_too_small: int  # prompts that have triples of which not one fits


class _Costs(NamedTuple):
    """Tokens of the pieces of M triples."""

    first: Small  # (M,) header and head, where the text begins with it
    head: Small  # (M,) head of a later line
    relation: Small  # (M,)
    tail: Small  # (M + 1, 4) tail and date, by how it ends; the last row, which is of no triple, is 0

    def least(self) -> Small:
        """(M,) what each triple adds at the least: its tail, and what any other saves by another end.

        Heads and relations add something or nothing, but of tokenizers that join them with what stands before.
        """
        low, high = self.tail.min(axis=1), self.tail.max(axis=1)
        others = sum(min(int(column.min(initial=0)), 0) for column in (self.first, self.head, self.relation))
        least: Small = low[:-1] + (low - high).min() + others
        return least


class Budget:
    """Fits subgraphs into `budget` tokens. Pickles as its arguments; what it has counted stays behind."""

    def __init__(self, verbaliser: Verbaliser, tokenizer: Tokenizer, budget: int) -> None:
        if tokenizer.padding is not None or tokenizer.truncation is not None:  # they would change the numbers
            tokenizer = Tokenizer.from_str(tokenizer.to_str())
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self.verbaliser, self.tokenizer, self.budget = verbaliser, tokenizer, budget
        style, inner = verbaliser.style, _Words(self._measured, [(_BEFORE, " ", "")])
        ends = (*style.ends, style.dated) if verbaliser.dates else style.ends
        first = _Words(self._measured, [("", style.header, ""), (_BEFORE + "\n", "", "")])
        last = _Words(self._measured, [(_BEFORE, " ", end) for end in ends])
        self._heads = _Table(verbaliser.heads, lambda texts: _by_first_word(texts, first, inner))
        self._tails = _Table(verbaliser.tails, lambda texts: _by_last_word(texts, inner, last))
        self._relations = self._measured([(_BEFORE, text) for text in verbaliser.relations]).astype(np.int32)
        self._dates: dict[int, Ints] = {}  # (4,) of each day, by how the triple ends
        self.is_additive = is_additive(tokenizer) and self._adds_up()

    def __reduce__(self) -> tuple[Any, ...]:
        return Budget, (self.verbaliser, self.tokenizer, self.budget)

    def fit(self, subgraphs: Subgraphs) -> Fitted:
        """The best triples of each prompt that the budget allows."""
        layout, costs = self.verbaliser.layout(subgraphs), self._costs(subgraphs)
        prompts, is_kept = np.arange(subgraphs.num_prompts), np.zeros(len(layout.prompts), dtype=bool)
        limits = np.full(len(prompts), self.budget)
        tokens = _take(layout, costs, subgraphs.offsets, limits, is_kept, prompts)
        texts = self._write(subgraphs, layout, is_kept, prompts)
        if not self.is_additive:
            sums, tokens = tokens, self._count(texts)
            while len(over := np.flatnonzero(tokens > self.budget)):
                limits[over] = sums[over] - (tokens[over] - self.budget)  # below what was taken: fewer are next
                sums[over] = _take(layout, costs, subgraphs.offsets, limits, is_kept, over)
                again = self._write(subgraphs, layout, is_kept, over)
                for prompt, text in zip(over.tolist(), again, strict=True):
                    texts[prompt] = text
                tokens[over] = self._count(again)
        kept = np.bincount(layout.prompts[is_kept], minlength=len(prompts))
        return Fitted(texts, kept, tokens, is_kept, int(((kept == 0) & (np.diff(subgraphs.offsets) > 0)).sum()))

    def _write(self, subgraphs: Subgraphs, layout: Layout, is_kept: Flags, prompts: Ints) -> list[str]:
        """Texts of some prompts."""
        if len(prompts) == subgraphs.num_prompts:
            return self.verbaliser.write(subgraphs, layout, np.flatnonzero(is_kept))
        chosen = np.zeros(subgraphs.num_prompts, dtype=bool)
        chosen[prompts] = True
        written = self.verbaliser.write(subgraphs, layout, np.flatnonzero(is_kept & chosen[layout.prompts]))
        return [written[prompt] for prompt in prompts.tolist()]

    # ---- counting ----

    def _count(self, texts: Iterable[str]) -> Ints:
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))

    def _measured(self, pieces: list[tuple[str, str]]) -> Ints:
        """Tokens that each piece adds behind what stands before it, for (before, piece)."""
        befores = {before: int(self._count([before])[0]) for before in {before for before, _ in pieces}}
        standing = np.array([befores[before] for before, _ in pieces], dtype=np.int64)
        return self._count(before + piece for before, piece in pieces) - standing

    def _costs(self, subgraphs: Subgraphs) -> _Costs:
        heads = self._heads.rows(subgraphs.heads)
        tails = self._tails.rows(subgraphs.tails)
        costs = np.zeros((len(tails) + 1, 4), dtype=np.int32)
        costs[:-1] = tails[:, :4]
        if self.verbaliser.dates:
            days = self.verbaliser.days(subgraphs)
            dated = np.flatnonzero(days != ALWAYS)
            costs[dated] = tails[dated, 4:] + self._date_rows(days[dated])
        return _Costs(heads[:, 0], heads[:, 1], self._relations[subgraphs.relations], costs)

    def _date_rows(self, days: Ints) -> Ints:
        """(…, 4) tokens of days, by how the triple ends."""
        unique, places = np.unique(days, return_inverse=True)
        style = self.verbaliser.style
        new = [day for day in unique.tolist() if day not in self._dates]
        written: list[str] = self.verbaliser.date_texts(np.array(new, dtype=np.int64)).tolist()
        pieces = [(_BEFORE, text[len(style.dated) :] + end) for text in written for end in style.ends]
        self._dates |= dict(zip(new, self._measured(pieces).reshape(-1, 4)))
        return np.array([self._dates[day] for day in unique.tolist()], dtype=np.int64).reshape(-1, 4)[places]

    def _adds_up(self) -> bool:
        """Whether the sums are right for a sample of this graph's own names, in this format."""
        num_entities, num_relations = len(self.verbaliser.entity_names), len(self._relations)
        if not num_entities or not num_relations:
            return True
        places = np.arange(2 * _SAMPLE)
        offsets = np.arange(0, len(places) + 1, 8)
        entities = (places * max(num_entities // len(places), 1) % num_entities).astype(np.int32)
        heads = entities[places // 4 * 4]  # two a text
        relations = (places // 2 % num_relations).astype(np.int32)
        times = np.where(places % 2, ALWAYS, places * 40 * DAY_S)
        scores, hops = np.ones(len(places), dtype=np.float32), np.ones(len(places), dtype=np.int8)
        sample = Subgraphs(offsets, heads, relations, entities, times, scores, hops)
        layout, is_kept = self.verbaliser.layout(sample), np.zeros(len(places), dtype=bool)
        limits, prompts = np.full(sample.num_prompts, 2**40), np.arange(sample.num_prompts)
        sums = _take(layout, self._costs(sample), offsets, limits, is_kept, prompts)
        return bool((sums == self._count(self._write(sample, layout, is_kept, prompts))).all())


class _Words:
    """Tokens of words, each in several surroundings (before, in front, behind), measured once.

    Names are many and their words few: most new names are known words.
    """

    def __init__(
        self, measured: Callable[[list[tuple[str, str]]], Ints], surroundings: list[tuple[str, str, str]]
    ) -> None:
        self._measured, self._surroundings = measured, surroundings
        self._row: dict[str, int] = {}
        self._tokens: Ints = np.empty((0, len(surroundings)), dtype=np.int64)

    def tokens(self, words: list[str]) -> Ints:
        """(len(words), C)."""
        if len(self._row) > verbalise.MOST_PIECES:
            self._row, self._tokens = {}, self._tokens[:0]
        if new := [word for word in dict.fromkeys(words) if word not in self._row]:
            counts = [self._measured([(a, b + word + c) for word in new]) for a, b, c in self._surroundings]
            self._row |= zip(new, itertools.count(len(self._row)))
            self._tokens = np.concatenate([self._tokens, np.stack(counts, axis=1)])
        found: Ints = self._tokens[[self._row[word] for word in words]]
        return found


def _by_first_word(texts: list[str], first: _Words, inner: _Words) -> Ints:
    """Tokens of texts that begin a line."""
    parts = [text.partition(" ") for text in texts]
    return first.tokens([part[0] for part in parts]) + _sums(inner, [part[2] for part in parts])


def _by_last_word(texts: list[str], inner: _Words, last: _Words) -> Ints:
    """Tokens of texts that begin with a blank."""
    parts = [text[1:].rpartition(" ") for text in texts]
    return _sums(inner, [part[0] for part in parts]) + last.tokens([part[2] for part in parts])


def _sums(inner: _Words, texts: list[str]) -> Ints:
    """(len(texts), 1) tokens of all words of each text."""
    words = [text.split(" ") if text else [] for text in texts]
    flat = inner.tokens(list(itertools.chain.from_iterable(words)))
    totals = np.concatenate([np.zeros((1, 1), dtype=np.int64), np.cumsum(flat, axis=0)])
    bounds = np.cumsum([0, *map(len, words)])
    return totals[bounds[1:]] - totals[bounds[:-1]]


class _Table:
    """Tokens of pieces: a row for each slot of `pieces`, counted when it is new."""

    def __init__(self, pieces: Pieces, counted: Callable[[list[str]], Ints]) -> None:
        self._pieces, self._counted, self._generation = pieces, counted, pieces.generation
        self._rows = counted([]).astype(np.int32)

    def rows(self, numbers: npt.NDArray[np.integer]) -> Small:
        """(len(numbers), C) tokens of the pieces of some numbers."""
        slots = self._pieces.slots(numbers)
        if self._generation != self._pieces.generation:
            self._rows, self._generation = self._rows[:0], self._pieces.generation
        if len(new := self._pieces.texts[len(self._rows) :]):
            self._rows = np.concatenate([self._rows, self._counted(new.tolist()).astype(np.int32)])
        found: Small = self._rows[slots]
        return found


def is_additive(tokenizer: Tokenizer) -> bool:
    """Whether a text has as many tokens as its pieces together, each piece beginning with a blank or a line.

    True where no token of the vocabulary holds a place between pieces (so that nothing on one side can join what is
    on the other), and where texts of two pieces, with all sorts of characters at the place, are the sum of both.
    """
    vocabulary: Iterable[str] = tokenizer.get_vocab(with_added_tokens=True)
    if "Ġ" in vocabulary and "▁" not in vocabulary:  # bytes 0 to 32 as U+0100 to U+0120
        bytes_of = {0x100 + byte: chr(byte) for byte in range(33)}
        vocabulary = (token.translate(bytes_of) for token in vocabulary)
    else:
        vocabulary = (token.replace("▁", " ").replace("<0x0A>", "\n") for token in vocabulary)
    if any(_SPANS.search(token) for token in vocabulary):
        return False

    def count(texts: Iterable[str]) -> Ints:
        encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return np.array([len(tokens) for tokens in encoded], dtype=np.int64)

    for gap in " \n":  # a blank belongs to what follows it, a newline to what it ends
        ends, begins = ("", gap) if gap == " " else (gap, "")
        left = count(f"{_BEFORE} {edge}{ends}" for edge in _EDGES)
        right = count(f"{_BEFORE}{ends}{begins}{edge}" for edge in _EDGES) - count([_BEFORE + ends])
        both = count(f"{_BEFORE} {one}{gap}{other}" for one, other in itertools.product(_EDGES, _EDGES))
        if (both.reshape(len(_EDGES), -1) != left[:, None] + right).any():
            return False
    return True


class _Ends:
    """Where the texts of all prompts end so far, by numbers of triples, parts and lines; −1 where nothing is yet."""

    def __init__(self, layout: Layout, num_prompts: int) -> None:
        size = len(layout.prompts) + 1  # one more, for what −1 finds
        self._layout = layout
        self._newest, self._last_part = np.full(size, -1), np.full(size, -1)  # triple of a part, part of a line
        self._last_line = np.full(num_prompts, -1)

    def added(self, costs: _Costs, triples: Ints) -> Ints:
        """Tokens that one more triple would add to the text of its prompt, at most one triple a prompt."""
        prompts, lines, parts = self._of(triples)
        last_line, opens = self._last_line[prompts], self._opens(lines, parts)
        same_part = opens == NEXT_TAIL
        behind = np.where(same_part, parts, self._last_part[np.where(opens == NEXT_PART, lines, last_line)])
        before = self._newest[behind]  # the triple that it will stand behind, whose end it takes over
        end = np.where((opens == NEXT_LINE) | (last_line == lines), LAST, NEXT_LINE)
        end[same_part & (self._last_part[lines] != parts)] = NEXT_PART
        tokens = costs.tail[triples, end] + costs.tail[before, opens] - costs.tail[before, end]
        tokens += np.where(same_part, 0, costs.relation[triples])
        heads = np.where(last_line < 0, costs.first[triples], costs.head[triples])
        return tokens + np.where(opens == NEXT_LINE, heads, 0)

    def add(self, triples: Ints) -> None:
        """Put triples into the texts."""
        prompts, lines, parts = self._of(triples)
        opens = self._opens(lines, parts)
        new_part, new_line = opens >= NEXT_PART, opens == NEXT_LINE
        self._newest[parts] = triples
        self._last_part[lines[new_part]] = parts[new_part]
        self._last_line[prompts[new_line]] = lines[new_line]

    def _of(self, triples: Ints) -> tuple[Ints, Ints, Ints]:
        return self._layout.prompts[triples], self._layout.lines[triples], self._layout.parts[triples]

    def _opens(self, lines: Ints, parts: Ints) -> Ints:
        """What a triple begins: only another tail, a part or a line."""
        other = np.where(self._last_part[lines] >= 0, NEXT_PART, NEXT_LINE)
        return np.where(self._newest[parts] >= 0, NEXT_TAIL, other)


def _take(layout: Layout, costs: _Costs, offsets: Ints, limits: Ints, is_kept: Flags, prompts: Ints) -> Ints:
    """Keep the best triples of some prompts that fit into their limits; marks them in `is_kept`, returns tokens taken.

    All prompts try their first triple, then all their second, …: a round costs some operations on arrays.
    """
    begins, counts = offsets[prompts], offsets[prompts + 1] - offsets[prompts]
    is_kept[ranges(begins, counts)] = False
    ends, left, least = _Ends(layout, len(limits)), limits.copy(), costs.least()
    for rank in range(int(counts.max(initial=0))):
        triples = begins[counts > rank] + rank
        triples = triples[~layout.is_repeat[triples] & (least[triples] <= left[layout.prompts[triples]])]
        added, here = ends.added(costs, triples), layout.prompts[triples]
        fits = added <= left[here]
        left[here[fits]] -= added[fits]
        ends.add(triples[fits])
        is_kept[triples[fits]] = True
    return limits[prompts] - left[prompts]
