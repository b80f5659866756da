"""The order of samples: a pure function of (shard sizes, seed, epoch, position), the same for every topology.

Position counts on across epochs: ``position // samples`` is the epoch, so a batch may straddle two, and each sample
comes exactly once per epoch. Shards are shuffled, laid end to end, and cut into windows of a few shards; within a
window samples are permuted by a keyed bijection that needs no memory. A reader then has few shards open at a time,
and the cost of finding a sample does not grow with the dataset.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

ORDER_VERSION = 1
WINDOW_SHARDS = 8
FEISTEL_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class SampleRef:
    """One place of the order: which sample stands there, in which epoch."""

    epoch: int
    sample: int
    """Number of the sample: its row, shards laid end to end in the order of ``dataset.json``."""


class CanonicalOrder:
    """The endless training order over shards of the given sizes."""

    def __init__(self, shard_sizes: tuple[int, ...], seed: int, window_shards: int = WINDOW_SHARDS) -> None:
        self.shard_sizes = shard_sizes
        self.seed = seed
        self.window_shards = window_shards
        self.starts = [0, *accumulate(shard_sizes)]
        self.samples = self.starts[-1]
        self._epoch_layout = lru_cache(maxsize=2)(self._lay_out)

    def at(self, position: int) -> SampleRef:
        """The sample at ``position`` >= 0 of the endless order."""
        epoch, offset = divmod(position, self.samples)
        shards, ends = self._epoch_layout(epoch)
        place = bisect_right(ends, offset)
        window = place // self.window_shards
        low = 0 if window == 0 else ends[window * self.window_shards - 1]
        high = ends[min((window + 1) * self.window_shards, len(ends)) - 1]
        offset = low + permuted(offset - low, high - low, key=_key(self.seed, epoch, window))
        place = bisect_right(ends, offset)
        row = offset - (0 if place == 0 else ends[place - 1])
        return SampleRef(epoch, self.starts[shards[place]] + row)

    def _lay_out(self, epoch: int) -> tuple[list[int], list[int]]:
        shards = np.random.default_rng([self.seed, epoch, ORDER_VERSION]).permutation(len(self.shard_sizes)).tolist()
        return shards, list(accumulate(self.shard_sizes[shard] for shard in shards))


def permuted(index: int, size: int, key: int) -> int:
    """Where a keyed bijection of range(size) sends ``index``: a Feistel network over the next power of 4, with cycle
    walking (Black and Rogaway, 2002), so that no table is kept.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right, key + turn) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int, key: int) -> int:
    # The finaliser of SplitMix64 (Steele et al., 2014): every input bit reaches every output bit.
    mixed = (value * 0x9E3779B97F4A7C15 + key) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return mixed ^ mixed >> 31


def _key(*parts: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """The key of everything random about one sample in one epoch, 0 to 2^62 - 1."""
    return _key(seed, epoch, sample, 1) >> 2


def share(total: int, part: int, parts: int) -> range:
    """The ``part``-th of ``parts`` nearly equal consecutive pieces of range(total)."""
    return range(total * part // parts, total * (part + 1) // parts)


def batch_positions(step: int, batch: int, rank: int, ranks: int) -> range:
    """Positions of the order that ``rank`` of ``ranks`` reads in global batch ``step`` of ``batch`` samples."""
    own = share(batch, rank, ranks)
    return range(step * batch + own.start, step * batch + own.stop)
