"""Reading a log on a cluster: a task of Ray Data checks and parses each file with the project's own readers.

The sections of a recipe enter; a `Scan` leaves, as rows.scan gives it: checks, line numbers and types are the same.
A file is one task: a log for a cluster comes in many files; a single one the driver reads itself (`RayEngine.scan`).
Batches are cut at the same rows however often the task runs, and numbered, so that a task that is lost and run again
gives none twice; the driver counts them.

A local path must be the same file on every node. An object of a store is copied to the node that reads it, once, and
its sha256 taken on the way.
"""

import contextlib
import functools
import io
import json
import logging
import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from recllm import cluster, files
from recllm.data import object_store, offline, readers, rows, tables
from recllm.data.readers import ROW, About
from recllm.data.rows import Scan
from recllm.errors import UserError
from recllm.recipe import ActionsSection, DataSection, FilterSection, InteractionsSource
from recllm.schema import ITEM_ID

_PLACE_BITS = 40  # of `row`, the place in the files, those below the number of the file
_PIECE = pa.schema([("file", pa.int32()), ("number", pa.int32()), ("about", pa.string()), ("rows", pa.large_binary())])


class Reading(NamedTuple):
    """What every task needs."""

    source: InteractionsSource
    not_read: frozenset[str]
    actions: ActionsSection | None
    item_ids: pa.Array | None  # in the catalogue's order
    skip_unreadable: bool
    folder: str  # that relative paths start from
    driver: cluster.Identity
    batch_rows: int


class _File(NamedTuple):
    """What a task says of its file, before the first row and again behind the last."""

    names: list[str]
    nowhere: list[str]
    sha256: str | None = None
    skipped: str | None = None
    batches: int | None = None  # behind the last


def scan(
    ray: Any,
    data: DataSection,
    filters: FilterSection,
    actions: ActionsSection | None,
    items: pl.DataFrame | None,
    skip_unreadable: bool,
) -> Scan:
    """See rows.scan.

    Raises:
        UserError: bad input (see readers), no file that can be read, a node that does not see a file.
    """
    source = data.interactions
    paths = readers.log_paths(source, actions)
    ids = None if items is None else items[ITEM_ID].to_arrow().cast(pa.large_string())
    how = (skip_unreadable, str(Path.cwd()), cluster.identity(), rows.batch_rows())
    asked = Reading(source, frozenset(rows.not_read(filters)), actions, ids, *how)
    pieces = _pieces(ray, paths, asked)
    merge = _Merge(paths, asked)
    first = list[pl.DataFrame]()
    for piece in pieces:  # until a file says what columns it has
        first += merge.take(piece)
        if merge.names:
            break
    if not merge.names:
        rows.refuse_nothing_left([], merge.skipped)
    names = merge.names + ([] if actions is None else [ROW])
    return Scan(names, merge.all(first, pieces), paths, merge.skipped, merge.sha256)


def _pieces(ray: Any, paths: list[str], asked: Reading) -> Iterator[dict[str, Any]]:
    from ray.data import from_items

    _quiet()
    task = functools.partial(_read, asked=[ray.put(asked)])
    listed = from_items(
        [{"file": place, "path": path} for place, path in enumerate(paths)], override_num_blocks=len(paths)
    )
    table = listed.map_batches(task, batch_size=1, batch_format="pyarrow", **cluster.task_options())
    with cluster.own_errors():
        blocks: Iterable[Any] = table.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
        for block in blocks:
            for batch in block.to_batches():
                for place in range(batch.num_rows):
                    yield {name: batch.column(name)[place] for name in batch.schema.names}


def _quiet() -> None:
    """Ray Data's own bars and log lines off: recllm shows its own."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # a task's UserError comes out as it is
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


class _Merge:
    """Takes pieces of all files, in any order between files; a lost task's are taken once."""

    def __init__(self, paths: list[str], asked: Reading) -> None:
        self.paths, self.asked = paths, asked
        self.names: list[str] = []
        self.sha256: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self._about: dict[int, About] = {}
        self._batches: dict[int, int] = {}
        self._seen: defaultdict[int, set[int]] = defaultdict(set)

    def all(self, first: list[pl.DataFrame], pieces: Iterator[dict[str, Any]]) -> Iterator[pl.DataFrame]:
        """Every batch of rows once.

        Raises:
            UserError: files that do not go together.
            RuntimeError: batches are missing: a defect.
        """
        yield from first
        for piece in pieces:
            yield from self.take(piece)
        about = [self._about[place] for place in sorted(self._about)]
        readers.check_together(about, self.asked.source, self.asked.not_read)
        for place, path in enumerate(self.paths):
            if path not in self.skipped and len(self._seen[place]) != self._batches.get(place):
                raise RuntimeError(f"{path}: {len(self._seen[place])} of {self._batches.get(place)} batches came")

    def take(self, piece: dict[str, Any]) -> Iterator[pl.DataFrame]:
        """The rows of a piece, if it has any and they are new."""
        place, number, rows_of = piece["file"].as_py(), piece["number"].as_py(), piece["rows"]
        if piece["about"].is_valid:
            self._hear(place, _File(**json.loads(piece["about"].as_py())))
        if not rows_of.is_valid or number in self._seen[place]:
            return
        self._seen[place].add(number)
        batch = pl.read_ipc(io.BytesIO(rows_of.as_buffer()))
        if self.asked.actions is not None:
            begin = (place << _PLACE_BITS) + number * self.asked.batch_rows
            batch = batch.with_columns(pl.Series(ROW, np.arange(begin, begin + batch.height)))
        yield batch

    def _hear(self, place: int, said: _File) -> None:
        path = self.paths[place]
        if said.skipped is not None:
            self.skipped[path] = said.skipped
            return
        self.names = self.names or said.names
        if said.names != self.names:  # at once: rows of different columns do not go into one file
            readers.check_together(
                [*self._about.values(), About(path, said.names, said.nowhere)], self.asked.source, self.asked.not_read
            )
        self._about[place] = About(path, said.names, said.nowhere)
        if said.sha256 is not None:
            self.sha256[path] = said.sha256
        if said.batches is not None:
            self._batches[place] = said.batches


# ---- in tasks ----


def _read(table: pa.Table, asked: list[Any]) -> Iterator[pa.Table]:
    """What is to be said of a file, and its rows."""
    import ray

    place, path = table.column("file")[0].as_py(), table.column("path")[0].as_py()
    how: Reading = ray.get(asked[0])
    cluster.check_here(how.driver)
    items = None if how.item_ids is None else pl.DataFrame({ITEM_ID: pl.from_arrow(how.item_ids)})
    with _here(how, path):
        try:
            file = readers.read_file(path, how.source, how.not_read, how.actions)
            if how.skip_unreadable:
                rows.read_through(file, how.source)
        except tables.Unreadable as error:
            if not how.skip_unreadable:
                raise
            yield _piece(place, about=_File([], [], skipped=str(error)))
            return
        remote = object_store.is_url(path)
        about = _File(file.about.names, file.about.nowhere, files.sha256_of(offline.resolve(path)) if remote else None)
        yield _piece(place, about=about)
        count = 0
        for batch in rows.in_order(file, how.source, items, how.batch_rows):
            yield _piece(place, number=count, batch=batch)
            count += 1
        yield _piece(place, about=about._replace(batches=count))


def _piece(place: int, number: int = 0, about: _File | None = None, batch: pl.DataFrame | None = None) -> pa.Table:
    said = None if about is None else json.dumps(about._asdict())
    written = None
    if batch is not None:
        buffer = io.BytesIO()
        batch.write_ipc(buffer, compression="lz4")
        written = buffer.getvalue()
    return pa.table([[place], [number], [said], [written]], schema=_PIECE)


@contextlib.contextmanager
def _here(how: Reading, path: str) -> Iterator[None]:
    """With the file there, a relative path in the driver's folder; copies of objects go afterwards."""
    try:
        with _in_folder(how.folder, path) if _is_relative(path) else contextlib.nullcontext():
            if not object_store.is_url(path) and not offline.resolve(path).exists():
                where = f" (relative to {how.folder})" if _is_relative(path) else ""
                raise UserError(
                    f"{path} does not exist on node {platform.node()}{where}: check the path in the recipe, and that "
                    "all nodes share its file system, or give URLs of an object store"
                )
            yield
    finally:
        object_store.forget_all()


def _is_relative(path: str) -> bool:
    """Whether what a path leads to hangs on the folder that a process works in."""
    local = path.removeprefix(offline.FAR_TRANS)
    return not (object_store.is_url(local) or local.startswith(offline.PREFIX) or Path(local).is_absolute())


@contextlib.contextmanager
def _in_folder(folder: str, path: str) -> Iterator[None]:
    # The path itself stays as the recipe has it: errors and the manifest name it so.
    before = Path.cwd()
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"node {platform.node()} has no folder {folder} ({error.strerror}), in which recllm was started and to "
            f"which {path} is relative: start it in a folder that all nodes share, or give absolute paths"
        ) from None
    try:
        yield
    finally:
        os.chdir(before)
