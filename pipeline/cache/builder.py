"""Making the files of a cache: one builder that has loaded the teacher, wherever it runs, and one shard at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from graphkd.batch import PageBatch
from graphkd.nodes import live_signals
from graphkd.signals import TeacherSignals
from pipeline.cache.format import cache_index_name, cache_shard_name
from pipeline.cache.quantize import quantize
from pipeline.cache.writer import CacheFileWriter, CacheRow, cache_file
from pipeline.config import RunConfig
from pipeline.core.files import locked, stale_temp_files
from pipeline.core.parallel import prefetch
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.loader import PageDataset, collate
from pipeline.data.loading.order import SampleRef
from pipeline.teacher.identity import cache_identity, open_teacher
from pipeline.teacher.statistics import ensure_statistics

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
PREFETCH_BATCHES = 2  # decoded before the teacher wants them, and said by it before they are written


class CacheBuilder:
    """A teacher that says what it sees, shard by shard.

    Args:
        student: whose config names teacher, dataset and cache.
        device: where the teacher runs.
    """

    def __init__(self, student: RunConfig, device: torch.device) -> None:
        self.student = student
        self.device = device
        self.dataset = PackedDataset(student.data.train, student.data.storage)
        self.teacher = open_teacher(student)
        self.identity = cache_identity(student, self.teacher, self.dataset)
        self.detector = self.teacher.detector(self.dataset.num_classes, device)
        views = self.teacher.settings.views
        self.items = PageDataset(self.dataset, student.data.view, student.run.seed, views if views > 1 else -1)

    def statistics(self, progress: Progress | None = None) -> None:
        """Compute the teacher's statistics where they are not there yet."""
        ensure_statistics(self.student, self.teacher, self.dataset, self.device, progress)

    def build(self, shard: int, progress: Callable[[int], None] | None = None) -> bool:
        """Make one file unless it is there; ``progress`` gets the rows written so far.

        Gives False where another builder is at it. Raises OutputError where the disk is full.
        """
        entry = self.dataset.description.shards[shard]
        settings, folder, name = self.teacher.settings, self.student.cache_folder, cache_shard_name(entry.name)
        with _alone_at(folder, name) as alone:
            if not alone or is_built(folder, name):
                return alone
            with cache_file(
                folder,
                name,
                tar_sha256=entry.sha256,
                identity=self.identity,
                precision=settings.cache_dtype,
                compression=settings.compression,
            ) as writer:
                self._write(shard, writer, progress)
        return True

    def refs(self, shard: int) -> list[list[SampleRef]]:
        """A shard's pages in each of their views, in batches."""
        sizes = self.dataset.shard_sizes
        start, batch = sum(sizes[:shard]), self.student.run.eval_batch
        samples = range(start, start + sizes[shard])
        refs = [SampleRef(view, sample) for sample in samples for view in range(self.teacher.settings.views)]
        return [refs[first : first + batch] for first in range(0, len(refs), batch)]

    def said(self, batches: list[list[SampleRef]]) -> Iterator[list[CacheRow]]:
        """What the teacher says of batches of pages, which are decoded by threads meanwhile."""
        threads = self.student.data.loader_workers
        for batch in prefetch(self._pages, batches, threads, threads + PREFETCH_BATCHES, "decode"):
            yield self.rows(batch, live_signals(self.detector, batch.to(self.device), self.teacher.settings.nodes))

    def rows(self, batch: PageBatch, signals: TeacherSignals) -> list[CacheRow]:
        """Signals as rows of the cache, on the CPU."""
        settings = self.teacher.settings
        said = signals.compressed() if settings.store == "descriptors" else signals
        counts = said.valid.sum(dim=1).tolist()
        rows = []
        for page, count in enumerate(counts):
            pooled, scales = quantize(said.pooled[page, :count], settings.cache_dtype)
            arrays = {"pooled": pooled, "pooled_scale": scales, "boxes": said.boxes[page, :count]}
            arrays |= {"scores": said.scores[page, :count], "classes": said.classes[page, :count]}
            if said.logits is not None and said.deltas is not None:
                arrays |= {"logits": said.logits[page, :count], "deltas": said.deltas[page, :count]}
            rows.append(_numbers(batch, page) | {name: value.cpu().numpy() for name, value in arrays.items()})
        return rows

    def _pages(self, refs: list[SampleRef]) -> PageBatch:
        return collate(self.items.__getitems__(refs))

    def _write(self, shard: int, writer: CacheFileWriter, progress: Callable[[int], None] | None) -> None:
        def write(rows: list[CacheRow]) -> int:
            for row in rows:
                writer.add(row)
            return len(rows)

        written = 0
        # One thread writes and hashes while the teacher looks at the next pages; the queue is short, so that a slow
        # disk slows the teacher down instead of filling the memory.
        for count in prefetch(write, self.said(self.refs(shard)), 1, PREFETCH_BATCHES, "write"):
            written += count
            if progress is not None:
                progress(written)


def _numbers(batch: PageBatch, page: int) -> CacheRow:
    return {
        "sample": int(batch.samples[page]),
        "view": int(batch.view_numbers[page]),
        "affine": batch.views[page].numpy(),
    }


def is_built(folder: Path, name: str) -> bool:
    """Whether a cache file is whole: its index comes last."""
    return (folder / cache_index_name(name)).exists()


@contextmanager
def _alone_at(folder: Path, name: str) -> Iterator[bool]:
    """Whether this is the only builder at a file; what a killed one left is removed."""
    with locked(folder / f".{name}.lock", wait=False) as alone:
        if alone:
            for path in [*stale_temp_files(folder, name), *stale_temp_files(folder, cache_index_name(name))]:
                path.unlink(missing_ok=True)
        yield alone
