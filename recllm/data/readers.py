"""Reads interactions and items: CSV/TSV, Parquet, JSONL, RecBole atomic files and saved HF datasets.

A source section of the recipe enters; a lazy frame of interactions or a frame of items in our own column names leaves.
Files are scanned lazily, so that a log need never be in memory as text. Anything unreadable is an error that names the
file, the line and the value.
"""

import csv
import difflib
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import polars as pl
import pyarrow as pa

from recllm.data import offline
from recllm.errors import UserError
from recllm.recipe import IdMap, InteractionsSource, ItemsSource
from recllm.schema import (
    ACTION,
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
_US_PER_UNIT = {"s": 1_000_000.0, "ms": 1_000.0, "us": 1.0}
_ENDINGS = {
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".inter", ".item", ".user", ".kg", ".link"), "recbole"),
}
_RESERVED = ("item_index", "text")  # columns that convert adds to items.parquet
_CONTROL = r"[\s\p{Cc}\u{2028}\u{2029}]+"


@dataclass(frozen=True)
class _Table:
    """One opened file: its lazy frame under the file's own column names, and how to name a row of it."""

    frame: pl.LazyFrame
    names: list[str]
    path: str  # as given in the recipe
    line: Callable[[int], str]  # row number from 0 → "line 17"


def read_interactions(source: InteractionsSource) -> pl.LazyFrame:
    """Lazy frame in the columns of schema.INTERACTIONS (optional ones only where the source has them).

    Ids are text without surrounding blanks. Timestamps are whole seconds, rounded down.

    Raises:
        UserError: missing file or column, blank id, unparsable timestamp or rating; names file, line and value.
    """
    return scan_interactions(source).drop(ORDER)


def scan_interactions(source: InteractionsSource) -> pl.LazyFrame:
    """Like `read_interactions`, with the exact time `order_us` (int64, microseconds) beside the seconds."""
    paths = [source.path] if isinstance(source.path, str) else list(source.path)
    if not paths:
        raise UserError("data.interactions.path is an empty list: name at least one file")
    _known_keys(source.columns)
    frames = [_interactions_of(_open(path, source), source) for path in paths]
    first = frames[0].collect_schema().names()
    for path, frame in zip(paths, frames):
        if (names := frame.collect_schema().names()) != first:
            raise UserError(f"{path}: gives the columns {names}, but {paths[0]} gives {first}: read them separately")
    return pl.concat(frames)


def _known_keys(columns: Mapping[str, Any]) -> None:
    for name in columns:
        if name not in INTERACTIONS.names:
            raise UserError(f'data.interactions.columns: unknown name "{name}", {_nearest(name, INTERACTIONS.names)}')


def _interactions_of(table: _Table, source: InteractionsSource) -> pl.LazyFrame:
    columns, checks = [], []
    schema = table.frame.collect_schema()
    for name in INTERACTIONS.names:
        required = name in REQUIRED_INTERACTION_COLUMNS
        column = _column(name, source.columns, table, required)
        if column is None:
            continue
        parsed = _parse(name, column, schema[column], source, table.path)
        columns.append(parsed.alias(ORDER if name == TIMESTAMP else name))
        if required or name == RATING:
            checks.append((name, column, _bad(parsed, column, schema[column], required)))
    _check(table, checks, source)
    return (
        table.frame.select(columns)
        .with_columns(pl.col(ORDER).floordiv(1_000_000).alias(TIMESTAMP))
        .select(
            *(n for n in INTERACTIONS.names if n == TIMESTAMP or n in {c.meta.output_name() for c in columns}), ORDER
        )
    )


def _bad(parsed: pl.Expr, column: str, dtype: pl.DataType, required: bool) -> pl.Expr:
    """Rows whose value cannot be used; an optional one may be blank."""
    value = pl.col(column)
    if dtype.is_integer():
        return value.is_null() & required
    blank = value.is_null() | (value.cast(pl.String).str.strip_chars() == "")
    return parsed.is_null() if required else parsed.is_null() & ~blank


def _parse(name: str, column: str, dtype: pl.DataType, source: InteractionsSource, path: str) -> pl.Expr:
    if name == TIMESTAMP:
        return _order_us(column, dtype, source.timestamp_unit)
    if name == RATING:
        value = pl.col(column).str.strip_chars() if dtype == pl.String else pl.col(column)
        return value.cast(pl.Float32, strict=False).fill_nan(None)
    return _text(column, dtype, path)


def _text(column: str, dtype: pl.DataType, path: str) -> pl.Expr:
    """An id as text: 7 and "7 " are the same id; blank is null."""
    if dtype.is_float() or dtype.is_nested():
        raise UserError(f'{path}: column "{column}" holds {dtype}, an id is text or a whole number: cast it first')
    text = pl.col(column).cast(pl.String).str.strip_chars()
    return pl.when(text != "").then(text)


def _order_us(column: str, dtype: pl.DataType, unit: str) -> pl.Expr:
    """Microseconds since the epoch (UTC where the text names no zone); null where it cannot be parsed."""
    value = pl.col(column)
    if dtype.is_temporal():
        return value.cast(pl.Datetime("us"), strict=False).cast(pl.Int64)
    if unit == "iso8601":
        text = value.cast(pl.String).str.strip_chars().str.replace(r"^(\d{4}-\d\d-\d\d)$", "$1 00:00:00")
        text = text.str.replace(r"^(\S+)[Tt]", "$1 ").str.replace(r"[Zz]$", "+00:00")
        text = text.str.replace(r"^(\S+ \d\d:\d\d)([+-]|$)", "$1:00$2").str.replace(r"([+-]\d\d)$", "$1:00")
        text = pl.when(text.str.contains(r" .*[+-]")).then(text).otherwise(text + "+00:00")
        return text.str.to_datetime("%Y-%m-%d %H:%M:%S%.f%#z", strict=False, time_unit="us").cast(pl.Int64)
    if dtype.is_integer():
        return value.cast(pl.Int64) * int(_US_PER_UNIT[unit])
    number = value.str.strip_chars() if dtype == pl.String else value
    number = number.cast(pl.Float64, strict=False) * _US_PER_UNIT[unit]
    return number.round().cast(pl.Int64, strict=False)  # exact up to 2^53 us: the year 2255


def _check(table: _Table, checks: Sequence[tuple[str, str, pl.Expr]], source: InteractionsSource) -> None:
    """One streaming pass that counts bad values; the second one, to find the first of them, only if there are any."""
    counts = _collect(table.frame.select(bad.sum().alias(name) for name, _, bad in checks), table)
    for name, column, bad in checks:
        if not (count := counts[name][0]):
            continue
        row = table.frame.with_row_index("__row").filter(bad).select("__row", column).head(1)
        found = _collect(row, table).row(0)
        raise UserError(
            f"{table.path}, {table.line(found[0])}: {_complaint(name, column, found[1], source)}"
            + (f" ({count} such rows)" if count > 1 else "")
        )


def _complaint(name: str, column: str, value: Any, source: InteractionsSource) -> str:
    if name == TIMESTAMP:
        unit = source.timestamp_unit
        expected = "an ISO 8601 date and time" if unit == "iso8601" else f"a number ({unit} since 1970)"
        return (
            f'the timestamp in column "{column}" is {value!r}, expected {expected}: '
            "mend the line or set data.interactions.timestamp_unit"
        )
    if name == RATING:
        return f'the rating in column "{column}" is {value!r}, expected a number: mend it or map rating elsewhere'
    return f'{name} in column "{column}" is blank: every interaction needs one, mend or drop the line'


def read_items(source: ItemsSource) -> pl.DataFrame:
    """Frame with item_id, title and one column an attribute, sorted by id: numbers by value, then texts.

    Row order of the file does not matter. Titles and text attributes lose control characters and line breaks (each run
    of blanks becomes one space); blank attributes are "".

    Raises:
        UserError: missing file or column, blank or duplicate item id, item without a title; names ids and lines.
    """
    table = _open(source.path, source)
    chosen = {name: str(_column(name, source.columns, table, True)) for name in (ITEM_ID, TITLE)}
    chosen |= {name: str(_column(name, source.columns, table, True)) for name in source.columns}
    taken = set(chosen.values())
    chosen |= {name: name for name in table.names if name not in taken and name not in chosen}
    if clash := sorted(set(chosen) & set(_RESERVED)):
        raise UserError(
            f'{table.path}: column "{clash[0]}" has a name that recllm uses itself: '
            f"rename it, e.g. data.items.columns.my_{clash[0]}={clash[0]}"
        )
    schema = table.frame.collect_schema()
    expressions = [
        _text(column, schema[column], table.path).alias(name)
        if name == ITEM_ID
        else _attribute(column, schema).alias(name)
        for name, column in chosen.items()
    ]
    items = _collect(table.frame.select(expressions).with_row_index("__row"), table)
    _check_ids(items, table)
    if source.id_map:
        items = _translate(items, source.id_map, table)
    _check_titles(items, table)
    return natural_sort(items.drop("__row"), ITEM_ID)


def natural_sort(frame: pl.DataFrame, column: str) -> pl.DataFrame:
    """Rows sorted by a text column: whole numbers by value first, then the other texts. No two rows compare equal.

    >>> natural_sort(pl.DataFrame({"id": ["b", "10", "9"]}), "id")["id"].to_list()
    ['9', '10', 'b']
    """
    number = pl.col(column).cast(pl.Int64, strict=False)
    return frame.sort(number, pl.col(column), nulls_last=True)


def _attribute(column: str, schema: pl.Schema) -> pl.Expr:
    dtype = schema[column]
    if dtype != pl.String and column != TITLE:
        return pl.col(column)
    return pl.col(column).cast(pl.String).str.replace_all(_CONTROL, " ").str.strip_chars().fill_null("")


def _check_ids(items: pl.DataFrame, table: _Table) -> None:
    blank = items.filter(pl.col(ITEM_ID).is_null())
    if blank.height:
        raise UserError(f"{table.path}, {table.line(blank['__row'][0])}: the item id is blank: mend or drop the line")
    if items.is_empty():
        raise UserError(f"{table.path}: holds no items: check the path, data.items.header and data.items.separator")
    _refuse_duplicates(items, table)


def _refuse_duplicates(items: pl.DataFrame, table: _Table) -> None:
    twice = items.filter(pl.col(ITEM_ID).is_duplicated())
    if twice.height:
        first = twice[ITEM_ID][0]
        rows = twice.filter(pl.col(ITEM_ID) == first)["__row"].to_list()
        count = twice[ITEM_ID].n_unique()
        raise UserError(
            f'{table.path}: item id "{first}" stands in {", ".join(map(table.line, rows[:5]))}'
            f" ({count} ids are duplicate): keep one row an item"
        )


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
    pairs = _collect(
        mapping.frame.select(
            pl.col(id_map.source).str.strip_chars().alias(ITEM_ID),
            pl.col(id_map.target).str.strip_chars().alias("__new"),
        ).with_row_index("__row"),
        mapping,
    )
    _refuse_duplicates(pairs, mapping)
    joined = items.join(pairs.select(ITEM_ID, "__new"), on=ITEM_ID, how="inner").with_columns(
        pl.col("__new").alias(ITEM_ID)
    )
    if joined.is_empty():
        raise UserError(
            f'{id_map.path}: column "{id_map.source}" shares no id with the items of {table.path}: '
            f"check data.items.id_map.source"
        )
    joined = joined.drop("__new").sort("__row")
    _refuse_duplicates(joined, table)
    return joined


def _column(name: str, columns: Mapping[str, str | int], table: _Table, required: bool) -> str | None:
    """The file's column for one of our names; None where an optional one is absent and not mapped."""
    given = columns.get(name, name)
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


def _open(path: str, source: InteractionsSource | ItemsSource) -> _Table:
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
        raise UserError(f"{path}: separator {separator!r} has {len(separator)} characters, one is expected")
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
        return frame.collect_schema().names()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read ({_first_line(error)}): check the format and that it is not empty"
        ) from None


def _collect(frame: pl.LazyFrame, table: _Table) -> pl.DataFrame:
    return collect(frame, table.path)


def collect(frame: pl.LazyFrame, path: str) -> pl.DataFrame:
    """Run a lazy frame with the streaming engine; what the file makes fail is a UserError that names it."""
    try:
        return frame.collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        file = str(offline.resolve(path))
        if _ENDINGS.get(_ending(Path(file))) == "jsonl":
            raise UserError(_broken_json(path, file, error)) from None
        raise UserError(
            f"{path}: cannot be read ({_first_line(error)}): check its format, separator and encoding (UTF-8)"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


__all__ = [
    "ACTION",
    "ORDER",
    "SESSION_ID",
    "USER_ID",
    "collect",
    "natural_sort",
    "read_interactions",
    "read_items",
    "scan_interactions",
]
