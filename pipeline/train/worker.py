"""One training worker, the same for every engine: assemble the parts, restore the newest checkpoint, train."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from graphkd.batch import PageBatch
from graphkd.distill import TrainingStep
from pipeline.context import RunContext
from pipeline.core.distributed import World
from pipeline.core.run_paths import CHECKPOINTS
from pipeline.data.loading.batches import TrainBatches
from pipeline.data.loading.loader import PageDataset, limit_bad_samples, page_loader, start_fork_server
from pipeline.data.loading.order import CanonicalOrder, check_batch_size
from pipeline.data.loading.resume_state import DataState
from pipeline.runs.attempts import AttemptRecorder
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.ledger import Ledger
from pipeline.runs.log import log_to_file
from pipeline.runs.metrics import Metrics
from pipeline.runs.run_folder import run_lock
from pipeline.teacher.source import SignalSource
from pipeline.train.evaluator import Evaluator
from pipeline.train.loop import TrainingRun, train
from pipeline.train.precision import WeightEma, apply_precision_and_compile, configure_determinism, grad_scaler
from pipeline.train.schedule import build_optimizer
from pipeline.train.shutdown import StopSignal, handle_signals
from pipeline.train.signal_source import signal_source
from pipeline.train.state import TrainingState
from pipeline.train.step_hooks import StepHooks, no_preemption
from pipeline.training_step import build_training_step

log = logging.getLogger(__name__)


def run_worker(context: RunContext, world: World, preemption_imminent: Callable[[], bool] = no_preemption) -> int:
    """Train a run as one of ``world``'s workers. Return the number of the signal that stopped it early, or 0.

    Args:
        context: of the run, whose folder exists.
        world: all workers, which train together.
        preemption_imminent: called by all ranks after every step; True if a node is about to be preempted, so that a
            checkpoint is due now.
    """
    folder = context.config.folder
    if context.config.data.loader_workers:
        start_fork_server()
    with run_lock(folder) if world.is_main else nullcontext(), log_to_file(folder, world):
        world.all_gather_object(None)  # no rank reads checkpoints while a killed start may still write one
        return _train(context, world, preemption_imminent)


def _train(context: RunContext, world: World, preemption_imminent: Callable[[], bool]) -> int:
    config, schedule = context.config, context.config.schedule.scaled()
    check_batch_size(schedule.batch, world.size, schedule.accumulate)
    if config.detector.norm == "batch" and world.is_main:
        log.warning(
            "detector.norm is batch: its statistics are those of one worker's pages, so results depend on how many "
            "workers share schedule.batch %d; frozen, sync (GPU) and group do not",
            schedule.batch,
        )
    configure_determinism(config.compute)
    state = _new_state(context, world)
    checkpoint = state.restore(config.folder / CHECKPOINTS)
    first = 0 if checkpoint is None else checkpoint.step
    metrics = Metrics(config.folder, world, config.run.log_every, first)
    metrics.load_state_dict(None if checkpoint is None else checkpoint.state.get("metrics"))
    evaluator = Evaluator(context, world, state.ema, metrics, first)
    with ExitStack() as stack:
        recorder = stack.enter_context(_recorded(config.folder, world, metrics, first))
        stack.enter_context(closing(metrics))
        writer = CheckpointWriter(
            config.folder / CHECKPOINTS, config.run.keep, config.run.keep_every, evaluator.best_step
        )
        stack.enter_context(closing(writer))
        hooks = StepHooks(state, metrics, evaluator, writer, config.run, first, preemption_imminent)
        stop_signal = stack.enter_context(closing(StopSignal(config.folder, world)))
        stack.enter_context(handle_signals(stop_signal.receive))
        source = signal_source(context, world.device)
        if not hooks.evaluate_if_due(first):  # a kill may have come before the evaluation of a checkpoint
            run = TrainingRun(
                step=_distributed(apply_precision_and_compile(state.module, config.compute), world),
                optimizer=state.optimizer,
                scaler=state.scaler,
                ema=state.ema,
                schedule=schedule,
                compute=config.compute,
                source=source,
                metrics=metrics,
                world=world,
                first_step=first,
                after_step=hooks.after_step,
                should_stop=stop_signal.should_stop,
                seed=config.run.seed,
                sample_key=lambda sample: context.dataset.sample(sample).key,
            )
            train(run, stack.enter_context(_batches(context, world, first, source)))
        number = 0 if hooks.has_ended(metrics.last_step) else stop_signal.signal
        recorder.reason = signal.Signals(number).name if number else recorder.reason
    return number


def _new_state(context: RunContext, world: World) -> TrainingState:
    schedule = context.config.schedule.scaled()
    module = build_training_step(context, world.device).train()
    return TrainingState(
        data=DataState(
            dataset=context.dataset.identity, seed=context.config.run.seed, batch=schedule.batch, position=0
        ),
        classes=[entry.model_dump() for entry in context.dataset.class_entries],
        module=module,
        ema=WeightEma(module, schedule.ema),
        optimizer=build_optimizer(module, schedule),
        scaler=grad_scaler(context.config.compute, world.device),
    )


@contextmanager
def _recorded(folder: Path, world: World, metrics: Metrics, first: int) -> Iterator[AttemptRecorder]:
    """Record this start and its end; a kill leaves it without an end."""
    recorder = AttemptRecorder(folder, world, first)
    if first and world.is_main:
        log.info("resuming from step %d with %d workers", first, world.size)
    try:
        yield recorder
    except BaseException as error:
        recorder.reason = f"{type(error).__name__}: {error}"[:300]
        raise
    finally:
        recorder.last_step = metrics.last_step
        recorder.end()


@contextmanager
def _batches(
    context: RunContext, world: World, first: int, source: SignalSource
) -> Iterator[Iterable[tuple[PageBatch, Any]]]:
    """Batches of this rank from step ``first`` on, recorded in the ledger if there is one."""
    config, schedule, dataset = context.config, context.config.schedule.scaled(), context.dataset
    order = CanonicalOrder(dataset.shard_sizes, config.run.seed, schedule.batch)
    batches = TrainBatches(order, schedule.batch, world.rank, world.size, first, schedule.steps, schedule.accumulate)
    tolerated = config.data.bad_samples
    pages = PageDataset(dataset, config.data.view, config.run.seed, config.views, substitute_bad=tolerated > 0)
    loader = page_loader(pages, batches, config.data.loader_workers, pin=world.device.type == "cuda")
    prefetched = source.prefetch(limit_bad_samples(loader, tolerated))
    if not config.run.ledger:
        yield prefetched
        return
    with closing(Ledger(config.folder, world)) as ledger:
        yield ledger.record(prefetched, first, schedule.accumulate)


def _distributed(module: TrainingStep, world: World) -> nn.Module:
    if world.size == 1:
        return module
    devices = [world.device.index] if world.device.type == "cuda" else None
    # An adapter gets no gradient if all terms on features have weight 0.
    has_adapter = not isinstance(module.adapter, nn.Identity)
    return DistributedDataParallel(module, device_ids=devices, find_unused_parameters=has_adapter)
