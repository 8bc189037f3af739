"""A knowledge graph as compressed sparse rows: edges by source, relation and time, both ways.

Triples of integers enter (`Graph.of`, in memory; `build.py` does it by streaming into a folder); a `Graph` leaves,
whose arrays are memory-mapped where it was opened from a folder, so that all workers share them.

Edges are sorted by (source, relation, time) and not by (source, time): a cap on the edges of one relation is then a
slice of a run, found by bisection, and an entity with a million edges costs as much as one with ten.

Edges of one time (all that have none) follow one another by the key of their target, a hash of its id. What a cap
leaves of them is then a random part, which no triple that comes later changes: a degree over all times would tell a
prompt of its future, and one over the triples without a time is 0 for most targets where triples have times, and else
prefers the entities that lead nowhere. The key is the target's own and not the edge's, so that what two capped
entities share stays in both parts (bottom-k sketches: Cohen & Kaplan 2007).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recllm import files
from recllm.data.randomness import Keys, mix
from recllm.errors import UserError

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.signedinteger]  # int32 where they fit, otherwise int64

ALWAYS = int(np.iinfo(np.int64).min)  # the time of a triple that has none: older than every cut-off
FORMAT = 2  # counted up when the arrays change
META = "graph.json"
ARRAYS = ("run_offsets", "run_relations", "run_begins", "targets", "times", "entity_keys", "relation_keys")


@dataclass(frozen=True)
class Graph:
    """E entities, R relations, T triples, 2T edges, S runs.

    A triple (h, r, t) is an edge h → t of relation r, and an edge t → h of relation R + r, its inverse. The edges of an
    entity lie together, those of one relation in a run of their own, oldest first; edges of one time by the key of
    their target.
    """

    num_relations: int  # R
    run_offsets: Offsets  # (E + 1,) entity s owns runs run_offsets[s]:run_offsets[s + 1]
    run_relations: Ids  # (S,) relation of each run, R and above: inverse
    run_begins: Offsets  # (S + 1,) run q owns edges run_begins[q]:run_begins[q + 1]
    targets: Ids  # (2T,)
    times: npt.NDArray[np.int64] | None  # (2T,) seconds since the epoch, or ALWAYS; None where no triple has a time
    entity_keys: Keys  # (E,) a hash of each entity's id: the same in every graph, whatever its number there
    relation_keys: Keys  # (R,)

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
        found = begins[self.run_offsets[entities + 1]] - begins[self.run_offsets[entities]]
        return found.astype(np.int64)

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
        entity_keys: Keys | None = None,
        relation_keys: Keys | None = None,
    ) -> "Graph":
        """From triples (T,) in memory; a triple that stands there twice, with the same time, is one.

        Without keys those of the numbers are taken, as if numbers were ids.

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
        entity_keys = mix(0, np.arange(num_entities)) if entity_keys is None else entity_keys
        order = np.lexsort((places(entity_keys)[targets], stamps_both, relations_both, sources))
        sources, relations_both, targets = sources[order], relations_both[order], targets[order]
        new = np.ones(len(sources), dtype=bool)
        new[1:] = (np.diff(sources) != 0) | (np.diff(relations_both) != 0)
        begins = np.flatnonzero(new)
        return cls(
            num_relations=num_relations,
            run_offsets=np.searchsorted(sources[begins], np.arange(num_entities + 1)).astype(offset_type(len(begins))),
            run_relations=relations_both[begins].astype(np.int32),
            run_begins=np.append(begins, len(sources)).astype(offset_type(len(sources))),
            targets=targets.astype(np.int32),
            times=None if (stamp == ALWAYS).all() else stamps_both[order],
            entity_keys=entity_keys,
            relation_keys=mix(0, np.arange(num_relations)) if relation_keys is None else relation_keys,
        )

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
        for name, expected in _sizes(graph, meta):
            if (found := len(getattr(graph, name))) != expected:
                raise UserError(f"{folder / name}.npy: holds {found} numbers, {expected} are expected: convert again")
        return graph


def places(keys: Keys) -> Ids:
    """(E,) the place of each entity among all by rising key; equals as they stand."""
    found = np.empty(len(keys), dtype=np.int32)
    found[np.argsort(keys, kind="stable")] = np.arange(len(keys))
    return found


def offset_type(last: int) -> type[np.signedinteger]:
    """The type of offsets that go up to `last`: int32 where it fits, otherwise int64."""
    return np.int32 if last <= np.iinfo(np.int32).max else np.int64


def _sizes(graph: Graph, meta: dict[str, Any]) -> list[tuple[str, int]]:
    """How long each array should be, by graph.json and by the offsets into it."""
    last_run, last_edge = (int(column[-1]) if len(column) else 0 for column in (graph.run_offsets, graph.run_begins))
    return [
        ("run_offsets", meta["num_entities"] + 1),
        ("run_relations", last_run),
        ("run_begins", last_run + 1),
        ("targets", 2 * meta["num_triples"]),
        ("targets", last_edge),
        *([] if graph.times is None else [("times", last_edge)]),
        ("entity_keys", meta["num_entities"]),
        ("relation_keys", meta["num_relations"]),
    ]


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
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # still mapped; np.memmap is slow to cut
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: is no readable array ({error}): convert again") from None
