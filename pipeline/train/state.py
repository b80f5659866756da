"""The part of a training worker that a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.amp.grad_scaler import GradScaler

from graphkd.distill import TrainingStep
from pipeline.config import RunConfig
from pipeline.core.errors import CheckpointError
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.state import DataState, load_data_state
from pipeline.models import CHECKPOINTS
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


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """Weights, their average, optimiser and scaler; the data is a position, and random numbers are keyed by step."""

    config: RunConfig
    dataset: PackedDataset
    module: TrainingStep
    average: WeightEma
    optimizer: torch.optim.Optimizer
    scaler: GradScaler

    def restore(self) -> Checkpoint | None:
        """Take on the newest whole checkpoint of the run; None without one.

        Raises CheckpointError where it belongs to another order of samples, architecture or optimiser.
        """
        checkpoint = newest_checkpoint(self.config.folder / CHECKPOINTS)
        if checkpoint is None:
            return None
        state = load_data_state(checkpoint.state.get("data"), checkpoint.step, str(checkpoint.folder))
        state.check_same_order(self._position(checkpoint.step), str(checkpoint.folder))
        restore_module(self.module, load_weights(checkpoint.folder / MODEL), checkpoint.folder)
        restore_optimizer(self.optimizer, checkpoint)
        self._restore_average(checkpoint)
        if self.scaler.is_enabled() and checkpoint.state.get("scaler"):
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        return checkpoint

    def _restore_average(self, checkpoint: Checkpoint) -> None:
        if self.average.module is None:
            return
        path = checkpoint.folder / AVERAGE
        if path != checkpoint.weights:
            raise CheckpointError(
                f"{checkpoint.folder} holds no moving average, but schedule.ema asks for one; set it to 0"
            )
        restore_module(self.average.module, load_weights(path), checkpoint.folder)
        self.average.resume(checkpoint.step)

    def snapshot(self, done: int, metrics: Metrics, best: int | None) -> Snapshot | None:
        """A copy of everything after ``done`` steps, on the leading rank only; a collective."""
        state = {
            "data": self._position(done).model_dump(),
            "metrics": metrics.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best_step": best,
        }
        if not metrics.world.is_main:
            return None
        return take_snapshot(done, self.module, self.optimizer, state, self.average.module)

    def _position(self, step: int) -> DataState:
        batch = self.config.schedule.batch
        return DataState(dataset=self.dataset.identity, seed=self.config.run.seed, batch=batch, position=step * batch)
