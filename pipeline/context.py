"""What a run works with: datasets, teacher and statistics, each opened and verified once per process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

from graphkd.method import TeacherStatistics
from pipeline.config import RunConfig
from pipeline.core.distributed import resolve_device
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.storage.local import LocalStore
from pipeline.data.storage.open import open_store
from pipeline.models import best_checkpoint, check_num_classes
from pipeline.runs.checkpoint import Checkpoint
from pipeline.teacher.identity import Identity, TeacherRun, cache_identity, open_teacher, statistics_identity
from pipeline.teacher.statistics import (
    STATISTICS_FILE,
    compute_statistics,
    read_statistics,
    write_statistics,
)


class RunContext:
    """Opens what ``config`` names at first use, and keeps it. Components get the parts that they need.

    Attributes raise the UserError of a part that is missing or does not fit.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @cached_property
    def dataset(self) -> PackedDataset:
        """Training pages."""
        return self._open(self.config.data.train)

    @cached_property
    def val(self) -> PackedDataset | None:
        """Evaluation pages; None without ``data.val``."""
        return None if self.config.data.val is None else self._open(self.config.data.val)

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

    @cached_property
    def statistics_identity(self) -> Identity:
        """What the teacher's statistics must have been computed from."""
        return statistics_identity(self.teacher, self.dataset, self.config.data.view)

    @cached_property
    def cache_identity(self) -> Identity:
        """What the teacher's cache must have been built from."""
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

    def _open(self, location: str) -> PackedDataset:
        dataset = PackedDataset(location, self.config.data.storage)
        check_num_classes(self.config.data.num_classes, dataset)
        return dataset
