"""The teacher's statistics as a file, computed in one finite pass over evenly spread pages."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from graphkd.batch import PageBatch
from graphkd.method import StatisticsAccumulator, TeacherStatistics
from graphkd.nodes import live_signals
from pipeline.core.errors import CacheError, DataError
from pipeline.core.files import write_atomic
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.augmentation import EVALUATION_VIEW, AugmentationConfig
from pipeline.data.loading.batches import FinitePassBatches
from pipeline.data.loading.loader import PageDataset, page_loader
from pipeline.data.storage.base import StorageConfig
from pipeline.data.storage.open import open_store
from pipeline.teacher.identity import Identity, TeacherRun, check_identity

STATISTICS_FILE = "statistics.safetensors"
TENSORS = ("mean", "covariance", "whitening", "discriminant", "text_classes")


def compute_statistics(
    teacher: TeacherRun,
    dataset: PackedDataset,
    view: AugmentationConfig,
    batch: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> TeacherStatistics:
    """Run the teacher over ``teacher.statistics_pages`` pages, evenly spread, in the evaluation view.

    Args:
        teacher: whose features are measured.
        dataset: pages with ground truth.
        view: canvas and page size.
        batch: pages at a time.
        device: of the teacher.
        progress: called with (pages done, pages in total).

    Raises:
        DataError: if these pages have too few regions for a covariance.
    """
    detector = teacher.load(dataset.num_classes, device)
    accumulator = StatisticsAccumulator(text_classes=torch.tensor(dataset.text_classes))
    stride = max(1, len(dataset) // teacher.settings.statistics_pages)
    samples = range(0, len(dataset), stride)
    pages = PageDataset(dataset, view, seed=0, views=EVALUATION_VIEW)
    done = 0
    for page_batch in page_loader(pages, FinitePassBatches(samples, batch, 0, 1), workers=0):
        signals = live_signals(detector, page_batch.to(device), teacher.settings.nodes)
        accumulator.add(signals, labelled_nodes(page_batch, signals.valid))
        done += len(page_batch)
        if progress is not None:
            progress(done, len(samples))
    try:
        return accumulator.finish(teacher.settings.shrinkage)
    except ValueError as error:
        raise DataError(f"no statistics of the teacher on {dataset.location}: {error}") from error


def labelled_nodes(batch: PageBatch, valid: Tensor) -> Tensor:
    """Mark nodes that are ground truth, which the node policy puts first: bool [B, N]."""
    index = torch.arange(valid.shape[1], device=valid.device)
    return (index < batch.counts.to(valid.device)[:, None]) & valid


def read_statistics(
    location: str | Path, identity: Identity | None = None, storage: StorageConfig | None = None
) -> TeacherStatistics:
    """Load the statistics stored with a cache.

    Raises:
        CacheError: if they are missing, damaged, or not of ``identity``.
    """
    path = f"{location}/{STATISTICS_FILE}"
    try:
        content = open_store(location, storage).read(STATISTICS_FILE)
    except DataError as error:
        raise CacheError(f"{error}; or run `graphkd cache build` with the student's config") from error
    try:
        header, tensors = _header(content), load(content)
        statistics = TeacherStatistics(
            **{name: tensors[name] for name in TENSORS},
            mean_square=header["energy"],
            thresholds=header["thresholds"],
            accuracy=header["accuracy"],
        )
        found = header["identity"]
        if header["tensors"] != _digest(tensors):
            raise ValueError("its tensors do not have the SHA-256 of its header")
    except (SafetensorError, KeyError, TypeError, ValueError, struct.error) as error:
        raise CacheError(f"{path} is damaged ({error}); delete it and build it again") from error
    if identity is not None:
        check_identity(found, identity, path, "delete it, or give another teacher.cache")
    return statistics


def _header(content: bytes) -> dict[str, Any]:
    (size,) = struct.unpack_from("<Q", content)  # safetensors: length of the JSON header, then the header
    return json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["graphkd"])


def write_statistics(folder: Path, statistics: TeacherStatistics, identity: Identity) -> None:
    """Store statistics with their identity and a digest."""
    tensors = {name: getattr(statistics, name).contiguous() for name in TENSORS}
    header = {
        "identity": identity,
        "tensors": _digest(tensors),
        "energy": statistics.mean_square,
        "thresholds": statistics.thresholds,
        "accuracy": statistics.accuracy,
    }
    write_atomic(folder / STATISTICS_FILE, save(tensors, metadata={"graphkd": json.dumps(header)}))


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = sha256()
    for name in TENSORS:
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
