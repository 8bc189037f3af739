"""Beam search over an item trie, for one prompt and without a model: what is asked next, and what was found.

Log-probabilities of the allowed next tokens enter, depth by depth; the best titles with their scores leave. An engine
drives the beams of many prompts at once and gets the numbers in its own way:

    beam = Beam(trie, width=20, k=10, blocked=trie.excluding(history))
    while not beam.done:
        choices = beam.choices                # the token choices.tokens[c] behind beam.frontier[choices.rows[c]]
        beam.advance(log_probs)               # (C,) log p(token | prompt, path of the frontier node), full vocabulary
        beam.frontier, beam.origins           # the new frontier, and each one's parent's place in the old one
    titles, scores = beam.ranking()

The score of a title is Σ log p(token | prompt, tokens before it), terminator included. The probabilities are those of
the model's whole vocabulary: they are not made to add up to 1 over the allowed tokens, or a title would gain by having
few neighbours, and scores would not be the likelihoods that scoring titles by themselves gives.

At each depth all children of the frontier compete and the `width` best are kept; those that end a title are finished,
the others are the next frontier. Ties go to the lower node. With a width of at least the number of titles nothing is
cut, and the ranking is the exhaustive one. It often is with less: scores only fall, so where everything that was cut
scored below the k-th title, no title behind it can stand among the best k, and the search knows so (`is_exact`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from recllm.errors import UserError
from recllm.infer.item_trie import Children, Ints, ItemTrie

Floats = npt.NDArray[np.float64]


class Ranking(NamedTuple):
    """What a search found for one prompt, best first: R ≤ k different titles."""

    titles: Ints  # (R,) numbers of ItemTrie
    scores: Floats  # (R,) nats, or nats a token
    is_exact: bool  # scoring every title would have given the same


class Beam:
    """The search for one prompt. F nodes in the frontier, C choices of a next token.

    Args:
        trie: of the catalogue.
        width: nodes that are kept at each depth.
        k: titles that are wanted; None: as many as the width.
        blocked: nodes that are never entered, of `ItemTrie.excluding`.
        length_normalised: rank by the mean over a title's tokens. At one depth it orders as the sum does, but a longer
            title may overtake a finished one, so the search goes on until nothing is left to extend.
        name: how errors call the prompt.

    Raises:
        UserError: a width or k below 1; nothing is allowed, because every title is excluded.
    """

    def __init__(
        self,
        trie: ItemTrie,
        width: int,
        k: int | None = None,
        blocked: Ints | None = None,
        length_normalised: bool = False,
        name: str = "the prompt",
    ) -> None:
        if width < 1 or (k is not None and k < 1):
            raise UserError(f"a beam of width {width} with k {k}: at least 1 of both is needed")
        if blocked is not None and len(blocked) and blocked[0] == 0:  # the root
            raise UserError(
                f"{name}: all {trie.num_titles} titles are excluded, at least 1 must be left to rank: exclude fewer "
                "items, or leave this user out"
            )
        self.trie, self.width, self.k, self.name = trie, width, k or width, name
        self.blocked, self.length_normalised = blocked, length_normalised
        self.frontier: Ints = np.zeros(1, dtype=np.int32)  # (F,) nodes whose next token is asked for, best first
        self.origins = np.zeros(1, dtype=np.int64)  # (F,) place of each one's parent in the frontier before
        self._scores: Floats = np.zeros(1)  # (F,)
        self._leaves: Ints = np.empty(0, dtype=np.int32)  # of the finished titles
        self._leaf_scores: Floats = np.empty(0)
        self._best_cut = -np.inf  # the highest score that the width left out
        self._has_cut = False
        self._choices: Children | None = None

    @property
    def done(self) -> bool:
        """Whether nothing is left to ask."""
        return not len(self.frontier)

    @property
    def tokens(self) -> Ints:
        """(F,) the newest token of each frontier node; −1 for the root, whose token is the prompt's last."""
        return self.trie.tokens[self.frontier]

    @property
    def choices(self) -> Children:
        """Every token that may stand behind each node of the frontier; empty when done."""
        if self._choices is None:
            self._choices = self.trie.children_of(self.frontier, self.blocked)
        return self._choices

    def advance(self, log_probs: npt.ArrayLike) -> None:
        """One depth further, by the log-probability (C,) of each of `choices`.

        Raises:
            UserError: a log-probability is NaN.
        """
        rows, _, nodes = self.choices
        added = np.asarray(log_probs, dtype=np.float64)
        if added.shape != nodes.shape:
            raise ValueError(f"{added.shape} log-probabilities for {len(nodes)} choices: one for each is expected")
        if np.isnan(added).any():
            raise UserError(
                f"{self.name}: the model gives NaN, numbers are needed: set model.dtype to float32 to find why"
            )
        scores = self._scores[rows] + added
        kept = _best(scores, nodes, self.width)
        if len(kept) < len(nodes):
            self._has_cut = True
            self._best_cut = max(self._best_cut, np.delete(scores, kept).max())
        is_leaf = self.trie.title[nodes[kept]] >= 0
        self._leaves = np.concatenate([self._leaves, nodes[kept[is_leaf]]])
        self._leaf_scores = np.concatenate([self._leaf_scores, scores[kept[is_leaf]]])
        inner = kept[~is_leaf]
        inner = inner[self._can_win(scores[inner])]
        self.frontier, self.origins, self._scores = nodes[inner], rows[inner], scores[inner]
        self._choices = None

    def ranking(self) -> Ranking:
        """The best k of the titles that are finished, best first; ties by lower leaf, which is the shorter title."""
        titles, scores = self.trie.title[self._leaves], self._leaf_scores
        if self.length_normalised:
            scores = scores / self.trie.lengths[titles]
        best = _best(scores, self._leaves, self.k)
        return Ranking(titles[best], scores[best], self._is_exact(scores[best]))

    def _is_exact(self, best: Floats) -> bool:
        """Whether nothing that was cut could be one of the best k; at equality it might stand before the k-th."""
        if not self._has_cut:
            return True
        # a mean over tokens may rise behind what was cut
        return not self.length_normalised and len(best) == self.k and bool(self._best_cut < best[-1])

    def _can_win(self, scores: Floats) -> npt.NDArray[np.bool_]:
        """Which unfinished nodes may still lead to one of the best k: those above the k-th finished title.

        Scores only fall. At equality the finished title wins, as in the ranking: deeper leaves are higher nodes.
        """
        if self.length_normalised or len(self._leaves) < self.k:
            return np.ones(len(scores), dtype=bool)
        won: npt.NDArray[np.bool_] = scores > np.partition(self._leaf_scores, -self.k)[-self.k]
        return won


def search(beams: Sequence[Beam], ask: Callable[[Sequence[Beam]], Sequence[npt.ArrayLike]]) -> None:
    """Drive beams together until all are done; `ask` gives the log-probabilities of each one's choices."""
    while not all(beam.done for beam in beams):
        for beam, log_probs in zip(beams, ask(beams), strict=True):
            beam.advance(log_probs)


def _best(scores: Floats, nodes: Ints, count: int) -> npt.NDArray[np.int64]:
    """Places of the `count` highest scores, best first, ties by lower node."""
    places = np.arange(len(scores))
    if count < len(scores):
        places = np.flatnonzero(scores >= np.partition(scores, -count)[-count])  # few are left to sort
    return places[np.lexsort((nodes[places], -scores[places]))][:count]
