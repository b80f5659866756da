"""What a run works with: datasets, teacher and statistics, each opened and verified once per process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from graphkd.detectors import DetectorModule
from graphkd.errors import ConfigError
from graphkd.method import TeacherStatistics
from pipeline.config import RunConfig
from pipeline.core.distributed import resolve_device
from pipeline.data.format.classes import match_classes
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.storage.local import LocalStore
from pipeline.data.storage.open import open_store
from pipeline.models import best_checkpoint, check_num_classes, load_initial_weights, new_detector
from pipeline.runs.checkpoint import Checkpoint
from pipeline.teacher.identity import Identity, TeacherRun, cache_identity, open_teacher, statistics_identity
from pipeline.teacher.statistics import (
    STATISTICS_FILE,
    compute_statistics,
    read_statistics,
    write_statistics,
)

log = logging.getLogger(__name__)


class RunContext:
    """Opens what ``config`` names at first use, and keeps it. Components get the parts that they need.

    Attributes raise the UserError of a part that is missing or does not fit.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._built: DetectorModule | None = None

    @cached_property
    def dataset(self) -> PackedDataset:
        """Training pages."""
        return self._open(self.config.data.train)

    @cached_property
    def val(self) -> PackedDataset | None:
        """Evaluation pages, with classes in the order of the training pages; None without ``data.val``."""
        return None if self.config.data.val is None else self._open(self.config.data.val, self.dataset.class_names)

    def val_of(self, checkpoint: Checkpoint) -> PackedDataset:
        """Evaluation pages, with classes in the order of a checkpoint's detector.

        Raises:
            ConfigError: if there are none, or their classes have other names.
        """
        if self.config.data.val is None:
            raise ConfigError(f"{self.config.name} names no data.val to evaluate on; give data.val=FOLDER")
        names = checkpoint.class_names
        return self._open(self.config.data.val, self.dataset.class_names if names is None else names)

    def open_inputs(self) -> None:
        """Open and verify the datasets and ``run.init`` now, so that mistakes show before anything starts."""
        _ = self.dataset, self.val, self.initial_checkpoint

    @property
    def device(self) -> torch.device:
        """Device of work outside the training workers."""
        return resolve_device(self.config.engine.device)

    @property
    def distills(self) -> bool:
        """Whether the run learns from a teacher."""
        return self.config.method.name != "none" and self.config.teacher is not None

    @cached_property
    def teacher(self) -> TeacherRun:
        """The teacher's run and checkpoint."""
        assert self.config.teacher is not None, "checked by the caller"
        return open_teacher(self.config.teacher, self.config.data.view.canvas)

    def check_teacher_classes(self) -> None:
        """Raise ConfigError unless the teacher has the classes of the training pages, in their order."""
        names = self.teacher.class_names
        if names is not None:
            of_pages, of_teacher = str(self.dataset.location), f"the teacher {self.teacher.settings.run}"
            match_classes(self.dataset.class_names, names, of_pages, of_teacher, same_order=True)

    @cached_property
    def statistics_identity(self) -> Identity:
        """What the teacher's statistics must have been computed from."""
        self.check_teacher_classes()
        return statistics_identity(self.teacher, self.dataset, self.config.data.view)

    @cached_property
    def cache_identity(self) -> Identity:
        """What the teacher's cache must have been built from."""
        self.check_teacher_classes()
        return cache_identity(self.teacher, self.dataset, self.config.data.view, self.config.run.seed)

    @cached_property
    def statistics(self) -> TeacherStatistics:
        """The teacher's statistics, on the CPU."""
        return read_statistics(self.config.cache_location, self.statistics_identity, self.config.data.storage)

    def ensure_statistics(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compute and store the teacher's statistics unless they exist.

        Raises:
            CacheError: if the existing ones were computed from something else.
        """
        store = open_store(self.config.cache_location, self.config.data.storage)
        if isinstance(store, LocalStore) and not (store.folder / STATISTICS_FILE).exists():
            view, batch = self.config.data.view, self.config.run.eval_batch
            found = compute_statistics(self.teacher, self.dataset, view, batch, self.device, progress)
            write_statistics(store.folder, found, self.statistics_identity)
        _ = self.statistics  # reads and verifies them

    @cached_property
    def initial_checkpoint(self) -> Checkpoint | None:
        """Checkpoint of ``run.init``."""
        return None if self.config.run.init is None else best_checkpoint(self.config.run.init)

    def build_detector(self) -> DetectorModule:
        """The detector with the weights that training starts from, or the one that :meth:`check_detector` built."""
        built, self._built = self._built or self._new_detector(), None
        return built

    def check_detector(self) -> None:
        """Build the detector, so that a wrong backbone or missing weights show before anything is written."""
        config = self.config
        if (config.detector.norm, config.detector.weights, config.run.init) == ("frozen", "none", None):
            log.warning(
                "detector.norm is frozen, but the backbone starts at random, so its statistics never fit; set "
                "detector.weights, run.init or detector.norm=group"
            )
        self._built = self._new_detector()

    def _new_detector(self) -> DetectorModule:
        config, classes = self.config, self.dataset.class_names
        detector = new_detector(config.detector, len(classes), config.data.view.canvas, seed=config.run.seed)
        if self.initial_checkpoint is not None:
            rest = load_initial_weights(detector, self.initial_checkpoint, classes)
            log.info("weights of %s; %d tensors keep initial weights: %s", config.run.init, len(rest), ", ".join(rest))
        return detector

    def _open(self, location: str, class_order: Sequence[str] | None = None) -> PackedDataset:
        dataset = PackedDataset(location, self.config.data.storage, class_order)
        check_num_classes(self.config.data.num_classes, dataset)
        return dataset
