"""Builds the folder of a graph by streaming: memory holds a bucket of edges and one row an entity, never the triples.

The recipe's graph section and the ids of the items enter; a folder with the arrays of `store.Graph`, the names of
entities and relations and the entity of each item leaves, and what the manifest says of them.

Text goes to a scratch Parquet file once, while the different ids are collected; then it comes back as numbers, which
are dealt to buckets on disk: by (head, tail) to drop duplicates and count degrees, by source to sort the edges. An
entity's edges are sorted in one piece, so memory grows with the largest entity.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq

from recllm import files
from recllm.data import offline, tables
from recllm.data.prices import DAY_S
from recllm.data.randomness import Keys, text_keys
from recllm.data.readers import paths_of
from recllm.errors import UserError
from recllm.graph import readers
from recllm.graph.readers import BATCH, ENTITY_ID, HEAD, ID, NAME, RELATION, TAIL
from recllm.graph.store import ALWAYS, Ids, Ints, offset_type, places, write_meta
from recllm.recipe import GraphSection, NamesSource, TriplesSource
from recllm.schema import ITEM_ID, TIMESTAMP

ENTITIES, RELATIONS, LINKS = "entities.parquet", "relations.parquet", "item_entities.npy"
RELATION_ID = "relation_id"
BUCKET = 1 << 20  # rows of a bucket, unless one entity has more edges
_MAX_BUCKETS = 256  # that many files are open at once
_LAST_ID = 2**31 - 1
_JANUARY_S = 31 * DAY_S  # seconds up to 2055 lie before, if they are read as milliseconds
_FACTORS = {  # by which the triples' times would have to be multiplied → their unit, and what they were read in
    Fraction(1000): "s and not ms, or in ms and not us",
    Fraction(1_000_000): "s and not us",
    Fraction(1, 1000): "ms and not s, or in us and not ms",
    Fraction(1, 1_000_000): "us and not s",
}
_ROW = np.dtype([(HEAD, "<i4"), (RELATION, "<i4"), (TAIL, "<i4"), (TIMESTAMP, "<i8")])

Rows = npt.NDArray[np.void]  # of _ROW; rows.take(…) costs a tenth of rows[…]


def build_graph(section: GraphSection, item_ids: Sequence[str], folder: Path) -> dict[str, Any]:
    """Write the graph of a recipe into `folder`; returns inputs, counts and time range for the manifest.

    Entities and relations are numbered in the order of their ids (whole numbers by value, then text): neither the order
    of the triples nor that of the machine's threads shows in the files, and further triples, which may add entities,
    leave the others in the order in which they were.

    Args:
        section: triples, names and links.
        item_ids: of the dataset, in item_index order.
        folder: is made where it does not exist; what is left half-written after an error is the caller's to remove.

    Raises:
        UserError: bad input (see readers), no triples, no item linked, more entities or relations than int32 numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=folder) as scratch:
        spooled = _spool(section.triples, Path(scratch))
        sizes = _sort(spooled, folder, Path(scratch))
        _write_names(spooled, section.triples, folder)
    links = _link(section, item_ids, spooled.entities, folder)
    return {
        "inputs": {path: files.sha256_of(offline.resolve(path)) for path in source_paths(section)},
        "counts": sizes | {"blank_literals": spooled.blank_literals} | links,
        "time_range": spooled.time_range,
    }


def source_paths(section: GraphSection) -> list[str]:
    """Every input file of a graph, as the recipe writes it, each once."""
    paths = paths_of(section.triples)
    paths += [names.path for names in (section.triples.entities, section.triples.relations) if names]
    paths.append(section.links.path)
    if section.links.id_map:
        paths.append(section.links.id_map.path)
    return list(dict.fromkeys(paths))


def check_times(time_range: Sequence[int] | None, first_s: int, last_s: int) -> str | None:
    """Whether the triples' times look as if they were read in a wrong unit: a warning, or None where nothing does.

    With seconds read as milliseconds every triple is of 1970 and before all cut-offs: prompts would show the future.

    Args:
        time_range: first and last time of the triples, seconds since the epoch, as `build_graph` returns it.
        first_s: first time of the interactions, seconds since the epoch.
        last_s: the last.

    Raises:
        UserError: the two spans lie nearer to a factor of 1,000 apart than to none (√1000), and would meet if one were
            in a unit 1,000 or 1,000,000 times as long or as short.
    """
    if time_range is None:
        return None
    first, last = map(int, time_range)
    first_s, last_s = int(first_s), int(last_s)
    said = f"the triples' times are {_span(first, last)}, those of the interactions {_span(first_s, last_s)}"
    if _is_far_beyond(first, last, first_s, last_s) or _is_far_beyond(first_s, last_s, first, last):
        for factor, units in _FACTORS.items():
            if first * factor <= last_s and (last + 1) * factor > first_s:  # seconds were rounded down
                raise UserError(
                    f"{said}: they would meet if the triples' were in {units}: set graph.triples.timestamp_unit "
                    "(or, if it is the interactions' times that are wrong, data.interactions.timestamp_unit)"
                )
    if max(abs(first), abs(last)) < _JANUARY_S <= first_s:
        return f"{said}: no cut-off hides a triple of January 1970, check graph.triples.timestamp_unit and its column"
    return None


def _is_far_beyond(first: int, last: int, other_first: int, other_last: int) -> bool:
    """Whether every time of a span is of 1973 or later (or as long before 1970) and √1000 times any of the other."""
    nearest = 0 if first <= 0 <= last else min(abs(first), abs(last))
    return nearest >= 10**8 and nearest > 1000**0.5 * max(abs(other_first), abs(other_last))


def _span(first: int, last: int) -> str:
    """Both ends as numbers, and as dates where Python has them."""
    with contextlib.suppress(OverflowError):
        dates = [str((datetime(1970, 1, 1) + timedelta(seconds=end)).date()) for end in (first, last)]
        return f"{first} to {last} s since 1970 ({' to '.join(dates)})"
    return f"{first} to {last} s since 1970"


@dataclass(frozen=True)
class _Spooled:
    """All triples as text on disk, and what the ids in them are."""

    path: Path
    rows: int
    entities: pl.Series  # text, in the order of their numbers
    relations: pl.Series
    labels: pl.DataFrame  # readers.LABELS
    time_range: list[int] | None  # the first and last time, where there is one
    blank_literals: int


class _Ids:
    """Different texts, collected from batches; memory holds about three times what is different.

    Those that wait are many, so that each pass over what is known, which is large, finds many new ones.
    """

    def __init__(self) -> None:
        self.known = pl.Series(ID, [], dtype=pl.String)
        self.waiting: list[pl.Series] = []
        self.num_waiting = 0

    def add(self, texts: pl.Series) -> None:
        self.waiting.append(texts.rename(ID))
        self.num_waiting += len(texts)
        if self.num_waiting > max(2 * BATCH, 2 * len(self.known)):
            self._merge()

    def _merge(self) -> None:
        self.known = pl.concat([self.known, *self.waiting]).unique()
        self.waiting, self.num_waiting = [], 0

    def in_order(self, what: str) -> pl.Series:
        self._merge()
        if len(self.known) > _LAST_ID // 2:  # relations and their inverses share one int32
            raise UserError(
                f"{len(self.known)} {what}, at most {_LAST_ID // 2} are numbered: take a part of the triples"
            )
        return tables.natural_sort(self.known.to_frame(), ID)[ID]


def _spool(source: TriplesSource, scratch: Path) -> _Spooled:
    entities, relations, path = _Ids(), _Ids(), scratch / "triples.parquet"
    labels = [pl.DataFrame(schema=readers.LABELS)]
    seen: list[int] = []  # the first and last time of each batch
    rows = blank = 0
    schema = pl.DataFrame(schema=readers.TRIPLES).to_arrow().schema
    plain: dict[str, Any] = {"use_dictionary": [RELATION], "write_statistics": False}  # most entities are rare
    with pq.ParquetWriter(path, schema, compression="lz4", **plain) as writer:
        for batch in readers.read_triples(source):
            blank += batch.blank_literals
            if batch.labels is not None:
                labels.append(batch.labels)
            if batch.triples.is_empty():
                continue
            writer.write_table(batch.triples.to_arrow().cast(writer.schema), row_group_size=BATCH)
            rows += batch.triples.height
            entities.add(batch.triples[HEAD])
            entities.add(batch.triples[TAIL])
            relations.add(batch.triples[RELATION])
            times = batch.triples[TIMESTAMP].filter(batch.triples[TIMESTAMP] != ALWAYS)
            if len(times):
                seen += [int(times.to_numpy().min()), int(times.to_numpy().max())]
    if not rows:
        raise UserError(f"{', '.join(paths_of(source))}: no triples there: check graph.triples.path and header")
    span = [min(seen), max(seen)] if seen else None
    found = entities.in_order("entities"), relations.in_order("relations")
    return _Spooled(path, rows, *found, pl.concat(labels), span, blank)


class _Buckets:
    """Rows dealt to files by number, each read back once."""

    def __init__(self, folder: Path, count: int) -> None:
        folder.mkdir()
        self.paths = [folder / f"{number:03d}" for number in range(count)]
        self.files = [path.open("wb") for path in self.paths]

    def deal(self, numbers: npt.NDArray[np.integer], rows: Rows) -> None:
        """Rows to the buckets with these numbers."""
        order = np.argsort(numbers.astype(np.uint16), kind="stable")
        ends = np.cumsum(np.bincount(numbers, minlength=len(self.files)))
        rows = rows.take(order)
        for file, begin, end in zip(self.files, np.append(0, ends), ends):
            file.write(rows[begin:end].tobytes())

    def take(self) -> Iterator[Rows]:
        """The rows of each bucket; its file goes, so that the disk holds no bucket twice."""
        for file, path in zip(self.files, self.paths):
            file.close()
            yield np.fromfile(path, dtype=_ROW)
            path.unlink()


def _numbered(spooled: _Spooled) -> Iterator[Rows]:
    """The triples as numbers, batch by batch."""
    entity = pl.Enum(spooled.entities)
    kinds = {HEAD: entity, RELATION: pl.Enum(spooled.relations), TAIL: entity}
    numbers = [pl.col(name).cast(kind).to_physical() for name, kind in kinds.items()]
    # One lazy query: every cast of its own would hash all entities again
    frame = pl.scan_parquet(spooled.path).select(*numbers, TIMESTAMP)
    for batch in tables.batches(frame, [str(spooled.path)], BATCH):
        rows = np.empty(batch.height, dtype=_ROW)
        for name in batch.columns:
            rows[name] = batch[name].to_numpy()
        yield rows


def _sort(spooled: _Spooled, folder: Path, scratch: Path) -> dict[str, int]:
    """Duplicates out, edges counted, edges sorted: writes the arrays of the graph; returns counts."""
    num_entities, num_relations = len(spooled.entities), len(spooled.relations)
    pairs = _Buckets(scratch / "pairs", _num_buckets(spooled.rows))
    for rows in _numbered(spooled):
        pairs.deal(_pair_hash(rows) % len(pairs.files), rows)
    spooled.path.unlink()
    degrees = np.zeros(num_entities, dtype=np.int64)
    num_triples = loops = 0
    with (scratch / "different").open("wb") as file:
        for rows in pairs.take():
            rows = _different(rows)
            file.write(rows.tobytes())
            for end in (HEAD, TAIL):
                degrees += np.bincount(rows[end], minlength=num_entities)
            num_triples += len(rows)
            loops += int((rows[HEAD] == rows[TAIL]).sum())
    has_times = spooled.time_range is not None
    entity_keys = _write_keys(spooled.entities, folder / "entity_keys.npy")
    _write_keys(spooled.relations, folder / "relation_keys.npy")
    _write_edges(_dealt_edges(scratch, degrees, num_relations), degrees, places(entity_keys), has_times, folder)
    write_meta(folder, num_entities, num_relations, num_triples, has_times=has_times)
    return {
        "triples": num_triples,
        "duplicate_triples": spooled.rows - num_triples,
        "self_loops": loops,
        "entities": num_entities,
        "relations": num_relations,
    }


def _write_keys(ids: pl.Series, path: Path) -> Keys:
    """Write and return the key of each id."""
    parts = (ids[begin : begin + BATCH].to_list() for begin in range(0, len(ids), BATCH))
    keys = np.concatenate([text_keys(part) for part in parts])
    np.save(path, keys)
    return keys


def _num_buckets(rows: int) -> int:
    return min(max(1, -(-rows // BUCKET)), _MAX_BUCKETS)


def _pair_hash(rows: Rows) -> npt.NDArray[np.uint64]:
    """Hash of (head, tail), so that a hub's triples spread over all buckets: Fibonacci hashing of the two numbers."""
    pair = (rows[HEAD].astype(np.uint64) << np.uint64(32)) | rows[TAIL].astype(np.uint64)
    hashed: npt.NDArray[np.uint64] = (pair * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return hashed


def _different(rows: Rows) -> Rows:
    """Each row once, in any order."""
    frame = pl.DataFrame({name: rows[name] for name in _ROW.names or ()}).unique()
    found = np.empty(frame.height, dtype=_ROW)
    for name in frame.columns:
        found[name] = frame[name].to_numpy()
    return found


def _dealt_edges(scratch: Path, degrees: Ints, num_relations: int) -> _Buckets:
    """Every triple as an edge and an inverse edge, dealt to buckets of neighbouring sources."""
    total = int(degrees.sum())
    count = _num_buckets(total)
    bucket_of = ((np.cumsum(degrees) - degrees) * count // max(total, 1)).astype(np.uint16)  # (E,) by its first edge
    edges = _Buckets(scratch / "edges", count)
    path = scratch / "different"
    for begin in range(0, total // 2, BATCH):
        rows = np.fromfile(path, dtype=_ROW, count=BATCH, offset=begin * _ROW.itemsize)
        inverse = rows.copy()
        inverse[HEAD], inverse[TAIL] = rows[TAIL], rows[HEAD]
        inverse[RELATION] += num_relations
        both = np.concatenate([rows, inverse])
        edges.deal(bucket_of[both[HEAD]], both)
    path.unlink()
    return edges


class _Array:
    """A .npy file of one dimension that grows; its header is written again at the end, when the length is known."""

    def __init__(self, path: Path, dtype: type[np.integer]) -> None:
        self.file, self.dtype, self.length = path.open("wb"), np.dtype(dtype), 0
        self._header()

    def _header(self) -> None:
        self.file.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)  # leaves room for the digits of any length

    def append(self, values: npt.NDArray[np.integer]) -> None:
        self.file.write(values.astype(self.dtype).tobytes())
        self.length += len(values)

    def close(self) -> None:
        self._header()
        self.file.close()


def _write_edges(edges: _Buckets, degrees: Ints, preference: Ids, has_times: bool, folder: Path) -> None:
    """Sort each bucket by itself, by the `preference` (E,) among edges of one time; they follow one another."""
    runs = np.zeros(len(degrees), dtype=np.int64)  # (E,) runs of each entity
    relations, targets = _Array(folder / "run_relations.npy", np.int32), _Array(folder / "targets.npy", np.int32)
    begins = _Array(folder / "run_begins.npy", offset_type(int(degrees.sum())))
    times = _Array(folder / "times.npy", np.int64)
    for rows in edges.take():
        rows = rows.take(_order(rows, preference))
        new = np.ones(len(rows), dtype=bool)
        new[1:] = (np.diff(rows[HEAD]) != 0) | (np.diff(rows[RELATION]) != 0)
        heads = rows[HEAD][new]  # neighbouring entities
        if len(heads):
            here = slice(heads[0], heads[-1] + 1)
            runs[here] += np.bincount(heads - heads[0], minlength=here.stop - here.start)
        begins.append(targets.length + np.flatnonzero(new))
        relations.append(rows[RELATION][new])
        targets.append(rows[TAIL])
        times.append(rows[TIMESTAMP] if has_times else rows[TIMESTAMP][:0])
    begins.append(np.array([targets.length]))
    for array in (relations, begins, targets, times):
        array.close()
    if not has_times:
        (folder / "times.npy").unlink()
    run_offsets = np.append(0, np.cumsum(runs))
    np.save(folder / "run_offsets.npy", run_offsets.astype(offset_type(int(run_offsets[-1]))))


def _order(rows: Rows, preference: Ids) -> Ids:
    """The order of store.Graph: source, relation, time, place of the target by its key."""
    keys = {name: rows[name] for name in (HEAD, RELATION, TIMESTAMP)} | {TAIL: preference[rows[TAIL]]}
    order: Ids = pl.DataFrame(keys).select(pl.arg_sort_by(*keys)).to_series().to_numpy()
    return order


def _write_names(spooled: _Spooled, source: TriplesSource, folder: Path) -> None:
    _named(spooled.entities, spooled.labels, source.entities, "graph.triples.entities").rename(
        {ID: ENTITY_ID}
    ).write_parquet(folder / ENTITIES)
    _named(spooled.relations, spooled.labels, source.relations, "graph.triples.relations").rename(
        {ID: RELATION_ID}
    ).write_parquet(folder / RELATIONS)


def _named(ids: pl.Series, labels: pl.DataFrame, source: NamesSource | None, section: str) -> pl.DataFrame:
    """Frame with id and name: the recipe's table, then rdfs:label, then what can be read from the id."""
    frame = pl.DataFrame({ID: ids, "__read": readers.readable(ids)})
    best = labels.sort(ID, "rank", NAME).unique(ID, keep="first", maintain_order=True)
    cleaned = pl.col(NAME).str.replace_all(tables.CONTROL, " ").str.strip_chars().alias("__label")
    frame = frame.join(best.select(ID, cleaned), on=ID, how="left", maintain_order="left")
    given = pl.DataFrame(schema={ID: pl.String, NAME: pl.String})
    if source is not None:
        given = readers.read_names(source, section)
        if not frame.join(given, on=ID, how="semi").height:
            raise UserError(
                f"{source.path}: names none of the {len(ids)} ids in the triples (there: {_some(given[ID])}; in the "
                f"triples: {_some(ids)}): check {section}.columns.id"
            )
    frame = frame.join(given.filter(pl.col(NAME) != ""), on=ID, how="left", maintain_order="left")
    return frame.select(ID, pl.coalesce(NAME, "__label", "__read", ID).alias(NAME))


def _some(ids: pl.Series) -> str:
    return ", ".join(f'"{text}"' for text in ids.head(3).to_list()) or "none"


def _link(section: GraphSection, item_ids: Sequence[str], entities: pl.Series, folder: Path) -> dict[str, int]:
    """Write the entity of each item; of an item with several links into the graph, the first counts."""
    links = readers.read_links(section.links)
    items = pl.DataFrame({ITEM_ID: pl.Series(item_ids, dtype=pl.String)}).with_row_index("item")
    known = links.drop_nulls(ITEM_ID).join(items, on=ITEM_ID, how="inner", maintain_order="left")
    numbers = pl.DataFrame({ENTITY_ID: entities}).with_row_index("entity")
    linked = known.join(numbers, on=ENTITY_ID, how="inner", maintain_order="left")
    if linked.is_empty():
        raise UserError(
            f"{section.links.path}: links no item to an entity of the graph. Its item ids: "
            f"{_some(links[ITEM_ID].drop_nulls())}, in "
            f"the interactions: {_some(items[ITEM_ID])}; its entity ids: {_some(links[ENTITY_ID])}, in the triples: "
            f"{_some(entities)}. Check graph.links.columns and graph.links.id_map"
        )
    first = linked.unique("item", keep="first", maintain_order=True)
    per_item = linked.unique(["item", "entity"]).group_by("item").len()
    per_entity = first.group_by("entity").len()
    item_entities = np.full(len(item_ids), -1, dtype=np.int32)
    item_entities[first["item"].to_numpy()] = first["entity"].to_numpy()
    np.save(folder / LINKS, item_entities)
    return {
        "linked_items": first.height,
        "items_without_link": len(item_ids) - first.height,
        "links_not_in_id_map": links[ITEM_ID].null_count(),
        "links_of_unknown_items": links.height - links[ITEM_ID].null_count() - known.height,
        "links_to_unknown_entities": known.height - linked.height,
        "items_linked_twice": per_item.filter(pl.col("len") > 1).height,
        "entities_of_several_items": per_entity.filter(pl.col("len") > 1).height,
    }
