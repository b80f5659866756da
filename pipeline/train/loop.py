"""The training loop: fetch, forward, loss, backward, clip, step, metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from graphkd.batch import PageBatch
from pipeline.config.schema import ComputeConfig, ScheduleConfig
from pipeline.core.distributed import World
from pipeline.data.loading.order import sample_seed
from pipeline.runs.metrics import Metrics
from pipeline.teacher.source import SignalSource
from pipeline.train.nonfinite import Terms, is_nonfinite, nonfinite_error
from pipeline.train.precision import WeightEma, autocast
from pipeline.train.schedule import learning_rate, set_learning_rate

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """Everything that the loop needs, ready to run from ``first_step``."""

    step: nn.Module
    """(batch, signals) -> loss terms [B]; wrapped in DDP for several ranks."""
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    ema: WeightEma
    schedule: ScheduleConfig
    """Scaled to its batch."""
    compute: ComputeConfig
    source: SignalSource
    metrics: Metrics
    world: World
    first_step: int
    after_step: Callable[[int, bool], bool]
    """Called with (steps done, whether all ranks stop now). Returns whether the run has ended for good."""
    should_stop: Callable[[], bool]
    """Called after every step: whether all ranks stop before the schedule ends."""
    seed: int
    """Seed of what networks draw from torch's global generator, such as stochastic depth."""
    sample_key: Callable[[int], str]
    """Key of a sample number, for messages."""


def train(run: TrainingRun, batches: Iterable[tuple[PageBatch, Any]]) -> None:
    """Train from ``first_step`` to the end of the schedule, over batches and their prefetched signals.

    Raises:
        TrainingError: before an optimizer step with a non-finite loss or gradient.
    """
    parameters = [parameter for parameter in run.step.parameters() if parameter.requires_grad]
    for done, micro_batches in enumerate(
        _grouped(_timed(batches, run.metrics), run.schedule.accumulate), run.first_step
    ):
        torch.manual_seed(sample_seed(run.seed, done, run.world.rank))  # by step, so that nothing needs restoring
        run.optimizer.zero_grad(set_to_none=True)
        last = len(micro_batches)
        parts = [_backward(run, *part, last=number == last) for number, part in enumerate(micro_batches, start=1)]
        run.scaler.unscale_(run.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, run.schedule.clip_norm or math.inf)
        if is_nonfinite(norm, parts, run.scaler, run.world):
            run.after_step(done, True)
            raise nonfinite_error(done, parts, run.sample_key, run.world)
        rate = learning_rate(run.schedule, done)
        set_learning_rate(run.optimizer, rate)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.ema.update()
        run.metrics.add([terms for _, terms in parts], run.schedule.batch)
        run.metrics.log(done + 1, rate, last=done + 1 == run.schedule.steps)
        stops = run.should_stop()
        if run.after_step(done + 1, stops) or stops:
            return


def _backward(run: TrainingRun, batch: PageBatch, prefetched: Any, *, last: bool) -> tuple[Tensor, Terms]:
    """Add a micro-batch's gradients, which ranks average with the last one. Return its samples and loss terms."""
    with run.step.no_sync() if not last and isinstance(run.step, DistributedDataParallel) else nullcontext():
        on_device = batch.to(run.world.device)
        signals = run.source.signals(on_device, prefetched)
        with autocast(run.compute, run.world.device):
            terms = run.step(on_device, signals)
        loss = global_mean(terms, run.schedule.batch, run.world)
        # A non-finite loss can have finite gradients; NaN makes all ranks see it when they average them.
        run.scaler.scale(loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)).backward()
    return batch.samples, terms


def global_mean(terms: Terms, global_batch: int, world: World) -> Tensor:
    """Sum of all terms over this rank's pages, divided by the global batch, times the ranks that DDP averages over.

    This weighs pages equally on ranks with unequal shares.
    """
    return torch.stack([values.sum() for values in terms.values()]).sum() * world.size / global_batch


def _grouped(batches: Iterator[Item], parts: int) -> Iterator[list[Item]]:
    while group := list(islice(batches, parts)):
        yield group


def _timed(batches: Iterable[Item], metrics: Metrics) -> Iterator[Item]:
    iterator = iter(batches)
    while True:
        begin = time.perf_counter()
        batch = next(iterator, None)
        metrics.add_data_wait(time.perf_counter() - begin)
        if batch is None:
            return
        yield batch
