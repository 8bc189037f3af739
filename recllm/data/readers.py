"""Reads interactions, items and users: CSV/TSV, Parquet, JSONL, RecBole atomic files and saved HF datasets.

A source section of the recipe enters; a lazy frame of interactions, or a frame of items or users, in our own column
names leaves.
Files are scanned lazily, so that a log need never be in memory as text. Anything unreadable is an error that names the
file, the line and the value.
"""

import contextlib
import csv
import difflib
import gzip
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import polars as pl
import pyarrow as pa

from recllm.data import offline
from recllm.errors import UserError
from recllm.recipe import IdMap, InteractionsSource, ItemsSource, UsersSource
from recllm.schema import INTERACTIONS, ITEM_ID, RATING, REQUIRED_INTERACTION_COLUMNS, TIMESTAMP, TITLE, USER_ID

# Microseconds since the epoch: the order of interactions is taken from it, before seconds are rounded down.
ORDER = "order_us"
_US_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1}
_LAST_US = 2**53  # in 2255; up to there a float holds every microsecond, and a time in too fine a unit lies beyond
_ENDINGS = {
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".inter", ".item", ".user"), "recbole"),
}
_RESERVED = {ITEM_ID: ("item_index", "text"), USER_ID: ("user_index",)}  # columns that recllm adds to these tables
_SECTIONS = {ITEM_ID: "items", USER_ID: "users"}
_TEXTS = (pl.String, pl.Categorical, pl.Enum)
_CONTROL = r"[\s\p{Cc}\u{2028}\u{2029}]+"


@dataclass(frozen=True)
class _Table:
    """One opened file: its lazy frame under the file's own column names, and how to name a row of it."""

    frame: pl.LazyFrame
    names: list[str]
    path: str  # as given in the recipe
    line: Callable[[int], str]  # row number from 0 → "line 17"


def read_interactions(source: InteractionsSource, skip: Collection[str] = ()) -> pl.LazyFrame:
    """Lazy frame of the interactions, in the order of the files.

    Columns are those of schema.INTERACTIONS (optional ones only where the source has them), timestamps as whole
    seconds, rounded down, and `order_us`, the exact time (int64, microseconds). Ids are text without blanks around it.

    Args:
        source: files and columns; an optional column that is mapped to null is not read.
        skip: optional columns that nobody asks for: they are not read either, whatever they hold.

    Raises:
        UserError: missing file or column, blank id, unparsable timestamp or rating; names file, line and value.
    """
    if not (paths := paths_of(source)):
        raise UserError("data.interactions.path is an empty list: name at least one file")
    _known_keys(source.columns)
    frames = [_interactions_of(_open(path, source), source, skip) for path in paths]
    first = frames[0].collect_schema().names()
    for path, frame in zip(paths, frames):
        if (names := frame.collect_schema().names()) != first:
            raise UserError(f"{path}: gives the columns {names}, but {paths[0]} gives {first}: read them separately")
    return pl.concat(frames)


def paths_of(source: InteractionsSource) -> list[str]:
    """The files of a log, as the recipe writes them."""
    return [source.path] if isinstance(source.path, str) else list(source.path)


def _known_keys(columns: Mapping[str, Any]) -> None:
    for name in columns:
        if name not in INTERACTIONS.names:
            raise UserError(f'data.interactions.columns: unknown name "{name}", {_nearest(name, INTERACTIONS.names)}')


def _interactions_of(table: _Table, source: InteractionsSource, skip: Collection[str]) -> pl.LazyFrame:
    columns, checks = [], []
    schema = table.frame.collect_schema()
    for name in INTERACTIONS.names:
        required = name in REQUIRED_INTERACTION_COLUMNS
        column = _column(name, source.columns, table, required)
        if column is None or name in skip:
            continue
        parsed = _parse(name, column, schema[column], source, table.path)
        columns.append(parsed.alias(ORDER if name == TIMESTAMP else name))
        if required or name == RATING:
            checks.append((name, column, _bad(parsed, column, required)))
    _check(table, checks, source)
    seconds = pl.col(ORDER).floordiv(1_000_000).alias(TIMESTAMP)
    kept = {column.meta.output_name() for column in columns} | {TIMESTAMP}
    return (
        table.frame.select(columns)
        .with_columns(seconds)
        .select(*(name for name in INTERACTIONS.names if name in kept), ORDER)
    )


def _bad(parsed: pl.Expr, column: str, required: bool) -> pl.Expr:
    """Rows whose value cannot be used; an optional one may be blank."""
    if required:
        return parsed.is_null()
    blank = pl.col(column).is_null() | (pl.col(column).cast(pl.String).str.strip_chars() == "")
    return parsed.is_null() & ~blank


def _parse(name: str, column: str, dtype: pl.DataType, source: InteractionsSource, path: str) -> pl.Expr:
    if name == TIMESTAMP:
        return _order_us(column, dtype, source.timestamp_unit, path)
    if name == RATING:
        if dtype.is_nested() or dtype.is_temporal():
            raise UserError(f'{path}: column "{column}" holds {dtype}, a rating is a number: {_unread(name)}')
        value = pl.col(column) if dtype.is_numeric() else pl.col(column).cast(pl.String).str.strip_chars()
        return value.cast(pl.Float32, strict=False).fill_nan(None)
    return _text(name, column, dtype, path)


def _text(name: str, column: str, dtype: pl.DataType, path: str) -> pl.Expr:
    """An id as text: 7 and "7 " are the same id; blank is null."""
    if dtype.is_float() or dtype.is_nested():
        optional = name in INTERACTIONS.names and name not in REQUIRED_INTERACTION_COLUMNS
        raise UserError(
            f'{path}: column "{column}" holds {dtype}, an id is text or a whole number: cast it first'
            + (f", or {_unread(name)}" if optional else "")
        )
    text = pl.col(column).cast(pl.String).str.strip_chars()
    return pl.when(text != "").then(text)


def _unread(name: str) -> str:
    """The next step for an optional column that nobody needs."""
    return f"set data.interactions.columns.{name}=null, then it is not read"


def _order_us(column: str, dtype: pl.DataType, unit: str, path: str) -> pl.Expr:
    """Microseconds since the epoch (UTC where the text names no zone); null where unparsable or beyond _LAST_US."""
    value = pl.col(column)
    if isinstance(dtype, pl.Datetime):
        whole = value.to_physical()  # UTC, also where the type has a zone
        return (
            _scaled(whole.floordiv(1_000), 1)
            if dtype.time_unit == "ns"
            else _scaled(whole, _US_PER_UNIT[dtype.time_unit])
        )
    if dtype == pl.Date:
        return _scaled(value.cast(pl.Int64), 86_400_000_000)
    if dtype.is_nested() or dtype.is_temporal() or dtype in (pl.Boolean, pl.Binary):
        raise UserError(f'{path}: column "{column}" holds {dtype}, a timestamp is a date and time or a number')
    if unit == "iso8601":
        us = _iso8601(value.cast(pl.String))
    elif dtype.is_integer():
        return _scaled(value.cast(pl.Int64, strict=False), _US_PER_UNIT[unit])
    else:
        number = value if dtype.is_numeric() else value.cast(pl.String).str.strip_chars()
        us = (number.cast(pl.Float64, strict=False) * _US_PER_UNIT[unit]).round().cast(pl.Int64, strict=False)
    return pl.when(us.is_between(-_LAST_US, _LAST_US)).then(us)


def _scaled(whole: pl.Expr, factor: int) -> pl.Expr:
    """Whole numbers times `factor`; what would lie beyond _LAST_US is null before it can overflow."""
    last = _LAST_US // factor
    return pl.when(whole.is_between(-last, last)).then(whole * factor)


def _iso8601(value: pl.Expr) -> pl.Expr:
    text = value.str.strip_chars().str.replace(r"^(\d{4}-\d\d-\d\d)$", "$1 00:00:00")
    text = text.str.replace(r"^(\S+)[Tt]", "$1 ").str.replace(r"[Zz]$", "+00:00")
    text = text.str.replace(r"^(\S+ \d\d:\d\d)([+-]|$)", "$1:00$2").str.replace(r"([+-]\d\d)$", "$1:00")
    text = pl.when(text.str.contains(r" .*[+-]")).then(text).otherwise(text + "+00:00")
    return text.str.to_datetime("%Y-%m-%d %H:%M:%S%.f%#z", strict=False, time_unit="us").cast(pl.Int64)


def _check(table: _Table, checks: Sequence[tuple[str, str, pl.Expr]], source: InteractionsSource) -> None:
    """One streaming pass that counts bad values; the second one, to find the first of them, only if there are any."""
    counts = collect(table.frame.select(bad.sum().alias(name) for name, _, bad in checks), [table.path])
    for name, column, bad in checks:
        if not (count := counts[name][0]):
            continue
        stored = table.frame.collect_schema()[column].is_temporal()  # as a number: Python's dates end in 9999
        value = pl.col(column).to_physical() if stored else pl.col(column)
        row = table.frame.with_row_index("__row").filter(bad).select("__row", value).head(1)
        found = collect(row, [table.path]).row(0)
        raise UserError(
            f"{table.path}, {table.line(found[0])}: {_complaint(name, column, found[1], source, stored)}"
            + (f" ({count} such rows)" if count > 1 else "")
        )


def _complaint(name: str, column: str, value: Any, source: InteractionsSource, stored: bool) -> str:
    if name == TIMESTAMP and stored:
        shown = "blank" if value is None else f"stored as {value}"
        return (
            f'the timestamp in column "{column}" is {shown}, expected a date no later than 2255: mend or drop the row'
        )
    if name == TIMESTAMP:
        return _bad_timestamp(column, value, source.timestamp_unit)
    if name == RATING:
        return f'the rating in column "{column}" is {value!r}, expected a number: mend it or {_unread(name)}'
    return f'{name} in column "{column}" is blank: every interaction needs one, mend or drop the line'


def _bad_timestamp(column: str, value: Any, unit: str) -> str:
    expected = "an ISO 8601 date and time" if unit == "iso8601" else f"a number ({unit} since 1970)"
    likely, shown = _likely_unit(value), "blank" if value is None else repr(str(value))
    if likely == "ns":
        step = "divide by 1000 and set data.interactions.timestamp_unit=us, the value would fit nanoseconds"
    elif likely and likely != unit:
        step = f"set data.interactions.timestamp_unit={likely}, which the value would fit"
    else:
        step = "mend the line or set data.interactions.timestamp_unit"
    return f'the timestamp in column "{column}" is {shown}, expected {expected} no later than 2255: {step}'


def _likely_unit(value: Any) -> str | None:
    """The coarsest unit in which a timestamp lies before 2255; iso8601 for a date; None where nothing fits."""
    try:
        number = abs(float(value))
    except (TypeError, ValueError):
        return "iso8601" if re.match(r"\s*\d{4}-\d\d-\d\d", str(value)) else None
    if not number <= _LAST_US * 1000:
        return None
    return next((unit for unit, factor in _US_PER_UNIT.items() if number * factor <= _LAST_US), "ns")


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
) -> tuple[pl.DataFrame, _Table]:
    """A table with one row an id: the id, the needed columns, the mapped ones and the others of the file, and __row."""
    table, required = _open(source.path, source), (key, *needed)
    mapped = {name: _column(name, source.columns, table, name in required) for name in (*required, *source.columns)}
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
        _text(name, column, schema[column], table.path)
        if name == key
        else _cleaned(name, column, schema[column], table.path)
        if as_text(name, schema[column])
        else pl.col(column)
        for name, column in chosen.items()
    ]
    named = (column.alias(name) for name, column in zip(chosen, columns))
    frame = collect(table.frame.select(named).with_row_index("__row"), [table.path])
    _check_ids(frame, table, key)
    return frame, table


def natural_sort(frame: pl.DataFrame, column: str) -> pl.DataFrame:
    """Rows sorted by a text column: whole numbers by value first, then the other texts. No two rows compare equal.

    >>> natural_sort(pl.DataFrame({"id": ["b", "10", "9"]}), "id")["id"].to_list()
    ['9', '10', 'b']
    """
    number = pl.col(column).cast(pl.Int64, strict=False)
    return frame.sort(number, pl.col(column), nulls_last=True)


def _cleaned(name: str, column: str, dtype: pl.DataType, path: str) -> pl.Expr:
    """Text on one line; null is ""."""
    if dtype.is_nested() or dtype == pl.Binary:
        raise UserError(
            f'{path}: column "{column}" holds {dtype}, {name} is text: write it as text in the file or map {name} '
            "to another column"
        )
    return pl.col(column).cast(pl.String).str.replace_all(_CONTROL, " ").str.strip_chars().fill_null("")


def _check_ids(frame: pl.DataFrame, table: _Table, key: str) -> None:
    blank = frame.filter(pl.col(key).is_null())
    if blank.height:
        line = table.line(blank["__row"][0])
        raise UserError(f"{table.path}, {line}: the {_said(key)} is blank: mend or drop the line")
    if frame.is_empty():
        section = f"data.{_SECTIONS[key]}"
        raise UserError(
            f"{table.path}: holds no {_SECTIONS[key]}: check the path, {section}.header and {section}.separator"
        )
    _refuse_duplicates(frame, table, key)


def _refuse_duplicates(frame: pl.DataFrame, table: _Table, key: str) -> None:
    twice = frame.filter(pl.col(key).is_duplicated())
    if twice.height:
        first = twice[key][0]
        rows = twice.filter(pl.col(key) == first)["__row"].to_list()
        count = twice[key].n_unique()
        raise UserError(
            f'{table.path}: {_said(key)} "{first}" stands in {", ".join(map(table.line, rows[:5]))}'
            f" ({count} ids are duplicate): keep one row an id"
        )


def _said(key: str) -> str:
    return key.replace("_", " ")


def _check_titles(items: pl.DataFrame, table: _Table) -> None:
    untitled = items.filter(pl.col(TITLE) == "")
    if untitled.height:
        ids = ", ".join(untitled[ITEM_ID].head(5).to_list())
        raise UserError(
            f"{table.path}: {untitled.height} of {items.height} items have no title (item ids {ids}; "
            f"the first in {table.line(untitled['__row'][0])}): give each one or drop them"
        )


def _translate(items: pl.DataFrame, id_map: IdMap, table: _Table) -> pl.DataFrame:
    """Item ids of the items file → those of the interactions; items that the map does not name are dropped."""
    path = str(offline.resolve(id_map.path))
    mapping = _csv(id_map.path, path, id_map.separator, True)
    for column in (id_map.source, id_map.target):
        if column not in mapping.names:
            raise UserError(f'{id_map.path}: no column "{column}", {_nearest(column, mapping.names)}')
    pairs = collect(
        mapping.frame.select(
            pl.col(id_map.source).str.strip_chars().alias(ITEM_ID),
            pl.col(id_map.target).str.strip_chars().alias("__new"),
        ).with_row_index("__row"),
        [mapping.path],
    )
    _refuse_duplicates(pairs, mapping, ITEM_ID)
    joined = items.join(pairs.select(ITEM_ID, "__new"), on=ITEM_ID, how="inner").with_columns(
        pl.col("__new").alias(ITEM_ID)
    )
    if joined.is_empty():
        raise UserError(
            f'{id_map.path}: column "{id_map.source}" shares no id with the items of {table.path}: '
            f"check data.items.id_map.source"
        )
    joined = joined.drop("__new").sort("__row")
    _refuse_duplicates(joined, table, ITEM_ID)
    return joined


def _column(name: str, columns: Mapping[str, str | int | None], table: _Table, required: bool) -> str | None:
    """The file's column for one of our names; None where one is mapped to null, or optional, absent and not mapped."""
    given = columns.get(name, name)
    if given is None:
        if required:
            raise UserError(f"{table.path}: {name} is mapped to null, but it is needed: name its column")
        return None
    if isinstance(given, int):
        if not 0 <= given < len(table.names):
            raise UserError(
                f"{table.path}: {name} is mapped to column {given}, but it has {len(table.names)} columns "
                "(count from 0)"
            )
        return table.names[given]
    if given in table.names:
        return given
    if not required and name not in columns:
        return None
    raise UserError(
        f'{table.path}: no column "{given}" for {name}, {_nearest(given, table.names)}; '
        f"columns there: {', '.join(table.names)}. Map it in the recipe: columns: {{{name}: …}}"
    )


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.5)
    match = next((k for k in known if close and k.lower() == close[0]), None)
    return f'did you mean "{match}"?' if match else f"known: {', '.join(known)}"


def _open(path: str, source: InteractionsSource | ItemsSource | UsersSource) -> _Table:
    file = offline.resolve(path)
    if not file.exists():
        raise UserError(f"{path} does not exist: check the path in the recipe (relative to {Path.cwd()})")
    kind = _format(file) if source.format == "auto" else source.format
    if file.is_dir() != (kind == "hf"):
        expected = "a folder written by datasets.save_to_disk" if kind == "hf" else "a file"
        raise UserError(f"{path}: is {'a folder' if file.is_dir() else 'a file'}, format {kind} expects {expected}")
    if kind == "recbole":
        return _recbole(path, str(file))
    if kind == "parquet":
        return _parquet(path, str(file))
    if kind == "jsonl":
        return _jsonl(path, str(file))
    if kind == "hf":
        return _hf(path, file)
    tab = _ending(file) == ".tsv" and source.separator == ","
    return _csv(path, str(file), "\t" if tab else source.separator, source.header)


def _format(file: Path) -> str:
    return "hf" if file.is_dir() else _ENDINGS.get(_ending(file), "csv")


def _ending(file: Path) -> str:
    """ ".csv" of both log.csv and log.csv.gz."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _opened(file: str) -> TextIO:
    """A text file, gzipped or not, to look for the line of an error."""
    if file.endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8", errors="replace", newline="")
    return open(file, encoding="utf-8", errors="replace", newline="")


def _csv(path: str, file: str, separator: str, header: bool) -> _Table:
    if len(separator.encode()) != 1:
        raise UserError(
            f"{path}: separator {separator!r} has {len(separator)} characters, one is expected: "
            "replace it in the file by one character that no field holds, e.g. a tab (sed 's/::/\\t/g')"
        )
    frame = pl.scan_csv(file, separator=separator, has_header=header, infer_schema=False)

    def line(row: int) -> str:  # a quoted cell may hold line breaks, so rows are counted by a CSV reader
        with _opened(file) as handle:
            reader = csv.reader(handle, delimiter=separator)
            filled = (reader.line_num for record in reader if any(record))
            return f"line {next(islice(filled, row + header, None), row + 1 + header)}"

    return _without_blank_lines(frame, path, line)


def _recbole(path: str, file: str) -> _Table:
    frame = pl.scan_csv(file, separator="\t", infer_schema=False, quote_char=None)
    names = _names(frame, path)
    if bad := [name for name in names if ":" not in name]:
        raise UserError(
            f'{path}: the header "{bad[0]}" names no type, a RecBole file has user_id:token, …: '
            "set data.*.format to csv with the separator"
        )

    def line(row: int) -> str:
        with _opened(file) as handle:
            filled = (number for number, text in enumerate(handle, 1) if text.strip())
            return f"line {next(islice(filled, row + 1, None), row + 2)}"

    return _without_blank_lines(frame.rename({name: name.split(":")[0] for name in names}), path, line)


def _without_blank_lines(frame: pl.LazyFrame, path: str, line: Callable[[int], str]) -> _Table:
    names = _names(frame, path)
    return _Table(frame.filter(~pl.all_horizontal(pl.all().is_null())), names, path, line)


def _parquet(path: str, file: str) -> _Table:
    frame = pl.scan_parquet(file)
    return _Table(frame, _names(frame, path), path, lambda row: f"row {row + 1}")


def _jsonl(path: str, file: str) -> _Table:
    try:
        frame = pl.scan_ndjson(file, infer_schema_length=1000)
        schema = frame.collect_schema()
        texts = {name: pl.String for name, dtype in schema.items() if not dtype.is_nested()}  # 7 and "7" both read
        frame = pl.scan_ndjson(file, schema={**schema, **texts})
    except pl.exceptions.PolarsError as error:
        _refuse_encoding(path, file)
        raise UserError(_broken_json(path, file, error)) from None
    return _Table(frame, _names(frame, path), path, lambda row: f"line {_json_line(file, row)}")


def _json_line(file: str, row: int) -> int:
    with _opened(file) as handle:
        filled = (number for number, text in enumerate(handle, 1) if text.strip())
        return next(islice(filled, row, None), row + 1)


def _broken_json(path: str, file: str, error: Exception) -> str:
    with _opened(file) as handle:
        for number, text in enumerate(handle, 1):
            try:
                if text.strip() and not isinstance(json.loads(text), dict):
                    return f"{path}, line {number}: holds {text.strip()[:60]!r}, one JSON object a line is expected"
            except json.JSONDecodeError as broken:
                return f"{path}, line {number}: not valid JSON ({broken.msg}): mend or drop the line"
    return f"{path}: cannot be read as JSON lines ({error})"


def _hf(path: str, folder: Path) -> _Table:
    from datasets import Dataset, load_from_disk

    try:
        dataset = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{path}: is no folder written by datasets.save_to_disk ({error})") from None
    if not isinstance(dataset, Dataset):
        raise UserError(f"{path}: holds the splits {', '.join(dataset)}: name one, e.g. {path}/{next(iter(dataset))}")
    frame = pl.from_arrow(dataset.with_format("arrow")[:])
    assert isinstance(frame, pl.DataFrame)
    return _Table(frame.lazy(), frame.columns, path, lambda row: f"row {row + 1}")


def _names(frame: pl.LazyFrame, path: str) -> list[str]:
    try:
        names = frame.collect_schema().names()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read ({_first_line(error)}): check the format and that it is not empty"
        ) from None
    if any("\ufffd" in name for name in names):
        _refuse_encoding(path, str(offline.resolve(path)))
    return names


def collect(frame: pl.LazyFrame, paths: Sequence[str]) -> pl.DataFrame:
    """Run a lazy frame with the streaming engine; what its files make fail is a UserError that names them."""
    with _named(paths):
        return frame.collect(engine="streaming")


def batches(frame: pl.LazyFrame, paths: Sequence[str], rows: int) -> Iterator[pl.DataFrame]:
    """The same in pieces of about `rows` rows, in any order; memory holds a few of them."""
    with _named(paths):
        yield from frame.collect_batches(chunk_size=rows, maintain_order=False, engine="streaming")


@contextlib.contextmanager
def _named(paths: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        for path in paths:
            file = offline.resolve(path)
            _refuse_encoding(path, str(file))
            if len(paths) == 1 and _ENDINGS.get(_ending(file)) == "jsonl":
                raise UserError(_broken_json(path, str(file), error)) from None
        raise UserError(
            f"{', '.join(paths)}: cannot be read ({_first_line(error)}): check the format and separator"
        ) from None


def _refuse_encoding(path: str, file: str) -> None:
    """Name the first line of a text file that is not UTF-8; only asked when reading has failed."""
    if Path(file).is_dir() or _ENDINGS.get(_ending(Path(file))) == "parquet":
        return
    opener = gzip.open if file.endswith(".gz") else open
    with opener(file, "rb") as handle:
        for number, text in enumerate(handle, 1):
            try:
                text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: is not UTF-8 text (byte 0x{text[error.start]:02x} at place "
                    f"{error.start + 1}): save the file as UTF-8, e.g. iconv -f latin1 -t utf-8 {Path(path).name}"
                ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
