"""Pages read, decoded, laid out and put together into batches."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from multiprocessing.context import BaseContext

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from graphkd.batch import PageBatch
from pipeline.core.errors import DataError
from pipeline.data.format.dataset import BadSampleError, PackedDataset, Record
from pipeline.data.loading.augmentation import (
    DECODING_ERRORS,
    Placement,
    View,
    ViewConfig,
    boxes_to_canvas,
    decode,
    evaluation_view,
    lay_out,
    place,
    training_view,
)
from pipeline.data.loading.order import SampleRef, sample_seed

logger = logging.getLogger(__name__)


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
    view: tuple[float, float, float, float]
    instead_of: int


class PageItems(Dataset[PageItem]):
    """Pages by place in the order, each decoded and laid out; regions marked as crowd are no targets.

    Args:
        dataset: where they come from.
        config: canvas and augmentation.
        seed: of the run.
        views: how many views of a page exist (0: a new one each epoch, -1: the evaluation view).
        stand_ins: whether another page stands in for one that cannot be used; otherwise that is an error.
    """

    def __init__(
        self, dataset: PackedDataset, config: ViewConfig, seed: int, views: int, stand_ins: bool = False
    ) -> None:
        self.dataset = dataset
        self.config = config
        self.seed = seed
        self.views = views
        self.stand_ins = stand_ins

    def __getitem__(self, ref: SampleRef) -> PageItem:
        return self.__getitems__([ref])[0]

    def __getitems__(self, refs: list[SampleRef]) -> list[PageItem]:
        """The pages of a batch, whose images are read together (called by torch's DataLoader)."""
        records = [self.dataset.record(ref.sample) for ref in refs]
        contents = self.dataset.images(records)
        return [self._page(ref, record, content) for ref, record, content in zip(refs, records, contents, strict=True)]

    def view_number(self, ref: SampleRef) -> int:
        """Which of its views the page is shown in, in its epoch."""
        if self.views < 0:
            return 0
        return ref.epoch % self.views if self.views else ref.epoch

    def _page(self, ref: SampleRef, record: Record, content: bytes) -> PageItem:
        try:
            return self._laid_out(ref, record, content)
        except BadSampleError as error:
            if not self.stand_ins:
                raise
            logger.warning("another page stands in: %s", error)
        return replace(self._stand_in(ref), instead_of=ref.sample)

    def _stand_in(self, ref: SampleRef) -> PageItem:
        """The next page that can be used: the same under any topology, and no rank is left without a page."""
        others = len(self.dataset)
        for step in range(1, others):
            other = SampleRef(ref.epoch, (ref.sample + step) % others)
            record = self.dataset.record(other.sample)
            try:
                return self._laid_out(other, record, self.dataset.images([record])[0])
            except BadSampleError:
                continue
        raise DataError(f"no page of {self.dataset.location} can be read; look at it with `graphkd data verify`")

    def _laid_out(self, ref: SampleRef, record: Record, content: bytes) -> PageItem:
        number = self.view_number(ref)
        view = evaluation_view(self.config)
        if self.views >= 0:
            view = training_view(self.config, self.seed, ref.sample, number)
        placed = place(*record.size, view, self.config.canvas)
        boxes = boxes_to_canvas(record.boxes, placed)
        # Regions of a fraction of a pixel on the canvas have no gradient worth having and break box encoding.
        kept = ~record.crowd & ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1)
        return PageItem(
            image=lay_out(self._decoded(record, content, view, placed), placed, view, self.config.canvas),
            size=(placed.height, placed.width),
            boxes=boxes[kept],
            classes=record.classes[kept],
            sample=ref.sample,
            seed=sample_seed(self.seed, ref.epoch, ref.sample),
            view_number=number,
            view=placed.affine,
            instead_of=-1,
        )

    def _decoded(self, record: Record, content: bytes, view: View, placed: Placement) -> Image.Image:
        image = self.dataset.open_image(content, record)
        if image.size != record.size:
            stated = f"{record.size[0]} x {record.size[1]} px"
            raise self.dataset.bad_sample(record, f"it is {image.size[0]} x {image.size[1]} px, its json says {stated}")
        try:
            return decode(image, view, placed)
        except DECODING_ERRORS as error:
            raise self.dataset.bad_sample(record, error) from error


def collate(items: list[PageItem]) -> PageBatch:
    """Put pages together into a handful of tensors."""
    return PageBatch(
        images=default_collate([torch.from_numpy(item.image) for item in items]),  # in a worker, into shared memory
        sizes=torch.tensor([item.size for item in items]),
        boxes=torch.from_numpy(np.concatenate([item.boxes for item in items])),
        classes=torch.from_numpy(np.concatenate([item.classes for item in items])),
        counts=torch.tensor([len(item.boxes) for item in items]),
        samples=torch.tensor([item.sample for item in items]),
        seeds=torch.tensor([item.seed for item in items]),
        view_numbers=torch.tensor([item.view_number for item in items]),
        views=torch.tensor([item.view for item in items], dtype=torch.float32),
        instead_of=torch.tensor([item.instead_of for item in items]),
    )


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
        multiprocessing_context=_clean_processes() if workers else None,
        worker_init_fn=_begin_worker if workers else None,
    )


def _clean_processes() -> BaseContext:
    """Where workers come from: a process that has imported all they need, but runs no threads.

    Forking this one, which may run torch's threads or Ray's, can deadlock; starting each anew takes seconds.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["pipeline.data.loading.loader"])
    return context


def _begin_worker(_worker: int) -> None:
    """Read on one thread, and end when the process that asked for this one does, however that ends.

    torch looks at the parent for that, which here is the server that workers are forked from; and the server lives as
    long as one of its workers.
    """
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_owner, daemon=True).start()


def _end_with_owner() -> None:
    owner = parent_process()  # who asked, not the server
    assert owner is not None
    owner.join()
    os._exit(1)


def within_budget(batches: Iterable[PageBatch], tolerated: int) -> Iterator[PageBatch]:
    """Pass batches on until more than ``tolerated`` different pages could not be used; then raise DataError."""
    bad: set[int] = set()
    for batch in batches:
        bad.update(sample for sample in batch.instead_of.tolist() if sample >= 0)
        if len(bad) > tolerated:
            raise DataError(
                f"{len(bad)} pages could not be read, such as sample {min(bad)}, but data.bad_samples is {tolerated}; "
                "take them out with `graphkd data verify --exclude`"
            )
        yield batch
