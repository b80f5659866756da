"""The order of samples: a pure function of (shard sizes, seed, batch, position), the same for every topology.

Positions count on across epochs: ``position // samples`` is the epoch, so a batch may span two, and each sample comes
exactly once per epoch. Within an epoch the shards are shuffled and concatenated, and that line is cut into *lanes* of
equal length. Slot ``s`` of every batch reads its own few lanes one after the other. A lane moves forward through its
shards in blocks of at most ``BLOCK`` samples, which a keyed bijection permutes. So a batch mixes as many shards as it
has pages, while each shard is read by few ranks and mostly forward. The cost of a position does not depend on the
dataset's size, and memory grows with the number of shards, not of samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from graphkd.errors import ConfigError
from pipeline.data.loading.rng import Int64Array, UInt64Array, feistel_permute, hash_key, random_permutation, splitmix64

ORDER_VERSION = 2
MIN_LANES = 64
BLOCK = 256


@dataclass(frozen=True, slots=True)
class SampleRef:
    """One position of the order: which sample, in which epoch."""

    epoch: int
    sample: int
    """Number of the sample: its row, with shards concatenated in the order of ``dataset.json``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Epoch:
    """Layout of one epoch. Offsets refer to its line of shuffled shards."""

    shards: Int64Array
    """[S]: shards in shuffled order."""
    shard_ends: Int64Array
    """[S]: offset behind each of them."""
    lane_starts: Int64Array
    """[L]: first offset of lane c, read by batch slots congruent to c."""
    lane_sizes: Int64Array
    """[L]."""


class CanonicalOrder:
    """The endless training order over shards of given sizes, for global batches of ``batch`` samples.

    The number of lanes is the smallest multiple of the batch that is at least ``MIN_LANES``, so that a rank keeps its
    lanes for a whole epoch.
    """

    def __init__(self, shard_sizes: tuple[int, ...], seed: int, batch: int = 1) -> None:
        self.shard_sizes = np.array(shard_sizes, dtype=np.int64)
        self.seed = seed
        self.lanes = batch * -(-MIN_LANES // batch)
        self.starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self.samples = int(self.starts[-1])
        self._epoch = lru_cache(maxsize=2)(self._layout)

    def at(self, position: int) -> SampleRef:
        """Sample at ``position`` >= 0."""
        return self.refs(range(position, position + 1))[0]

    def refs(self, positions: range) -> list[SampleRef]:
        """Samples at consecutive ``positions``."""
        refs: list[SampleRef] = []
        while len(positions):
            epoch = positions.start // self.samples
            own = positions[: (epoch + 1) * self.samples - positions.start]
            offsets = np.arange(own.start, own.stop, dtype=np.int64) - epoch * self.samples
            refs += [SampleRef(epoch, sample) for sample in self.samples_of(epoch, offsets).tolist()]
            positions = positions[len(own) :]
        return refs

    def samples_of(self, epoch: int, offsets: Int64Array) -> Int64Array:
        """Sample numbers at ``offsets`` (0 to samples - 1, in any order) of ``epoch``: int64 [n] -> int64 [n]."""
        layout = self._epoch(epoch)
        lane = offsets % self.lanes
        low, size = layout.lane_starts[lane], layout.lane_sizes[lane]
        offset = low + offsets // self.lanes
        turn = np.searchsorted(layout.shard_ends, offset, side="right")
        shard = layout.shards[turn]
        shard_size = self.shard_sizes[shard]
        shard_start = layout.shard_ends[turn] - shard_size
        block_low, block_high = _block(offset - shard_start, shard_size)
        block_low = np.maximum(block_low + shard_start, low)
        block_high = np.minimum(block_high + shard_start, low + size)
        keys = self._keys(epoch, block_low)
        offset = block_low + feistel_permute(offset - block_low, block_high - block_low, keys)
        samples: Int64Array = self.starts[shard] + offset - shard_start
        return samples

    def _keys(self, epoch: int, offsets: Int64Array) -> UInt64Array:
        return splitmix64(offsets.astype(np.uint64) + np.uint64(hash_key(self.seed, epoch, "block", ORDER_VERSION)))

    def _layout(self, epoch: int) -> _Epoch:
        shards = random_permutation(hash_key(self.seed, epoch, "shards", ORDER_VERSION), len(self.shard_sizes))
        # Lanes are shuffled along the line, so that those of one batch are not neighbours in the same shard.
        along = random_permutation(hash_key(self.seed, epoch, "lanes", ORDER_VERSION), self.lanes)
        sizes = self.samples // self.lanes + (np.arange(self.lanes) < self.samples % self.lanes)
        starts = np.empty(self.lanes, dtype=np.int64)
        starts[along] = np.cumsum(sizes[along]) - sizes[along]
        return _Epoch(
            shards=shards,
            shard_ends=np.cumsum(self.shard_sizes[shards]),
            lane_starts=starts,
            lane_sizes=sizes,
        )


def _block(row: Int64Array, shard_size: Int64Array) -> tuple[Int64Array, Int64Array]:
    """First row and row behind the last of the block that contains ``row``. Blocks of a shard are nearly equal."""
    blocks = -(-shard_size // BLOCK)
    number = ((row + 1) * blocks - 1) // shard_size
    return shard_size * number // blocks, shard_size * (number + 1) // blocks


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """Seed of everything random about one sample in one epoch, 0 to 2^62 - 1."""
    return hash_key(seed, epoch, sample, 1) >> 2


def split_range(total: int, part: int, parts: int) -> range:
    """The ``part``-th of ``parts`` nearly equal consecutive pieces of range(total)."""
    return range(total * part // parts, total * (part + 1) // parts)


def batch_positions(step: int, batch: int, rank: int, ranks: int) -> range:
    """Positions that ``rank`` of ``ranks`` reads in global batch ``step`` of ``batch`` samples."""
    own = split_range(batch, rank, ranks)
    return range(step * batch + own.start, step * batch + own.stop)


def micro_batch_positions(step: int, batch: int, rank: int, ranks: int, parts: int) -> list[range]:
    """:func:`batch_positions` split into ``parts`` micro-batches."""
    own = batch_positions(step, batch, rank, ranks)
    return [own[part.start : part.stop] for part in (split_range(len(own), n, parts) for n in range(parts))]


def check_batch_size(batch: int, ranks: int, parts: int = 1) -> None:
    """Raise ConfigError if a global batch leaves one of ``ranks`` ranks, or of its micro-batches, without a page."""
    needed = ranks * parts
    if batch < needed:
        each = f" in each of schedule.accumulate={parts} parts" if parts > 1 else ""
        raise ConfigError(
            f"schedule.batch {batch} leaves some of {ranks} workers without a page{each} in every step, and a worker "
            f"needs one; the nearest that does not is schedule.batch={needed}, or give at most "
            f"{max(1, batch // parts)} workers"
        )
