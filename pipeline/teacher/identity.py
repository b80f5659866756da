"""The teacher's run, and the identity of its statistics and cached signals: everything their bytes depend on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from graphkd.detectors import DetectorConfig, DetectorModule
from graphkd.errors import ConfigError, UserError
from pipeline.config import TeacherConfig
from pipeline.config.schema import DataConfig
from pipeline.core.errors import CacheError
from pipeline.core.files import fingerprint
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.augmentation import AugmentationConfig
from pipeline.models import Canvas, best_checkpoint, detector_identity, load_detector, load_run_config
from pipeline.runs.checkpoint import Checkpoint

SIGNALS_VERSION = 3
"""Version of stored teacher outputs: statistics and cache."""
Identity = dict[str, str]
"""What an artifact was made from, by name: values or fingerprints."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherRun:
    """The run that trained a student's teacher, with its verified checkpoint."""

    settings: TeacherConfig
    """The student's settings of its teacher."""
    detector_config: DetectorConfig
    canvas: Canvas
    checkpoint: Checkpoint
    class_names: list[str] | None
    """None if unknown: the checkpoint is of an earlier release, and its training pages cannot be read."""

    def load(self, num_classes: int, device: torch.device) -> DetectorModule:
        """Load the teacher, in evaluation mode and without gradients."""
        return load_detector(self.detector_config, num_classes, self.canvas, self.checkpoint, device)


def open_teacher(settings: TeacherConfig, canvas: Canvas) -> TeacherRun:
    """Find and verify the teacher that a student on ``canvas`` names.

    Raises:
        CheckpointError: if it has not been trained.
        ConfigError: if it was trained on another canvas, where its features would mean something else.
    """
    config = load_run_config(settings.run)
    if config.data.view.canvas != canvas:
        raise ConfigError(
            f"the teacher {settings.run} has canvas {list(config.data.view.canvas)} and the student {list(canvas)}; "
            "give both the same data.view.canvas"
        )
    checkpoint = best_checkpoint(settings.run)
    return TeacherRun(
        settings=settings,
        detector_config=config.detector,
        canvas=canvas,
        checkpoint=checkpoint,
        class_names=checkpoint.class_names or _class_names(config.data),
    )


def _class_names(data: DataConfig) -> list[str] | None:
    try:
        return PackedDataset(data.train, data.storage).class_names
    except UserError:
        return None


def statistics_identity(teacher: TeacherRun, dataset: PackedDataset, view: AugmentationConfig) -> Identity:
    """What the teacher's statistics depend on, by name."""
    detector = teacher.detector_config
    return detector_identity(detector, teacher.checkpoint) | {
        "schema": str(SIGNALS_VERSION),
        "dataset": dataset.identity,
        "preprocessing": fingerprint([view.canvas, view.shortest_edge[1], detector.pixel_mean, detector.pixel_std]),
        "node policy": fingerprint(teacher.settings.nodes.model_dump()),
        "statistics pages": str(teacher.settings.statistics_pages),
        "shrinkage": str(teacher.settings.shrinkage),
    }


def cache_identity(teacher: TeacherRun, dataset: PackedDataset, view: AugmentationConfig, seed: int) -> Identity:
    """What cached signals depend on, by name. Several views depend on the run's seed and its augmentation."""
    several = teacher.settings.views > 1
    names = ("teacher weights", "detector config", "schema", "dataset", "preprocessing", "node policy")
    shared = statistics_identity(teacher, dataset, view)
    return {name: shared[name] for name in names} | {
        "views": str(teacher.settings.views),
        "augmentation": fingerprint(view.model_dump()) if several else "none",
        "run.seed": str(seed) if several else "any",
        "store": teacher.settings.store,
        "dtype": teacher.settings.cache_dtype,
    }


def check_identity(found: Identity, wanted: Identity, where: Path | str, remedy: str) -> None:
    """Raise CacheError naming every part in which ``found`` differs from ``wanted``."""
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        details = "; ".join(
            f"{name} {found.get(name, 'nothing')[:12]} instead of {wanted[name][:12]}" for name in differing
        )
        raise CacheError(f"{where} was made for something else: {details}; {remedy}")
