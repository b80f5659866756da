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
from pipeline.data.format.dataset import BadSampleError, PackedDataset, Sample
from pipeline.data.loading.augmentation import (
    DECODING_ERRORS,
    Augmentation,
    AugmentationConfig,
    Transform,
    boxes_to_canvas,
    compute_transform,
    decode_image,
    evaluation_augmentation,
    render,
    training_augmentation,
)
from pipeline.data.loading.order import SampleRef, sample_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedPage:
    """One page on its canvas, in numpy, before batches are put together."""

    image: np.ndarray
    size: tuple[int, int]
    boxes: np.ndarray
    classes: np.ndarray
    sample: int
    seed: int
    view_number: int
    view: tuple[float, float, float, float]
    replaced_sample: int


class PageDataset(Dataset[RenderedPage]):
    """Pages by place in the order, each decoded and laid out; regions marked as crowd are no targets.

    Args:
        dataset: where they come from.
        config: canvas and augmentation.
        seed: of the run.
        views: how many views of a page exist (0: a new one each epoch, -1: the evaluation view).
        stand_ins: whether another page stands in for one that cannot be used; otherwise that is an error.
    """

    def __init__(
        self, dataset: PackedDataset, config: AugmentationConfig, seed: int, views: int, substitute_bad: bool = False
    ) -> None:
        self.dataset = dataset
        self.config = config
        self.seed = seed
        self.views = views
        self.substitute_bad = substitute_bad

    def __getitem__(self, ref: SampleRef) -> RenderedPage:
        return self.__getitems__([ref])[0]

    def __getitems__(self, refs: list[SampleRef]) -> list[RenderedPage]:
        """The pages of a batch, whose images are read together (called by torch's DataLoader)."""
        records = [self.dataset.sample(ref.sample) for ref in refs]
        contents = self.dataset.images(records)
        return [self._page(ref, record, content) for ref, record, content in zip(refs, records, contents, strict=True)]

    def view_number(self, ref: SampleRef) -> int:
        """Which of its views the page is shown in, in its epoch."""
        if self.views < 0:
            return 0
        return ref.epoch % self.views if self.views else ref.epoch

    def _page(self, ref: SampleRef, record: Sample, content: bytes) -> RenderedPage:
        try:
            return self._render(ref, record, content)
        except BadSampleError as error:
            if not self.substitute_bad:
                raise
            logger.warning("another page stands in: %s", error)
        return replace(self._substitute(ref), replaced_sample=ref.sample)

    def _substitute(self, ref: SampleRef) -> RenderedPage:
        """The next page that can be used: the same under any topology, and no rank is left without a page."""
        others = len(self.dataset)
        for step in range(1, others):
            other = SampleRef(ref.epoch, (ref.sample + step) % others)
            record = self.dataset.sample(other.sample)
            try:
                return self._render(other, record, self.dataset.images([record])[0])
            except BadSampleError:
                continue
        raise DataError(f"no page of {self.dataset.location} can be read; look at it with `graphkd data verify`")

    def _render(self, ref: SampleRef, record: Sample, content: bytes) -> RenderedPage:
        number = self.view_number(ref)
        view = evaluation_augmentation(self.config)
        if self.views >= 0:
            view = training_augmentation(self.config, self.seed, ref.sample, number)
        placed = compute_transform(*record.size, view, self.config.canvas)
        boxes = boxes_to_canvas(record.boxes, placed)
        # Regions of a fraction of a pixel on the canvas have no gradient worth having and break box encoding.
        kept = ~record.crowd & ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1)
        return RenderedPage(
            image=render(self._decoded(record, content, view, placed), placed, view, self.config.canvas),
            size=(placed.height, placed.width),
            boxes=boxes[kept],
            classes=record.classes[kept],
            sample=ref.sample,
            seed=sample_seed(self.seed, ref.epoch, ref.sample),
            view_number=number,
            view=placed.affine,
            replaced_sample=-1,
        )

    def _decoded(self, record: Sample, content: bytes, view: Augmentation, placed: Transform) -> Image.Image:
        image = self.dataset.open_image(content, record)
        if image.size != record.size:
            stated = f"{record.size[0]} x {record.size[1]} px"
            raise self.dataset.bad_sample_error(
                record, f"it is {image.size[0]} x {image.size[1]} px, its json says {stated}"
            )
        try:
            return decode_image(image, view, placed)
        except DECODING_ERRORS as error:
            raise self.dataset.bad_sample_error(record, error) from error


def collate(items: list[RenderedPage]) -> PageBatch:
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
        replaced_sample=torch.tensor([item.replaced_sample for item in items]),
    )


def page_loader(
    items: PageDataset, batches: Iterable[list[SampleRef]], workers: int, pin: bool = False
) -> DataLoader[RenderedPage]:
    """A loader of PageBatch whose order does not depend on ``workers`` (0: in this process)."""
    return DataLoader(
        items,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
        multiprocessing_context=_forkserver_context() if workers else None,
        worker_init_fn=_init_worker if workers else None,
    )


def _forkserver_context() -> BaseContext:
    """Where workers come from: a process that has imported all they need, but runs no threads.

    Forking this one, which may run torch's threads or Ray's, can deadlock; starting each anew takes seconds.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["pipeline.data.loading.loader"])
    return context


def _init_worker(_worker: int) -> None:
    """Read on one thread, and end when the process that asked for this one does, however that ends.

    torch looks at the parent for that, which here is the server that workers are forked from; and the server lives as
    long as one of its workers.
    """
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_owner, daemon=True).start()


def _exit_with_owner() -> None:
    owner = parent_process()  # who asked, not the server
    assert owner is not None
    owner.join()
    os._exit(1)


def limit_bad_samples(batches: Iterable[PageBatch], tolerated: int) -> Iterator[PageBatch]:
    """Pass batches on until more than ``tolerated`` different pages could not be used; then raise DataError."""
    bad: set[int] = set()
    for batch in batches:
        bad.update(sample for sample in batch.replaced_sample.tolist() if sample >= 0)
        if len(bad) > tolerated:
            raise DataError(
                f"{len(bad)} pages could not be read, such as sample {min(bad)}, but data.bad_samples is {tolerated}; "
                "take them out with `graphkd data verify --exclude`"
            )
        yield batch
