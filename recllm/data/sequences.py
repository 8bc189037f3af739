"""From the source sections of a recipe to one sequence a user, split and audited.

Data, filter and split sections enter; a `Prepared` leaves: sequences (schema.SEQUENCES), items in item_index order,
training counts, cut-offs, audit and the sha256 of every input.

Filters apply in this order: min_rating, like_at, unknown items, k-core (users and items in turn until none is left).
Sequences are sorted by time in microseconds. Ties within a user are ordered by mix(seed, user_key, item_key): a lot
that depends on content only, never on file order, and that favours no item. Interactions equal in user, item and time
are ordered by a hash of their session and action. (split.method given: ties follow the given rows where these say so.)
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from recllm import files, schema
from recllm.data import offline, readers, splits
from recllm.data.randomness import mix, text_keys
from recllm.data.readers import ORDER
from recllm.errors import UserError
from recllm.recipe import DataSection, FilterSection, SplitSection
from recllm.schema import ACTION, ITEM_ID, RATING, SESSION_ID, TRAIN, USER_ID

_TIE_LOT = 100
_CHUNK = 1 << 20
_ITEM = "__item"


@dataclass(frozen=True)
class Prepared:
    """Everything that convert needs to know about a log."""

    sequences: pl.DataFrame  # columns of schema.SEQUENCES, one row a user
    items: pl.DataFrame  # item_index, item_id, title, attributes
    users: pl.DataFrame | None  # user_index, user_id, attributes as text, one row a user; None without data.users
    train_counts: npt.NDArray[np.int64]  # (num_items,) interactions in TRAIN positions
    split: dict[str, Any]  # method, cutoffs (seconds)
    audit: dict[str, Any]
    inputs: dict[str, str]  # path as the recipe gives it → sha256
    counts: dict[str, int]  # interactions after each filter, users, items, targets


def prepare(data: DataSection, filters: FilterSection, split: SplitSection, seed: int) -> Prepared:
    """Read, filter, order, split and audit. Row order and number of the input files do not change the result.

    The catalogue is the whole items file; with filter.item_core > 1 only the items that the k-core left.

    Raises:
        UserError: bad input (see readers), unknown items, nothing left after filtering, an empty split.
    """
    items = readers.read_items(data.items)
    attributes = None if data.users is None else readers.read_users(data.users)
    table, counts = _filtered(data, filters, items)
    items, table = _catalogue(items, table, filters)
    user_ids, table = _keyed(table, items, seed)
    table = table.sort("user", ORDER, "lot", *_key_names(table)).drop("lot")  # each step lets the table before it go
    log, actions = _log(user_ids, table)
    del table
    item_ids = items[ITEM_ID].to_list()
    given = splits.read_given(split) if split.method == "given" else None
    if given:
        order = splits.settle_ties(log, item_ids, given)
        log, actions = log.reordered(order), None if actions is None else actions.gather(order)
    result = splits.assign(log, split, seed, item_ids, given)
    users, without = (None, {}) if attributes is None else _with_attributes(log.user_ids, attributes, data)
    found = {name: int((result.codes == code).sum()) for name, code in schema.SPLIT_CODES.items()}
    return Prepared(
        sequences=_sequences(log, result.codes, actions),
        items=items,
        users=users,
        train_counts=np.bincount(log.items[result.codes == TRAIN], minlength=items.height),
        split={"method": split.method, "cutoffs": result.cutoffs},
        audit=splits.audit(log, result, split),
        inputs={path: files.sha256_of(offline.resolve(path)) for path in source_paths(data, split)},
        counts=counts
        | {"users": len(log.user_ids), "items": items.height, "interactions": len(log.items)}
        | without
        | found,
    )


def source_paths(data: DataSection, split: SplitSection) -> list[str]:
    """Every input file that `prepare` reads, as the recipe writes it, each once."""
    paths = [*readers.paths_of(data.interactions), data.items.path]
    if data.items.id_map:
        paths.append(data.items.id_map.path)
    if data.users:
        paths.append(data.users.path)
    if split.method == "given" and split.given:
        paths += [split.given.valid, split.given.test]
    return list(dict.fromkeys(paths))


def _filtered(data: DataSection, filters: FilterSection, items: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """Interactions that pass all filters; `__item` is the row of `items`. Counts after each step."""
    table = _encoded(data, filters, items)
    counts = {"interactions_read": table.height}
    if filters.min_rating is not None:
        table = table.filter(pl.col(RATING) >= filters.min_rating)  # blank ratings go, too
        counts["after_min_rating"] = table.height
    if filters.like_at is not None:
        liked = pl.when(pl.col(RATING) >= filters.like_at).then(pl.lit("like"))
        disliked = pl.when(pl.col(RATING).is_not_null()).then(pl.lit("dislike"))
        table = table.with_columns(pl.coalesce(liked, disliked).cast(pl.Categorical).alias(ACTION))
    table = table.drop(RATING, strict=False)
    if (unknown := table[_ITEM].null_count()) and not filters.drop_unknown_items:
        raise UserError(_unknown_items(data, filters, items, unknown, table.height))
    table = table.drop_nulls(_ITEM)
    counts["after_unknown_items"] = table.height
    if filters.user_core > 1 or filters.item_core > 1:
        table = table.filter(pl.Series(_core(table, filters)))
        counts["after_core"] = table.height
    if table.is_empty():
        steps = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"no interaction is left after filtering ({steps}): loosen the filter section")
    return table, counts


def _encoded(data: DataSection, filters: FilterSection, items: pl.DataFrame) -> pl.DataFrame:
    """Read with the streaming engine, ids as integers early: a row is 20 to 30 bytes, not text."""
    scanned = readers.read_interactions(data.interactions, _not_read(filters))
    names = scanned.collect_schema().names()
    rated = RATING not in _not_read(filters)
    if rated and RATING not in names:
        raise UserError(
            "filter.min_rating and filter.like_at need ratings, the source has no rating column: "
            "map one with data.interactions.columns.rating or drop the filter"
        )
    catalogue = items.lazy().select(ITEM_ID, pl.int_range(pl.len(), dtype=pl.Int32).alias(_ITEM))
    wanted = [USER_ID, _ITEM, ORDER, *([RATING] if rated else [])]
    coded = [name for name in (ACTION, SESSION_ID) if name in names]
    frame = scanned.join(catalogue, on=ITEM_ID, how="left").select(*wanted, *coded)
    return readers.collect(
        frame.with_columns(pl.col(name).cast(pl.Categorical) for name in (USER_ID, *coded)),
        readers.paths_of(data.interactions),
    )


def _not_read(filters: FilterSection) -> set[str]:
    """Optional columns that nothing looks at, whatever they hold."""
    rated = filters.min_rating is not None or filters.like_at is not None
    return (set() if rated else {RATING}) | (set() if filters.like_at is None else {ACTION})


def _unknown_items(data: DataSection, filters: FilterSection, items: pl.DataFrame, unknown: int, total: int) -> str:
    scanned = readers.read_interactions(data.interactions, _not_read(filters))
    if filters.min_rating is not None:
        scanned = scanned.filter(pl.col(RATING) >= filters.min_rating)
    missing = scanned.join(items.lazy().select(ITEM_ID), on=ITEM_ID, how="anti").select(ITEM_ID).unique().sort(ITEM_ID)
    ids = missing.head(5).collect(engine="streaming")[ITEM_ID].to_list()
    return (
        f"{unknown} of {total} interactions have items that {data.items.path} does not hold (item ids {', '.join(ids)}"
        "…): add them, check data.items.columns.item_id, or set filter.drop_unknown_items to true"
    )


def _core(table: pl.DataFrame, filters: FilterSection) -> npt.NDArray[np.bool_]:
    """k-core: which rows are left when users and items with too few interactions go, again and again."""
    users, items = table[USER_ID].to_physical().to_numpy(), table[_ITEM].to_numpy()
    keep = np.ones(len(users), dtype=bool)
    left = -1
    while left != (left := int(keep.sum())):
        keep &= (np.bincount(users[keep], minlength=int(users.max(initial=0)) + 1) >= filters.user_core)[users]
        keep &= (np.bincount(items[keep], minlength=int(items.max(initial=0)) + 1) >= filters.item_core)[items]
    return keep


def _catalogue(items: pl.DataFrame, table: pl.DataFrame, filters: FilterSection) -> tuple[pl.DataFrame, pl.DataFrame]:
    """item_index 0..n-1 in natural order of the ids; `__item` of the interactions follows."""
    stays = np.ones(items.height, dtype=bool)
    if filters.item_core > 1:
        stays = np.bincount(table[_ITEM].to_numpy(), minlength=items.height) > 0
    index = (np.cumsum(stays) - 1).astype(np.int32)
    items = items.filter(pl.Series(stays)).with_row_index("item_index")
    items = items.with_columns(pl.col("item_index").cast(pl.Int32))
    attributes = [name for name in items.columns if name not in schema.ITEMS.names]
    renumbered = pl.Series(_ITEM, index[table[_ITEM].to_numpy()])
    return items.select(*schema.ITEMS.names, *attributes), table.with_columns(renumbered)


def _keyed(table: pl.DataFrame, items: pl.DataFrame, seed: int) -> tuple[list[str], pl.DataFrame]:
    """User ids in order; the table with `user` (place of the id), `lot` and a hash of session and action to sort by."""
    user_ids, users = _codes(table[USER_ID])
    lots = _lots(users, table[_ITEM].to_numpy(), text_keys(user_ids), text_keys(items[ITEM_ID]), seed)
    coded = [name for name in (SESSION_ID, ACTION) if name in table.columns]
    keys = [pl.Series(f"{name}_key", _keys(table[name])) for name in coded]
    kept = table.select(ORDER, _ITEM, *([ACTION] if ACTION in coded else []))
    return user_ids, kept.with_columns(pl.Series("user", users), pl.Series("lot", lots), *keys)


def _key_names(table: pl.DataFrame) -> list[str]:
    return [f"{name}_key" for name in (SESSION_ID, ACTION) if f"{name}_key" in table.columns]


def _log(user_ids: list[str], table: pl.DataFrame) -> tuple[splits.Log, pl.Series | None]:
    """The log of a sorted table, and the actions in its order."""
    users = table["user"].to_numpy()
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users, minlength=len(user_ids)))])
    session_keys = table[f"{SESSION_ID}_key"].to_numpy() if f"{SESSION_ID}_key" in table.columns else None
    log = splits.Log(
        user_ids=user_ids,
        user_keys=text_keys(user_ids),
        offsets=offsets.astype(np.int64),
        items=table[_ITEM].to_numpy(),
        order_us=table[ORDER].to_numpy(),
        sessions=None if session_keys is None else _session_numbers(users, session_keys, offsets),
        session_keys=session_keys,
    )
    return log, table[ACTION] if ACTION in table.columns else None


def _codes(column: pl.Series) -> tuple[list[str], npt.NDArray[np.int32]]:
    """A categorical column as (distinct texts in natural order, place of each row's text among them)."""
    codes = column.to_physical().to_numpy()
    present = column.unique()
    texts = pl.DataFrame({"code": present.to_physical(), "text": present.cast(pl.String)})
    texts = readers.natural_sort(texts, "text")
    place = np.zeros(int(codes.max()) + 1, dtype=np.int32)
    place[texts["code"].to_numpy()] = np.arange(texts.height, dtype=np.int32)
    return texts["text"].to_list(), place[codes]


def _keys(column: pl.Series) -> npt.NDArray[np.uint64]:
    """Hash of each row's text; null has its own value."""
    texts, places = _codes(column.cast(pl.Categorical).fill_null("\0"))
    return text_keys(texts)[places]


def _lots(users: Any, items: Any, user_keys: Any, item_keys: Any, seed: int) -> npt.NDArray[np.uint64]:
    lots = np.empty(len(users), dtype=np.uint64)
    for start in range(0, len(users), _CHUNK):  # in chunks: the temporaries of 10 million rows would be 400 MB
        part = slice(start, start + _CHUNK)
        lots[part] = mix(seed, _TIE_LOT, user_keys[users[part]], item_keys[items[part]])
    return lots


def _session_numbers(users: Any, session_keys: Any, offsets: Any) -> npt.NDArray[np.int32]:
    """Sessions numbered within their user by first appearance, also where they interleave."""
    session = mix(0, users, session_keys)
    order = np.argsort(session, kind="stable")
    session = session[order]
    starts = np.flatnonzero(np.concatenate([[True], session[1:] != session[:-1]]))
    del session
    first = np.empty(len(users), dtype=np.int64)  # position of the first interaction of the row's session
    first[order] = np.repeat(np.minimum.reduceat(order, starts), np.diff(np.append(starts, len(order))))
    started = np.cumsum(first == np.arange(len(first)))
    return (started[first] - started[offsets[:-1]][users]).astype(np.int32)


def _sequences(log: splits.Log, codes: splits.Codes, actions: pl.Series | None) -> pl.DataFrame:
    users = len(log.user_ids)
    columns: dict[str, pa.Array] = {
        "user_index": pa.array(np.arange(users, dtype=np.int32)),
        USER_ID: pa.array(log.user_ids, pa.string()),
        "user_key": pa.array(log.user_keys),
        "items": _lists(log.offsets, pa.array(log.items)),
        "timestamps": _lists(log.offsets, pa.array(log.seconds)),
        "splits": _lists(log.offsets, pa.array(codes)),
        "actions": pa.nulls(users, pa.list_(pa.string())),
        "sessions": pa.nulls(users, pa.list_(pa.int32())),
    }
    if actions is not None:
        columns["actions"] = _lists(log.offsets, actions.cast(pl.String).to_arrow())
    if log.sessions is not None:
        columns["sessions"] = _lists(log.offsets, pa.array(log.sessions))
    frame = pl.from_arrow(pa.table(columns))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _lists(offsets: npt.NDArray[np.int64], values: pa.Array) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(offsets), values)


def _with_attributes(
    user_ids: list[str], attributes: pl.DataFrame, data: DataSection
) -> tuple[pl.DataFrame, dict[str, int]]:
    """A row a user in user_index order, and how many users the file does not hold; their attributes are ""."""
    index = np.arange(len(user_ids), dtype=np.int32)
    users = pl.DataFrame({"user_index": index, USER_ID: user_ids}, schema_overrides={USER_ID: pl.String})
    missing = users.join(attributes, on=USER_ID, how="anti").height
    if missing == len(user_ids):
        raise UserError(
            f"{data.users.path if data.users else ''}: shares no user id with the interactions (after filtering): "
            "check data.users.columns.user_id"
        )
    joined = users.join(attributes, on=USER_ID, how="left", maintain_order="left")
    return joined.with_columns(pl.exclude("user_index").fill_null("")), {"users_without_attributes": missing}
