"""Whom each expert serves: what stands in the histories of the users that the gate sends to it, and who they are.

The gates of the evaluated users and the dataset enter; the entry `experts` of metrics.json leaves. Imports without
torch.

Each user counts once, at their last evaluated example. Two kinds of groups are looked at: values of an item attribute
(genres), with the share of each in a user's history, and groups of users (history length, taste, recency, attributes of
data.users), where a user's share is 0 or 1. An expert's lift of a group is the mean share of the users weighted by the
expert's gate weight, over the mean share of all users: 1 where the gate does not care (statistics.bootstrap_lifts).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recllm.data import readers
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.evaluate import statistics
from recllm.evaluate.baselines import item_counts
from recllm.evaluate.figures import HISTORY_BUCKETS, as_json, popularity_classes
from recllm.recipe import Recipe
from recllm.schema import ITEMS, actions_of

Floats = npt.NDArray[np.float64]

MAX_ITEM_GROUPS, MAX_USER_GROUPS = 20, 8  # values of an attribute that are looked at; of a user attribute
MAX_VALUES = 60  # an attribute with more values is no grouping
SEPARATORS = ("|", ";", ",", " ")
_DAY = 86400


class ItemGroups(NamedTuple):
    """The values of one item attribute. G groups."""

    column: str
    separator: str  # "" where an item has one value
    guessed: bool
    names: list[str]  # (G,)
    members: npt.NDArray[np.bool_]  # (num_items, G)


class Part(NamedTuple):
    """One table of groups: each user's share of each. U users, G groups."""

    name: str
    what: str  # items: shares of a history; users: 0 or 1
    groups: list[str]  # (G,)
    shares: Floats  # (U, G)


# ---- what items have in common ----


def item_groups(items: pa.Table, asked: str | None) -> ItemGroups | None:
    """The groups of evaluate.item_groups: "COLUMN", "COLUMN by SEPARATOR" (or "by space"); None guesses, "" has none.

    Guessed is a text attribute of 2 to 60 values that most items have: one with several values an item before others.

    Raises:
        UserError: an attribute that items.parquet does not have, or one without two values.
    """
    texts = {name: _texts(items[name]) for name in _attributes(items)}
    if asked == "":
        return None
    if asked is not None:
        return _asked_groups(texts, asked)
    found = [_groups(name, values, guess_separator(values), True) for name, values in texts.items() if _words(values)]
    fitting = [group for group in found if 2 <= len(group.names) <= min(MAX_VALUES, items.num_rows // 2)]
    fitting = [group for group in fitting if group.members.any(axis=1).mean() >= 0.5]
    return min(fitting, key=lambda group: group.separator == "", default=None)  # several values first, then file order


def _attributes(items: pa.Table) -> list[str]:
    return [name for name in items.column_names if name not in {*ITEMS.names, "text"}]


def _texts(column: pa.ChunkedArray) -> list[str]:
    """Each item's value as one text; a list's values are joined as the first separator would be split."""
    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    return [
        "" if value is None else SEPARATORS[0].join(map(str, value)) if lists else str(value)
        for value in column.to_pylist()
    ]


def _words(values: Sequence[str]) -> bool:
    """Whether an attribute is text: not all numbers (years, prices)."""
    present = [value for value in values if value.strip()]
    return any(not value.replace(".", "", 1).replace("-", "").strip().isdigit() for value in present)


def guess_separator(values: Sequence[str]) -> str:
    """What parts the values of an attribute: the first separator by which the parts are fewer than whole values.

    >>> guess_separator(["Action Comedy", "Action", "Comedy", "Drama"])
    ' '
    >>> guess_separator(["Science Fiction", "Drama", "Comedy"])
    ''
    """
    whole = {value.strip() for value in values if value.strip()}
    for separator in SEPARATORS:
        parts = {part for value in whole for part in _split(value, separator)}
        if any(separator in value for value in whole) and len(parts) < len(whole):
            return separator
    return ""


def _split(value: str, separator: str) -> list[str]:
    parts = value.split(separator) if separator else [value]
    return [part.strip() for part in parts if part.strip()]


def _asked_groups(texts: Mapping[str, list[str]], asked: str) -> ItemGroups:
    column, by, separator = (asked, "", "") if asked in texts else asked.rpartition(" by ")
    column = column if by else asked
    if column not in texts:
        known = ", ".join(texts) or "none"
        raise UserError(f'evaluate.item_groups: no item attribute is called "{column}", attributes there: {known}')
    separator = (" " if separator == "space" else separator) if by else guess_separator(texts[column])
    groups = _groups(column, texts[column], separator, False)
    if len(groups.names) < 2:
        raise UserError(
            f"evaluate.item_groups: {column} has {len(groups.names)} values, at least 2 are needed: name another "
            'attribute, or ""'
        )
    return groups


def _groups(column: str, values: Sequence[str], separator: str, guessed: bool) -> ItemGroups:
    parts = [_split(value, separator) for value in values]
    names = sorted({part for row in parts for part in row})
    place = {name: number for number, name in enumerate(names)}
    if guessed and len(names) > MAX_VALUES:  # refused anyway: a title-like column would fill the memory
        return ItemGroups(column, separator, guessed, names, np.zeros((0, 0), dtype=bool))
    members = np.zeros((len(values), len(names)), dtype=bool)
    for line, row in zip(members, parts, strict=True):
        line[[place[part] for part in row]] = True
    return ItemGroups(column, separator, guessed, names, members)


# ---- who the users are ----


class Users(NamedTuple):
    """The users that are looked at, each at one example. U users."""

    user_index: npt.NDArray[np.int64]  # (U,)
    history_end: npt.NDArray[np.int64]  # (U,)
    gate_end: npt.NDArray[np.int64]  # (U,) the gate reads positions before it


def last_examples(users: npt.NDArray, ends: npt.NDArray) -> npt.NDArray[np.int64]:
    """The row of each user's last example: the one with the longest history, (U,), by user.

    >>> last_examples(np.array([5, 3, 5]), np.array([1, 9, 4])).tolist()
    [1, 2]
    """
    order = np.lexsort((ends, users))
    newest = np.flatnonzero(np.append(np.diff(users[order]) != 0, True))
    return order[newest]


def item_part(groups: ItemGroups, dataset: Dataset, users: Users) -> Part:
    """Share of each group in each user's history, as much of it as the gate reads; the most frequent groups."""
    longest = int(dataset.manifest["history_max_items"])
    shares = np.zeros((len(users.user_index), len(groups.names)))
    for line, user, end in zip(shares, users.user_index.tolist(), users.gate_end.tolist(), strict=True):
        if len(items := dataset.history(user, end, longest)):
            line[:] = groups.members[items].mean(axis=0)
    return _most_frequent(groups.column, groups.names, shares)


def action_part(dataset: Dataset, users: Users) -> Part:
    """Share of each action in each user's events, as many of them as the gate reads."""
    longest, names = int(dataset.manifest["history_max_items"]), dataset.actions
    shares = np.zeros((len(users.user_index), len(names)))
    for line, user, end in zip(shares, users.user_index.tolist(), users.gate_end.tolist(), strict=True):
        if len(codes := dataset.read(user, end, longest)):
            numbers = actions_of(codes.astype(np.int64), dataset.num_items)
            line[:] = np.bincount(numbers, minlength=len(names)) / len(codes)
    return _most_frequent("actions", names, shares)


def _most_frequent(name: str, groups: Sequence[str], shares: Floats) -> Part:
    """The groups that most of the histories are of, and enough users have."""
    kept = np.flatnonzero((shares > 0).sum(axis=0) >= statistics.FEW_USERS)
    kept = kept[np.argsort(-shares[:, kept].mean(axis=0), kind="stable")][:MAX_ITEM_GROUPS]
    return Part(name, "items", [groups[place] for place in kept], shares[:, kept])


def user_parts(dataset: Dataset, users: Users, attributes: Mapping[str, Sequence[str]]) -> Iterator[Part]:
    """History length, taste, recency, and every attribute: one part each, groups in their own order."""
    labels = {
        "history length": _history_lengths(users.history_end),
        "head items in the history": thirds(_head_shares(dataset, users), lambda share: f"{share:.0%}"),
        "time since the last interaction": thirds(_gaps(dataset, users), _duration),
        **{name: _attribute(values) for name, values in attributes.items()},
    }
    for name, (values, order) in labels.items():
        groups = [group for group in order if (values == group).any()]
        if len(groups) > 1:
            yield Part(name, "users", groups, np.stack([values == group for group in groups], axis=1).astype(float))


def _history_lengths(ends: npt.NDArray) -> tuple[npt.NDArray, list[str]]:
    names = ["0", *(f"{low}-{high}" for low, high in HISTORY_BUCKETS), f">{HISTORY_BUCKETS[-1][1]}"]
    return np.array(names)[np.searchsorted([0, *(high for _, high in HISTORY_BUCKETS)], ends)], names


def _head_shares(dataset: Dataset, users: Users) -> Floats:
    """Share of head items in each history, (U,); NaN without an item in it."""
    head = popularity_classes(item_counts(dataset)) == "head"
    longest = int(dataset.manifest["history_max_items"])
    pairs = zip(users.user_index.tolist(), users.gate_end.tolist(), strict=True)
    histories = (dataset.history(user, end, longest) for user, end in pairs)
    return np.array([head[items].mean() if len(items) else np.nan for items in histories])


def _gaps(dataset: Dataset, users: Users) -> Floats:
    """Seconds from the last interaction of the history to the example, (U,); NaN without a history."""
    times, starts = np.asarray(dataset.sequences.timestamps), dataset.sequences.offsets[users.user_index]
    last = np.maximum(starts, starts + users.history_end - 1)
    return np.where(users.history_end > 0, times[starts + users.history_end] - times[last], np.nan)


def thirds(values: Floats, write: Any) -> tuple[npt.NDArray, list[str]]:
    """The third that each value (N,) falls into, as text, and the names in order; NaN is in none.

    Equal values are never parted, so that ties can leave two groups, or one.

    >>> thirds(np.array([1.0, 2, 3, np.nan]), lambda value: f"{value:.0f}")[0].tolist()
    ['≤ 1', '1 to 2', '> 2', '']
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return np.full(len(values), ""), []
    low, high = np.quantile(known, [1 / 3, 2 / 3], method="inverted_cdf")
    names = [f"≤ {write(low)}", f"{write(low)} to {write(high)}", f"> {write(high)}"]
    place = np.select([np.isnan(values), values <= low, values <= high], [3, 0, 1], 2)
    return np.array([*names, ""])[place], names


def _duration(seconds: float) -> str:
    """
    >>> _duration(7200), _duration(3 * 86400)
    ('2 hours', '3 days')
    """
    for unit, size in (("days", _DAY), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _attribute(values: Sequence[str]) -> tuple[npt.NDArray, list[str]]:
    """The values of a user attribute as groups; of numbers with many values the thirds; nothing of many texts."""
    texts = np.array([value.strip() for value in values])
    names, counts = np.unique(texts[texts != ""], return_counts=True)
    if len(names) <= MAX_USER_GROUPS:
        return texts, names.tolist()
    try:
        numbers = np.array([float(text) if text else np.nan for text in texts])
    except ValueError:
        kept = names[np.argsort(-counts, kind="stable")][:MAX_USER_GROUPS]
        return texts, kept.tolist() if len(names) <= MAX_VALUES else []
    return thirds(numbers, lambda value: f"{value:g}")


class Groups(NamedTuple):
    """What the experts are looked at by, read before anything is scored."""

    items: ItemGroups | None
    attributes: dict[str, list[str]]  # of data.users: by user_index
    notes: list[str]


def load_groups(recipe: Recipe, dataset: Dataset) -> Groups:
    """Item groups by evaluate.item_groups, and the attributes of data.users where its file can still be read.

    Raises:
        UserError: evaluate.item_groups names no attribute of the items.
    """
    items, notes = item_groups(dataset.items, recipe.evaluate.item_groups), []
    attributes: dict[str, list[str]] = {}
    if items is None and recipe.evaluate.item_groups is None:
        notes.append(
            f"No item attribute groups the items (a text with 2 to {MAX_VALUES} values that most items have): name one "
            "with evaluate.item_groups."
        )
    if recipe.data.users:
        try:
            attributes = _read_attributes(recipe, dataset)
        except UserError as error:
            notes.append(f"The attributes of data.users were not read: {error}.")
    return Groups(items, attributes, notes)


def _read_attributes(recipe: Recipe, dataset: Dataset) -> dict[str, list[str]]:
    assert recipe.data.users is not None  # asked by load_groups
    table = readers.read_users(recipe.data.users)
    place = {user: row for row, user in enumerate(table["user_id"].to_list())}
    rows = [place.get(user) for user in dataset.sequences.user_ids.to_pylist()]
    columns = {name: table[name].to_list() for name in table.columns if name != "user_id"}
    return {name: ["" if row is None else str(values[row] or "") for row in rows] for name, values in columns.items()}


# ---- metrics.json ----


def summarise(
    system: str,
    weights: Floats,
    users: npt.NDArray,
    ends: npt.NDArray,
    gate_ends: npt.NDArray,
    dataset: Dataset,
    groups: Groups,
    recipe: Recipe,
) -> dict[str, Any] | None:
    """The entry `experts` of metrics.json; None with a single expert.

    weights (N, K) of the examples, whose users (N,), history_end (N,) and gate_end (N,) are given. All intervals of
    the entry hold at once with protocol.bootstrap.confidence.
    """
    if weights.shape[1] < 2:
        return None
    rows = last_examples(users, ends)
    rows = rows[gate_ends[rows] > 0]  # of whom the gate has read nothing, it has nothing to say: all experts alike
    if not len(rows):
        return None
    chosen = Users(*(column[rows].astype(np.int64) for column in (users, ends, gate_ends)))
    parts = [] if groups.items is None else [item_part(groups.items, dataset, chosen)]
    parts += [action_part(dataset, chosen)] if dataset.is_events else []
    attributes = {name: [values[user] for user in chosen.user_index] for name, values in groups.attributes.items()}
    parts += user_parts(dataset, chosen, attributes)
    parts = [part for part in parts if part.groups]
    section = recipe.protocol.bootstrap
    shares = np.concatenate([part.shares for part in parts], axis=1) if parts else np.empty((len(rows), 0))
    rng = np.random.default_rng(section.seed)
    lifts = iter(statistics.bootstrap_lifts(weights[rows], shares, rng, section.samples, section.confidence))
    return {
        "system": system,
        "num_users": len(rows),
        "item_groups": _item_groups_entry(groups.items),
        "notes": groups.notes,
        "parts": [{"name": part.name, "what": part.what, "groups": _entries(part, lifts)} for part in parts],
    }


def _item_groups_entry(groups: ItemGroups | None) -> dict[str, Any] | None:
    if groups is None:
        return None
    return {"column": groups.column, "separator": groups.separator, "guessed": groups.guessed}


def _entries(part: Part, lifts: Iterator[Sequence[statistics.Estimate]]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "share": float(share.mean()),
            "num_users": int((share > 0).sum()),
            "lifts": [as_json(estimate) for estimate in next(lifts)],
        }
        for name, share in zip(part.groups, part.shares.T, strict=True)
    ]
