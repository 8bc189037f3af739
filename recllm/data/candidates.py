"""Frozen candidates: for each example `count` items, the target among them, none of the others from the user's history.

Example keys, targets and histories enter; an (N, count) array leaves that depends on (seed, example key) only, so that
any partitioning of the examples, in any order, gives the same candidates.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from recllm.data.randomness import mix, uniform
from recllm.errors import UserError
from recllm.recipe import CandidatesSection

_DRAW_LOT, _PLACE_LOT, _REST_LOT = 201, 202, 203
_CHUNK = 4096  # rows at a time: the draws of a chunk fit into the second-level cache
_MOST_DRAWS = 16  # times the number wanted + 4: a row that needs more is completed exactly, over the whole catalogue
_REST_CELLS = 1 << 22

Items = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

__all__ = ["CandidateSampler", "mix", "uniform"]


class CandidateSampler:
    """Draws candidates without replacement.

    uniform: every item that is allowed is equally likely. popularity: successive draws without replacement, each
    proportional to the item's training interactions plus one (so that items without any can fill up).

    A row looks at a stream of draws, mix(seed, example key, 0), mix(seed, example key, 1), …, and takes the first
    count - 1 distinct items that are allowed. How many draws are computed at a time does not change which are taken.
    """

    def __init__(self, num_items: int, train_counts: npt.NDArray[np.int64], section: CandidatesSection) -> None:
        if section.count > num_items:
            raise UserError(
                f"candidates.count is {section.count}, the catalogue has {num_items} items: "
                "lower protocol.candidates.count"
            )
        self.num_items, self.section = num_items, section
        self.weights = np.ones(num_items) if section.method == "uniform" else np.asarray(train_counts) + 1.0
        self.cumulative = np.cumsum(self.weights) / self.weights.sum()

    def draw(
        self,
        example_keys: npt.NDArray[np.uint64],
        targets: Items,
        history_offsets: npt.NDArray[np.int64],
        history_items: Items,
    ) -> Items:
        """Candidates of N examples, (N, count) int32; row i's history is history_items[offsets[i]:offsets[i + 1]].

        The target stands at a seeded place of its row, once. The history should be all of the user's items, later ones
        included; it may contain the target.

        Raises:
            UserError: a row whose history leaves fewer than count - 1 other items; an item outside the catalogue.
        """
        targets = np.asarray(targets, dtype=np.int32)
        self._check(targets, history_offsets, history_items)
        result = np.empty((len(targets), self.section.count), dtype=np.int32)
        for start in range(0, len(targets), _CHUNK):
            rows = slice(start, min(start + _CHUNK, len(targets)))
            offsets = np.asarray(history_offsets[rows.start : rows.stop + 1])
            history = np.asarray(history_items[offsets[0] : offsets[-1]])
            forbidden = _pairs(targets[rows], offsets - offsets[0], history, self.num_items)
            result[rows] = self._rows(np.asarray(example_keys[rows]), targets[rows], forbidden)
        return result

    def _check(self, targets: Items, offsets: npt.NDArray[np.int64], history: Items) -> None:
        for name, items in (("target", targets), ("history", history)):
            if len(items) and (items.min() < 0 or items.max() >= self.num_items):
                wrong = int(items.min()) if items.min() < 0 else int(items.max())
                raise UserError(f"{name} item_index {wrong} is outside the catalogue of {self.num_items} items")
        long = np.flatnonzero(np.diff(offsets) + self.section.count > self.num_items)
        for row in long:  # only histories that might be too long are counted exactly
            taken = len(np.unique(np.append(history[offsets[row] : offsets[row + 1]], targets[row])))
            if taken + self.section.count - 1 > self.num_items:
                raise UserError(
                    f"example {row}: the user had {taken} of the {self.num_items} items, which leaves "
                    f"{self.num_items - taken} for the {self.section.count - 1} other candidates: lower "
                    "protocol.candidates.count or give more items"
                )

    def _rows(self, keys: npt.NDArray[np.uint64], targets: Items, forbidden: npt.NDArray[np.int64]) -> Items:
        """Candidates of one chunk. forbidden: sorted row * num_items + item."""
        wanted = self.section.count - 1
        others = np.full((len(keys), wanted), -1, dtype=np.int32)
        open_rows, draws = np.arange(len(keys)), wanted + 4 + wanted // 4
        while len(open_rows) and draws <= _MOST_DRAWS * (wanted + 4):
            drawn, taken = self._stream(keys[open_rows], open_rows, draws, forbidden)
            rank = np.cumsum(taken, axis=1, dtype=np.int32)
            row, column = np.nonzero(taken & (rank <= wanted))
            others[open_rows[row], rank[row, column] - 1] = drawn[row, column]
            open_rows = open_rows[rank[:, -1] < wanted]
            draws *= 4
        if len(open_rows):
            self._complete(keys, open_rows, others, forbidden)
        return _with_target(others, targets, uniform(mix(self.section.seed, _PLACE_LOT, keys)))

    def _stream(self, keys: Any, rows: Any, draws: int, forbidden: Any) -> tuple[npt.NDArray[np.int64], Mask]:
        """The first draws of each row, (rows, draws), and which of them are allowed and new to their row."""
        numbers = np.arange(draws)
        lots = uniform(mix(self.section.seed, _DRAW_LOT, keys[:, None], numbers[None, :]))
        if self.section.method == "uniform":
            drawn = (lots * self.num_items).astype(np.int64)
        else:
            drawn = np.minimum(np.searchsorted(self.cumulative, lots, side="right"), self.num_items - 1)
        return drawn, ~_repeated(drawn) & ~_contains(forbidden, drawn + rows[:, None] * self.num_items)

    def _complete(self, keys: Any, rows: Any, others: Items, forbidden: Any) -> None:
        """Rows whose stream ran dry: go on drawing without replacement, exactly.

        Smallest exponential arrival times E / weight are a successive draw without replacement (Efraimidis & Spirakis
        2006), and what is left over after some draws is again one.
        """
        step = max(1, _REST_CELLS // self.num_items)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            lots = uniform(mix(self.section.seed, _REST_LOT, keys[part][:, None], np.arange(self.num_items)[None, :]))
            arrival = -np.log1p(-lots) / self.weights  # (part, num_items)
            for line, row in enumerate(part):
                begin, end = np.searchsorted(forbidden, [row * self.num_items, (row + 1) * self.num_items])
                arrival[line, forbidden[begin:end] - row * self.num_items] = np.inf
                found = others[row] >= 0
                arrival[line, others[row][found]] = np.inf
                others[row][~found] = np.argsort(arrival[line], kind="stable")[: int((~found).sum())]


def _pairs(targets: Items, offsets: Any, history: Items, num_items: int) -> npt.NDArray[np.int64]:
    """Sorted row * num_items + item of everything that a row may not draw."""
    rows = np.repeat(np.arange(len(targets), dtype=np.int64), np.diff(offsets))
    pairs = np.concatenate([rows * num_items + history, np.arange(len(targets), dtype=np.int64) * num_items + targets])
    pairs.sort()
    return pairs


def _contains(ordered: npt.NDArray[np.int64], values: npt.NDArray[np.int64]) -> Mask:
    """Which values stand in the sorted, non-empty array."""
    place = np.searchsorted(ordered, values)
    return ordered[np.minimum(place, len(ordered) - 1)] == values


def _repeated(drawn: npt.NDArray[np.int64]) -> Mask:
    """Which draws of a row came earlier in it."""
    draws = drawn.shape[1]
    packed = drawn * draws + np.arange(draws)  # sorts by item, then by place
    packed.sort(axis=1)
    items, places = packed // draws, packed % draws
    again = np.zeros(drawn.shape, dtype=bool)
    again[:, 1:] = items[:, 1:] == items[:, :-1]
    result = np.empty_like(again)
    np.put_along_axis(result, places, again, axis=1)
    return result


def _with_target(others: Items, targets: Items, lots: npt.NDArray[np.float64]) -> Items:
    count = others.shape[1] + 1
    place = (lots * count).astype(np.int64)[:, None]
    column = np.arange(count)[None, :]
    source = np.clip(column - (column > place), 0, count - 2)
    return np.where(column == place, targets[:, None], np.take_along_axis(others, source, axis=1))
