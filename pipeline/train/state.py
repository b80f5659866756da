"""The part of a training worker that a checkpoint holds."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from graphkd.detectors.sampling import VERSION
from graphkd.distill import TrainingStep
from pipeline.core.errors import CheckpointError
from pipeline.data.loading.resume_state import DataState, load_data_state
from pipeline.runs.checkpoint import (
    AVERAGE,
    MODEL,
    Checkpoint,
    load_weights,
    newest_checkpoint,
    restore_module,
    restore_optimizer,
)
from pipeline.runs.checkpoint_writer import Snapshot, take_snapshot
from pipeline.runs.metrics import Metrics
from pipeline.train.precision import WeightEma

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """Weights, EMA, optimizer and scaler. The data is a position, and random numbers are keyed by step."""

    data: DataState
    """Dataset, seed and batch, at position 0."""
    classes: list[dict[str, Any]]
    """Name and text flag of each class."""
    module: TrainingStep
    ema: WeightEma
    optimizer: torch.optim.Optimizer
    scaler: GradScaler

    def restore(self, checkpoints: Path) -> Checkpoint | None:
        """Restore the newest complete checkpoint below ``checkpoints``; None if there is none.

        Raises:
            CheckpointError: if it belongs to another order of samples, architecture or optimizer.
        """
        checkpoint = newest_checkpoint(checkpoints)
        if checkpoint is None:
            return None
        state = load_data_state(checkpoint.state.get("data"), checkpoint.step, str(checkpoint.folder))
        state.check_same_order(self.data, str(checkpoint.folder))
        if checkpoint.state.get("sampling", 1) != VERSION:
            log.warning(
                "%s is of a release that sampled other anchors and regions of a page; the run continues with those of "
                "this one, so that it does not repeat the losses of an uninterrupted run",
                checkpoint.folder,
            )
        restore_module(self.module, load_weights(checkpoint.folder / MODEL), checkpoint.folder)
        restore_optimizer(self.optimizer, checkpoint)
        self._restore_ema(checkpoint)
        if self.scaler.is_enabled() and checkpoint.state.get("scaler"):
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        return checkpoint

    def _restore_ema(self, checkpoint: Checkpoint) -> None:
        if self.ema.module is None:
            return
        path = checkpoint.folder / AVERAGE
        if path != checkpoint.weights:
            raise CheckpointError(
                f"{checkpoint.folder} holds no moving average, but schedule.ema asks for one; set it to 0"
            )
        restore_module(self.ema.module, load_weights(path), checkpoint.folder)
        self.ema.resume(checkpoint.step)

    def snapshot(self, done: int, metrics: Metrics, best: int | None) -> Snapshot | None:
        """Copy everything after ``done`` steps, on rank 0 only. A collective."""
        state = {
            "data": self.data.model_copy(update={"position": done * self.data.batch}).model_dump(),
            "metrics": metrics.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best_step": best,
            "classes": self.classes,
            "sampling": VERSION,
        }
        if not metrics.world.is_main:
            return None
        return take_snapshot(done, self.module, self.optimizer, state, self.ema.module)
