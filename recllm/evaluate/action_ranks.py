"""Areas under ROC curves in thousands of resamples: ranked once, exact in each.

Scores, what is positive and the cluster of each example enter; how often each cluster was drawn gives the areas, of all
examples together or within each user. In a resample an example weighs what its cluster was drawn, so that an area is a
sum over the positives of the weight of the negatives below (Hanley & McNeil 1982, with weights):

    AUC = Σ_g up_g (below_g + tied_g / 2) / (Σ up · Σ down)

over the levels g, the different scores that a positive has: up_g is the weight of the positives there, tied_g that of
the negatives there and below_g that of all negatives below. Which clusters stand where does not change between
resamples: it is kept in sparse matrices (levels × clusters), and what is left of a resample is their product with the
draws and a running sum. Imports without torch.

N examples, U clusters (of `statistics`: users or sessions), V groups, G levels of all groups, S resamples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from recllm.evaluate.metrics import Booleans, Floats, Integers, differs

EXACT_IN_SINGLE = 2**24  # whole numbers up to here, and their sums, are exact in single precision
_CHUNK = 2_000_000  # entries of a table of levels and resamples held at once


@dataclass(frozen=True)
class Draws:
    """Resamples of clusters, laid out for sums over clusters: made once for all rankings of the same examples."""

    counts: Floats  # (S, U) how often each cluster was drawn
    of_cluster: NDArray  # (U, S) the same; in single precision where that is exact

    @classmethod
    def of(cls, counts: Floats, members: Integers) -> "Draws":
        """Of counts (S, U) and the cluster of each example (N,).

        Single precision is twice as fast. It is exact if weights are whole numbers and those of all examples of a
        resample together, which no sum exceeds, are below EXACT_IN_SINGLE.
        """
        counts = np.asarray(counts, np.float64)
        sizes = np.bincount(members, minlength=counts.shape[1])
        whole = bool((counts == np.rint(counts)).all()) and bool((counts >= 0).all())
        exact = whole and bool((counts @ sizes).max(initial=0) < EXACT_IN_SINGLE)
        return cls(counts, np.ascontiguousarray(counts.T, np.float32 if exact else np.float64))


@dataclass(frozen=True)
class Ranking:
    """Examples ranked by score within groups.

    Groups without a positive or without a negative have no area in any resample, and are dropped. Where a group's
    examples are all of one cluster, its area is the same in every resample that draws it, as all of them weigh alike:
    those groups are summed up beforehand.
    """

    below: csr_array  # (G, U) negatives below a level and at or above the one before it in its group
    tied: csr_array  # (G', U) negatives at a level, of the levels that have some
    tied_level: Integers  # (G',) these levels
    up: csr_array  # (G, U) positives at a level
    starts: Integers  # (V,) the first level of each group whose area moves
    positives: csr_array  # (V, U) of these groups
    negatives: csr_array  # (V, U)
    fixed: Floats  # (2, U) by cluster, of groups whose area is fixed: Σ n_v AUC_v and Σ n_v

    @classmethod
    def of(cls, score: Floats, positive: Booleans, members: Integers, groups: NDArray | None = None) -> "Ranking":
        """Rank scores (N,) of examples in clusters `members` (N,), 0 to U - 1; a NaN score is below all others.

        Without `groups` (N,) all examples are one group.
        """
        members = np.asarray(members, np.int64)
        score = np.where(np.isnan(score), -np.inf, np.asarray(score, np.float64))
        group = np.zeros(len(score), np.int64) if groups is None else np.unique(groups, return_inverse=True)[1]
        order = np.lexsort((score, group))
        sorted_ = _Sorted(group[order], score[order], np.asarray(positive, bool)[order], members[order])
        sorted_ = sorted_.of_groups(sorted_.has_both())
        clusters = int(members.max(initial=-1)) + 1
        alone = sorted_.is_alone()
        fixed = np.zeros((2, clusters))
        if alone.any():
            fixed = _fixed(sorted_.of_groups(alone), clusters)
        moving = sorted_.of_groups(~alone)
        return cls(*moving.matrices(clusters), fixed)

    def auc(self, draws: "Draws") -> Floats:
        """The area (S,) of a ranking without groups; NaN where one of the two classes was not drawn."""
        areas, _ = self._areas(draws)
        if len(areas):
            return np.asarray(areas[0])
        above, below = self.fixed @ draws.counts.T  # one cluster, or a class that is absent
        return _ratio(above, below)

    def grouped(self, draws: "Draws") -> Floats:
        """Σ_v n_v AUC_v / Σ_v n_v (S,) over the groups with both classes in a resample, n_v their weight; or NaN."""
        areas, sizes = self._areas(draws)
        known = ~np.isnan(areas)
        above, below = self.fixed @ draws.counts.T
        above = above + np.where(known, areas * sizes, 0).sum(axis=0)
        return _ratio(above, below + np.where(known, sizes, 0).sum(axis=0))

    def _areas(self, draws: "Draws") -> tuple[Floats, Floats]:
        """Areas and weights of the groups that move, (V, S) each."""
        ups, downs = ((of @ draws.of_cluster).astype(np.float64) for of in (self.positives, self.negatives))
        pairs = np.zeros_like(ups)
        for place, part in self._pairs(draws.of_cluster):
            pairs[place : place + len(part)] += part
        return _ratio(pairs, ups * downs), ups + downs

    def _pairs(self, drawn: NDArray) -> Iterator[tuple[int, Floats]]:
        """Weight of the pairs of each group in which the positive is ahead, as (first group, sums of it and the next).

        Level by level in blocks; a group that goes on in the next block is yielded again.
        """
        levels, step = self.up.shape[0], max(1, _CHUNK // max(1, drawn.shape[1]))
        carried = np.zeros((1, drawn.shape[1]), drawn.dtype)  # of the group that began in a block before
        for begin in range(0, levels, step):
            end = min(begin + step, levels)
            up, running = self.up[begin:end] @ drawn, np.cumsum(self.below[begin:end] @ drawn, axis=0)
            first, last = np.searchsorted(self.starts, [begin, end])
            new = self.starts[first:last] - begin  # rows at which a group begins
            goes_on = not len(new) or bool(new[0] > 0)
            base = np.concatenate([-carried] * goes_on + [running[new - 1] * (new > 0)[:, None]])
            edges = np.concatenate([[0] * goes_on, new]).astype(np.int64)
            running -= np.repeat(base, np.diff([*edges, end - begin]), axis=0)
            carried = running[-1:].copy()
            halves = np.searchsorted(self.tied_level, [begin, end])
            weight = running.astype(np.float64)  # its products with `up` may be too large for single precision
            if halves[1] > halves[0]:
                weight[self.tied_level[slice(*halves)] - begin] += (self.tied[slice(*halves)] @ drawn) / 2
            yield int(first) - goes_on, np.add.reduceat(up * weight, edges, axis=0)


@dataclass(frozen=True)
class _Sorted:
    """Examples (N,) each, by group and then by score."""

    group: Integers
    score: Floats
    positive: Booleans
    member: Integers

    def of_groups(self, chosen: Booleans) -> "_Sorted":
        """The examples of the chosen groups, numbered anew from 0; `chosen` (V,) by number."""
        if not len(self.group) or chosen.all():
            return self
        kept = chosen[self.group]
        number = np.cumsum(chosen) - 1
        return _Sorted(number[self.group[kept]], self.score[kept], self.positive[kept], self.member[kept])

    def has_both(self) -> Booleans:
        """(V,) whether a group has positives and negatives."""
        ups = np.bincount(self.group, weights=self.positive)
        return np.asarray((ups > 0) & (ups < np.bincount(self.group)))

    def is_alone(self) -> Booleans:
        """(V,) whether the examples of a group are of one cluster."""
        if not len(self.group):
            return np.zeros(0, bool)
        starts = np.flatnonzero(differs(self.group))
        return np.asarray(np.minimum.reduceat(self.member, starts) == np.maximum.reduceat(self.member, starts))

    def matrices(
        self, clusters: int
    ) -> tuple[csr_array, csr_array, Integers, csr_array, Integers, csr_array, csr_array]:
        """What `Ranking` keeps of groups that have both classes, in its order."""
        place = np.cumsum(differs(self.group) | differs(self.score)) - 1  # number of the (group, score)
        of_positive = np.unique(place[self.positive])  # (G,)
        levels, groups = len(of_positive), int(self.group.max(initial=-1)) + 1
        up = np.searchsorted(of_positive, place[self.positive])
        at = np.searchsorted(of_positive, place[~self.positive])  # the level at or above each negative, G behind all
        owner = np.append(self.group[self.positive][differs(up)], -1)  # (G + 1,) the group of each level
        on_level = np.append(of_positive, -1)[at] == place[~self.positive]
        above = at + on_level  # the first level that is above the negative
        of_own = owner[above] == self.group[~self.positive]
        tied_level, half = np.unique(at[on_level], return_inverse=True)
        member, down = self.member[self.positive], self.member[~self.positive]
        return (
            _incidence(above[of_own], down[of_own], levels, clusters),
            _incidence(half, down[on_level], len(tied_level), clusters),
            tied_level,
            _incidence(up, member, levels, clusters),
            np.flatnonzero(differs(owner[:-1])),
            _incidence(self.group[self.positive], member, groups, clusters),
            _incidence(self.group[~self.positive], down, groups, clusters),
        )


def _fixed(sorted_: _Sorted, clusters: int) -> Floats:
    """(2, U) Σ n_v AUC_v and Σ n_v by cluster, of groups of one cluster each."""
    owner = sorted_.member[differs(sorted_.group)]  # (V,) the cluster of each group
    own = _Sorted(sorted_.group, sorted_.score, sorted_.positive, sorted_.group)
    moving = Ranking(*own.matrices(len(owner)), np.zeros((2, len(owner))))
    areas, sizes = (found[:, 0] for found in moving._areas(Draws.of(np.ones((1, len(owner))), sorted_.group)))
    return np.stack([np.bincount(owner, weights=part, minlength=clusters) for part in (areas * sizes, sizes)])


def _incidence(row: Integers, column: Integers, rows: int, columns: int) -> csr_array:
    """(rows, columns) how often each pair occurs, from ascending rows; single precision, as counts are small."""
    ends = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))])
    small = np.int32 if len(row) < np.iinfo(np.int32).max else np.int64
    table = csr_array((np.ones(len(row), np.float32), column.astype(small), ends.astype(small)), shape=(rows, columns))
    table.sum_duplicates()
    return table


def _ratio(above: Floats, below: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)
