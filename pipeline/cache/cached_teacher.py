"""A finished cache as a source of teacher signals. Rows are found by sample and view, so any topology can read it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphkd.batch import PageBatch
from graphkd.signals import TeacherSignals
from pipeline.cache.format import CacheJson, read_cache_json
from pipeline.cache.quantize import dequantize
from pipeline.cache.reader import CacheReader, Row, check_file
from pipeline.core.errors import CacheError
from pipeline.core.parallel import prefetch
from pipeline.data.format.classes import match_classes
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.storage.base import FileInfo, StorageConfig
from pipeline.data.storage.local import LocalStore
from pipeline.data.storage.open import open_store
from pipeline.teacher.identity import Identity, check_identity

PREFETCH_BATCHES = 3
PREFETCH_THREADS = 2
AFFINE_TOLERANCE = 1e-3  # px, and the same in scale


class CachedTeacher:
    """A finished cache as a source of signals.

    Args:
        location: cache folder, or URL (http, https, s3, gs).
        dataset: dataset that it was built for.
        identity: what it must have been built from.
        storage: how a remote one is read.

    Raises:
        CacheError: if the cache is unfinished, lacks a file, or was built from something else, naming what differs.
    """

    def __init__(
        self,
        location: str | Path,
        dataset: PackedDataset,
        identity: Identity,
        storage: StorageConfig | None = None,
    ) -> None:
        self.dataset = dataset
        self.store = open_store(location, storage)
        self.description = read_cache_json(self.store)
        self._check(identity)
        self.store.register({shard.name: FileInfo(shard.bytes, shard.sha256) for shard in self.description.shards})
        self.reader = CacheReader(self.store, self.description)

    def prefetch(self, batches: Iterable[PageBatch]) -> Iterator[tuple[PageBatch, StoredSignals]]:
        """Yield batches with their stored signals, which threads read while earlier steps run."""
        return prefetch(
            lambda batch: (batch, self.stored(batch)), batches, PREFETCH_THREADS, PREFETCH_BATCHES, "read-cache"
        )

    def signals(self, batch: PageBatch, prefetched: StoredSignals | None = None) -> TeacherSignals:
        """Signals in fp32 on the device of the batch's images."""
        return (prefetched or self.stored(batch)).on(batch.images.device)

    def stored(self, batch: PageBatch) -> StoredSignals:
        """Read the signals of the batch's pages, in the precision of the cache."""
        pages = zip(batch.samples.tolist(), batch.view_index.tolist(), strict=True)
        rows = self.reader.rows([self._position(sample, view) for sample, view in pages])
        self._check_pages(rows, batch)
        cached = self.description
        counts = np.array([len(row.arrays["scores"]) for row in rows])
        valid, heads = np.arange(cached.nodes) < counts[:, None], cached.classifies

        def padded(name: str, *shape: int) -> Tensor:
            return torch.from_numpy(_padded([row.arrays[name].reshape(-1, *shape) for row in rows], valid))

        signals = TeacherSignals(
            boxes=padded("boxes", 4),
            valid=torch.from_numpy(valid),
            scores=padded("scores"),
            classes=padded("classes").long(),
            logits=padded("logits", cached.num_classes + 1) if heads else None,
            deltas=padded("deltas", cached.num_classes, 4) if heads else None,
            pooled=padded("pooled", *cached.feature_shape),
        )
        scales = np.stack([row.arrays["pooled_scale"] for row in rows])
        return StoredSignals(signals=signals, scales=torch.from_numpy(scales))

    def _position(self, sample: int, view: int) -> tuple[int, int]:
        shard, row = self.dataset.locate(sample)
        return shard, row * self.description.views + view

    def _check_pages(self, rows: Sequence[Row], batch: PageBatch) -> None:
        differences = np.abs(np.stack([row.arrays["affine"] for row in rows]) - batch.affine.numpy()).max(axis=1)
        pages = zip(batch.samples.tolist(), batch.view_index.tolist(), differences.tolist(), strict=True)
        for row, (sample, view, difference) in zip(rows, pages, strict=True):
            if (row.sample, row.view) != (sample, view):
                raise CacheError(
                    f"{self.store.location} has sample {row.sample}, view {row.view} where sample {sample}, view "
                    f"{view} should be; build the cache again"
                )
            if difference > AFFINE_TOLERANCE:
                raise CacheError(
                    f"{self.store.location} has sample {sample} in view {view} at {row.arrays['affine'].tolist()}, "
                    f"{difference:.3g} px from where it is shown; build the cache again for this data.view"
                )

    def _check(self, identity: Identity) -> None:
        location, found = self.store.location, self.description
        names = [each.name for each in found.classes]
        if names:
            of_pages, of_cache = str(self.dataset.location), f"the cache {location}"
            match_classes(self.dataset.class_names, names, of_pages, of_cache, same_order=True)
        try:
            check_identity(found.identity, identity, location, "build a cache for this config in another folder")
        except CacheError as error:
            raise CacheError(f"{error}{_first_difference(found, self.dataset)}") from error
        if isinstance(self.store, LocalStore):
            for shard in found.shards:
                check_file(self.store, shard)


def _padded(pages: list[NDArray[Any]], valid: NDArray[np.bool_]) -> NDArray[Any]:
    """One array [B, N, ...] from arrays [n, ...] of each page, copied once, with zeros where not valid."""
    if valid.all():
        return np.stack(pages)
    padded = np.zeros((*valid.shape, *pages[0].shape[1:]), dtype=pages[0].dtype)
    for target, values in zip(padded, pages, strict=True):
        target[: len(values)] = values
    return padded


def _first_difference(cached: CacheJson, dataset: PackedDataset) -> str:
    ours = [shard.sha256 for shard in dataset.description.shards]
    theirs = [shard.tar_sha256 for shard in cached.shards]
    if ours == theirs:
        return ""
    differing = [index for index, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]]
    if not differing:
        return f" (it was built for {len(theirs)} shards, the dataset has {len(ours)})"
    return f" (the first shard that differs is {dataset.description.shards[differing[0]].name})"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSignals:
    """Signals of a batch on the CPU, with features in the precision of the cache."""

    signals: TeacherSignals
    scales: Tensor
    """float32 [B, C] of int8 features, else [B, 0]."""

    def on(self, device: torch.device) -> TeacherSignals:
        """Signals in fp32 on ``device``. The stored, smaller form is transferred."""
        moved = self.signals.to(device)
        return replace(moved, pooled=dequantize(moved.pooled, self.scales.to(device)))
