"""Reads triples, the names of entities and relations, and the links of items: RecBole, RDF, tables, KGAT's integers.

Sections of the recipe enter; batches of triples (text ids and a time) and frames of names and links leave. Triples are
streamed: a batch is all that is in memory, whatever the file's size. Anything unreadable is an error that names the
file, the line and the value.
"""

import gzip
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

import polars as pl

from recllm.data import offline, tables
from recllm.data.readers import paths_of
from recllm.errors import UserError
from recllm.graph.store import ALWAYS
from recllm.recipe import LinksSource, NamesSource, TriplesSource
from recllm.schema import ITEM_ID, TIMESTAMP

HEAD, RELATION, TAIL = "head", "relation", "tail"
ID, NAME, ENTITY_ID = "id", "name", "entity_id"
LABEL = "http://www.w3.org/2000/01/rdf-schema#label"
BATCH = 200_000  # triples
TRIPLES = pl.Schema({HEAD: pl.String, RELATION: pl.String, TAIL: pl.String, TIMESTAMP: pl.Int64})
LABELS = pl.Schema({ID: pl.String, NAME: pl.String, "rank": pl.Int8})  # the lowest rank is the name

_RDF = {".ttl": "TURTLE", ".nt": "N_TRIPLES", ".nq": "N_QUADS", ".trig": "TRIG"}
_SECTION = "graph.triples"
_UNQUOTED = "\t "  # at these separators a quote is a letter, as in the files of RecBole, KGAT and KGCN
# Column names of RecBole, KGAT and the DBpedia releases of MovieLens, taken where the recipe maps nothing.
_ALSO: Mapping[str, tuple[str, ...]] = {
    HEAD: ("head_id", "entity_head", "head_entity", "subject", "h"),
    RELATION: ("relation_id", "predicate", "r"),
    TAIL: ("tail_id", "entity_tail", "tail_entity", "object", "t"),
    ID: ("remap_id", "entity_id", "relation_id", "eid"),
    NAME: ("label", "title", "org_id"),
    ITEM_ID: ("item", "org_id"),
    ENTITY_ID: ("entity", "eid", "remap_id"),
}
AnySource = TypeVar("AnySource", TriplesSource, NamesSource, LinksSource)


@dataclass(frozen=True)
class Batch:
    """Some triples of a source, in any order, and what RDF says beside them."""

    triples: pl.DataFrame  # TRIPLES; the time in seconds since the epoch, rounded down, or ALWAYS
    labels: pl.DataFrame | None = None  # LABELS
    blank_literals: int = 0  # triples of RDF that were left out because their literal holds nothing but blanks


def read_triples(source: TriplesSource) -> Iterator[Batch]:
    """All triples of a source, batch by batch.

    A time is read where the source has a column for it; a triple whose time is blank has none. RDF has no times: an IRI
    is its own id, a literal is the entity of its text, whatever its language or type; blank nodes are numbered in the
    order of the files, graph names are ignored, and rdfs:label names its subject and is no triple.

    Raises:
        UserError: missing file or column, blank head, relation or tail, unparsable time, broken RDF; names the line.
    """
    if not (paths := paths_of(source)):
        raise UserError(f"{_SECTION}.path is an empty list: name at least one file")
    _known_keys(source.columns, tuple(TRIPLES), _SECTION)
    nodes: dict[tuple[int, str], str] = {}
    for number, path in enumerate(paths):
        if source.format == "rdf" or (source.format == "auto" and tables.ending_of(Path(path)) in _RDF):
            yield from _rdf(path, number, nodes)
        else:
            yield from map(Batch, _table(path, source))


def _table(path: str, source: TriplesSource) -> Iterator[pl.DataFrame]:
    described = _described(source, path)
    table = tables.open_table(path, described, _UNQUOTED)
    mapping = _mapping(described, table.names, (HEAD, RELATION, TAIL))
    schema = table.frame.collect_schema()
    columns, checks = [], []
    for name in (HEAD, RELATION, TAIL):
        column = tables.column_of(name, mapping, table, True)
        assert column is not None
        parsed = tables.id_text(column, schema[column], path)
        columns.append(parsed.alias(name))
        checks.append((name, column, tables.unusable(parsed, column, True)))
    time = tables.column_of(TIMESTAMP, mapping, table, False)
    if time is None:
        columns.append(pl.lit(ALWAYS, dtype=pl.Int64).alias(TIMESTAMP))
    else:
        us = tables.time_us(time, schema[time], source.timestamp_unit, path)
        columns.append(us.floordiv(1_000_000).fill_null(ALWAYS).alias(TIMESTAMP))
        checks.append((TIMESTAMP, time, tables.unusable(us, time, False)))
    tables.check(table, checks, partial(_complaint, source))
    yield from tables.batches(table.frame.select(columns), [path], BATCH)


def _complaint(source: TriplesSource, name: str, column: str, value: Any, stored: bool) -> str:
    if name == TIMESTAMP:
        return tables.bad_time(column, value, stored, source.timestamp_unit, _SECTION)
    return f'the {name} in column "{column}" is blank: every triple needs one, mend or drop the line'


def read_names(source: NamesSource, section: str) -> pl.DataFrame:
    """Frame with id and name (one line, readable; "" where the file has none).

    Raises:
        UserError: missing file or column, blank id, an id that stands there twice; names lines.
    """
    _known_keys(source.columns, (ID, NAME), section)
    table = tables.open_table(source.path, described := _described(source, source.path), _UNQUOTED)
    mapping = _mapping(described, table.names, (ID, NAME))
    key, name = (tables.column_of(ours, mapping, table, True) for ours in (ID, NAME))
    assert key is not None
    assert name is not None
    schema = table.frame.collect_schema()
    ids = tables.id_text(key, schema[key], source.path)
    names = tables.one_line(NAME, name, schema[name], source.path)
    tables.check(table, [(ID, key, ids.is_null())], partial(_blank, "names"))
    frame = tables.collect(table.frame.select(ids.alias(ID), names.alias(NAME)).with_row_index("__row"), [source.path])
    tables.refuse_duplicates(frame, table, ID)
    return frame.select(ID, readable(frame[NAME]))


def read_links(source: LinksSource) -> pl.DataFrame:
    """Frame with item_id (as the interactions write it; null: the id map lacks it) and entity_id, in the file's order.

    Raises:
        UserError: missing file or column, blank id, an id map that shares no id with the links; names lines.
    """
    _known_keys(source.columns, (ITEM_ID, ENTITY_ID), "graph.links")
    table = tables.open_table(source.path, described := _described(source, source.path), _UNQUOTED)
    mapping = _mapping(described, table.names, (ITEM_ID, ENTITY_ID))
    chosen = {name: tables.column_of(name, mapping, table, True) for name in (ITEM_ID, ENTITY_ID)}
    schema = table.frame.collect_schema()
    ids = {
        name: tables.id_text(column, schema[column], source.path)
        for name, column in chosen.items()
        if column is not None
    }
    checks = [(name, str(chosen[name]), text.is_null()) for name, text in ids.items()]
    tables.check(table, checks, partial(_blank, "links"))
    named = [text.alias(name) for name, text in ids.items()]
    links = tables.collect(table.frame.select(named).with_row_index("__row"), [source.path]).sort("__row")
    return (_translated(links, source, table.path) if source.id_map else links).select(ITEM_ID, ENTITY_ID)


def _blank(what: str, name: str, column: str, *_: Any) -> str:
    return f'the {tables.said(name)} in column "{column}" is blank: the {what} need one a row, mend or drop the line'


def _translated(links: pl.DataFrame, source: LinksSource, path: str) -> pl.DataFrame:
    """Links by the ids of the interactions, null for an item that the map does not name."""
    assert source.id_map is not None
    pairs, mapping = tables.id_pairs(source.id_map, "graph.links")
    joined = links.join(pairs.select(ITEM_ID, "__new"), on=ITEM_ID, how="left").sort("__row")
    if joined["__new"].null_count() == joined.height:
        raise UserError(
            f'{mapping.path}: column "{source.id_map.source}" shares no id with the items of {path}: '
            "check graph.links.id_map.source"
        )
    return joined.with_columns(pl.col("__new").alias(ITEM_ID))


def _known_keys(columns: Mapping[str, Any], known: Sequence[str], section: str) -> None:
    for name in columns:
        if name not in known:
            raise UserError(f'{section}.columns: unknown name "{name}", {tables.nearest(name, known)}')


def _described(source: AnySource, path: str) -> AnySource:
    """A .txt file says by its first line what the recipe leaves open: tabs, blanks or commas, and whether a header.

    A .tsv file says the latter. A first line that begins with a whole number is no header: KGAT's kg_final.txt and
    KGCN's kg.txt have none (the relation there is text), DBpedia's kg_final.txt has one.
    """
    file = offline.resolve(path)
    ending = tables.ending_of(file)
    if source.format not in ("auto", "csv") or ending not in (".txt", ".tsv") or not file.is_file():
        return source
    with tables.opened_text(str(file)) as handle:
        first = next((text.strip() for text in handle if text.strip()), "")
    found: dict[str, Any] = {}
    if "separator" not in source.model_fields_set:
        found["separator"] = "\t" if ending == ".tsv" else next((mark for mark in "\t, " if mark in first), ",")
    fields = first.split(found.get("separator", source.separator))
    if "header" not in source.model_fields_set:
        found["header"] = not fields[0].strip().isdecimal()
    return source.model_copy(update=found)


def _mapping(source: AnySource, names: Sequence[str], ours: Sequence[str]) -> dict[str, str | int | None]:
    """The recipe's mapping; for the rest a column of a known name, or the place where columns have no names."""
    mapping: dict[str, str | int | None] = dict(source.columns)
    for place, name in enumerate(ours):
        if name in mapping or name in names:
            continue
        if not source.header and not source.columns and source.format in ("auto", "csv"):
            mapping[name] = place
        elif also := next((other for other in _ALSO[name] if other in names), None):
            mapping[name] = also
    return mapping


def readable(texts: pl.Series) -> pl.Series:
    """Names from ids: the last part of an IRI, without percent codes; underscores are blanks where there are no others.

    >>> readable(pl.Series(["http://dbpedia.org/resource/Heat_%281995_film%29", "snake_case x", "_:3"])).to_list()
    ['Heat (1995 film)', 'snake_case x', 'unnamed 3']
    """
    iri = r"^(?:[A-Za-z][A-Za-z0-9+.-]*://|urn:)\S*?([^/#:]+)[/#]*$"
    frame = texts.alias(NAME).to_frame()
    coded = pl.col(NAME).str.contains("%[0-9A-Fa-f]{2}", strict=True)
    short = frame.select(NAME, pl.col(NAME).str.extract(iri).alias("short"))
    short = short.with_columns(pl.coalesce("short", NAME).alias(NAME), pl.col("short").is_not_null().alias("short"))
    decoded = pl.col(NAME).map_elements(unquote, return_dtype=pl.String, skip_nulls=True)
    if short.filter(pl.col("short") & coded).height:
        short = short.with_columns(pl.when(pl.col("short") & coded).then(decoded).otherwise(NAME).alias(NAME))
    name = pl.col(NAME).str.replace(r"^_:(\d+)$", "unnamed $1")
    blank = name.str.replace_all("_", " ").str.strip_chars()
    spaced = pl.when(name.str.contains(r"\s") | (blank == "")).then(name).otherwise(blank)
    return short.select(spaced.str.replace_all(tables.CONTROL, " ").str.strip_chars().alias(NAME))[NAME]


def _rdf(path: str, number: int, nodes: dict[tuple[int, str], str]) -> Iterator[Batch]:
    """Triples and labels of one RDF file; `nodes` numbers the blank nodes of all files."""
    oxigraph = _oxigraph()
    file = offline.resolve(path)
    if not file.is_file():
        raise UserError(f"{path} does not exist: check the path in the recipe (relative to {Path.cwd()})")
    if (kind := _RDF.get(tables.ending_of(file))) is None:
        raise UserError(f"{path}: format rdf goes by the file's ending, known: {', '.join(_RDF)}, each also with .gz")
    opener: Any = gzip.open if file.name.lower().endswith(".gz") else open
    with opener(file, "rb") as handle:
        quads = _named_lines(_parsed(oxigraph, handle, kind), path)
        while some := list(islice(quads, BATCH)):
            yield _rdf_batch(some, path, number, nodes)


def _oxigraph() -> Any:
    try:
        import pyoxigraph
    except ImportError:
        raise UserError("RDF is read by pyoxigraph, which is not installed: pip install 'recllm[kg]'") from None
    return pyoxigraph


def _parsed(oxigraph: Any, handle: BinaryIO, kind: str) -> Iterator[Any]:
    yield from oxigraph.parse(handle, getattr(oxigraph.RdfFormat, kind))


def _named_lines(quads: Iterator[Any], path: str) -> Iterator[Any]:
    try:
        yield from quads
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid RDF ({error.msg}): mend that line") from None
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): check the file") from None


def _rdf_batch(quads: Sequence[Any], path: str, number: int, nodes: dict[tuple[int, str], str]) -> Batch:
    triples: tuple[list[str], list[str], list[str]] = ([], [], [])
    labels: list[tuple[str, str, int]] = []
    blank = 0
    for quad in quads:
        head, relation = _term(quad.subject, path, number, nodes), quad.predicate.value
        if not (tail := _term(quad.object, path, number, nodes)):
            blank += 1
        elif relation == LABEL:
            labels.append((head, tail, _rank(getattr(quad.object, "language", None))))
        else:
            for column, text in zip(triples, (head, relation, tail)):
                column.append(text)
    frame = pl.DataFrame([*triples], schema=[HEAD, RELATION, TAIL], orient="col").cast(pl.String)
    frame = frame.with_columns(pl.lit(ALWAYS, dtype=pl.Int64).alias(TIMESTAMP))
    return Batch(frame, pl.DataFrame(labels, schema=LABELS, orient="row") if labels else None, blank)


def _term(term: Any, path: str, number: int, nodes: dict[tuple[int, str], str]) -> str:
    kind = type(term).__name__
    if kind == "BlankNode":
        return nodes.setdefault((number, term.value), f"_:{len(nodes) + 1}")
    if kind == "Triple":
        raise UserError(
            f"{path}: {str(term)[:200]} is a triple about a triple, which a graph here cannot hold: drop it"
        )
    return str(term.value.strip())


def _rank(language: str | None) -> int:
    """English before a label without a language before the others; within a rank the alphabet decides."""
    return 0 if language and language.lower().split("-")[0] == "en" else 1 if language is None else 2
