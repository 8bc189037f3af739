"""A knowledge graph as compressed sparse rows: edges by source, relation and time, both ways.

Triples of integers enter (`Graph.of`, in memory; `build.py` does it by streaming into a folder); a `Graph` leaves,
whose arrays are memory-mapped where it was opened from a folder, so that all workers share them.

Edges are sorted by (source, relation, time) and not by (source, time): a cap on the edges of one relation is then a
slice of a run, found by bisection, and an entity with a million edges costs as much as one with ten.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recllm import files
from recllm.errors import UserError

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]

ALWAYS = int(np.iinfo(np.int64).min)  # the time of a triple that has none: older than every cut-off
FORMAT = 1  # counted up when the arrays change
META = "graph.json"
ARRAYS = ("run_offsets", "run_relations", "run_begins", "targets", "times")


@dataclass(frozen=True)
class Graph:
    """E entities, R relations, T triples, 2T edges, S runs.

    A triple (h, r, t) is an edge h → t of relation r, and an edge t → h of relation R + r, its inverse. The edges of an
    entity lie together, those of one relation in a run of their own, oldest first; edges of one time by falling degree
    of their targets, so that the end of a run holds what is newest and, among equals, says most.
    """

    num_relations: int  # R
    run_offsets: Ints  # (E + 1,) entity s owns runs run_offsets[s]:run_offsets[s + 1]
    run_relations: Ids  # (S,) relation of each run, R and above: inverse
    run_begins: Ints  # (S + 1,) run q owns edges run_begins[q]:run_begins[q + 1]
    targets: Ids  # (2T,)
    times: npt.NDArray[np.int64] | None  # (2T,) seconds since the epoch, or ALWAYS; None where no triple has a time

    @property
    def num_entities(self) -> int:
        """E."""
        return len(self.run_offsets) - 1

    @property
    def num_triples(self) -> int:
        """T."""
        return len(self.targets) // 2

    def degrees(self, entities: npt.NDArray[np.integer]) -> Ints:
        """Edges of each of some entities, both ways."""
        begins = self.run_begins
        found: Ints = begins[self.run_offsets[entities + 1]] - begins[self.run_offsets[entities]]
        return found

    @classmethod
    def of(
        cls,
        heads: npt.ArrayLike,
        relations: npt.ArrayLike,
        tails: npt.ArrayLike,
        times: npt.ArrayLike | None = None,
        *,
        num_entities: int,
        num_relations: int,
    ) -> "Graph":
        """From triples (T,) in memory; a triple that stands there twice, with the same time, is one.

        >>> graph = Graph.of([0, 0], [0, 0], [1, 2], num_entities=3, num_relations=1)
        >>> graph.degrees(np.arange(3)).tolist()
        [2, 1, 1]
        """
        columns = [np.asarray(column, dtype=np.int64) for column in (heads, relations, tails)]
        stamps = np.full(len(columns[0]), ALWAYS) if times is None else np.asarray(times, dtype=np.int64)
        table = np.unique(np.stack([*columns, stamps], axis=1), axis=0)
        head, relation, tail, stamp = table.T
        sources, targets = np.concatenate([head, tail]), np.concatenate([tail, head])
        relations_both = np.concatenate([relation, relation + num_relations])
        stamps_both = np.concatenate([stamp, stamp])
        degree = np.bincount(sources, minlength=num_entities)
        order = np.lexsort((targets, -degree[targets], stamps_both, relations_both, sources))
        sources, relations_both, targets = sources[order], relations_both[order], targets[order]
        new = np.ones(len(sources), dtype=bool)
        new[1:] = (np.diff(sources) != 0) | (np.diff(relations_both) != 0)
        begins = np.flatnonzero(new)
        return cls(
            num_relations=num_relations,
            run_offsets=np.searchsorted(sources[begins], np.arange(num_entities + 1)),
            run_relations=relations_both[begins].astype(np.int32),
            run_begins=np.append(begins, len(sources)),
            targets=targets.astype(np.int32),
            times=None if (stamp == ALWAYS).all() else stamps_both[order],
        )

    def save(self, folder: Path) -> None:
        """Write the arrays into a folder that exists."""
        for name in ARRAYS:
            if (array := getattr(self, name)) is not None:
                np.save(folder / f"{name}.npy", array)
        write_meta(folder, self.num_entities, self.num_relations, self.num_triples, has_times=self.times is not None)

    @classmethod
    def open(cls, folder: Path) -> "Graph":
        """Map the arrays of a folder into memory.

        Raises:
            UserError: no graph there, one of another format, a missing or truncated array.
        """
        meta = files.read_json(folder / META, "a graph written by `recllm convert`")
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            found = meta.get("format") if isinstance(meta, dict) else None
            raise UserError(f"{folder / META}: format {found}, this recllm reads {FORMAT}: convert again")
        stored = [name for name in ARRAYS if name != "times" or meta["has_times"]]
        arrays: dict[str, Any] = {"times": None} | {name: _mapped(folder / f"{name}.npy") for name in stored}
        graph = cls(num_relations=meta["num_relations"], **arrays)
        expected = (meta["num_entities"], meta["num_triples"], int(graph.run_begins[-1]), len(graph.run_relations) + 1)
        found_sizes = (graph.num_entities, graph.num_triples, len(graph.targets), len(graph.run_begins))
        if expected != found_sizes or (graph.times is not None and len(graph.times) != len(graph.targets)):
            raise UserError(f"{folder}: arrays of sizes {found_sizes}, {expected} are expected: convert again")
        return graph


def write_meta(folder: Path, num_entities: int, num_relations: int, num_triples: int, *, has_times: bool) -> None:
    """Write what `Graph.open` checks the arrays of a folder against."""
    meta = {
        "format": FORMAT,
        "num_entities": num_entities,
        "num_relations": num_relations,
        "num_triples": num_triples,
        "has_times": has_times,
    }
    (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _mapped(path: Path) -> npt.NDArray[np.generic]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: is no readable array ({error}): convert again") from None
