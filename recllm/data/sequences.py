"""From the source sections of a recipe to one sequence a user, split and audited, on disk.

Data, filter and split sections enter; a `Prepared` leaves: stored sequences (schema.SEQUENCES), items in item_index
order, training counts, cut-offs, audit and the sha256 of every input.

Filters apply in this order: min_rating, like_at, unknown items, k-core (users and items in turn until none is left).
Sequences are sorted by time in microseconds. Ties within a user are ordered by mix(seed, user_key, item_key): a lot
that depends on content only, never on file order, and that favours no item. Interactions equal in user, item and time
are ordered by a hash of their session and action. (split.method given: ties follow the given rows where these say so.)

A log passes through as a stream: its rows go to a scratch file, from there to buckets of consecutive users, and each
bucket is sorted, split and written by itself. Memory holds one bucket, and the users and items, however long the log.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from recllm import files, schema
from recllm.data import offline, readers, splits, tables
from recllm.data.audit import Audit
from recllm.data.given import Given, read_given
from recllm.data.log import Log
from recllm.data.randomness import mix, text_keys
from recllm.data.readers import ORDER
from recllm.data.spool import Rows, Spool
from recllm.data.stored import GROUP_POSITIONS, StoredSequences, shards
from recllm.errors import UserError
from recllm.recipe import DataSection, FilterSection, SplitSection
from recllm.schema import ACTION, ITEM_ID, RATING, SESSION_ID, TRAIN, USER_ID

_TIE_LOT = 100
_BATCH = 1 << 17  # rows read at a time
_ITEM = "__item"
_NO_TEXT = "\0"  # stands for a null action or session where texts are hashed


@dataclass(frozen=True)
class Prepared:
    """Everything that convert needs to know about a log."""

    sequences: StoredSequences  # in user_index order
    items: pl.DataFrame  # item_index, item_id, title, attributes
    users: pl.DataFrame | None  # user_index, user_id, attributes as text, one row a user; None without data.users
    actions: list[str]  # the different ones, sorted
    train_counts: npt.NDArray[np.int64]  # (num_items,) interactions in TRAIN positions
    split: dict[str, Any]  # method, cutoffs (seconds)
    audit: dict[str, Any]
    inputs: dict[str, str]  # path as the recipe gives it → sha256
    counts: dict[str, int]  # interactions after each filter, users, items, targets


def prepare(data: DataSection, filters: FilterSection, split: SplitSection, seed: int, folder: Path) -> Prepared:
    """Read, filter, order, split and audit. Row order and number of the input files do not change the result.

    The catalogue is the whole items file; with filter.item_core > 1 only the items that the k-core left.

    Args:
        data, filters, split, seed: of the recipe.
        folder: there sequences.parquet is written; scratch files there need some 30 bytes an interaction, twice.

    Raises:
        UserError: bad input (see readers), unknown items, nothing left after filtering, an empty split.
        OSError: the disk is full.
    """
    given_rows = read_given(split) if split.method == "given" else None
    items = readers.read_items(data.items)
    attributes = None if data.users is None else readers.read_users(data.users)
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=folder) as scratch:
        source = _read(data, filters, items, Path(scratch) / "rows")
        user_rows, item_rows = _core(source, filters, items.height)
        items, item_index = _catalogue(items, item_rows, filters)
        user_ids, user_index = _in_order(source.users, user_rows)
        lengths = user_rows[user_rows > 0][np.argsort(user_index[user_rows > 0])]
        log = _LogOnDisk(source, user_ids, lengths, text_keys(items[ITEM_ID]), seed, Path(scratch) / "buckets")
        log.fill(user_index, item_index)
        users, without = (None, {}) if attributes is None else _with_attributes(user_ids, attributes, data)
        given = Given(split.given, given_rows, items[ITEM_ID].to_list()) if split.given and given_rows else None
        rules = splits.rules(split, seed, user_ids, lengths, log.seconds, given)
        audit, train_counts = Audit(split, Path(scratch) / "times"), np.zeros(items.height, dtype=np.int64)
        with pq.ParquetWriter(folder / "sequences.parquet", schema.SEQUENCES, compression="zstd") as writer:
            for first, part, actions in log.parts():
                if given:
                    order = given.settle_ties(part)
                    part, actions = part.reordered(order), None if actions is None else actions.gather(order)
                found = given.find(part) if given else None
                codes = splits.assign(part, rules, found)
                audit.add(part, codes, found)
                train_counts += np.bincount(part.items[codes == TRAIN], minlength=items.height)
                writer.write_batch(_sequences(part, first, codes, actions))
        splits.refuse_empty(audit.found, len(lengths), int(lengths.sum()), rules)
        leaks = audit.finish()
    return Prepared(
        sequences=StoredSequences(folder / "sequences.parquet", lengths),
        items=items,
        users=users,
        actions=sorted(log.actions_found),
        train_counts=train_counts,
        split={"method": split.method, "cutoffs": rules.cutoffs},
        audit=leaks,
        inputs={path: files.sha256_of(offline.resolve(path)) for path in source_paths(data, split)},
        counts=source.counts
        | {"users": len(lengths), "items": items.height, "interactions": int(lengths.sum())}
        | without
        | audit.found,
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


@dataclass(frozen=True)
class _Source:
    """The log as it was read: rows that pass every filter but the k-core, with numbers for texts."""

    rows: Spool  # user, item (row of the items), order, and where the source has them action (-1: null) and session
    users: list[str]  # by number
    actions: list[str]  # by number
    counts: dict[str, int]


def _read(data: DataSection, filters: FilterSection, items: pl.DataFrame, folder: Path) -> _Source:
    """Read with the streaming engine, ids as integers early: a row is 16 to 28 bytes, not text."""
    scanned = readers.read_interactions(data.interactions, _not_read(filters))
    names = scanned.collect_schema().names()
    if RATING not in _not_read(filters) and RATING not in names:
        raise UserError(
            "filter.min_rating and filter.like_at need ratings, the source has no rating column: "
            "map one with data.interactions.columns.rating or drop the filter"
        )
    catalogue = items.lazy().select(ITEM_ID, pl.int_range(pl.len(), dtype=pl.Int32).alias(_ITEM))
    # Build side: by default the engine may hold the log and stream the catalogue.
    joined = scanned.join(catalogue, on=ITEM_ID, how="left", build_side="force_right")
    wanted = [name for name in (USER_ID, _ITEM, ORDER, RATING, ACTION, SESSION_ID) if name == _ITEM or name in names]
    acts = ACTION in names or filters.like_at is not None
    users, actions = _Numbers(), _Numbers()
    spool = Spool(folder, _row_type(acts, SESSION_ID in names))
    read = rated = unknown = 0
    with tqdm(unit="interaction", desc="read", unit_scale=True, leave=False) as progress:
        for batch in tables.batches(joined.select(wanted), readers.paths_of(data.interactions), _BATCH):
            read += batch.height
            progress.update(batch.height)
            batch = _by_rating(batch, filters)
            rated += batch.height
            unknown += batch[_ITEM].null_count()
            batch = batch.drop_nulls(_ITEM)
            rows = np.empty(batch.height, spool.dtype)
            rows["user"], rows["item"] = users.of(batch[USER_ID]), batch[_ITEM].to_numpy()
            rows["order"] = batch[ORDER].to_numpy()
            if acts:
                rows["action"] = actions.of(batch[ACTION])
            if SESSION_ID in names:
                rows["session"] = _keys(batch[SESSION_ID])
            spool.append(rows)
    counts = {"interactions_read": read} | ({"after_min_rating": rated} if filters.min_rating is not None else {})
    if unknown and not filters.drop_unknown_items:
        raise UserError(_unknown_items(data, filters, items, unknown, rated))
    counts["after_unknown_items"] = rated - unknown
    return _Source(spool, users.texts, actions.texts, counts)


def _row_type(acts: bool, sessions: bool) -> np.dtype[Any]:
    fields = [("user", np.uint32), ("item", np.int32), ("order", np.int64)]
    optional = [("action", np.int32)] * acts + [("session", np.uint64)] * sessions
    return np.dtype([*fields, *optional])


class _Numbers:
    """Numbers texts in the order in which they come; null is -1."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}

    @property
    def texts(self) -> list[str]:
        return list(self._number)

    def of(self, column: pl.Series) -> npt.NDArray[np.int64]:
        different, places = _different(column)
        numbers = [-1 if text is None else self._number.setdefault(text, len(self._number)) for text in different]
        return np.array(numbers, dtype=np.int64)[places]


def _keys(column: pl.Series) -> npt.NDArray[np.uint64]:
    """Hash of each row's text; null has its own value."""
    different, places = _different(column)
    return text_keys(_NO_TEXT if text is None else text for text in different)[places]


def _different(column: pl.Series) -> tuple[list[str | None], npt.NDArray[np.int64]]:
    """Each text once, in any order, and each row's place among them."""
    encoded = pc.dictionary_encode(column.to_arrow(), null_encoding="encode")
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()


def _by_rating(batch: pl.DataFrame, filters: FilterSection) -> pl.DataFrame:
    if filters.min_rating is not None:
        batch = batch.filter(pl.col(RATING) >= filters.min_rating)  # blank ratings go, too
    if filters.like_at is not None:
        liked = pl.when(pl.col(RATING) >= filters.like_at).then(pl.lit("like"))
        disliked = pl.when(pl.col(RATING).is_not_null()).then(pl.lit("dislike"))
        batch = batch.with_columns(pl.coalesce(liked, disliked).alias(ACTION))
    return batch


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


def _core(
    source: _Source, filters: FilterSection, num_items: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows that the k-core leaves to each user and to each item: a row stays if both of its own have any.

    Users and items with too few interactions go, again and again.
    """
    users, items = np.ones(len(source.users), dtype=bool), np.ones(num_items, dtype=bool)
    while True:
        user_rows, item_rows = np.zeros(len(users), dtype=np.int64), np.zeros(num_items, dtype=np.int64)
        for rows in source.rows.chunks():
            rows = rows[users[rows["user"]] & items[rows["item"]]]
            user_rows += np.bincount(rows["user"], minlength=len(users))
            item_rows += np.bincount(rows["item"], minlength=num_items)
        few_users = (user_rows > 0) & (user_rows < filters.user_core)
        few_items = (item_rows > 0) & (item_rows < filters.item_core)
        if not few_users.any() and not few_items.any():
            break
        users, items = users & ~few_users, items & ~few_items
    if filters.user_core > 1 or filters.item_core > 1:
        source.counts["after_core"] = int(user_rows.sum())
    if not user_rows.any():
        steps = ", ".join(f"{name} {count}" for name, count in source.counts.items())
        raise UserError(f"no interaction is left after filtering ({steps}): loosen the filter section")
    return user_rows, item_rows


def _catalogue(
    items: pl.DataFrame, item_rows: npt.NDArray[np.int64], filters: FilterSection
) -> tuple[pl.DataFrame, npt.NDArray[np.int64]]:
    """item_index 0..n-1 in natural order of the ids, and the item_index of each row of `items`, -1 for none."""
    stays = item_rows > 0 if filters.item_core > 1 else np.ones(items.height, dtype=bool)
    index = np.where(stays, np.cumsum(stays) - 1, -1)
    items = items.filter(pl.Series(stays)).with_row_index("item_index")
    items = items.with_columns(pl.col("item_index").cast(pl.Int32))
    attributes = [name for name in items.columns if name not in schema.ITEMS.names]
    return items.select(*schema.ITEMS.names, *attributes), index


def _in_order(users: list[str], user_rows: npt.NDArray[np.int64]) -> tuple[pl.Series, npt.NDArray[np.int64]]:
    """The ids of users with any row in natural order, and the user_index of each number, -1 for the others."""
    numbered = pl.DataFrame({"number": np.arange(len(users)), USER_ID: pl.Series(users, dtype=pl.String)})
    ordered = tables.natural_sort(numbered.filter(pl.Series(user_rows > 0)), USER_ID)
    index = np.full(len(users), -1, dtype=np.int64)
    index[ordered["number"].to_numpy()] = np.arange(ordered.height)
    return ordered[USER_ID], index


class _LogOnDisk:
    """The rows of a source in buckets of consecutive users, each small enough to be sorted in memory."""

    def __init__(
        self,
        source: _Source,
        user_ids: pl.Series,
        lengths: npt.NDArray[np.int64],
        item_keys: npt.NDArray[np.uint64],
        seed: int,
        folder: Path,
    ) -> None:
        self.source, self.user_ids, self.lengths, self.item_keys, self.seed = source, user_ids, lengths, item_keys, seed
        self.user_keys = text_keys(user_ids)
        self.buckets = Spool(folder, source.rows.dtype)
        self.shards = shards(lengths, GROUP_POSITIONS)
        self.action_keys = text_keys([*source.actions, _NO_TEXT])  # number -1 is the last
        self.actions_found: set[str] = set()

    def fill(self, user_index: npt.NDArray[np.int64], item_index: npt.NDArray[np.int64]) -> None:
        """Move the source's rows to their buckets; users and items that have no index are left out."""
        first_users = np.array([first for first, _ in self.shards])
        for rows in self.source.rows.chunks():
            users, items = user_index[rows["user"]], item_index[rows["item"]]
            kept = (users >= 0) & (items >= 0)
            rows = rows[kept]
            rows["user"], rows["item"] = users[kept], items[kept]
            self.buckets.scatter(rows, np.searchsorted(first_users, rows["user"], side="right") - 1)
        self.source.rows.clear()

    def seconds(self) -> Iterator[npt.NDArray[np.int64]]:
        """The time of every interaction in whole seconds, rounded down; in pieces, in any order."""
        for rows in self.buckets.chunks():
            yield rows["order"] // 1_000_000

    def parts(self) -> Iterator[tuple[int, Log, pl.Series | None]]:
        """For each bucket its first user_index, its log and the actions in the log's order."""
        with tqdm(total=int(self.lengths.sum()), unit="interaction", desc="sort", unit_scale=True, leave=False) as bar:
            for number, (first, users) in enumerate(self.shards):
                yield first, *self._sorted(self.buckets.read(number), first, users)
                bar.update(int(self.lengths[first : first + users].sum()))

    def _sorted(self, rows: Rows, first: int, users: int) -> tuple[Log, pl.Series | None]:
        owners, user_keys = rows["user"] - first, self.user_keys[first : first + users]
        lot = mix(self.seed, _TIE_LOT, user_keys[owners], self.item_keys[rows["item"]])
        columns = {"user": owners, ORDER: rows["order"], "lot": lot, _ITEM: rows["item"]}
        keys = []
        if "session" in (rows.dtype.names or ()):
            columns |= {"session_key": rows["session"]}
            keys.append("session_key")
        if "action" in (rows.dtype.names or ()):
            columns |= {"action_key": self.action_keys[rows["action"]], ACTION: rows["action"]}
            keys.append("action_key")
        table = pl.DataFrame(columns).sort("user", ORDER, "lot", *keys)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[first : first + users])])
        session_keys = table["session_key"].to_numpy() if "session_key" in keys else None
        log = Log(
            user_ids=self.user_ids[first : first + users].to_list(),
            user_keys=user_keys,
            offsets=offsets,
            items=table[_ITEM].to_numpy(),
            order_us=table[ORDER].to_numpy(),
            sessions=None
            if session_keys is None
            else _session_numbers(table["user"].to_numpy(), session_keys, offsets),
            session_keys=session_keys,
        )
        return log, self._action_texts(table[ACTION]) if ACTION in columns else None

    def _action_texts(self, numbers: pl.Series) -> pl.Series:
        present = numbers.unique()
        texts = pl.Series([None if n < 0 else self.source.actions[n] for n in present], dtype=pl.String)
        self.actions_found.update(texts.drop_nulls())
        return numbers.replace_strict(present, texts, return_dtype=pl.String)


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


def _sequences(log: Log, first: int, codes: splits.Codes, actions: pl.Series | None) -> pa.RecordBatch:
    users = len(log.user_ids)
    columns: dict[str, pa.Array] = {
        "user_index": pa.array(np.arange(first, first + users, dtype=np.int32)),
        USER_ID: pa.array(log.user_ids, pa.string()),
        "user_key": pa.array(log.user_keys),
        "items": _lists(log.offsets, pa.array(log.items)),
        "timestamps": _lists(log.offsets, pa.array(log.seconds)),
        "splits": _lists(log.offsets, pa.array(codes)),
        "actions": pa.nulls(users, pa.list_(pa.string())),
        "sessions": pa.nulls(users, pa.list_(pa.int32())),
    }
    if actions is not None:
        columns["actions"] = _lists(log.offsets, actions.to_arrow().cast(pa.string()))
    if log.sessions is not None:
        columns["sessions"] = _lists(log.offsets, pa.array(log.sessions))
    return pa.record_batch(columns).cast(schema.SEQUENCES)


def _lists(offsets: npt.NDArray[np.int64], values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _with_attributes(
    user_ids: pl.Series, attributes: pl.DataFrame, data: DataSection
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
