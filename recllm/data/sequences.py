"""From the source sections of a recipe to one sequence a user, split and audited, on disk.

Data, filter and split sections enter, and `actions` of an event log; a `Prepared` leaves: stored sequences
(schema.SEQUENCES), items in item_index order, training counts, cut-offs, audit and the sha256 of every input.

Filters apply in this order: min_rating, like_at or rating_bands, unknown actions, unknown items, k-core (users and
items in turn until none is left; an event without item counts for its user).
Sequences are sorted by time in microseconds. Ties within a user are ordered by mix(seed, user_key, item_key), of events
mix(seed, user_key, item_key, time, action_key): a lot that depends on content only, never on file order, and that
favours no item and no action. What is equal in all of these is ordered by a hash of its session, action and attributes.
(split.method given: ties follow the given rows where these say so.)

Sessions of an event log are those of its session ids; where it has none, a pause of more than session_gap_s begins one;
without that, all of a user is one session. A session id that two users share is two sessions.

A log passes through as a stream: its rows go to a scratch file (rows.py), from there to buckets of consecutive users,
and each bucket is sorted, split and written by itself. Memory holds one bucket, the users and items, and the different
texts of attributes, however long the log; of one user it holds all, however long their sessions.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from recllm import files, schema
from recllm.data import offline, readers, splits, tables
from recllm.data.audit import Audit
from recllm.data.given import Given, read_given
from recllm.data.log import Log
from recllm.data.randomness import mix, text_keys
from recllm.data.readers import ORDER, ROW
from recllm.data.rows import NO_TEXT, Scanner, Source, read_rows, scan
from recllm.data.spool import Rows, Spool
from recllm.data.stored import GROUP_POSITIONS, StoredSequences, shards
from recllm.errors import UserError
from recllm.recipe import ActionsSection, DataSection, FilterSection, SplitSection
from recllm.schema import ACTION, ATTRIBUTE, ITEM_ID, NO_ITEM, TRAIN, USER_ID

_TIE_LOT, _SESSION_KEY = 100, 103
_GROUP_TEXT = 1 << 28  # bytes of an attribute's texts in a row group, and at most one user's more
_MOST_TEXT = (1 << 31) - 1  # bytes of an attribute's texts that one user may have: Arrow's offsets end there
_ITEM = "__item"
_ACTIONS = "actions"  # column of schema.SEQUENCES


@dataclass(frozen=True)
class Prepared:
    """Everything that convert needs to know about a log."""

    sequences: StoredSequences  # in user_index order
    items: pl.DataFrame  # item_index, item_id, title, attributes
    users: pl.DataFrame | None  # user_index, user_id, attributes as text, one row a user; None without data.users
    actions: list[str]  # of an event log the labels of its vocabulary, in their order, else the different ones, sorted
    train_counts: npt.NDArray[np.int64]  # (num_items,) interactions in TRAIN positions
    split: dict[str, Any]  # method, cutoffs (seconds)
    audit: dict[str, Any]
    inputs: dict[str, str]  # path as the recipe gives it → sha256
    skipped: dict[str, str]  # files of the log that could not be read → why
    # interactions after each filter, users, items, targets; of an event log events_without_item, sessions and
    # sessions_of_one_event
    counts: dict[str, int]


def prepare(
    data: DataSection,
    filters: FilterSection,
    split: SplitSection,
    seed: int,
    folder: Path,
    events: ActionsSection | None = None,
    scanner: Scanner = scan,
) -> Prepared:
    """Read, filter, order, split and audit. Row order and number of the input files do not change the result.

    The catalogue is the whole items file, or without one the ids in the log, each its own title; with filter.item_core
    > 1 only the items that the k-core left.

    Args:
        data, filters, split, seed: of the recipe.
        folder: there sequences.parquet is written; scratch files there need some 30 bytes an interaction, twice.
        events: the section `actions` of the recipe, if it has one.
        scanner: reads the log, here or elsewhere.

    Raises:
        UserError: bad input (see readers), unknown items or actions, nothing left after filtering, an empty split.
        OSError: the disk is full.
    """
    given_rows = read_given(split) if split.method == "given" else None
    attributes = None if data.users is None else readers.read_users(data.users)
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=folder) as scratch:
        source = read_rows(data, filters, events, Path(scratch) / "rows", scanner)
        user_rows, item_rows = _core(source, filters)
        items, item_index = _catalogue(source.items, item_rows, filters)
        user_ids, user_index = _in_order(source.users, user_rows)
        lengths = user_rows[user_rows > 0][np.argsort(user_index[user_rows > 0])]
        log = _LogOnDisk(source, user_ids, lengths, items[ITEM_ID], seed, Path(scratch) / "buckets", events)
        log.fill(user_index, item_index)
        users, without = (None, {}) if attributes is None else _with_attributes(user_ids, attributes, data)
        given = Given(split.given, given_rows, items[ITEM_ID].to_list()) if split.given and given_rows else None
        rules = splits.rules(split, seed, user_ids, lengths, log.seconds, given)
        audit = Audit(split, Path(scratch) / "times", events is not None)
        train_counts = np.zeros(items.height, dtype=np.int64)
        columns = schema.sequences_schema(events.attributes if events else ())
        with pq.ParquetWriter(folder / "sequences.parquet", columns, compression="zstd") as writer:
            for first, part, texts, disordered in log.parts():
                if given:
                    order = given.settle_ties(part)
                    part, texts = part.reordered(order), {name: column.gather(order) for name, column in texts.items()}
                found = given.find(part) if given else None
                codes = splits.assign(part, rules, found)
                cut = int(splits.trimmed(part, rules).sum()) if split.whole_sessions else 0
                audit.add(part, codes, found, cut, disordered)
                trained = part.items[(codes == TRAIN) & (part.items != NO_ITEM)]
                train_counts += np.bincount(trained, minlength=items.height)
                for batch in _batches(part, first, codes, texts):
                    writer.write_batch(batch.cast(columns))
        splits.refuse_empty(audit.found, len(lengths), int(lengths.sum()), rules)
        leaks = audit.finish()
    return Prepared(
        sequences=StoredSequences(folder / "sequences.parquet", lengths),
        items=items,
        users=users,
        actions=list(events.words) if events else sorted(log.actions_found),
        train_counts=train_counts,
        split={"method": split.method, "cutoffs": rules.cutoffs},
        audit=leaks,
        inputs={
            path: source.sha256.get(path) or files.sha256_of(offline.resolve(path))
            for path in source_paths(data, split)
            if path not in source.skipped
        },
        skipped=source.skipped,
        counts=source.counts
        | {"users": len(lengths), "items": items.height, "interactions": int(lengths.sum())}
        | log.counts
        | without
        | audit.found,
    )


def source_paths(data: DataSection, split: SplitSection) -> list[str]:
    """Every input file that `prepare` reads, as the recipe writes it, each once."""
    paths = readers.paths_of(data.interactions)
    if data.items:
        paths.append(data.items.path)
    if data.items and data.items.id_map:
        paths.append(data.items.id_map.path)
    if data.users:
        paths.append(data.users.path)
    if split.method == "given" and split.given:
        paths += [split.given.valid, split.given.test]
    return list(dict.fromkeys(paths))


def _core(source: Source, filters: FilterSection) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows that the k-core leaves to each user and to each item: a row stays if both of its own have any.

    Users and items with too few interactions go, again and again. A row without item hangs on its user alone.
    """
    num_users, num_items = len(source.users), source.items.height
    users, items = np.ones(num_users, dtype=bool), np.ones(num_items + 1, dtype=bool)  # the last is NO_ITEM, -1
    while True:
        user_rows, item_rows = np.zeros(num_users, dtype=np.int64), np.zeros(num_items, dtype=np.int64)
        for rows in source.rows.chunks():
            rows = rows.compress(users[rows["user"]] & items[rows["item"]])
            user_rows += np.bincount(rows["user"], minlength=num_users)
            item_rows += np.bincount(rows["item"][rows["item"] != NO_ITEM], minlength=num_items)
        few_users = (user_rows > 0) & (user_rows < filters.user_core)
        few_items = (item_rows > 0) & (item_rows < filters.item_core)
        if not few_users.any() and not few_items.any():
            break
        users, items[:-1] = users & ~few_users, items[:-1] & ~few_items
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
    numbered = items.with_columns(pl.Series("__number", np.arange(items.height))).filter(pl.Series(stays))
    ordered = tables.natural_sort(numbered, ITEM_ID)
    index = np.full(items.height, -1, dtype=np.int64)
    index[ordered["__number"].to_numpy()] = np.arange(ordered.height)
    items = ordered.drop("__number").with_row_index("item_index").with_columns(pl.col("item_index").cast(pl.Int32))
    attributes = [name for name in items.columns if name not in schema.ITEMS.names]
    return items.select(*schema.ITEMS.names, *attributes), index


def _in_order(users: list[str], user_rows: npt.NDArray[np.int64]) -> tuple[pl.Series, npt.NDArray[np.int64]]:
    """The ids of users with any row in natural order, and the user_index of each number, -1 for the others."""
    numbered = pl.DataFrame({"number": np.arange(len(users)), USER_ID: pl.Series(users, dtype=pl.String)})
    ordered = tables.natural_sort(numbered.filter(pl.Series(user_rows > 0)), USER_ID)
    index = np.full(len(users), -1, dtype=np.int64)
    index[ordered["number"].to_numpy()] = np.arange(ordered.height)
    return ordered[USER_ID], index


class _Part(NamedTuple):
    """The sequences of some users."""

    first: int  # user_index
    log: Log
    texts: dict[str, pl.Series]  # "actions" and "attribute:NAME" → (P,) in the log's order
    disordered: int  # events older than the one of their session before them in the files


class _LogOnDisk:
    """The rows of a source in buckets of consecutive users, each small enough to be sorted in memory."""

    def __init__(
        self,
        source: Source,
        user_ids: pl.Series,
        lengths: npt.NDArray[np.int64],
        item_ids: pl.Series,
        seed: int,
        folder: Path,
        events: ActionsSection | None,
    ) -> None:
        self.source, self.user_ids, self.lengths, self.seed, self.events = source, user_ids, lengths, seed, events
        self.user_keys = text_keys(user_ids)
        # of null and of no item, -1, the last
        self.item_keys = text_keys([*item_ids, NO_TEXT])
        self.text_keys = {name: text_keys([*texts, NO_TEXT]) for name, texts in source.texts.items()}
        self.texts = {name: pl.Series([*texts, None], dtype=pl.String) for name, texts in source.texts.items()}
        self.buckets = Spool(folder, source.rows.dtype)
        self.shards = shards(lengths, GROUP_POSITIONS)
        self.actions_found: set[str] = set()
        names = ("events_without_item", "sessions", "sessions_of_one_event")
        self.counts = dict.fromkeys(names, 0) if events else {}

    def fill(self, user_index: npt.NDArray[np.int64], item_index: npt.NDArray[np.int64]) -> None:
        """Move the source's rows to their buckets; users and items that have no index are left out."""
        first_users = np.array([first for first, _ in self.shards])
        item_index = np.append(item_index, NO_ITEM)
        for rows in self.source.rows.chunks():
            users, items = user_index[rows["user"]], item_index[rows["item"]]
            kept = (users >= 0) & ((items >= 0) | (rows["item"] == NO_ITEM))
            rows = rows.compress(kept)
            rows["user"], rows["item"] = users[kept], items[kept]
            self.buckets.scatter(rows, np.searchsorted(first_users, rows["user"], side="right") - 1)
        self.source.rows.clear()

    def seconds(self) -> Iterator[npt.NDArray[np.int64]]:
        """The time of every interaction in whole seconds, rounded down; in pieces, in any order."""
        for rows in self.buckets.chunks():
            yield rows["order"] // 1_000_000

    def parts(self) -> Iterator[_Part]:
        """Each bucket, sorted."""
        with tqdm(total=int(self.lengths.sum()), unit="interaction", desc="sort", unit_scale=True, leave=False) as bar:
            for number, (first, users) in enumerate(self.shards):
                part = self._sorted(self.buckets.read(number), first, users)
                if self.events:
                    self._count(part.log)
                yield part
                bar.update(int(self.lengths[first : first + users].sum()))

    def _sorted(self, rows: Rows, first: int, users: int) -> _Part:
        names = rows.dtype.names or ()
        rows = rows.take(self._order(rows, names))
        owners, offsets = rows["user"] - first, np.concatenate([[0], np.cumsum(self.lengths[first : first + users])])
        session_keys = np.ascontiguousarray(rows["session"]) if "session" in names else None
        sessions = None if session_keys is None else _session_numbers(owners, session_keys, offsets)
        if sessions is None and self.events:
            sessions, session_keys = _by_pauses(rows["order"], offsets, self.events.session_gap_s)
        log = Log(
            user_ids=self.user_ids[first : first + users].to_list(),
            user_keys=self.user_keys[first : first + users],
            offsets=offsets,
            items=np.ascontiguousarray(rows["item"]),
            order_us=np.ascontiguousarray(rows["order"]),
            sessions=sessions,
            session_keys=session_keys,
        )
        texts = {name: self.texts[name].gather(rows[name]) for name in names if name.startswith(ATTRIBUTE)}
        if ACTION in names:
            texts[_ACTIONS] = self._action_texts(rows[ACTION])
        return _Part(first, log, texts, _disordered(rows) if ROW in names else 0)

    def _order(self, rows: Rows, names: tuple[str, ...]) -> npt.NDArray[np.int64]:
        """The order of the rows by user, time and lot, and what is equal in these by a hash of all else."""
        told = {name: self.text_keys[name][rows[name]] for name in names if name in self.text_keys}
        moment = (rows["order"], told[ACTION]) if self.events else ()
        lot = mix(self.seed, _TIE_LOT, self.user_keys[rows["user"]], self.item_keys[rows["item"]], *moment)
        further = {"session": rows["session"]} if "session" in names else {}
        columns = {"user": rows["user"], ORDER: rows["order"], "lot": lot, **further, **told}
        table = pl.DataFrame(columns).with_row_index("__place").sort(list(columns))
        return table["__place"].to_numpy()

    def _count(self, log: Log) -> None:
        lengths = np.bincount(log.session_numbers[0])
        found = (int((log.items == NO_ITEM).sum()), len(lengths), int((lengths == 1).sum()))
        self.counts = {name: count + more for (name, count), more in zip(self.counts.items(), found)}

    def _action_texts(self, numbers: npt.NDArray[np.int32]) -> pl.Series:
        self.actions_found.update(self.texts[ACTION].gather(np.unique(numbers)).drop_nulls())
        return self.texts[ACTION].gather(numbers)


def _disordered(rows: Rows) -> int:
    """How many of these rows are older than the one before them in the files, of the same user and session."""
    session = rows["session"] if "session" in (rows.dtype.names or ()) else np.zeros(len(rows), dtype=np.uint64)
    order = np.lexsort((rows[ROW], session, rows["user"]))
    same = (np.diff(rows["user"][order]) == 0) & (session[order][1:] == session[order][:-1])
    return int((same & (np.diff(rows["order"][order]) < 0)).sum())


def _by_pauses(
    order_us: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], gap_s: int | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
    """Number within the user, and key, of each position's session, (P,); without `gap_s` a user's first is their last.

    A key is a hash of the time at which the session begins.
    """
    begins = np.zeros(len(order_us), dtype=bool)
    if gap_s is not None:
        begins[1:] = np.diff(order_us) > gap_s * 1_000_000
    begins[offsets[:-1]] = True
    number = np.cumsum(begins) - 1  # among all users'
    sessions = number - np.repeat(number[offsets[:-1]], np.diff(offsets))
    return sessions.astype(np.int32), mix(0, _SESSION_KEY, order_us[begins])[number]


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


def _batches(log: Log, first: int, codes: splits.Codes, texts: Mapping[str, pl.Series]) -> Iterator[pa.RecordBatch]:
    """The part in pieces whose attributes fit into a row group: all of it, unless they are long.

    Raises:
        UserError: a user whose texts are too long.
    """
    sizes = [
        column.str.len_bytes().cast(pl.Int64).to_numpy() for name, column in texts.items() if name.startswith(ATTRIBUTE)
    ]
    longest = np.max([np.add.reduceat(size, log.offsets[:-1]) for size in sizes], axis=0) if sizes else log.lengths * 0
    if longest.max() > _MOST_TEXT:
        raise UserError(
            f"user {log.user_ids[int(longest.argmax())]} has an attribute of {longest.max()} bytes in all events, at "
            f"most {_MOST_TEXT} are read: shorten its texts, or leave it out of actions.attributes"
        )
    for begin, users in shards(longest, _GROUP_TEXT):
        part = slice(log.offsets[begin], log.offsets[begin + users])
        pieces = {name: column[part] for name, column in texts.items()}
        yield _sequences(log.users_between(begin, begin + users), first + begin, codes[part], pieces)


def _sequences(log: Log, first: int, codes: splits.Codes, texts: Mapping[str, pl.Series]) -> pa.RecordBatch:
    users = len(log.user_ids)
    columns: dict[str, pa.Array] = {
        "user_index": pa.array(np.arange(first, first + users, dtype=np.int32)),
        USER_ID: pa.array(log.user_ids, pa.string()),
        "user_key": pa.array(log.user_keys),
        "items": _lists(log.offsets, pa.array(log.items)),
        "timestamps": _lists(log.offsets, pa.array(log.seconds)),
        "splits": _lists(log.offsets, pa.array(codes)),
        _ACTIONS: pa.nulls(users, pa.list_(pa.string())),
        "sessions": pa.nulls(users, pa.list_(pa.int32())),
    }
    columns |= {name: _lists(log.offsets, column.to_arrow().cast(pa.string())) for name, column in texts.items()}
    if log.sessions is not None:
        columns["sessions"] = _lists(log.offsets, pa.array(log.sessions))
    return pa.record_batch(columns)


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
