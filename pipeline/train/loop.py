"""The training loop: fetch, forward, loss, backward, clip, step, metrics. Everything else is around it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graphkd.errors import TrainingError
from graphkd.pages import PageBatch
from pipeline.config.schema import ScheduleConfig
from pipeline.data.order import sample_seed
from pipeline.runs.metrics import Metrics
from pipeline.runs.world import World
from pipeline.teacher.source import SignalSource
from pipeline.train.optim import learning_rate, set_learning_rate

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """All that the loop needs, ready to run from ``first_step``."""

    step: nn.Module
    """Gives loss terms [B] from (batch, signals); wrapped for several ranks."""
    optimizer: torch.optim.Optimizer
    schedule: ScheduleConfig
    """Already scaled to its batch."""
    source: SignalSource
    metrics: Metrics
    world: World
    first_step: int
    after_step: Callable[[int, bool], None]
    """Called with (steps done, whether this was the last step of this start)."""
    leaving: Callable[[], bool]
    """Asked after every step whether all ranks end here, before the schedule does."""
    seed: int
    """Of the run; keys what networks draw from torch's own generator, such as dropped paths."""


def train(run: Training, batches: Iterable[tuple[PageBatch, Any]]) -> None:
    """Run from ``first_step`` to the end of the schedule, over batches and what the source has read of each.

    Raises TrainingError before the optimiser step that a loss or gradient that is not finite would have spoiled.
    """
    parameters = [parameter for parameter in run.step.parameters() if parameter.requires_grad]
    for done, (batch, read) in enumerate(_timed(batches, run.metrics), start=run.first_step):
        on_device = batch.to(run.world.device)
        torch.manual_seed(sample_seed(run.seed, done, run.world.rank))  # a function of the step, so nothing to restore
        terms = run.step(on_device, run.source.signals(on_device, read))
        loss = global_mean(terms, run.schedule.batch, run.world)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, run.schedule.clip_norm or math.inf)
        _require_finite(norm, done, terms, batch)
        rate = learning_rate(run.schedule, done)
        set_learning_rate(run.optimizer, rate)
        run.optimizer.step()
        run.metrics.add(terms, run.schedule.batch)
        ends = done + 1 == run.schedule.steps
        run.metrics.log(done + 1, rate, last=ends)
        leaves = run.leaving() or ends
        run.after_step(done + 1, leaves)
        if leaves:
            return


def global_mean(terms: dict[str, Tensor], global_batch: int, world: World) -> Tensor:
    """Sum of all terms over this rank's pages, over the global batch, times the ranks that DDP averages over.

    Ranks with unequal shares of pages then weigh as they should.
    """
    return torch.stack([values.sum() for values in terms.values()]).sum() * world.size / global_batch


def _timed(batches: Iterable[Item], metrics: Metrics) -> Iterator[Item]:
    iterator = iter(batches)
    while True:
        begin = time.perf_counter()
        batch = next(iterator, None)
        metrics.waited(time.perf_counter() - begin)
        if batch is None:
            return
        yield batch


def _require_finite(norm: Tensor, step: int, terms: dict[str, Tensor], batch: PageBatch) -> None:
    # The norm of averaged gradients is the same on every rank, so all of them stop here together.
    if torch.isfinite(norm):
        return
    parts = ", ".join(f"{name} {float(values.detach().sum()):.4g}" for name, values in terms.items())
    raise TrainingError(
        f"step {step}: gradients are not finite (samples {batch.samples.tolist()}; {parts}); "
        "lower schedule.lr, set schedule.clip_norm, or look at those pages"
    )
