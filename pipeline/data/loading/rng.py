"""Random numbers as pure functions of a key: equal on every machine, numpy release and order of use.

Legend: ``n`` values computed together.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

UInt64Array = NDArray[np.uint64]
Int64Array = NDArray[np.int64]

FEISTEL_ROUNDS = 4
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash_key(*parts: int | str) -> int:
    """64-bit hash of ``parts``."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def splitmix64(values: UInt64Array) -> UInt64Array:
    """Finaliser of SplitMix64 (Steele et al., 2014), uint64 [n]: every input bit affects every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def random_uint64(key: int, count: int) -> UInt64Array:
    """First ``count`` outputs of SplitMix64 seeded with ``key``: uint64 [count]."""
    steps = np.arange(1, count + 1, dtype=np.uint64)
    return splitmix64(np.uint64(key) + steps * GOLDEN)


def random_uniform(key: int, count: int) -> NDArray[np.float64]:
    """``count`` numbers in [0, 1): float64 [count]."""
    return (random_uint64(key, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_permutation(key: int, size: int) -> Int64Array:
    """Permutation of range(size): int64 [size]. Uses a table, so for small sizes such as shards."""
    return np.argsort(random_uint64(key, size), kind="stable").astype(np.int64)


def feistel_permute(index: Int64Array, size: Int64Array, key: UInt64Array) -> Int64Array:
    """Map ``index`` by keyed bijections of range(size), each element with its own size and key: int64 [n].

    A Feistel network over the next power of 4 with cycle walking (Black and Rogaway, CT-RSA 2002). It needs no table,
    and the cost of one element does not grow with the size.
    """
    bits = np.frexp(np.maximum(size - 1, 1).astype(np.float64))[1]
    half = ((bits + 1) // 2).astype(np.uint64)
    result = index.astype(np.uint64)
    limit = size.astype(np.uint64)
    walking = np.arange(len(index))
    while len(walking):
        result[walking] = _feistel(result[walking], half[walking], key[walking])
        walking = walking[result[walking] >= limit[walking]]
    return result.astype(np.int64)


def _feistel(values: UInt64Array, half: UInt64Array, key: UInt64Array) -> UInt64Array:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for turn in range(FEISTEL_ROUNDS):
        left, right = right, left ^ (splitmix64(right * GOLDEN + key + np.uint64(turn)) & mask)
    return left << half | right
