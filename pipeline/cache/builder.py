"""Building cache files: one builder, with the teacher loaded, builds one shard at a time, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from graphkd.batch import PageBatch
from graphkd.detectors import DetectorModule
from graphkd.nodes import live_signals
from graphkd.signals import TeacherSignals
from pipeline.cache.format import cache_index_name, cache_shard_name, is_built
from pipeline.cache.quantize import quantize
from pipeline.cache.writer import CacheFileWriter, CacheRow, cache_file
from pipeline.context import RunContext
from pipeline.core.files import stale_temp_files
from pipeline.core.locks import file_lock
from pipeline.core.parallel import prefetch
from pipeline.data.loading.augmentation import cached_views
from pipeline.data.loading.loader import PageDataset, collate
from pipeline.data.loading.order import SampleRef

Progress = Callable[[int, int], None]
"""(done, total)."""
PREFETCH_BATCHES = 2  # decoded before the teacher needs them, and computed before they are written


class CacheBuilder:
    """Builds the cache files of a student's teacher, which is loaded at first use."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.settings = context.teacher.settings
        self.eval_batch = context.config.run.eval_batch
        self.decode_threads = context.config.data.loader_workers
        views = cached_views(self.settings.views)
        self.pages = PageDataset(context.dataset, context.config.data.view, context.config.run.seed, views)

    @cached_property
    def detector(self) -> DetectorModule:
        """The teacher, on the context's device."""
        return self.context.teacher.load(self.context.dataset.num_classes, self.context.device)

    def build(self, shard: int, progress: Callable[[int], None] | None = None) -> bool:
        """Build one file unless it exists; ``progress`` gets the number of rows written so far.

        Returns False if another builder is building it.

        Raises:
            OutputError: if the disk is full.
        """
        entry = self.context.dataset.description.shards[shard]
        folder, name = self.context.config.cache_folder, cache_shard_name(entry.name)
        with _file_builder_lock(folder, name) as held:
            if not held or is_built(folder, name):
                return held
            with cache_file(
                folder,
                name,
                tar_sha256=entry.sha256,
                identity=self.context.cache_identity,
                precision=self.settings.cache_dtype,
                compression=self.settings.compression,
            ) as writer:
                self._write(shard, writer, progress)
        return True

    def refs(self, shard: int) -> list[list[SampleRef]]:
        """A shard's pages in each of their views, in batches."""
        sizes = self.context.dataset.shard_sizes
        start, batch = sum(sizes[:shard]), self.eval_batch
        samples = range(start, start + sizes[shard])
        refs = [SampleRef(view, sample) for sample in samples for view in range(self.settings.views)]
        return [refs[first : first + batch] for first in range(0, len(refs), batch)]

    def teacher_rows(self, batches: list[list[SampleRef]]) -> Iterator[list[CacheRow]]:
        """Cache rows of batches of pages, which threads decode while the teacher runs."""
        threads = self.decode_threads
        for batch in prefetch(self._decode, batches, threads, threads + PREFETCH_BATCHES, "decode"):
            signals = live_signals(self.detector, batch.to(self.context.device), self.settings.nodes)
            yield self.rows(batch, signals)

    def rows(self, batch: PageBatch, signals: TeacherSignals) -> list[CacheRow]:
        """Convert signals to cache rows on the CPU."""
        if self.settings.store == "descriptors":
            signals = signals.compressed()
        counts = signals.valid.sum(dim=1).tolist()
        rows = []
        for page, count in enumerate(counts):
            pooled, scales = quantize(signals.pooled[page, :count], self.settings.cache_dtype)
            arrays = {"pooled": pooled, "pooled_scale": scales, "boxes": signals.boxes[page, :count]}
            arrays |= {"scores": signals.scores[page, :count], "classes": signals.classes[page, :count]}
            if signals.logits is not None and signals.deltas is not None:
                arrays |= {"logits": signals.logits[page, :count], "deltas": signals.deltas[page, :count]}
            rows.append(_page_fields(batch, page) | {name: value.cpu().numpy() for name, value in arrays.items()})
        return rows

    def _decode(self, refs: list[SampleRef]) -> PageBatch:
        return collate(self.pages.__getitems__(refs))

    def _write(self, shard: int, writer: CacheFileWriter, progress: Callable[[int], None] | None) -> None:
        def write(rows: list[CacheRow]) -> int:
            for row in rows:
                writer.add(row)
            return len(rows)

        written = 0
        # One thread writes and hashes while the teacher computes the next pages. The queue is short, so that a slow
        # disk slows the teacher down instead of filling memory.
        for count in prefetch(write, self.teacher_rows(self.refs(shard)), 1, PREFETCH_BATCHES, "write"):
            written += count
            if progress is not None:
                progress(written)


def _page_fields(batch: PageBatch, page: int) -> CacheRow:
    return {
        "sample": int(batch.samples[page]),
        "view": int(batch.view_index[page]),
        "affine": batch.affine[page].numpy(),
    }


@contextmanager
def _file_builder_lock(folder: Path, name: str) -> Iterator[bool]:
    """Lock of a cache file, False if another builder holds it; removes what a killed builder left."""
    with file_lock(folder / f".{name}.lock", wait=False) as held:
        if held:
            for path in [*stale_temp_files(folder, name), *stale_temp_files(folder, cache_index_name(name))]:
                path.unlink(missing_ok=True)
        yield held
