"""The identity of a teacher's statistics and cache: everything that their bytes depend on, by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from graphkd.detectors import DetectorModule
from graphkd.errors import ConfigError
from pipeline.cache.format import CACHE_VERSION
from pipeline.config import RunConfig, TeacherConfig
from pipeline.core.errors import CacheError
from pipeline.core.files import fingerprint
from pipeline.data.format.dataset import PackedDataset
from pipeline.models import best_checkpoint, detector_identity, load_detector, load_run_config
from pipeline.runs.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherRun:
    """A student's view of its teacher: the run that trained it and its checkpoint."""

    settings: TeacherConfig
    config: RunConfig
    checkpoint: Checkpoint

    def detector(self, num_classes: int, device: torch.device) -> DetectorModule:
        """Load the teacher, in evaluation mode."""
        return load_detector(self.config, num_classes, self.checkpoint, device)


def open_teacher(student: RunConfig) -> TeacherRun:
    """Find the teacher that ``student`` names.

    Raises:
        CheckpointError: where it has not been trained.
        ConfigError: where it was trained on another canvas, at which its features would mean something else.
    """
    assert student.teacher is not None
    folder = student.teacher.run
    config = load_run_config(folder)
    if config.data.view.canvas != student.data.view.canvas:
        raise ConfigError(
            f"the teacher {folder} has canvas {list(config.data.view.canvas)} and the student "
            f"{list(student.data.view.canvas)}; give both the same data.view.canvas"
        )
    return TeacherRun(settings=student.teacher, config=config, checkpoint=best_checkpoint(folder))


def statistics_identity(student: RunConfig, teacher: TeacherRun, dataset: PackedDataset) -> dict[str, str]:
    """What the teacher's statistics depend on, by name."""
    view, detector = student.data.view, teacher.config.detector
    return detector_identity(teacher.config, teacher.checkpoint) | {
        "schema": str(CACHE_VERSION),
        "dataset": dataset.identity,
        "preprocessing": fingerprint([view.canvas, view.shortest_edge[1], detector.pixel_mean, detector.pixel_std]),
        "node policy": fingerprint(teacher.settings.nodes.model_dump()),
        "statistics pages": str(teacher.settings.statistics_pages),
        "shrinkage": str(teacher.settings.shrinkage),
    }


def cache_identity(student: RunConfig, teacher: TeacherRun, dataset: PackedDataset) -> dict[str, str]:
    """What the cached signals depend on, by name; views are keyed by the run's seed where there are several."""
    several = teacher.settings.views > 1
    names = ("teacher weights", "detector config", "schema", "dataset", "preprocessing", "node policy")
    shared = statistics_identity(student, teacher, dataset)
    return {name: shared[name] for name in names} | {
        "views": str(teacher.settings.views),
        "augmentation": fingerprint(student.data.view.model_dump()) if several else "none",
        "run.seed": str(student.run.seed) if several else "any",
        "store": teacher.settings.store,
        "dtype": teacher.settings.cache_dtype,
    }


def check_identity(found: dict[str, str], wanted: dict[str, str], where: Path | str, remedy: str) -> None:
    """Raise CacheError naming every part in which ``found`` differs from ``wanted``."""
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        details = "; ".join(
            f"{name} {found.get(name, 'nothing')[:12]} instead of {wanted[name][:12]}" for name in differing
        )
        raise CacheError(f"{where} was made for something else: {details}; {remedy}")
