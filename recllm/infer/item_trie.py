"""One trie of a catalogue's titles: what a constrained search may write, for every engine.

The token ids of each item's title enter, terminator included; an `ItemTrie` of flat int32 arrays leaves. Imports
without torch.

    node 0 is the root; each other node is one token behind its parent's; a title ends in a node without children.
    Nodes are numbered level by level, within a level by (parent, token): the children of a node are the nodes
    first_child[node] … first_child[node + 1] − 1, by ascending token, and a shorter title ends in a lower node.

Titles and items. Items whose tokens are equal share ONE title, as they share one likelihood: nothing that a model
writes tells them apart. A title is therefore found and ranked once. `items_of` names all items that share it,
`representatives` the one that is shown for it, and it is excluded for a user when all of its items are. Titles are
numbered by their first items, so title and item numbers are the same in a catalogue without such pairs.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from recllm.errors import UserError

Ints = npt.NDArray[np.int32]

_TEXTS_AT_ONCE = 8192  # that a tokenizer is given: its answer is a list of lists of Python integers


class Children(NamedTuple):
    """Children of several nodes, one after the other: C of them."""

    rows: npt.NDArray[np.int64]  # (C,) which of the nodes asked about is the parent, ascending
    tokens: Ints  # (C,) ascending within a row
    nodes: Ints  # (C,)


@dataclass(frozen=True, eq=False)
class ItemTrie:
    """Titles with shared beginnings merged. N nodes, S titles, I items; made by `build` or `catalogue_trie`."""

    tokens: Ints  # (N,) −1 for the root
    parent: Ints  # (N,) −1 for the root
    first_child: Ints  # (N + 1,)
    levels: Ints  # (depth + 2,) nodes of depth d are levels[d] … levels[d + 1] − 1
    title: Ints  # (N,) the title that ends in a node, −1 where none does
    leaf: Ints  # (S,) the node in which a title ends
    item_title: Ints  # (I,) the title of an item
    items: Ints  # (I,) items by title, ascending within one
    item_offsets: Ints  # (S + 1,) title s has items[item_offsets[s] : item_offsets[s + 1]]

    @classmethod
    def build(
        cls,
        tokens: Sequence[Sequence[int]] | npt.ArrayLike,
        offsets: npt.ArrayLike | None = None,
        texts: Sequence[str] | None = None,
    ) -> "ItemTrie":
        """Merge the titles of a catalogue, item by item.

        Args:
            tokens: a list of token ids an item; with `offsets` one flat array of them.
            offsets: (I + 1,) item i has tokens[offsets[i] : offsets[i + 1]].
            texts: how errors call the items; None: by their tokens.

        Raises:
            UserError: no item; a title without tokens; a title that another one begins with.
        """
        titles = _Titles(*_flat(tokens), texts) if offsets is None else _Titles(tokens, offsets, texts)
        nodes, parents, levels, leaf_of_item = _merge(titles)
        num_children = np.bincount(parents[1:], minlength=len(nodes))
        _check_ends(titles, num_children, parents, leaf_of_item)
        leaf, item_title = _number_titles(leaf_of_item)
        title = np.full(len(nodes), -1, dtype=np.int32)
        title[leaf] = np.arange(len(leaf))
        return cls(
            tokens=nodes,
            parent=parents,
            first_child=_sums_from(1, num_children),
            levels=levels,
            title=title,
            leaf=leaf,
            item_title=item_title,
            items=np.argsort(item_title, kind="stable").astype(np.int32),
            item_offsets=_sums_from(0, np.bincount(item_title)),
        )

    # ---- sizes ----

    @property
    def num_nodes(self) -> int:
        """N, the root included."""
        return len(self.tokens)

    @property
    def num_titles(self) -> int:
        """S: different titles."""
        return len(self.leaf)

    @property
    def num_items(self) -> int:
        """I: the catalogue."""
        return len(self.item_title)

    @property
    def depth(self) -> int:
        """Tokens of the longest title."""
        return len(self.levels) - 2

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(getattr(self, name).nbytes for name in self.__dataclass_fields__)

    @cached_property
    def lengths(self) -> Ints:
        """(S,) tokens of each title: the depth of its leaf."""
        return (np.searchsorted(self.levels, self.leaf, side="right") - 1).astype(np.int32)

    # ---- down and up ----

    def children(self, node: int) -> tuple[Ints, Ints]:
        """Tokens that may follow, ascending, and the nodes that they lead to."""
        start, end = self.first_child[node], self.first_child[node + 1]
        return self.tokens[start:end], np.arange(start, end, dtype=np.int32)

    def children_of(self, nodes: npt.ArrayLike, blocked: Ints | None = None) -> Children:
        """Children of several nodes at once, without those that are `blocked` (see `excluding`)."""
        parents = np.asarray(nodes, dtype=np.int64)
        starts = self.first_child[parents]
        counts = self.first_child[parents + 1] - starts
        rows = np.repeat(np.arange(len(parents)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, … of each parent
        found = (np.repeat(starts, counts) + within).astype(np.int32)
        if blocked is not None and len(blocked):
            is_open = ~_is_in(found, blocked)
            rows, found = rows[is_open], found[is_open]
        return Children(rows, self.tokens[found], found)

    def walk(self, tokens: Iterable[int], node: int = 0) -> int:
        """The node that tokens lead to, from the root or from another node; −1 where no title goes that way."""
        for token in tokens:
            start, end = self.first_child[node], self.first_child[node + 1]
            node = int(start + np.searchsorted(self.tokens[start:end], token))
            if node == end or self.tokens[node] != token:
                return -1
        return node

    def path(self, node: int) -> list[int]:
        """Token ids from the root to a node."""
        found = []
        while node > 0:
            found.append(int(self.tokens[node]))
            node = int(self.parent[node])
        return found[::-1]

    def allowed(self, prefix: Iterable[int], blocked: Ints | None = None) -> Ints:
        """Tokens that may follow a prefix, ascending. None may follow a whole title, and what begins no title."""
        node = self.walk(prefix)
        return self.children_of([] if node < 0 else [node], blocked).tokens

    # ---- titles and items ----

    def title_of(self, node: int) -> int:
        """The title that ends in a node; −1 where none does."""
        return int(self.title[node])

    def items_of(self, title: int) -> Ints:
        """All items that share a title, ascending."""
        return self.items[self.item_offsets[title] : self.item_offsets[title + 1]]

    def representatives(self, popularity: npt.ArrayLike | None = None) -> Ints:
        """(S,) the one item that is shown for each title, so that no list of items holds a title twice.

        The most popular of those that share it, by `popularity` (I,), such as the counts of training; the lowest
        index among equals, and of all where no popularity is given.
        """
        if popularity is None:
            return self.items[self.item_offsets[:-1]]
        counts = np.asarray(popularity, dtype=np.float64)
        if counts.shape != (self.num_items,):
            raise ValueError(f"popularity has shape {counts.shape}: one number for each of {self.num_items} items")
        order = np.lexsort((-counts[self.items], self.item_title[self.items]))  # stable: lower items stay in front
        return self.items[order[self.item_offsets[:-1]]]

    # ---- what one user is not shown ----

    def excluding(self, items: npt.ArrayLike) -> Ints:
        """Blocked nodes, ascending: those below which every title is excluded, and the leaves of these titles.

        A title is excluded when all items that share it are. Level by level from the deepest, each node is asked
        whether all of its children are blocked: the cost grows with the items × their depth, not with the catalogue.
        """
        unique = np.unique(np.asarray(items, dtype=np.int64))
        if len(unique) and not 0 <= unique[0] <= unique[-1] < self.num_items:
            raise ValueError(f"items {unique[0]} to {unique[-1]} of a trie with {self.num_items} items")
        titles, counts = np.unique(self.item_title[unique], return_counts=True)
        leaves = np.sort(self.leaf[titles[counts == self.item_offsets[titles + 1] - self.item_offsets[titles]]])
        by_level = np.split(leaves, np.searchsorted(leaves, self.levels[1:-1]))
        blocked, above = [], np.empty(0, dtype=np.int32)
        for level in reversed(by_level):
            here = np.concatenate([level, above])
            parents, counts = np.unique(self.parent[here[here > 0]], return_counts=True)
            above = parents[counts == self.first_child[parents + 1] - self.first_child[parents]]
            blocked.append(here)
        return np.sort(np.concatenate(blocked))


def _is_in(nodes: Ints, blocked: Ints) -> npt.NDArray[np.bool_]:
    """Which nodes are blocked; faster than np.isin, which would sort the sorted.

    >>> _is_in(np.array([1, 5, 9]), np.array([0, 5])).tolist()
    [False, True, False]
    """
    place = np.minimum(np.searchsorted(blocked, nodes), len(blocked) - 1)
    found: npt.NDArray[np.bool_] = blocked[place] == nodes
    return found


def catalogue_trie(tokenizer: Any, texts: Sequence[str], end: str) -> ItemTrie:
    """The trie of a catalogue: item i is answered with `texts[i] + end`, tokenised as every answer is.

    Args:
        tokenizer: a Transformers tokenizer.
        texts: the items as prompts and answers write them, in the order of item_index.
        end: what ends an answer: a newline where it continues a list, "" for eos (model/chat.py).

    Raises:
        UserError: no item; an empty text; a text that another one begins with, which takes a newline inside one.
    """
    from recllm.model.chat import answers_ids  # needs torch, which a trie does not

    if empty := [item for item, text in enumerate(texts) if not text]:
        raise UserError(f"item {empty[0]} has an empty title, every item needs one: set prompt.item and convert again")
    flat, offsets = array("i"), array("q", [0])
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        for ids in answers_ids(tokenizer, [text + end for text in texts[start : start + _TEXTS_AT_ONCE]]):
            flat.extend(ids)
            offsets.append(len(flat))
    return ItemTrie.build(np.frombuffer(flat, np.int32) if flat else [], np.frombuffer(offsets, np.int64), texts)


# ---- building ----


class _Titles:
    """Token ids of the items' titles, checked: item i has tokens[offsets[i] : offsets[i + 1]]."""

    def __init__(self, tokens: npt.ArrayLike, offsets: npt.ArrayLike, texts: Sequence[str] | None) -> None:
        self.tokens, self.offsets, self.texts = np.asarray(tokens, np.int32), np.asarray(offsets, np.int64), texts
        self.lengths = np.diff(self.offsets)  # (I,)
        if not len(self.lengths):
            raise UserError("a trie of 0 titles, at least 1 is needed: check the items of the dataset")
        if self.offsets[0] or self.offsets[-1] != len(self.tokens) or self.lengths.min() < 0:
            raise ValueError(f"offsets that ascend from 0 to {len(self.tokens)} are expected")
        if not self.lengths.all():
            named = self.name(int(self.lengths.argmin()))
            raise UserError(f"{named} has a title of 0 tokens, at least 1 is needed: give it a title and convert again")
        if self.tokens.min() < 0:
            raise ValueError(f"token id {self.tokens.min()}: ids from 0 are expected")

    def name(self, item: int) -> str:
        """An item as errors call it."""
        ids = self.tokens[self.offsets[item] : self.offsets[item + 1]].tolist()
        return f'item {item} "{self.texts[item]}"' if self.texts else f"item {item} {ids}"


def _flat(lists: Any) -> tuple[Ints, npt.NDArray[np.int64]]:
    counts = np.fromiter(map(len, lists), np.int64, len(lists))
    flat = np.fromiter(chain.from_iterable(lists), np.int32, int(counts.sum()))
    return flat, np.concatenate([[0], np.cumsum(counts)])


def _sums_from(start: int, counts: npt.NDArray[np.int64]) -> Ints:
    return np.concatenate([[start], start + np.cumsum(counts)]).astype(np.int32)


def _merge(titles: _Titles) -> tuple[Ints, Ints, Ints, Ints]:
    """Tokens and parents of the nodes, the levels' first nodes, and the node in which each item's title ends."""
    node = np.zeros(len(titles.lengths), dtype=np.int32)  # (I,) where each item has arrived
    tokens, parents, levels = [np.full(1, -1, np.int32)], [np.full(1, -1, np.int32)], [0, 1]
    vocabulary = np.int64(titles.tokens.max()) + 1
    active = np.arange(len(node), dtype=np.int32)  # items whose titles go on
    for depth in range(titles.lengths.max()):
        active = active[titles.lengths[active] > depth]
        keys = node[active] * vocabulary + titles.tokens[titles.offsets[active] + depth]
        unique, places = np.unique(keys, return_inverse=True)  # by (parent, token)
        node[active] = levels[-1] + places
        tokens.append((unique % vocabulary).astype(np.int32))
        parents.append((unique // vocabulary).astype(np.int32))
        levels.append(levels[-1] + len(unique))
    return np.concatenate(tokens), np.concatenate(parents), np.array(levels, dtype=np.int32), node


def _check_ends(titles: _Titles, num_children: npt.NDArray[np.int64], parents: Ints, leaf_of_item: Ints) -> None:
    """Refuse a title that another one begins with: behind its last token a search could stop or go on."""
    begun = np.flatnonzero(num_children[leaf_of_item])
    if not len(begun):
        return
    node = leaf_of_item[begun[0]]
    while num_children[node]:
        node = parents.searchsorted(node)  # its first child: parents ascend
    longer = int(np.flatnonzero(leaf_of_item == node)[0])
    raise UserError(
        f"{titles.name(int(begun[0]))} is the beginning of {titles.name(longer)}, each title must end where no other "
        "one goes on: end all with a newline or with eos, and keep newlines out of titles"
    )


def _number_titles(leaf_of_item: Ints) -> tuple[Ints, Ints]:
    """Leaves of the titles, numbered by their first items, and the title of each item."""
    leaves, first, places = np.unique(leaf_of_item, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty(len(leaves), dtype=np.int32)
    number[order] = np.arange(len(leaves))
    return leaves[order], number[places]
