"""A language model's ranks in the whole catalogue: by the likelihood of every title, or by beam search.

A task and an engine enter; `FullRanks` leaves. Items that share a title have one score: they rank above a target that
is one of them (ties are pessimistic), and a title stands in a ranking once. Items of the history are not ranked where
the protocol says so; the target always is.

Every title is scored for `evaluate.exhaustive`: exact, at the price of the catalogue's tokens a user. A beam search
(`evaluate.beam_width`) returns the best titles that it found: a target that is not among them has no rank, which is a
miss. `exact` is the share of examples whose best titles are known to be those of the exhaustive ranking: at 1, metrics
up to k are exact. With both every rank is exact, and `recall` says which share of the exhaustive best the beam found.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from recllm.data.dataset import Dataset
from recllm.evaluate.action_figures import wants_otto
from recllm.evaluate.baselines import in_history
from recllm.evaluate.metrics import NO_RANK, ranks
from recllm.evaluate.tasks import NEXT_ITEM, Task
from recllm.recipe import Recipe
from recllm.schema import NO_ITEM

CATALOGUE_USERS = 256  # whose scores of all titles are held at once

Given = dict[str, npt.NDArray[np.float32]]  # what an adapter takes beside tokens, a row an example
Integers = npt.NDArray[np.int64]


class FullRanks(NamedTuple):
    """Of one system and task."""

    ranks: Integers  # (N,) of the target among all items; NO_RANK where a beam did not find it
    beam: dict[str, Any] | None  # {width, k, exact, recall}: of the exhaustive best k, None where not measured
    top: Integers | None = None  # (N, otto_k) the first items, NO_ITEM behind the last; of tasks held against sessions


class Catalogue:
    """Ranks in one dataset's catalogue."""

    def __init__(self, recipe: Recipe, dataset: Dataset, tokenizer: Any) -> None:
        self.recipe, self.dataset, self.tokenizer = recipe, dataset, tokenizer
        self._tries: dict[str, Any] = {}

    def is_asked(self, task: Task) -> bool:
        """Whether a task's targets are ranked among all items."""
        section = self.recipe.evaluate
        return task.kind == NEXT_ITEM and (section.exhaustive or section.beam_width is not None)

    def trie(self, end: str) -> Any:
        """The catalogue's titles, each with what ends it."""
        from recllm.infer.item_trie import catalogue_trie

        if end not in self._tries:
            self._tries[end] = catalogue_trie(self.tokenizer, self.dataset.titles, end)
        return self._tries[end]

    def full_ranks(self, engine: Any, task: Task, label: str, given: Given) -> FullRanks | None:
        """Ranks of a task's targets; None where they are not asked for."""
        if not self.is_asked(task):
            return None
        section, found = self.recipe.evaluate, np.zeros(len(task.target), dtype=np.int64)
        best: dict[int, Integers] = {}
        firsts: dict[int, Integers] = {}
        if section.exhaustive:
            found, best, firsts = self._exhaustive(engine, task, label, given)
        if section.beam_width is None:
            return FullRanks(found, None, self._top(task, firsts))
        rankings = self._beams(engine, task, label, given)
        exact = float(np.mean([ranking.is_exact for ranking in rankings.values()]))
        beam = {"width": section.beam_width, "k": self._k(task), "exact": exact, "recall": None}
        if section.exhaustive:
            shares = [len(np.intersect1d(best[row], rankings[row].titles)) / len(best[row]) for row in best]
            return FullRanks(found, beam | {"recall": float(np.mean(shares))}, self._top(task, firsts))
        for rows, end, excluded in self._blocks(task):
            for row, out in zip(rows.tolist(), excluded):
                found[row] = rank_in(rankings[row], self.trie(end), int(task.target[row]), out)
                items = [self.trie(end).items_of(int(title)) for title in rankings[row].titles]
                firsts[row] = np.concatenate([*items, np.empty(0, np.int64)]).astype(np.int64)
        return FullRanks(found, beam, self._top(task, firsts))

    def _k(self, task: Task) -> int:
        """How many titles of a ranking are looked at."""
        further = [self.recipe.protocol.actions.otto_k] if wants_otto(task, self.dataset) else []
        return max(self.recipe.protocol.ranking.k + further)

    def _top(self, task: Task, firsts: dict[int, Integers]) -> Integers | None:
        """(N, otto_k) the first items, for tasks held against sessions; from each row's items, best first.

        Here the target is an item like any other: where the protocol leaves items of the history out, it goes too.
        """
        if not wants_otto(task, self.dataset):
            return None
        k, examples = self.recipe.protocol.actions.otto_k, task.examples
        top = np.full((len(task.target), k), NO_ITEM, dtype=np.int64)
        for row, found in firsts.items():
            if self.recipe.protocol.ranking.exclude_history:
                end = int(examples.history_end[row])
                found = found[~np.isin(found, self.dataset.history(int(examples.user_index[row]), end, end))]
            top[row, : len(found[:k])] = found[:k]
        return top

    def _blocks(self, task: Task) -> Iterator[tuple[Integers, str, npt.NDArray[np.bool_]]]:
        """Rows of like endings, CATALOGUE_USERS at most, and the items (rows, items) that are not ranked for each."""
        examples, ends = task.examples, np.array(task.ends)
        for end in dict.fromkeys(task.ends):
            of_end = np.flatnonzero(ends == end)
            for start in range(0, len(of_end), CATALOGUE_USERS):
                rows = of_end[start : start + CATALOGUE_USERS]
                out = np.zeros((len(rows), self.dataset.num_items), dtype=bool)
                if self.recipe.protocol.ranking.exclude_history:
                    out = in_history(self.dataset, examples.user_index[rows], examples.history_end[rows])
                out[np.arange(len(rows)), task.target[rows]] = False
                yield rows, end, out

    def _exhaustive(
        self, engine: Any, task: Task, label: str, given: Given
    ) -> tuple[Integers, dict[int, Integers], dict[int, Integers]]:
        """Ranks by every title's score, each row's best k titles by the numbers of its trie, and its first items."""
        mean = self.recipe.protocol.decoding.score == "mean"
        titles, place = np.unique(np.array(self.dataset.titles, dtype=object), return_inverse=True)  # sorted: a
        parts, blocks = engine.parts(titles.tolist()), list(self._blocks(task))  # part's titles share their beginnings
        found, k = np.empty(len(task.target), dtype=np.int64), self._k(task)
        best: dict[int, Integers] = {}
        firsts: dict[int, Integers] = {}
        with tqdm(total=len(blocks) * len(parts), desc=f"{label}, all {len(titles)} titles", unit="part") as bar:
            for rows, end, excluded in blocks:
                prompts, own = [task.prompts[row] for row in rows], {name: table[rows] for name, table in given.items()}
                table = np.empty((len(rows), len(titles)))
                for part in parts:
                    texts = [title + end for title in titles[part]]
                    table[:, part] = engine.score(prompts, [texts] * len(rows), length_normalised=mean, **own)
                    bar.update()
                scores = table[:, place]
                found[rows] = ranks(scores, task.target[rows], excluded)
                order = np.argsort(np.where(excluded, np.inf, -scores), axis=1, kind="stable")
                for row, line, out in zip(rows.tolist(), order, excluded):
                    best[row] = self._first_titles(line, out, end, k)
                    firsts[row] = line[~out[line]][: k + 1]  # one more: the target may be left out of them
        return found, best, firsts

    def _first_titles(self, items: Integers, excluded: npt.NDArray[np.bool_], end: str, k: int) -> Integers:
        """The first k different titles of items in an order, without excluded ones."""
        numbers = self.trie(end).item_title[items[~excluded[items]][: 4 * k]]
        _, first = np.unique(numbers, return_index=True)
        return numbers[np.sort(first)][:k]

    def _beams(self, engine: Any, task: Task, label: str, given: Given) -> dict[int, Any]:
        """Each row's ranking by beam search."""
        section, k = self.recipe.evaluate, self._k(task)
        rankings: dict[int, Any] = {}
        for rows, end, excluded in self._blocks(task):
            found = engine.rank_titles(
                [task.prompts[row] for row in rows],
                self.trie(end),
                section.beam_width,
                k,
                [np.flatnonzero(out) for out in excluded],
                length_normalised=self.recipe.protocol.decoding.score == "mean",
                progress=f"{label}, beams of {section.beam_width}",
                **{name: table[rows] for name, table in given.items()},
            )
            rankings |= dict(zip(rows.tolist(), found, strict=True))
        return rankings


def rank_in(ranking: Any, trie: Any, target: int, excluded: npt.NDArray[np.bool_]) -> int:
    """Rank of an item in a beam's titles; NO_RANK where its title is not among them.

    As `metrics.ranks` counts: 1 + the items, of those that are ranked, whose score is at least the target's.
    """
    own = int(trie.item_title[target])
    places = np.flatnonzero(ranking.titles == own)
    if not len(places):
        return NO_RANK
    above = ranking.titles[ranking.scores >= ranking.scores[places[0]]]
    return sum(int((~excluded[trie.items_of(int(title))]).sum()) for title in above)
