"""The teacher's statistics as a file: one finite pass over evenly spread pages, fingerprinted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graphkd.errors import CacheError, DataError
from graphkd.method import StatisticsAccumulator, TeacherStatistics
from graphkd.nodes import live_signals
from graphkd.pages import PageBatch
from pipeline.config import RunConfig
from pipeline.data.batches import FiniteBatches
from pipeline.data.dataset import PackedDataset
from pipeline.data.loader import PageItems, page_loader
from pipeline.files import replaced
from pipeline.teacher.identity import TeacherRun, require_same, statistics_identity

STATISTICS_FILE = "statistics.safetensors"
TENSORS = ("mean", "covariance", "whitening", "discriminant", "text_classes")


def ensure_statistics(
    student: RunConfig,
    teacher: TeacherRun,
    dataset: PackedDataset,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Compute the statistics where they are not there yet; raises CacheError where others are."""
    path = student.cache_folder / STATISTICS_FILE
    identity = statistics_identity(student, teacher, dataset)
    if path.exists():
        require_same(_header(path)["identity"], identity, path, "delete it, or give another teacher.cache")
        return path
    statistics = compute_statistics(student, teacher, dataset, device, progress)
    _write(path, statistics, identity)
    return path


def compute_statistics(
    student: RunConfig,
    teacher: TeacherRun,
    dataset: PackedDataset,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> TeacherStatistics:
    """Stream the teacher over ``teacher.statistics_pages`` pages, evenly spread, in the evaluation view.

    Raises DataError where these pages have too few regions for a covariance.
    """
    detector = teacher.detector(dataset.num_classes, device)
    accumulator = StatisticsAccumulator(text_classes=torch.tensor(dataset.text_classes))
    stride = max(1, len(dataset) // teacher.settings.statistics_pages)
    samples = range(0, len(dataset), stride)
    items = PageItems(dataset, student.data.view, student.run.seed, views=-1)
    done = 0
    for batch in page_loader(items, FiniteBatches(samples, student.run.eval_batch, 0, 1), workers=0):
        signals = live_signals(detector, batch.to(device), teacher.settings.nodes)
        accumulator.add(signals, labelled_nodes(batch, signals.valid))
        done += len(batch)
        if progress is not None:
            progress(done, len(samples))
    try:
        return accumulator.finish(teacher.settings.shrinkage)
    except ValueError as error:
        raise DataError(f"no statistics of the teacher on {dataset.location}: {error}") from error


def labelled_nodes(batch: PageBatch, valid: Tensor) -> Tensor:
    """Which nodes are ground truth: the node policy puts those first. bool [B, N]."""
    places = torch.arange(valid.shape[1], device=valid.device)
    return (places < batch.counts.to(valid.device)[:, None]) & valid


def read_statistics(path: Path, identity: dict[str, str] | None = None) -> TeacherStatistics:
    """Load the artifact; raises CacheError where it is missing, damaged, or not of ``identity``."""
    header = _header(path)
    if identity is not None:
        require_same(header["identity"], identity, path, "delete it, or give another teacher.cache")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in TENSORS}
    return TeacherStatistics(
        **tensors, energy=header["energy"], thresholds=header["thresholds"], accuracy=header["accuracy"]
    )


def _header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["graphkd"])
    except FileNotFoundError as error:
        raise CacheError(f"{path} does not exist; run `graphkd cache build` with the student's config") from error
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise CacheError(f"{path} is damaged ({error}); delete it and build it again") from error


def _write(path: Path, statistics: TeacherStatistics, identity: dict[str, str]) -> None:
    header = {
        "identity": identity,
        "energy": statistics.energy,
        "thresholds": statistics.thresholds,
        "accuracy": statistics.accuracy,
    }
    tensors = {name: getattr(statistics, name).contiguous() for name in TENSORS}
    with replaced(path) as temporary:
        save_file(tensors, temporary, metadata={"graphkd": json.dumps(header)})
