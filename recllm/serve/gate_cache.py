"""Gates of users who come back, by a hash of what their gates read: bounded, the least recently used forgotten first.

The served adapter never changes, so a history's gate hangs on nothing else. It is remembered in place of the
representation that it is made of, which is larger; nothing is left to compute for a user who is known.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ENTRY_BYTES = 350  # of Python around the numbers of one gate: measured 330


class GateCache:
    """Remembers gate weights; used by one thread.

    Args:
        max_bytes: memory for what is remembered, about.
    """

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._known: OrderedDict[bytes, array[float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    @property
    def num_bytes(self) -> int:
        """Memory of what is remembered, about."""
        return len(self) * _entry(len(next(iter(self._known.values())))) if self._known else 0

    def get(self, items: npt.NDArray[np.int64]) -> list[float] | None:
        """The gate of a history, None where it is not remembered."""
        key = _key(items)
        found = self._known.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._known.move_to_end(key)
        return found.tolist()

    def put(self, items: npt.NDArray[np.int64], weights: Sequence[float]) -> None:
        """Remember a gate."""
        key = _key(items)
        self._known[key] = array("d", weights)
        self._known.move_to_end(key)
        room = self.max_bytes // _entry(len(weights))
        while len(self._known) > room:
            self._known.popitem(last=False)


def _key(items: npt.NDArray[np.int64]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(items, dtype=np.int64).tobytes(), digest_size=16).digest()


def _entry(numbers: int) -> int:
    return 8 * numbers + ENTRY_BYTES
