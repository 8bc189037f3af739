"""Opens the tables that recipes name: CSV/TSV, Parquet, JSONL, RecBole atomic files and saved HF datasets.

A path and the section of the recipe that describes it enter; a `Table` leaves: a lazy frame under the file's own column
names, with the expressions that turn its columns into ids, times and texts, and with what names a row in an error.
Every reader (interactions, items, users, triples, links) is built from these.
"""

import contextlib
import csv
import difflib
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TextIO

import polars as pl
import pyarrow as pa

from recllm.data import offline
from recllm.errors import UserError
from recllm.recipe import IdMap

_US_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1}
_LAST_US = 2**53  # in 2255; up to there a float holds every microsecond, and a time in too fine a unit lies beyond
_ENDINGS = {
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".inter", ".item", ".user", ".kg", ".link"), "recbole"),
}
CONTROL = r"[\s\p{Cc}\u{2028}\u{2029}]+"

_LOOKED_AT = 1000  # rows of which the keys are told to somebody who asked for others
_NEVER = "never "  # begins the names of columns of `check` that say so of a name

Complaint = Callable[[str, str, Any, bool], str]


class Source(Protocol):
    """What every section of the recipe that names a table has."""

    @property
    def format(self) -> str:
        """auto, or the format's name."""

    @property
    def header(self) -> bool:
        """Whether the first line of separated values names the columns."""

    @property
    def separator(self) -> str:
        """One character."""


class Unreadable(UserError):
    """A file that cannot be read as what it should be: cut short, broken, not text. Not one that holds wrong values."""


@dataclass(frozen=True)
class Table:
    """One opened file: its lazy frame under the file's own column names, and how to name a row of it."""

    frame: pl.LazyFrame
    names: list[str]
    path: str  # as given in the recipe
    line: Callable[[int], str]  # row number from 0 → "line 17"
    events: str | None = None  # of lines that are sessions: the key of their list
    json: Mapping[str, str] = field(default_factory=dict)  # a name that goes into objects → the column that holds JSON


def open_table(path: str, source: Source, unquoted: str = "") -> Table:
    """Open a file or saved data set as the recipe's section says; auto goes by its ending.

    Args:
        path: as the recipe writes it.
        source: the section.
        unquoted: separators between which a quote is a letter like any other.

    Raises:
        UserError: no such file, a folder in place of a file, one that cannot be read as that format.
    """
    file, kind = _existing(path, source.format)
    if kind == "recbole":
        return _recbole(path, str(file))
    if kind == "parquet":
        return _parquet(path, str(file))
    if kind == "jsonl":
        return _jsonl(path, str(file))
    if kind == "hf":
        return _hf(path, file)
    tab = ending_of(file) == ".tsv" and source.separator == ","
    separator = "\t" if tab else source.separator
    return csv_table(path, str(file), separator, source.header, quote=None if separator in unquoted else '"')


def _existing(path: str, kind: str) -> tuple[Path, str]:
    file = offline.resolve(path)
    if not file.exists():
        raise UserError(f"{path} does not exist: check the path in the recipe (relative to {Path.cwd()})")
    kind = _format(file) if kind == "auto" else kind
    if file.is_dir() != (kind == "hf"):
        expected = "a folder written by datasets.save_to_disk" if kind == "hf" else "a file"
        raise UserError(f"{path}: is {'a folder' if file.is_dir() else 'a file'}, format {kind} expects {expected}")
    return file, kind


def _format(file: Path) -> str:
    return "hf" if file.is_dir() else _ENDINGS.get(ending_of(file), "csv")


def ending_of(file: Path) -> str:
    """ ".csv" of both log.csv and log.csv.gz."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def opened_text(file: str) -> TextIO:
    """A text file, gzipped or not, to look for the line of an error."""
    if file.endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8", errors="replace", newline="")
    return open(file, encoding="utf-8", errors="replace", newline="")


def csv_table(path: str, file: str, separator: str, header: bool, quote: str | None = '"') -> Table:
    """A file of separated values, every column as text; blank lines are no rows. Without `quote` none is special."""
    if len(separator.encode()) != 1:
        raise UserError(
            f"{path}: separator {separator!r} has {len(separator)} characters, one is expected: "
            "replace it in the file by one character that no field holds, e.g. a tab (sed 's/::/\\t/g')"
        )
    frame = pl.scan_csv(file, separator=separator, has_header=header, infer_schema=False, quote_char=quote)

    def line(row: int) -> str:  # a quoted cell may hold line breaks, so rows are counted by a CSV reader
        with opened_text(file) as handle:
            quoting: Any = csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE
            reader = csv.reader(handle, delimiter=separator, quoting=quoting)
            filled = (reader.line_num for record in reader if any(record))
            return f"line {next(islice(filled, row + header, None), row + 1 + header)}"

    return _without_blank_lines(frame, path, line)


def _recbole(path: str, file: str) -> Table:
    frame = pl.scan_csv(file, separator="\t", infer_schema=False, quote_char=None)
    names = _names(frame, path)
    if bad := [name for name in names if ":" not in name]:
        raise UserError(
            f'{path}: the header "{bad[0]}" names no type, a RecBole file has user_id:token, …: '
            "set its format to csv in the recipe, with the separator"
        )

    def line(row: int) -> str:
        with opened_text(file) as handle:
            filled = (number for number, text in enumerate(handle, 1) if text.strip())
            return f"line {next(islice(filled, row + 1, None), row + 2)}"

    return _without_blank_lines(frame.rename({name: name.split(":")[0] for name in names}), path, line)


def _without_blank_lines(frame: pl.LazyFrame, path: str, line: Callable[[int], str]) -> Table:
    names = _names(frame, path)
    return Table(frame.filter(~pl.all_horizontal(pl.all().is_null())), names, path, line)


def _parquet(path: str, file: str) -> Table:
    frame = pl.scan_parquet(file)
    return Table(frame, _names(frame, path), path, lambda row: f"row {row + 1}")


def _jsonl(path: str, file: str) -> Table:
    try:
        frame = pl.scan_ndjson(file, infer_schema_length=1000)
        schema = frame.collect_schema()
        texts = {name: pl.String for name, dtype in schema.items() if not dtype.is_nested()}  # 7 and "7" both read
        frame = pl.scan_ndjson(file, schema={**schema, **texts})
    except pl.exceptions.PolarsError as error:
        raise _unreadable_json(path, file, error) from None
    return Table(frame, _names(frame, path), path, lambda row: f"line {_json_line(file, row)}")


def open_sessions(path: str, events: str) -> Table:
    """Open lines that are sessions: JSON objects, each with a list of events under the key `events`.

    A row an event, in the order of the file. Columns are what the session says, under its own keys, and what the event
    says, as "events.KEY"; of objects inside, as "events.KEY.KEY". Every value is text; keys are those of the first 1000
    lines. A session with an empty list has no row; one without the list has one, with no value in the event's columns.

    Raises:
        UserError: no such file, a line that is no JSON object, a list that is none.
    """
    file = str(_existing(path, "jsonl_sessions")[0])
    try:
        inferred = pl.scan_ndjson(file, infer_schema_length=1000).collect_schema()
        schema = {name: _all_text(dtype) for name, dtype in inferred.items()}
        if events in schema and isinstance(schema[events], pl.List):
            frame = pl.scan_ndjson(file, schema=schema)
    except pl.exceptions.PolarsError as error:
        raise _unreadable_json(path, file, error, events) from None
    if not isinstance(schema.get(events), pl.List) or not isinstance(schema[events].inner, pl.Struct):
        raise UserError(
            _json_fault(path, file, events)
            or f'{path}: no line has events under "{events}", keys there: {", ".join(schema)}: set '
            "data.interactions.events"
        )
    frame = frame.filter(pl.col(events).list.len().ne_missing(0)).explode(events)
    table = Table(frame, list(schema), path, lambda row: _event_of(file, events, row), events)
    return _with_fields(table)


def _all_text(dtype: Any) -> Any:
    """The type with text in place of everything that is neither object nor list."""
    if isinstance(dtype, pl.Struct):
        return pl.Struct({part.name: _all_text(part.dtype) for part in dtype.fields})
    return pl.List(_all_text(dtype.inner)) if isinstance(dtype, pl.List) else pl.String


def _event_of(file: str, events: str, row: int) -> str:
    """Which line, and which event of its list, both from 1."""
    with opened_text(file) as handle:
        for number, text in enumerate(handle, 1):
            if not text.strip():
                continue
            found = json.loads(text).get(events)
            rows = len(found) if isinstance(found, list) else 1
            if row < rows:
                return f"line {number}, event {row + 1}" if isinstance(found, list) else f"line {number}"
            row -= rows
    return f"event {row + 1} after the last"


def with_paths(table: Table, names: Iterable[str | int | None]) -> Table:
    """The table with a column more for each of the names that goes into objects, a.b.c, and is no column itself.

    Of objects in the file a field; of text that is JSON what it holds there, as text, and Table.json says where that
    stands. A name that leads nowhere gets no column, but of text that is JSON one of nulls: `check` finds those.
    """
    wanted = [name for name in names if isinstance(name, str) and "." in name and name not in table.names]
    if not wanted:
        return table
    table = _with_fields(table)
    schema = table.frame.collect_schema()
    found: dict[str, str] = {}
    for name in wanted:
        ends = [place for place, letter in enumerate(name) if letter == "."]
        prefixes = [name[:end] for end in reversed(ends) if schema.get(name[:end]) == pl.String]
        if name not in table.names and prefixes:
            found[name] = prefixes[0]
    columns = [
        pl.col(column).str.json_path_match(_json_path(name[len(column) + 1 :])).alias(name)
        for name, column in found.items()
    ]
    return replace(table, frame=table.frame.with_columns(columns), names=[*table.names, *found], json=found)


def _with_fields(table: Table) -> Table:
    """With a column for each field of objects, named by its way."""
    fields = [
        (way, field)
        for name, dtype in table.frame.collect_schema().items()
        for way, field in _fields(name, pl.col(name), dtype)
        if way not in table.names
    ]
    columns = [field.alias(way) for way, field in fields]
    return replace(table, frame=table.frame.with_columns(columns), names=[*table.names, *(way for way, _ in fields)])


def _fields(way: str, value: pl.Expr, dtype: Any) -> Iterator[tuple[str, pl.Expr]]:
    for part in dtype.fields if isinstance(dtype, pl.Struct) else ():
        inner = value.struct.field(part.name)
        yield f"{way}.{part.name}", inner
        yield from _fields(f"{way}.{part.name}", inner, part.dtype)


def _json_path(way: str) -> str:
    keys = (key.replace("\\", "\\\\").replace("'", "\\'") for key in way.split("."))
    return "$" + "".join(f"['{key}']" for key in keys)


def broken_json(column: str) -> pl.Expr:
    """Rows where a column of text holds something that is not JSON; blank is nothing."""
    text = pl.col(column).str.strip_chars()
    return text.str.json_path_match("$").is_null() & ~text.fill_null("").is_in(["", "null"])


def _json_line(file: str, row: int) -> int:
    with opened_text(file) as handle:
        filled = (number for number, text in enumerate(handle, 1) if text.strip())
        return next(islice(filled, row, None), row + 1)


def _unreadable_json(path: str, file: str, error: Exception, events: str | None = None) -> Unreadable:
    _refuse_encoding(path, file)
    return Unreadable(
        _json_fault(path, file, events)
        or f"{path}: cannot be read as JSON lines ({_first_line(error)}): values of one key must be of one kind"
    )


def _json_fault(path: str, file: str, events: str | None = None) -> str | None:
    """What is wrong with the first line that is no JSON object, or whose `events` are no list of objects."""
    with _broken(path), opened_text(file) as handle:
        for number, text in enumerate(handle, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except json.JSONDecodeError as broken:
                return f"{path}, line {number}: not valid JSON ({broken.msg}): mend or drop the line"
            if not isinstance(line, dict):
                return f"{path}, line {number}: holds {text.strip()[:60]!r}, one JSON object a line is expected"
            found = line.get(events, []) if events else []
            if not isinstance(found, list):
                return f'{path}, line {number}: "{events}" is {str(found)[:60]!r}, a list of events is expected'
            wrong = next((place for place, event in enumerate(found, 1) if not isinstance(event, dict)), None)
            if wrong:
                return f"{path}, line {number}: event {wrong} is {str(found[wrong - 1])[:60]!r}, an object is expected"
    return None


def _hf(path: str, folder: Path) -> Table:
    from datasets import Dataset, load_from_disk

    try:
        dataset = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise Unreadable(f"{path}: is no folder written by datasets.save_to_disk ({error})") from None
    if not isinstance(dataset, Dataset):
        raise UserError(f"{path}: holds the splits {', '.join(dataset)}: name one, e.g. {path}/{next(iter(dataset))}")
    frame = pl.from_arrow(dataset.with_format("arrow")[:])
    assert isinstance(frame, pl.DataFrame)
    return Table(frame.lazy(), frame.columns, path, lambda row: f"row {row + 1}")


def _names(frame: pl.LazyFrame, path: str) -> list[str]:
    try:
        names = frame.collect_schema().names()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise Unreadable(
            f"{path}: cannot be read ({_first_line(error)}): check the format and that it is not empty"
        ) from None
    if any("\ufffd" in name for name in names):
        _refuse_encoding(path, str(offline.resolve(path)))
    return names


def column_of(name: str, columns: Mapping[str, str | int | None], table: Table, required: bool) -> str | None:
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
        f'{table.path}: no column "{given}" for {name}, {nearest(given, table.names)}; '
        f"columns there: {', '.join(table.names)}. Map it in the recipe: columns: {{{name}: …}}"
        + (", and set header: false if the first line is no header" if table.names[0].strip().isdecimal() else "")
    )


def nearest(name: str, known: Sequence[str]) -> str:
    """What was perhaps meant by an unknown name, otherwise all that is known."""
    close = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.5)
    match = next((k for k in known if close and k.lower() == close[0]), None)
    return f'did you mean "{match}"?' if match else f"known: {', '.join(known)}"


def collect(frame: pl.LazyFrame, paths: Sequence[str], events: str | None = None) -> pl.DataFrame:
    """Run a lazy frame with the streaming engine; what its files make fail is a UserError that names them.

    `events`: the key of the list in lines that are sessions.
    """
    with _named(paths, events):
        return frame.collect(engine="streaming")


def batches(
    frame: pl.LazyFrame, paths: Sequence[str], rows: int, events: str | None = None, ordered: bool = False
) -> Iterator[pl.DataFrame]:
    """The same in pieces of about `rows` rows, in any order unless `ordered`; memory holds a few of them."""
    with _named(paths, events):
        yield from frame.collect_batches(chunk_size=rows, maintain_order=ordered, engine="streaming")


@contextlib.contextmanager
def _named(paths: Sequence[str], events: str | None = None) -> Iterator[None]:
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        for path in paths:
            file = offline.resolve(path)
            _refuse_encoding(path, str(file))
            if len(paths) == 1 and (events or _ENDINGS.get(ending_of(file)) == "jsonl"):
                raise _unreadable_json(path, str(file), error, events) from None
        raise Unreadable(
            f"{', '.join(paths)}: cannot be read ({_first_line(error)}): check the format and separator"
        ) from None


def _refuse_encoding(path: str, file: str) -> None:
    """Name the first line of a text file that is not UTF-8; only asked when reading has failed."""
    if Path(file).is_dir() or _ENDINGS.get(ending_of(Path(file))) == "parquet":
        return
    opener = gzip.open if file.endswith(".gz") else open
    with _broken(path), opener(file, "rb") as handle:
        for number, text in enumerate(handle, 1):
            try:
                text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise Unreadable(
                    f"{path}, line {number}: is not UTF-8 text (byte 0x{text[error.start]:02x} at place "
                    f"{error.start + 1}): save the file as UTF-8, e.g. iconv -f latin1 -t utf-8 {Path(path).name}"
                ) from None


@contextlib.contextmanager
def _broken(path: str) -> Iterator[None]:
    """A file that cannot be read to its end even as bytes: a gzip file that is cut short, a disk that fails."""
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        raise Unreadable(
            f"{path}: cannot be read to its end ({_first_line(error)}): copy or download the file again"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def natural_sort(frame: pl.DataFrame, column: str) -> pl.DataFrame:
    """Rows sorted by a text column: whole numbers by value first, then the other texts. No two rows compare equal.

    >>> natural_sort(pl.DataFrame({"id": ["b", "10", "9"]}), "id")["id"].to_list()
    ['9', '10', 'b']
    """
    number = pl.col(column).cast(pl.Int64, strict=False)
    return frame.sort(number, pl.col(column), nulls_last=True)


def time_us(column: str, dtype: pl.DataType, unit: str, path: str) -> pl.Expr:
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


def check(table: Table, checks: Sequence[tuple[str, str, pl.Expr]], complaint: Complaint) -> list[str]:
    """One streaming pass that counts bad values; the second one, to find the first of them, only if there are any.

    Returns the names of Table.json that lead nowhere: null in every row. Where a row may not lack one, it is an error.

    Args:
        table: the opened file.
        checks: our name, the file's column, and what is true where its value cannot be used.
        complaint: (our name, the file's column, the value, whether it is stored as a time) → what is wrong, next step.
    """
    sums = [bad.sum().alias(name) for name, _, bad in checks]
    never = [(pl.col(way).is_null().all() & (pl.len() > 0)).alias(f"{_NEVER}{way}") for way in table.json]
    counts = collect(table.frame.select(*sums, *never), [table.path], table.events)
    nowhere = [way for way in table.json if counts[f"{_NEVER}{way}"][0]]
    for name, column, bad in checks:
        if not (count := counts[name][0]) or column in nowhere:
            continue
        stored = table.frame.collect_schema()[column].is_temporal()  # as a number: Python's dates end in 9999
        value = pl.col(column).to_physical() if stored else pl.col(column)
        row = table.frame.with_row_index("__row").filter(bad).select("__row", value).head(1)
        found = collect(row, [table.path], table.events).row(0)
        raise UserError(
            f"{table.path}, {table.line(found[0])}: {complaint(name, column, found[1], stored)}"
            + (f" ({count} such rows)" if count > 1 else "")
        )
    if needed := [column for name, column, _ in checks if column in nowhere and counts[name][0]]:
        raise leads_nowhere(table, needed[0])
    return nowhere


def leads_nowhere(table: Table, way: str) -> UserError:
    """What is wrong with a name of Table.json that is null in every row: how far it leads, and what is there."""
    column = table.json[way]
    filled = table.frame.select(column).filter(pl.col(column).is_not_null()).head(_LOOKED_AT)
    there: dict[str, None] = {column: None}
    for text in collect(filled, [table.path], table.events)[column]:
        with contextlib.suppress(ValueError):  # blank
            there.update(dict.fromkeys(_ways(column, json.loads(text))))
    ends = [place for place, letter in enumerate(way) if letter == "."] + [len(way)]
    known, next_end = next((way[:end], after) for end, after in zip(ends[-2::-1], ends[:0:-1]) if way[:end] in there)
    keys = [name for name in there if name.startswith(f"{known}.") and "." not in name[len(known) + 1 :]]
    if way in there:
        hint = "it is null wherever it stands"
    else:
        hint = nearest(way[:next_end], keys) if keys else f"{known} holds no object"
    return UserError(
        f'{table.path}: "{way}" has no value in any row, {hint} (of the first {_LOOKED_AT} rows with {column}): map '
        "another name in the recipe's columns, or leave it out"
    )


def _ways(way: str, value: Any) -> Iterator[str]:
    """The names of all that JSON objects hold, at any depth."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield f"{way}.{key}"
        yield from _ways(f"{way}.{key}", inner)


def bad_time(column: str, value: Any, stored: bool, unit: str, section: str) -> str:
    """What is wrong with a timestamp, and the next step; `section` is where the recipe has its timestamp_unit."""
    shown = "blank" if value is None else f"stored as {value}" if stored else repr(str(value))
    if stored:
        return (
            f'the timestamp in column "{column}" is {shown}, expected a date no later than 2255: mend or drop the row'
        )
    expected = "an ISO 8601 date and time" if unit == "iso8601" else f"a number ({unit} since 1970)"
    likely = _likely_unit(value)
    if likely == "ns":
        step = f"divide by 1000 and set {section}.timestamp_unit=us, the value would fit nanoseconds"
    elif likely and likely != unit:
        step = f"set {section}.timestamp_unit={likely}, which the value would fit"
    else:
        step = f"mend the line or set {section}.timestamp_unit"
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


def unusable(parsed: pl.Expr, column: str, required: bool) -> pl.Expr:
    """Rows whose value cannot be used; an optional one may be blank."""
    if required:
        return parsed.is_null()
    blank = pl.col(column).is_null() | (pl.col(column).cast(pl.String).str.strip_chars() == "")
    return parsed.is_null() & ~blank


def refuse_duplicates(frame: pl.DataFrame, table: Table, key: str) -> None:
    """An error that names the lines of the first id that a column holds twice; `__row` numbers the rows."""
    twice = frame.filter(pl.col(key).is_duplicated())
    if twice.height:
        first = twice[key][0]
        rows = twice.filter(pl.col(key) == first)["__row"].to_list()
        count = twice[key].n_unique()
        raise UserError(
            f'{table.path}: {said(key)} "{first}" stands in {", ".join(map(table.line, rows[:5]))}'
            f" ({count} ids are duplicate): keep one row an id"
        )


def said(key: str) -> str:
    """A column's name in a sentence."""
    return key.replace("_", " ")


def id_text(column: str, dtype: pl.DataType, path: str, otherwise: str = "") -> pl.Expr:
    """An id as text: 7 and "7 " are the same id; blank is null. `otherwise`: a further next step for a wrong type."""
    if dtype.is_float() or dtype.is_nested():
        raise UserError(
            f'{path}: column "{column}" holds {dtype}, an id is text or a whole number: cast it first{otherwise}'
        )
    text = pl.col(column).cast(pl.String).str.strip_chars()
    return pl.when(text != "").then(text)


def one_line(name: str, column: str, dtype: pl.DataType, path: str) -> pl.Expr:
    """Text on one line; null is ""."""
    if dtype.is_nested() or dtype == pl.Binary:
        raise UserError(
            f'{path}: column "{column}" holds {dtype}, {name} is text: write it as text in the file or map {name} '
            "to another column"
        )
    return pl.col(column).cast(pl.String).str.replace_all(CONTROL, " ").str.strip_chars().fill_null("")


def id_pairs(id_map: IdMap, section: str) -> tuple[pl.DataFrame, Table]:
    """A map of item ids: frame with item_id (of the file that is read), __new (of the interactions) and __row.

    Raises:
        UserError: a missing file or column, an id that is mapped twice.
    """
    file = offline.resolve(id_map.path)
    if not file.exists():
        raise UserError(f"{id_map.path} does not exist: check {section}.id_map.path (relative to {Path.cwd()})")
    mapping = csv_table(id_map.path, str(file), id_map.separator, True)
    for column in (id_map.source, id_map.target):
        if column not in mapping.names:
            raise UserError(f'{id_map.path}: no column "{column}", {nearest(column, mapping.names)}')
    pairs = collect(
        mapping.frame.select(
            pl.col(id_map.source).str.strip_chars().alias("item_id"),
            pl.col(id_map.target).str.strip_chars().alias("__new"),
        ).with_row_index("__row"),
        [mapping.path],
    )
    refuse_duplicates(pairs, mapping, "item_id")
    return pairs, mapping
