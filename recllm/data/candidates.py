"""Frozen candidates: for each example `count` items, the target among them, none of the others from the user's history.

Events without item are no candidates, and take none away.

Example keys, targets and what each user had enter; an (N, count) array leaves that depends on (seed, example key) only,
so that any partitioning of the examples, in any order, gives the same candidates. A user's history is looked at once,
however many examples it has.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from recllm.data.randomness import mix, uniform
from recllm.errors import UserError
from recllm.recipe import CandidatesSection
from recllm.schema import NO_ITEM

_DRAW_LOT, _PLACE_LOT, _REST_LOT = 201, 202, 203
_CHUNK = 4096  # rows at a time: the draws of a chunk fit into the second-level cache
_MOST_DRAWS = 16  # times the number wanted + 4: a row that needs more is completed exactly, over all free items
_REST_CELLS = 1 << 18

Items = npt.NDArray[np.int32]
Taken = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


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

    def taken(self, offsets: npt.NDArray[np.int64], items: Items) -> Taken:
        """What U users had, once a batch for `draw`: user u's items are items[offsets[u]:offsets[u + 1]], in any order.

        NO_ITEM is nothing that anybody had.

        Returns the sorted distinct values of user * num_items + item, 8 bytes each.

        Raises:
            UserError: an item outside the catalogue.
        """
        had = items != NO_ITEM
        users = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))[had]
        self._check("history", items[had])
        pairs = users * self.num_items + items[had]
        pairs.sort()
        return pairs[np.diff(pairs, prepend=-1) > 0]

    def draw(self, example_keys: npt.NDArray[np.uint64], targets: Items, users: npt.ArrayLike, taken: Taken) -> Items:
        """Candidates of N examples, (N, count) int32.

        The target stands at a seeded place of its row, once; it may be among what its user had. `taken` should hold all
        of the user's items, later ones included.

        Args:
            example_keys: (N,) the key of each example's random stream.
            targets: (N,) item indices.
            users: (N,) each example's user, 0..U-1 of `taken`.
            taken: the result of the method `taken`.

        Raises:
            UserError: a user who had so much that less than count - 1 other items are left; a target outside the
                catalogue.
        """
        targets, users = np.asarray(targets, dtype=np.int32), np.asarray(users, dtype=np.int64)
        self._check("target", targets)
        result = np.empty((len(targets), self.section.count), dtype=np.int32)
        for start in range(0, len(targets), _CHUNK):
            rows = slice(start, start + _CHUNK)
            result[rows] = self._rows(np.asarray(example_keys[rows]), targets[rows], users[rows], taken)
        return result

    def _check(self, name: str, items: Items) -> None:
        if len(items) and (items.min() < 0 or items.max() >= self.num_items):
            wrong = int(items.min()) if items.min() < 0 else int(items.max())
            raise UserError(f"{name} item_index {wrong} is outside the catalogue of {self.num_items} items")

    def _rows(self, keys: npt.NDArray[np.uint64], targets: Items, users: Any, taken: Taken) -> Items:
        """Candidates of one chunk."""
        wanted = self.section.count - 1
        others = np.full((len(keys), wanted), -1, dtype=np.int32)
        open_rows, draws = np.arange(len(keys)), wanted + 4 + wanted // 4
        while len(open_rows) and draws <= _MOST_DRAWS * (wanted + 4):
            drawn, good = self._stream(keys[open_rows], targets[open_rows], users[open_rows], draws, taken)
            rank = np.cumsum(good, axis=1, dtype=np.int32)
            row, column = np.nonzero(good & (rank <= wanted))
            others[open_rows[row], rank[row, column] - 1] = drawn[row, column]
            open_rows = open_rows[rank[:, -1] < wanted]
            draws *= 4
        for user in np.unique(users[open_rows]):
            rows = open_rows[users[open_rows] == user]
            others[rows] = self._complete(keys[rows], targets[rows], others[rows], self._free(user, taken))
        return _with_target(others, targets, uniform(mix(self.section.seed, _PLACE_LOT, keys)))

    def _stream(self, keys: Any, targets: Any, users: Any, draws: int, taken: Taken) -> tuple[Any, Mask]:
        """The first draws of each row, (rows, draws), and which of them are allowed and new to their row."""
        numbers = np.arange(draws)
        lots = uniform(mix(self.section.seed, _DRAW_LOT, keys[:, None], numbers[None, :]))
        if self.section.method == "uniform":
            drawn = (lots * self.num_items).astype(np.int64)
        else:
            drawn = np.minimum(np.searchsorted(self.cumulative, lots, side="right"), self.num_items - 1)
        had = _contains(taken, drawn + users[:, None] * self.num_items) | (drawn == targets[:, None])
        return drawn, ~_repeated(drawn) & ~had

    def _free(self, user: int, taken: Taken) -> npt.NDArray[np.int64]:
        """The items that a user never had, in order."""
        begin, end = np.searchsorted(taken, [user * self.num_items, (user + 1) * self.num_items])
        free = np.ones(self.num_items, dtype=bool)
        free[taken[begin:end] - user * self.num_items] = False
        return np.flatnonzero(free)

    def _complete(self, keys: Any, targets: Any, others: Items, free: npt.NDArray[np.int64]) -> Items:
        """Rows of one user whose stream ran dry: go on drawing without replacement from the free items, exactly.

        Smallest exponential arrival times E / weight are a successive draw without replacement (Efraimidis & Spirakis
        2006), and what is left over after some draws is again one.
        """
        step = max(1, _REST_CELLS // max(1, len(free)))
        for start in range(0, len(keys), step):
            part = slice(start, start + step)
            lots = uniform(mix(self.section.seed, _REST_LOT, keys[part][:, None], free[None, :]))
            arrival = -np.log1p(-lots) / self.weights[free]  # (part, free)
            for times, target, row in zip(arrival, targets[part], others[part]):
                found = row >= 0
                times[_places(free, np.append(row[found], target))] = np.inf
                row[~found] = free[self._earliest(times, int((~found).sum()))]
        return others

    def _earliest(self, times: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
        """The places of the `count` smallest finite times, smallest first."""
        first = np.argpartition(times, count - 1)[:count] if count <= len(times) else np.arange(0)
        if len(first) < count or np.isinf(times[first]).any():
            raise UserError(
                f"a user had all but fewer than {self.section.count - 1} of the {self.num_items} items, which leaves "
                "too few other candidates: lower protocol.candidates.count or give more items"
            )
        return first[np.argsort(times[first], kind="stable")]


def _places(ordered: npt.NDArray[np.int64], values: Any) -> npt.NDArray[np.int64]:
    """Where those of the values stand that the sorted array holds."""
    place = np.searchsorted(ordered, values)
    return place[_contains(ordered, values)]


def _contains(ordered: npt.NDArray[np.int64], values: npt.NDArray[np.int64]) -> Mask:
    """Which values stand in the sorted array."""
    if not len(ordered):
        return np.zeros(values.shape, dtype=bool)
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
