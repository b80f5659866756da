"""Reading, decoding and rendering pages, and collating them into batches."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import forkserver, get_context, parent_process
from multiprocessing.context import BaseContext

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from graphkd.batch import PageBatch
from pipeline.core.errors import DataError
from pipeline.core.parallel import available_cores
from pipeline.data.format.dataset import BadSampleError, PackedDataset, Sample
from pipeline.data.format.images import DECODING_ERRORS, upright_size
from pipeline.data.loading.augmentation import (
    Augmentation,
    AugmentationConfig,
    Transform,
    Views,
    compute_transform,
    decode_image,
    evaluation_augmentation,
    regions_on_canvas,
    render,
    training_augmentation,
)
from pipeline.data.loading.order import SampleRef, sample_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedPage:
    """One page on its canvas, as numpy arrays, before collation."""

    image: np.ndarray
    size: tuple[int, int]
    boxes: np.ndarray
    classes: np.ndarray
    sample: int
    seed: int
    view_index: int
    affine: tuple[float, float, float, float]
    replaced_sample: int


class PageDataset(Dataset[RenderedPage]):
    """Pages by position in the order, decoded and rendered. Crowd regions are no targets.

    Args:
        dataset: pages.
        config: canvas and augmentation.
        seed: seed of the run.
        views: which view each epoch shows.
        substitute_bad: substitute the next usable page for one that cannot be read, instead of raising.
        threads: that decode the pages of a batch; Pillow decodes without holding Python's lock.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        config: AugmentationConfig,
        seed: int,
        views: Views,
        substitute_bad: bool = False,
        threads: int = 1,
    ) -> None:
        self.dataset = dataset
        self.config = config
        self.seed = seed
        self.views = views
        self.substitute_bad = substitute_bad
        self.threads = threads

    def __getitem__(self, ref: SampleRef) -> RenderedPage:
        return self.__getitems__([ref])[0]

    def __getitems__(self, refs: list[SampleRef]) -> list[RenderedPage]:
        """Pages of a batch, whose images are read together. Called by torch's DataLoader."""
        samples = [self.dataset.sample(ref.sample) for ref in refs]
        contents = self.dataset.read_images(samples)
        if self.threads == 1 or len(refs) == 1:
            return list(map(self._page, refs, samples, contents))
        with ThreadPoolExecutor(self.threads, "decode") as pool:
            return list(pool.map(self._page, refs, samples, contents))

    def _page(self, ref: SampleRef, sample: Sample, content: bytes) -> RenderedPage:
        try:
            return self._render(ref, sample, content)
        except BadSampleError as error:
            if not self.substitute_bad:
                raise
            logger.warning("substituting another page: %s", error)
        return replace(self._substitute(ref), replaced_sample=ref.sample)

    def _substitute(self, ref: SampleRef) -> RenderedPage:
        """The next usable page: the same under any topology, so that no rank is left without a page."""
        total = len(self.dataset)
        for step in range(1, total):
            other = SampleRef(ref.epoch, (ref.sample + step) % total)
            sample = self.dataset.sample(other.sample)
            try:
                return self._render(other, sample, self.dataset.read_images([sample])[0])
            except BadSampleError:
                continue
        raise DataError(f"no page of {self.dataset.location} can be read; check it with `graphkd data verify`")

    def _render(self, ref: SampleRef, sample: Sample, content: bytes) -> RenderedPage:
        view_index, view = self.views.index(ref.epoch), evaluation_augmentation(self.config)
        if self.views.augmented:
            view = training_augmentation(self.config, self.seed, ref.sample, view_index)
        transform = compute_transform(*sample.size, view, self.config.canvas)
        boxes, shown, _ = regions_on_canvas(sample.boxes, transform)
        kept = ~sample.crowd & shown
        return RenderedPage(
            image=render(self._decode(sample, content, view, transform), transform, view, self.config.canvas),
            size=(transform.height, transform.width),
            boxes=boxes[kept],
            classes=sample.classes[kept],
            sample=ref.sample,
            seed=sample_seed(self.seed, ref.epoch, ref.sample),
            view_index=view_index,
            affine=transform.affine,
            replaced_sample=-1,
        )

    def _decode(self, sample: Sample, content: bytes, view: Augmentation, transform: Transform) -> Image.Image:
        image = self.dataset.open_image(content, sample)
        try:
            size = upright_size(image)
            page = decode_image(image, view, transform)
        except DECODING_ERRORS as error:
            raise self.dataset.bad_sample_error(sample, error) from error
        if size != sample.size:
            stated = f"its json says {sample.size[0]} x {sample.size[1]} px"
            raise self.dataset.bad_sample_error(sample, f"it is {size[0]} x {size[1]} px, {stated}")
        return page


def collate(pages: list[RenderedPage]) -> PageBatch:
    """Collate pages into a few tensors."""
    return PageBatch(
        images=default_collate([torch.from_numpy(page.image) for page in pages]),  # in a worker, into shared memory
        sizes=torch.tensor([page.size for page in pages]),
        boxes=torch.from_numpy(np.concatenate([page.boxes for page in pages])),
        classes=torch.from_numpy(np.concatenate([page.classes for page in pages])),
        counts=torch.tensor([len(page.boxes) for page in pages]),
        samples=torch.tensor([page.sample for page in pages]),
        seeds=torch.tensor([page.seed for page in pages]),
        view_index=torch.tensor([page.view_index for page in pages]),
        affine=torch.tensor([page.affine for page in pages], dtype=torch.float32),
        replaced_sample=torch.tensor([page.replaced_sample for page in pages]),
    )


def page_loader(
    pages: PageDataset, batches: Iterable[list[SampleRef]], workers: int, pin: bool = False
) -> DataLoader[RenderedPage]:
    """DataLoader of PageBatch. Its order does not depend on ``workers`` (0 loads in this process)."""
    pages.threads = 2 if available_cores() >= 2 * max(1, workers) else 1  # a core for each
    return DataLoader(
        pages,
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
    """Context whose server has imported everything that workers need, but runs no threads.

    Forking this process, which may run threads of torch or Ray, can deadlock. Spawning takes seconds for each worker.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def start_fork_server() -> None:
    """Have the server that loader workers are forked from import what they need, while this process does other things.

    It takes seconds, most of them for torch.
    """
    _forkserver_context()
    forkserver.ensure_running()


def _init_worker(_worker: int) -> None:
    """Load on one thread, leave Ctrl-C to the training process, and exit when that does, however it ends.

    torch watches the parent process, which here is the fork server; and that lives as long as one of its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the training process decides
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_owner, daemon=True).start()


def _exit_with_owner() -> None:
    owner = parent_process()  # the process that started the loader, not the fork server
    assert owner is not None
    owner.join()
    os._exit(1)


def limit_bad_samples(batches: Iterable[PageBatch], tolerated: int) -> Iterator[PageBatch]:
    """Pass batches on. Raises DataError once more than ``tolerated`` different pages could not be read."""
    bad: set[int] = set()
    for batch in batches:
        bad.update(sample for sample in batch.replaced_sample.tolist() if sample >= 0)
        if len(bad) > tolerated:
            raise DataError(
                f"{len(bad)} pages could not be read, such as sample {min(bad)}, but data.bad_samples is {tolerated}; "
                "exclude them with `graphkd data verify --exclude`"
            )
        yield batch
