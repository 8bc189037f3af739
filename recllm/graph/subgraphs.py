"""What goes into retrieval and what comes out, for N prompts at once: flat arrays, cut by offsets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Seeds:
    """Where retrieval starts, for N prompts: F weighted entities, and a cut-off for each prompt.

    An entity may stand twice in a prompt, as two items may be one entity: its weights add up. Weights are above 0.
    """

    offsets: Ints  # (N + 1,) prompt n has entities offsets[n]:offsets[n + 1]
    entities: Ids  # (F,) entity numbers of the graph
    weights: Floats  # (F,)
    cutoffs: Ints  # (N,) seconds since the epoch; what is shown is strictly older

    @property
    def num_prompts(self) -> int:
        """N."""
        return len(self.cutoffs)

    @property
    def prompts(self) -> Ints:
        """(F,) the prompt of each entity."""
        return np.repeat(np.arange(self.num_prompts), np.diff(self.offsets))

    @classmethod
    def of(cls, entities: Sequence[Sequence[int]], cutoffs: Sequence[int]) -> "Seeds":
        """From the entities of each prompt, each of weight 1.

        >>> Seeds.of([[3, 4], []], cutoffs=[10, 10]).offsets.tolist()
        [0, 2, 2]
        """
        flat = np.array([entity for listed in entities for entity in listed], dtype=np.int32)
        offsets = np.cumsum([0, *map(len, entities)])
        return cls(offsets, flat, np.ones(len(flat), dtype=np.float32), np.array(cutoffs, dtype=np.int64))

    def parts(self, size: int) -> Iterator[tuple[slice, "Seeds"]]:
        """Consecutive prompts of about `size` entities together, one prompt at least: which, and their seeds."""
        begin = 0
        while begin < self.num_prompts:
            end = int(np.searchsorted(self.offsets, self.offsets[begin] + size, side="right")) - 1
            end = min(max(end, begin + 1), begin + size, self.num_prompts)
            flat = slice(self.offsets[begin], self.offsets[end])
            offsets = self.offsets[begin : end + 1] - self.offsets[begin]
            yield slice(begin, end), Seeds(offsets, self.entities[flat], self.weights[flat], self.cutoffs[begin:end])
            begin = end


@dataclass(frozen=True)
class Subgraphs:
    """What each of N prompts may show: M triples, those of a prompt best first, none twice.

    A triple stands as the graph has it, from head to tail, whichever way it was followed.
    """

    offsets: Ints  # (N + 1,) prompt n has triples offsets[n]:offsets[n + 1]
    heads: Ids  # (M,)
    relations: Ids  # (M,) 0..R-1
    tails: Ids  # (M,)
    times: Ints  # (M,) seconds since the epoch, or store.ALWAYS
    scores: Floats  # (M,) falling within a prompt
    hops: npt.NDArray[np.int8]  # (M,) step at which it was first followed; 1: from a seed

    @property
    def num_prompts(self) -> int:
        """N."""
        return len(self.offsets) - 1

    @property
    def prompts(self) -> Ints:
        """(M,) the prompt of each triple."""
        return np.repeat(np.arange(self.num_prompts), np.diff(self.offsets))

    @classmethod
    def concatenated(cls, parts: Sequence["Subgraphs"]) -> "Subgraphs":
        """The prompts of all parts, one part behind the other."""
        counts = [np.diff(part.offsets) for part in parts]
        offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, dtype=np.int64), *counts]))])
        empty = cls(*(np.empty(0, dtype=kind) for kind in ("i8", "i4", "i4", "i4", "i8", "f4", "i1")))
        names = [field.name for field in fields(cls) if field.name != "offsets"]
        return cls(
            offsets, **{name: np.concatenate([getattr(part, name) for part in (empty, *parts)]) for name in names}
        )

    def triples(self, prompt: int) -> list[tuple[int, int, int, int]]:
        """(head, relation, tail, time) of one prompt, best first."""
        here = slice(self.offsets[prompt], self.offsets[prompt + 1])
        columns: list[npt.NDArray[Any]] = [self.heads, self.relations, self.tails, self.times]
        return list(zip(*(column[here].tolist() for column in columns), strict=True))
