"""Batches of pages: the endless training order for one rank, and a finite pass over every page once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from graphkd.pages import PageBatch
from pipeline.data.dataset import PackedDataset
from pipeline.data.order import CanonicalOrder, SampleRef, batch_positions, sample_seed, share
from pipeline.data.views import (
    View,
    ViewConfig,
    apply_view,
    boxes_to_canvas,
    evaluation_view,
    page_size,
    training_view,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PageItem:
    """One page on its canvas, in numpy, before batches are put together."""

    image: np.ndarray
    size: tuple[int, int]
    boxes: np.ndarray
    classes: np.ndarray
    sample: int
    seed: int
    view_number: int
    view: tuple[float, float, float]


class PageItems(Dataset[PageItem]):
    """Pages by place in the order; ``views`` is how many views of a page exist (0: a new one each epoch, -1: none)."""

    def __init__(self, dataset: PackedDataset, config: ViewConfig, seed: int, views: int) -> None:
        self.dataset = dataset
        self.config = config
        self.seed = seed
        self.views = views

    def __getitem__(self, ref: SampleRef) -> PageItem:
        number = self.view_number(ref)
        view = training_view(self.config, self.seed, ref.sample, number)
        if self.views < 0:
            view = evaluation_view(self.config)
        seed = sample_seed(self.seed, ref.epoch, ref.sample)
        return load_page(self.dataset, ref.sample, number, view, self.config, seed)

    def view_number(self, ref: SampleRef) -> int:
        """Which of its views the page is shown in, in its epoch."""
        if self.views < 0:
            return 0
        return ref.epoch % self.views if self.views else ref.epoch


def load_page(dataset: PackedDataset, sample: int, number: int, view: View, config: ViewConfig, seed: int) -> PageItem:
    """Read, decode and lay out view ``number`` of one page; regions marked as crowd are no targets."""
    record = dataset.record(sample)
    width, height = page_size(*record.size, view, config.canvas)
    boxes = boxes_to_canvas(record.boxes, record.size, view, config.canvas)
    # Regions of a fraction of a pixel on the canvas have no gradient worth having and break box encoding.
    kept = ~record.crowd & ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1)
    return PageItem(
        image=apply_view(dataset.image(sample, record), view, config.canvas),
        size=(height, width),
        boxes=boxes[kept],
        classes=record.classes[kept],
        sample=sample,
        seed=seed,
        view_number=number,
        view=(width / record.size[0], height / record.size[1], float(view.flip)),
    )


def collate(items: list[PageItem]) -> PageBatch:
    """Put pages together into a handful of tensors."""
    return PageBatch(
        images=torch.from_numpy(np.stack([item.image for item in items])),
        sizes=torch.tensor([item.size for item in items]),
        boxes=torch.from_numpy(np.concatenate([item.boxes for item in items])),
        classes=torch.from_numpy(np.concatenate([item.classes for item in items])),
        counts=torch.tensor([len(item.boxes) for item in items]),
        samples=torch.tensor([item.sample for item in items]),
        seeds=torch.tensor([item.seed for item in items]),
        view_numbers=torch.tensor([item.view_number for item in items]),
        views=torch.tensor([item.view for item in items], dtype=torch.float32),
    )


class StepBatches(Sampler[list[SampleRef]]):
    """The samples of each global batch that one rank reads, from ``start`` up to ``stop``."""

    def __init__(self, order: CanonicalOrder, batch: int, rank: int, ranks: int, start: int, stop: int) -> None:
        self.order = order
        self.batch = batch
        self.rank = rank
        self.ranks = ranks
        self.start = start
        self.stop = stop

    def __iter__(self) -> Iterator[list[SampleRef]]:
        for step in range(self.start, self.stop):
            yield [self.order.at(position) for position in batch_positions(step, self.batch, self.rank, self.ranks)]

    def __len__(self) -> int:
        return self.stop - self.start


class FiniteBatches(Sampler[list[SampleRef]]):
    """Every page once, in dataset order, split over ranks; ranks may get unequal numbers of batches, or none."""

    def __init__(self, samples: range, batch: int, rank: int, ranks: int) -> None:
        own = share(len(samples), rank, ranks)
        self.samples = samples[own.start : own.stop]
        self.batch = batch

    def __iter__(self) -> Iterator[list[SampleRef]]:
        for start in range(0, len(self.samples), self.batch):
            yield [SampleRef(0, sample) for sample in self.samples[start : start + self.batch]]

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch)


def page_loader(
    items: PageItems, batches: Iterable[list[SampleRef]], workers: int, pin: bool = False
) -> DataLoader[PageItem]:
    """A loader of PageBatch whose order does not depend on ``workers`` (0: in this process)."""
    return DataLoader(
        items,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
        # Forking a process that already runs torch's threads (or Ray's) can deadlock in the child.
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_one_thread if workers else None,
    )


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
