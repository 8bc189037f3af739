"""Stateless random numbers: keys enter, the same numbers leave, whatever the order or the partition of the rows.

Every random choice of the converter is a function of (seed, what the choice is about), never of a generator's state:
any partitioning of the users over cores or machines then gives the same dataset.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)

Keys = npt.NDArray[np.uint64]


def mix(seed: int, *keys: Any) -> Keys:
    """Hash a seed and any number of broadcastable integer arrays to uint64, one value an element.

    splitmix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators") chained over the keys.

    >>> int(mix(0, np.arange(2))[1]) == int(mix(0, np.array([1]))[0])
    True
    """
    state = _splitmix(np.asarray([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    shape = np.broadcast_shapes(*(np.shape(key) for key in keys))
    return mix_further(state, *keys).reshape(shape)


def mix_further(state: Keys, *keys: Any) -> Keys:
    """Hashes gone on with, for what many of them share: mix_further(mix(seed, a), b) is mix(seed, a, b)."""
    for key in keys:
        state = _splitmix(state ^ _as_uint64(key))
    return state


def uniform(keys: Keys) -> npt.NDArray[np.float64]:
    """Turn hashes into numbers in [0, 1): the upper 53 bits.

    >>> bool(0 <= uniform(mix(1, np.array([7])))[0] < 1)
    True
    """
    return (keys >> _S11).astype(np.float64) * 2.0**-53


def text_keys(texts: Iterable[str]) -> Keys:
    """Hash each text to uint64: the first 8 bytes of BLAKE2b over UTF-8, little endian. The same on every machine.

    >>> int(text_keys(["17"])[0]) == int(text_keys(["3", "17"])[1])
    True
    """
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _as_uint64(key: Any) -> Keys:
    array = np.atleast_1d(np.asarray(key))
    return array if array.dtype == np.uint64 else array.astype(np.int64).view(np.uint64)


def _splitmix(state: Keys) -> Keys:
    """In place: `state` is nobody else's."""
    state += GOLDEN
    state ^= state >> _S30
    state *= _FIRST
    state ^= state >> _S27
    state *= _SECOND
    state ^= state >> _S31
    return state
