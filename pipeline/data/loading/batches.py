"""Batch samplers: the endless training order of one rank, and a finite pass that visits every page once."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from pipeline.data.loading.order import CanonicalOrder, SampleRef, micro_batch_positions, split_range


class TrainBatches(Sampler[list[SampleRef]]):
    """One rank's share of each global batch, from step ``start`` up to ``stop``, in ``parts`` micro-batches."""

    def __init__(
        self, order: CanonicalOrder, batch: int, rank: int, ranks: int, start: int, stop: int, parts: int = 1
    ) -> None:
        self.order = order
        self.batch = batch
        self.rank = rank
        self.ranks = ranks
        self.start = start
        self.stop = stop
        self.parts = parts

    def __iter__(self) -> Iterator[list[SampleRef]]:
        for step in range(self.start, self.stop):
            for positions in micro_batch_positions(step, self.batch, self.rank, self.ranks, self.parts):
                yield self.order.refs(positions)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.parts


class FinitePassBatches(Sampler[list[SampleRef]]):
    """Every page once, in dataset order, split over ranks. Ranks may get different numbers of batches, or none."""

    def __init__(self, samples: range, batch: int, rank: int, ranks: int) -> None:
        own = split_range(len(samples), rank, ranks)
        self.samples = samples[own.start : own.stop]
        self.batch = batch

    def __iter__(self) -> Iterator[list[SampleRef]]:
        for start in range(0, len(self.samples), self.batch):
            yield [SampleRef(0, sample) for sample in self.samples[start : start + self.batch]]

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch)
