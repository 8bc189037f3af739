"""Reads interactions, items and users: CSV/TSV, Parquet, JSONL, RecBole atomic files and saved HF datasets.

Interactions also as JSON lines of whole sessions, and as events: with the attributes of each, and without item where
their action needs none.

A source section of the recipe enters; a lazy frame of interactions, or a frame of items or users, in our own column
names leaves.
Files are scanned lazily, so that a log need never be in memory as text. Anything unreadable is an error that names the
file, the line and the value.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import polars as pl

from recllm.data.tables import (
    Table,
    bad_time,
    broken_json,
    check,
    collect,
    column_of,
    id_pairs,
    id_text,
    leads_nowhere,
    natural_sort,
    nearest,
    one_line,
    open_sessions,
    open_table,
    refuse_duplicates,
    said,
    time_us,
    unusable,
    with_paths,
)
from recllm.errors import UserError
from recllm.recipe import ActionsSection, IdMap, InteractionsSource, ItemsSource, TriplesSource, UsersSource
from recllm.schema import (
    ACTION,
    ATTRIBUTE,
    INTERACTIONS,
    ITEM_ID,
    RATING,
    REQUIRED_INTERACTION_COLUMNS,
    SESSION_ID,
    TIMESTAMP,
    TITLE,
    USER_ID,
)

# Microseconds since the epoch: the order of interactions is taken from it, before seconds are rounded down.
ORDER = "order_us"
ROW = "row"  # of an event: its place in the files
_NO_ITEM, _NO_JSON = "no item", "no JSON in "  # names of checks
_RESERVED = {ITEM_ID: ("item_index", "text"), USER_ID: ("user_index",)}  # columns that recllm adds to these tables
_SECTIONS = {ITEM_ID: "items", USER_ID: "users"}
_TEXTS = (pl.String, pl.Categorical, pl.Enum)


def read_interactions(
    source: InteractionsSource, skip: Collection[str] = (), actions: ActionsSection | None = None
) -> pl.LazyFrame:
    """Lazy frame of the interactions, in the order of the files.

    Columns are those of schema.INTERACTIONS (optional ones only where the source has them), timestamps as whole
    seconds, rounded down, and `order_us`, the exact time (int64, microseconds). Ids are text without blanks around it.

    Of an event log action and item_id are always there, the item null where an event has none. Further columns are
    `attribute:NAME`, text on one line, "" for blank, and `row`, the event's place in the files.

    Args:
        source: files and columns; an optional column that is mapped to null is not read.
        skip: optional columns that nobody asks for: they are not read either, whatever they hold.
        actions: of the recipe, if the log holds events.

    Raises:
        UserError: missing file or column, blank id, unparsable timestamp or rating; of events also a blank action or
            session id, an action without the item that it needs, an attribute in JSON that is none. Names file, line
            and value. Also a name that goes into JSON and leads nowhere in any row of any file.
    """
    read = [read_file(path, source, skip, actions) for path in log_paths(source, actions)]
    check_together([one.about for one in read], source, skip)
    log = pl.concat([one.frame for one in read])
    return log if actions is None else log.with_row_index(ROW)


def log_paths(source: InteractionsSource, actions: ActionsSection | None) -> list[str]:
    """The files of a log, of which there is at least one; the names in its `columns` are known ones.

    Raises:
        UserError: an empty list, an unknown name.
    """
    if not (paths := paths_of(source)):
        raise UserError("data.interactions.path is an empty list: name at least one file")
    _known_keys(source.columns, actions)
    return paths


class About(NamedTuple):
    """What the files of one log must agree on."""

    path: str
    names: list[str]  # of the columns that it gives
    nowhere: list[str]  # names that go into its JSON and are null in every row


class LogFile(NamedTuple):
    """One file of a log, checked."""

    about: About
    frame: pl.LazyFrame  # as `read_interactions` says, without `row`


def read_file(
    path: str, source: InteractionsSource, skip: Collection[str] = (), actions: ActionsSection | None = None
) -> LogFile:
    """One file of a log by itself; arguments and errors are those of `read_interactions`."""
    frame, nowhere = _interactions_of(_table(path, source), source, skip, actions)
    return LogFile(About(path, frame.collect_schema().names(), nowhere), frame)


def check_together(files: Sequence[About], source: InteractionsSource, skip: Collection[str] = ()) -> None:
    """What can only be seen of all files of a log.

    Raises:
        UserError: files with different columns, a name that goes into JSON and leads nowhere in any row of any file.
    """
    asked = [column for name, column in source.columns.items() if name not in skip]
    if lost := [way for way in files[0].nowhere if way in asked and all(way in file.nowhere for file in files)]:
        raise leads_nowhere(_table(files[0].path, source), lost[0])
    for path, names, _ in files:
        if names != files[0].names:
            raise UserError(
                f"{path}: gives the columns {names}, but {files[0].path} gives {files[0].names}: read them separately"
            )


def _table(path: str, source: InteractionsSource) -> Table:
    return with_paths(_open(path, source), source.columns.values())


def _open(path: str, source: InteractionsSource) -> Table:
    return open_sessions(path, source.events) if source.format == "jsonl_sessions" else open_table(path, source)


def list_key(source: InteractionsSource) -> str | None:
    """The key of the list in lines that are sessions; None for other files."""
    return source.events if source.format == "jsonl_sessions" else None


def paths_of(source: InteractionsSource | TriplesSource) -> list[str]:
    """The files of a log or of triples, as the recipe writes them."""
    return [source.path] if isinstance(source.path, str) else list(source.path)


def _known_keys(columns: Mapping[str, Any], actions: ActionsSection | None) -> None:
    known = [*INTERACTIONS.names, *(actions.attributes if actions else ())]
    for name in columns:
        if name not in known:
            raise UserError(f'data.interactions.columns: unknown name "{name}", {nearest(name, known)}')


def _interactions_of(
    table: Table, source: InteractionsSource, skip: Collection[str], actions: ActionsSection | None
) -> tuple[pl.LazyFrame, list[str]]:
    """The rows of a file, and the names of Table.json that lead nowhere in it."""
    columns, checks = {}, []
    schema = table.frame.collect_schema()
    needed, filled = _needed(skip, actions)
    for name in INTERACTIONS.names:
        column = column_of(name, source.columns, table, name in needed)
        if column is None or name in skip:
            continue
        columns[name] = _parse(name, column, schema[column], source, table.path)
        if name in filled or name == RATING:
            checks.append((name, column, unusable(columns[name], column, name in filled)))
    if actions is not None:
        checks += _complete_events(columns, table, source, actions)
    mapped = {name: table.json[str(column)] for name, column in source.columns.items() if column in table.json}
    checks += [(f"{_NO_JSON}{name}", column, broken_json(column)) for name, column in mapped.items()]
    nowhere = check(table, checks, partial(_complaint, source))
    columns[ORDER] = columns.pop(TIMESTAMP)
    seconds = pl.col(ORDER).floordiv(1_000_000).alias(TIMESTAMP)
    ours = [name for name in INTERACTIONS.names if name in columns or name == TIMESTAMP]
    further = [name for name in columns if name not in INTERACTIONS.names]
    named = [column.alias(name) for name, column in columns.items()]
    return table.frame.select(named).with_columns(seconds).select(*ours, *further), nowhere


def _needed(skip: Collection[str], actions: ActionsSection | None) -> tuple[Collection[str], Collection[str]]:
    """Our columns that must be there, and those in which no value may be blank."""
    if actions is None:
        return REQUIRED_INTERACTION_COLUMNS, REQUIRED_INTERACTION_COLUMNS
    if ACTION not in skip:
        return (USER_ID, TIMESTAMP, ACTION), (USER_ID, TIMESTAMP, ACTION, SESSION_ID)
    item = () if actions.without_item == "*" else (ITEM_ID,)  # actions are made of ratings
    return (USER_ID, TIMESTAMP, *item), (USER_ID, TIMESTAMP, SESSION_ID, *item)


def _complete_events(
    columns: dict[str, pl.Expr], table: Table, source: InteractionsSource, actions: ActionsSection
) -> list[tuple[str, str, pl.Expr]]:
    """Add what events have beyond interactions to `columns`; the check that no action lacks the item it needs."""
    schema = table.frame.collect_schema()
    columns.setdefault(ITEM_ID, pl.lit(None, dtype=pl.String))
    for name in actions.attributes:
        column = column_of(name, source.columns, table, required=True)
        assert column is not None  # it is required
        columns[f"{ATTRIBUTE}{name}"] = one_line(name, column, schema[column], table.path)
    if ACTION not in columns or actions.without_item == "*":
        return []
    needing = [label for label in actions.words if label not in actions.without_item]
    label = column_of(ACTION, source.columns, table, required=True)
    assert label is not None
    return [(_NO_ITEM, label, columns[ITEM_ID].is_null() & columns[ACTION].is_in(needing))]


def _parse(name: str, column: str, dtype: pl.DataType, source: InteractionsSource, path: str) -> pl.Expr:
    if name == TIMESTAMP:
        return time_us(column, dtype, source.timestamp_unit, path)
    if name == RATING:
        if dtype.is_nested() or dtype.is_temporal():
            raise UserError(f'{path}: column "{column}" holds {dtype}, a rating is a number: {_unread(name)}')
        value = pl.col(column) if dtype.is_numeric() else pl.col(column).cast(pl.String).str.strip_chars()
        return value.cast(pl.Float32, strict=False).fill_nan(None)
    optional = name not in REQUIRED_INTERACTION_COLUMNS
    return id_text(column, dtype, path, f", or {_unread(name)}" if optional else "")


def _unread(name: str) -> str:
    """The next step for an optional column that nobody needs."""
    return f"set data.interactions.columns.{name}=null, then it is not read"


def _complaint(source: InteractionsSource, name: str, column: str, value: Any, stored: bool) -> str:
    if name == TIMESTAMP:
        return bad_time(column, value, stored, source.timestamp_unit, "data.interactions")
    if name == RATING:
        return f'the rating in column "{column}" is {value!r}, expected a number: mend it or {_unread(name)}'
    if name == _NO_ITEM:
        return (
            f'an event of the action "{str(value).strip()}" has no item: give it one in the column of item_id '
            f"({source.columns.get(ITEM_ID, ITEM_ID)}), or list the action in actions.without_item"
        )
    if name.startswith(_NO_JSON):
        asked = source.columns[name.removeprefix(_NO_JSON)]
        return f'column "{column}" is no valid JSON ({str(value)[:60]!r}), of which {asked} is asked: mend the line'
    if name == SESSION_ID:
        return (
            f'session_id in column "{column}" is blank: every event needs one, mend or drop the line, or '
            f"{_unread(name)}, and actions.session_gap_s makes sessions from pauses"
        )
    return f'{name} in column "{column}" is blank: every interaction needs one, mend or drop the line'


def read_items(source: ItemsSource) -> pl.DataFrame:
    """Frame with item_id, title and one column an attribute, sorted by id: numbers by value, then texts.

    Row order of the file does not matter. Titles and text attributes lose control characters and line breaks (each run
    of blanks becomes one space); blank attributes are "".

    Raises:
        UserError: missing file or column, blank or duplicate item id, item without a title; names ids and lines.
    """
    items, table = _keyed(source, ITEM_ID, lambda name, dtype: name == TITLE or dtype in _TEXTS, (TITLE,))
    if source.id_map:
        items = _translate(items, source.id_map, table)
    _check_titles(items, table)
    return natural_sort(items.drop("__row"), ITEM_ID)


def read_users(source: UsersSource) -> pl.DataFrame:
    """Frame with user_id and one text column an attribute, sorted like the items; blank attributes are "".

    Raises:
        UserError: missing file or column, blank or duplicate user id, an attribute that is no text; names lines.
    """
    users, _ = _keyed(source, USER_ID, lambda *_: True)
    return natural_sort(users.drop("__row"), USER_ID)


def _keyed(
    source: ItemsSource | UsersSource,
    key: str,
    as_text: Callable[[str, pl.DataType], bool],
    needed: tuple[str, ...] = (),
) -> tuple[pl.DataFrame, Table]:
    """A table with one row an id: the id, the needed columns, the mapped ones and the others of the file, and __row."""
    table, required = open_table(source.path, source), (key, *needed)
    mapped = {name: column_of(name, source.columns, table, name in required) for name in (*required, *source.columns)}
    taken = {*mapped.values(), *mapped}
    chosen = {name: column for name, column in mapped.items() if column is not None}
    chosen |= {name: name for name in table.names if name not in taken}
    if clash := sorted(set(chosen) & set(_RESERVED[key])):
        raise UserError(
            f'{table.path}: column "{clash[0]}" has a name that recllm uses itself: '
            f"rename it, e.g. data.{_SECTIONS[key]}.columns.my_{clash[0]}={clash[0]}"
        )
    schema = table.frame.collect_schema()
    columns = [
        id_text(column, schema[column], table.path)
        if name == key
        else one_line(name, column, schema[column], table.path)
        if as_text(name, schema[column])
        else pl.col(column)
        for name, column in chosen.items()
    ]
    named = (column.alias(name) for name, column in zip(chosen, columns))
    frame = collect(table.frame.select(named).with_row_index("__row"), [table.path])
    _check_ids(frame, table, key)
    return frame, table


def _check_ids(frame: pl.DataFrame, table: Table, key: str) -> None:
    blank = frame.filter(pl.col(key).is_null())
    if blank.height:
        line = table.line(blank["__row"][0])
        raise UserError(f"{table.path}, {line}: the {said(key)} is blank: mend or drop the line")
    if frame.is_empty():
        section = f"data.{_SECTIONS[key]}"
        raise UserError(
            f"{table.path}: holds no {_SECTIONS[key]}: check the path, {section}.header and {section}.separator"
        )
    refuse_duplicates(frame, table, key)


def _check_titles(items: pl.DataFrame, table: Table) -> None:
    untitled = items.filter(pl.col(TITLE) == "")
    if untitled.height:
        ids = ", ".join(untitled[ITEM_ID].head(5).to_list())
        raise UserError(
            f"{table.path}: {untitled.height} of {items.height} items have no title (item ids {ids}; "
            f"the first in {table.line(untitled['__row'][0])}): give each one or drop them"
        )


def _translate(items: pl.DataFrame, id_map: IdMap, table: Table) -> pl.DataFrame:
    """Item ids of the items file → those of the interactions; items that the map does not name are dropped."""
    pairs, _ = id_pairs(id_map, "data.items")
    joined = items.join(pairs.select(ITEM_ID, "__new"), on=ITEM_ID, how="inner").with_columns(
        pl.col("__new").alias(ITEM_ID)
    )
    if joined.is_empty():
        raise UserError(
            f'{id_map.path}: column "{id_map.source}" shares no id with the items of {table.path}: '
            f"check data.items.id_map.source"
        )
    joined = joined.drop("__new").sort("__row")
    refuse_duplicates(joined, table, ITEM_ID)
    return joined
