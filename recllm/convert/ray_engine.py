"""The engine of a cluster: a log's files are read by Ray Data, and tasks of Ray make shards into examples.

A log and shards of sequences enter; the same files leave as those of the local engine, byte for byte, whatever the
number of partitions, nodes and lost tasks: tasks call the functions that the local engine calls, on the same shards.

What runs where: tasks parse, check and translate the files of a log in several (ray_reading.py), and make the examples;
these take no rows and give none (shards lie on the file system), so Ray Data would add its actors and nothing else.
The driver numbers users, cuts the log into buckets, sorts, splits and audits (data/sequences.py), on its own.
That part is serial: measured at 1e7 interactions, 0.6 CPU-seconds a million (0.9 where it reads a log in one file too)
and 156 bytes a user, of 8 CPU-seconds a million in all with 20 candidates in each prompt, and of 1.4 with windows of
ten titles. So a cluster makes a conversion at most 12 or 2 times as fast as one core. For a billion interactions of a
hundred million users that predicts half an hour of one core, and 16 GiB on the driver: its memory breaks first.

Nodes share a file system: the output's folder, and the files of the log unless they are URLs.

The prepared log and the shards that are done lie beside the output, in .NAME.shards-KEY, until the dataset is complete.
A run that was killed as a whole is started again with the same recipe, inputs and recllm, and so with the same KEY: it
takes the log as it was prepared, and writes only the shards that are not there. What other keys left is removed.
"""

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa

from recllm import cluster, files, schema
from recllm.convert import kept, ray_reading
from recllm.convert.examples import Converter
from recllm.convert.pipeline import Written, write_shard
from recllm.data import readers
from recllm.data.rows import Scan, scan
from recllm.data.sequences import Prepared
from recllm.data.stored import Shard, StoredSequences
from recllm.errors import UserError
from recllm.recipe import ActionsSection, DataSection, FilterSection

ASKED = "recllm convert --engine ray"
TASKS_A_CORE = 4  # at least, while there are shards, and unless partitions are given: cores end at about the same time
_WRITING = ".writing-"  # folders of tasks under way
_PREPARED = "prepared"
_NOTE = re.compile(r"\d+\.json")


class Work(NamedTuple):
    """What every task needs, put once into the object store, where each node keeps one copy."""

    sequences: StoredSequences
    cut: list[Shard]
    converter: Converter
    driver: cluster.Identity


class RayEngine:
    """An engine for `pipeline.convert`; of one conversion."""

    def __init__(self, output: Path, key: str, partitions: int | None = None) -> None:
        """Nothing happens yet.

        Args:
            output: the dataset's folder, beside which shards that are done lie.
            key: changes with all that examples hang on but recllm's sources.
            partitions: tasks that the shards are dealt to; None: one a row group, more where there are few.

        Raises:
            UserError: less than one partition.
        """
        if partitions is not None and partitions < 1:
            raise UserError(f"--partitions {partitions}: at least 1 is needed, leave it out for the default")
        self.partitions, output = partitions, Path(output).resolve()
        self.done = Done(output, f"{key[:16]}{cluster.identity().sources[:8]}")
        self._ray: Any = None

    @contextlib.contextmanager
    def opened(self, folder: Path) -> Iterator[None]:
        """Connected to Ray, with the folder of shards that are done; kept where some are and the work stops.

        Raises:
            UserError: see cluster.connected; another run writes to the same output.
        """
        with self.done.opened(), cluster.connected(ASKED, folder) as self._ray:  # first no task runs any more
            self.done.remove_others()
            if not self._ray.cluster_resources().get("CPU"):
                raise UserError(
                    f"{ASKED}: no node of the cluster has a CPU for tasks: add a node, or start them without "
                    "`ray start --num-cpus=0`"
                )
            yield

    def scan(
        self,
        data: DataSection,
        filters: FilterSection,
        actions: ActionsSection | None,
        items: pl.DataFrame | None,
        skip_unreadable: bool = False,
    ) -> Scan:
        """See rows.scan; a task reads a file, and of a log in one file there is nothing to share out."""
        if len(readers.paths_of(data.interactions)) == 1:
            return scan(data, filters, actions, items, skip_unreadable)
        return ray_reading.scan(self._ray, data, filters, actions, items, skip_unreadable)

    def prepared(self, folder: Path, make: Callable[[Path], Prepared]) -> Prepared:
        """See pipeline.Engine; kept until the dataset is complete."""
        return self.done.prepared(folder, make)

    def write(
        self, sequences: StoredSequences, cut: list[Shard], converter: Converter, folder: Path
    ) -> Iterator[tuple[int, Written]]:
        """See pipeline.Engine.

        Raises:
            UserError: what a task met; processes that were lost again and again.
            OSError: a node's disk is full.
        """
        self.done.bind(files.sha256_of(sequences.path))
        missing, noted = [], self.done.noted()
        for number in range(len(cut)):
            if number not in noted or (held := self.done.read(number)) is None:
                missing.append(number)
            else:
                yield number, held
        if missing:
            yield from self._written(Work(sequences, cut, converter, cluster.identity()), missing)
        self.done.move_to(folder, len(cut))

    def _written(self, work: Work, missing: Sequence[int]) -> Iterator[tuple[int, Written]]:
        task = self._ray.remote(_write_part).options(scheduling_strategy="SPREAD", **cluster.task_options())
        shared = [self._ray.put(work)]  # [] keeps it a reference
        tasks = [task.remote(part, shared, self.done) for part in self._partitions(work.cut, missing)]
        with cluster.own_errors():
            for held in cluster.as_they_end(self._ray, tasks):
                for number, document in held.items():
                    yield number, Written.of_document(document)

    def _partitions(self, cut: Sequence[Shard], missing: Sequence[int]) -> list[list[int]]:
        """Shards by task. Those of a row group, which a task reads as a whole, go to one, or to few for few groups."""
        if self.partitions:
            return _dealt(missing, self.partitions)
        cores = int(self._ray.cluster_resources().get("CPU", 1))
        groups = [list(group) for _, group in itertools.groupby(missing, key=lambda number: cut[number].group)]
        each = math.ceil(TASKS_A_CORE * cores / len(groups))
        return [part for group in groups for part in _dealt(group, each)]


def _dealt(numbers: Sequence[int], count: int) -> list[list[int]]:
    """At most `count` parts of like size, none empty.

    >>> _dealt([4, 5, 6, 7, 8], 2), _dealt([4, 5], 3)
    ([[4, 5], [6, 7, 8]], [[4], [5]])
    """
    count = min(count, len(numbers))
    ends = [round(len(numbers) * part / count) for part in range(count + 1)]
    return [list(numbers[begin:end]) for begin, end in itertools.pairwise(ends)]


class Done:
    """The folder of what is done: the log in prepared/, and of shards {train,valid,test}/part-NUMBER.parquet.

    Behind all files of a shard comes its NUMBER.json.
    """

    def __init__(self, output: Path, key: str) -> None:
        self.output, self.key, self.run = output, key, uuid.uuid4().hex[:8]
        self.folder = output.parent / f".{output.name}.shards-{key}"

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Made or found again, and locked; removed at the end, unless the work stops while there is something to keep.

        That are shards that are done, and the prepared log. A run of another recipe for this output removes them.

        Raises:
            UserError: another process is writing to the same output.
        """
        for split in schema.SPLITS:
            (self.folder / split).mkdir(parents=True, exist_ok=True)
        lock = _locked(self.folder)
        if lock is None:
            raise UserError(f"{self.output}: another run is writing it: wait for it or stop it")
        with lock.file:
            for left in self.folder.glob(f"{_WRITING}*") if lock.held else ():
                shutil.rmtree(left, ignore_errors=True)
            try:
                yield
            except BaseException:
                if shards := len(list(self.folder.glob("*.json"))):
                    print(f"recllm: {shards} shards are done, the next run goes on from them", file=sys.stderr)
                elif (self.folder / _PREPARED).exists():
                    print("recllm: the log is prepared, the next run goes on from there", file=sys.stderr)
                else:
                    shutil.rmtree(self.folder, ignore_errors=True)
                raise
            shutil.rmtree(self.folder, ignore_errors=True)

    def remove_others(self) -> None:
        """What runs of other recipes, inputs or versions left for this output, unless they are still at work."""
        for other in self.output.parent.glob(f".{self.output.name}.shards-*"):
            if other == self.folder or (lock := _locked(other)) is None:
                continue
            with lock.file:
                if lock.held:  # otherwise nobody knows
                    shutil.rmtree(other, ignore_errors=True)

    def prepared(self, folder: Path, make: Callable[[Path], Prepared]) -> Prepared:
        """What `make` gives, or gave a run before this one, with its sequences.parquet in `folder`.

        Where files of the log were skipped it is made every time: they may be readable again.
        """
        place = self.folder / _PREPARED
        if (found := kept.read(place)) is None:
            shutil.rmtree(place, ignore_errors=True)
            found = self._prepare(place, folder, make)
        else:
            _link(place / kept.SEQUENCES, folder / kept.SEQUENCES)
        sequences = dataclasses.replace(found.sequences, path=folder / kept.SEQUENCES)
        return dataclasses.replace(found, sequences=sequences)

    def _prepare(self, place: Path, folder: Path, make: Callable[[Path], Prepared]) -> Prepared:
        """Made, in `folder`, and kept at `place`, which appears whole."""
        under_way = Path(tempfile.mkdtemp(prefix=f"{_WRITING}{_PREPARED}-", dir=self.folder))
        try:
            found = make(under_way)
            kept.write(found, under_way)
            _link(under_way / kept.SEQUENCES, folder / kept.SEQUENCES)
            if not found.skipped:
                _keep(under_way, place)
        finally:
            shutil.rmtree(under_way, ignore_errors=True)
        return found

    def bind(self, sequences_sha256: str) -> None:
        """Forget the shards that were made of other sequences: a file that was skipped may be readable again."""
        stamp = self.folder / "sequences.sha256"
        if stamp.exists() and stamp.read_text() != sequences_sha256:
            for note in self.folder.glob("*.json"):
                note.unlink(missing_ok=True)
            for part in self.folder.glob("*/part-*.parquet"):
                part.unlink(missing_ok=True)
        files.write_text(stamp, sequences_sha256)

    def noted(self) -> set[int]:
        """Shards that have a note. One look at the folder: NFS remembers for a while what was asked for in vain."""
        return {int(name[: -len(".json")]) for name in os.listdir(self.folder) if _NOTE.fullmatch(name)}

    def read(self, number: int) -> Written | None:
        """What a shard held, if it is done and all its files are there."""
        note = self._note(number)
        return None if note is None else Written.of_document(note["held"])

    def _note(self, number: int) -> dict[str, Any] | None:
        """The note of a shard, if it is there and the parts that it names have the sizes that it names."""
        try:
            found: dict[str, Any] = json.loads((self.folder / f"{number}.json").read_text())
            sizes = {split: self._part(split, number).stat().st_size for split in found["sizes"]}
        except FileNotFoundError:
            return None
        return found if sizes == found["sizes"] else None

    def write(self, number: int, batch: pa.RecordBatch, converter: Converter) -> Written:
        """Make a shard: its files appear whole, and behind them the note that they are done.

        Raises:
            UserError: process after process was lost over it.
            OSError: the disk is full; nothing is left of the shard.
        """
        if (lost := len(list(self.folder.glob(f"{_WRITING}{number}-{self.run}-*")))) >= cluster.MOST_LOST:
            raise UserError(
                f"{lost} processes were killed over shard {number}, most likely for want of memory: give Ray fewer CPUs"
                " a node (`ray start --num-cpus`), and run again: shards that are done stay"
            )
        under_way = Path(
            tempfile.mkdtemp(prefix=f"{_WRITING}{number}-{self.run}-{platform.node()}-{os.getpid()}-", dir=self.folder)
        )
        try:
            for split in schema.SPLITS:
                (under_way / split).mkdir()
            held = write_shard(number, batch, str(under_way), converter)
            sizes = {}
            for split in schema.SPLITS:
                if (path := under_way / split / _name(number)).exists():
                    sizes[split] = path.stat().st_size
                    os.replace(path, self._part(split, number))
            files.write_json(self.folder / f"{number}.json", {"held": held.document(), "sizes": sizes})
        finally:
            shutil.rmtree(under_way, ignore_errors=True)
        return held

    def move_to(self, folder: Path, count: int) -> None:
        """The files that the notes of shards 0 to count - 1 name into folder/{train,valid,test}/: done no longer here.

        Raises:
            UserError: a note is missing, or a file is not as its note says; then nothing has moved.
        """
        notes = [self._note(number) for number in range(count)]
        if None in notes:
            raise UserError(
                f"shard {notes.index(None)} was written, but its files in {self.folder} are not there or not whole: "
                "check the file system that the nodes share, and run again: shards that are done stay"
            )
        for number, note in enumerate(notes):
            (self.folder / f"{number}.json").unlink(missing_ok=True)
            for split in note["sizes"] if note else ():
                os.replace(self._part(split, number), folder / split / _name(number))

    def _part(self, split: str, number: int) -> Path:
        return self.folder / split / _name(number)


def _keep(folder: Path, place: Path) -> None:
    """Give a folder its name, unless another run did with the same: on file systems without locks two may work."""
    try:
        os.rename(folder, place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _link(path: Path, link: Path) -> None:
    """The same file under a second name, a copy where the file system has one name a file."""
    try:
        os.link(path, link)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
            raise
        shutil.copyfile(path, link)


def _name(number: int) -> str:
    return f"part-{number:05d}.parquet"


class _Lock(NamedTuple):
    """Of a folder, until its file is closed or its process ends."""

    file: Any
    held: bool  # False on a file system without locks: others may be at work there


def _locked(folder: Path) -> _Lock | None:
    """The lock of a folder; None if another process has it, or the folder is gone."""
    try:
        lock = (folder / ".lock").open("w")
    except FileNotFoundError:  # removed since it was seen
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    except OSError:  # a file system without locks: two runs at once write the same bytes
        return _Lock(lock, held=False)
    return _Lock(lock, held=True)


# ---- in tasks ----

_opened: dict[str, Work] = {}  # of this process, under its reference: a graph's names are worked out once


def _write_part(numbers: Sequence[int], work: list[Any], done: Done) -> dict[int, dict[str, Any]]:
    """Write shards, and say of each what it held; those that an earlier try of this task wrote are left."""
    pa.set_cpu_count(1)  # one process a core: no threads on top
    asked = _work(work[0])
    cluster.check_here(asked.driver)
    held = {number: found for number in numbers if (found := done.read(number)) is not None}
    missing = [number for number in numbers if number not in held]
    batches = asked.sequences.read(asked.cut[number] for number in missing)
    for number in missing:
        with _named(f"sequences cannot be read from {asked.sequences.path}", OSError, pa.ArrowException):
            batch = next(batches)
        with _named(f"shard {number} cannot be written to {done.folder}", OSError):
            held[number] = done.write(number, batch, asked.converter)
    return {number: found.document() for number, found in held.items()}


def _work(reference: Any) -> Work:
    import ray

    name = reference.hex()
    if name not in _opened:
        _opened.clear()
        _opened[name] = ray.get(reference)
    return _opened[name]


@contextlib.contextmanager
def _named(what: str, *errors: type[Exception]) -> Iterator[None]:
    """What this node cannot do with the file system is said, with the node; a full disk stays what it is."""
    try:
        yield
    except errors as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"node {platform.node()}: {what} ({error}): check the file system that the nodes share, and run again: "
            "shards that are done stay"
        ) from error
