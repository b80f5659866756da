"""One training worker, whatever engine started it: put the parts together, go on from the newest checkpoint, train."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from graphkd.batch import PageBatch
from graphkd.distill import TrainingStep
from pipeline.config import RunConfig
from pipeline.core.distributed import World
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.batches import TrainBatches
from pipeline.data.loading.loader import PageDataset, limit_bad_samples, page_loader
from pipeline.data.loading.order import CanonicalOrder, check_batch_size
from pipeline.models import CHECKPOINTS
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.ledger import Ledger
from pipeline.runs.metrics import Metrics
from pipeline.runs.start_history import StartRecorder, log_to_file, run_lock
from pipeline.teacher.source import SignalSource
from pipeline.train.builders import build_step, signal_source
from pipeline.train.evaluator import Evaluator
from pipeline.train.loop import Training, train
from pipeline.train.precision import WeightEma, apply_precision_and_compile, configure_determinism, grad_scaler
from pipeline.train.schedule import build_optimizer
from pipeline.train.shutdown import StopSignal, handle_signals
from pipeline.train.state import TrainingState

log = logging.getLogger(__name__)


def no_preemption() -> bool:
    """No engine knows of a node that is about to go."""
    return False


def run_worker(config: RunConfig, world: World, preemption_imminent: Callable[[], bool] = no_preemption) -> int:
    """Train ``config`` as one of ``world``'s workers; gives the number of the signal that ended it early, or 0.

    Args:
        config: of the run; its folder is there.
        world: all workers, which train together.
        preemption_imminent: called by all ranks after every step; True if a node is about to be preempted, so that
            a checkpoint is due now.
    """
    with run_lock(config.folder) if world.is_main else nullcontext(), log_to_file(config.folder, world):
        world.gather(None)  # nobody looks for checkpoints while a start that was killed may still write one
        return _train(config, world, preemption_imminent)


def _train(config: RunConfig, world: World, preemption_imminent: Callable[[], bool]) -> int:
    dataset = PackedDataset(config.data.train, config.data.storage)
    schedule = config.schedule.scaled()
    check_batch_size(schedule.batch, world.size, schedule.accumulate)
    _say_what_varies(config, world)
    configure_determinism(config.compute)
    state = _new_state(config, dataset, world)
    checkpoint = state.restore()
    first = 0 if checkpoint is None else checkpoint.step
    metrics = Metrics(config.folder, world, config.run.log_every, first)
    metrics.load_state_dict(None if checkpoint is None else checkpoint.state.get("metrics"))
    evaluator = Evaluator(config, world, state.average, metrics, first)
    with ExitStack() as stack:
        record = stack.enter_context(_recorded(config, world, metrics, first))
        stack.enter_context(closing(metrics))
        saving = _Saving(state, metrics, evaluator, preemption_imminent, first)
        stack.enter_context(closing(saving.writer))
        stop_signal = stack.enter_context(closing(StopSignal(config.folder, world)))
        stack.enter_context(handle_signals(stop_signal.receive))
        source = signal_source(config, dataset, world.device)
        if not saving.evaluated(first):  # a kill may have come before a checkpoint was evaluated
            run = Training(
                step=_distributed(apply_precision_and_compile(state.module, config.compute), world),
                optimizer=state.optimizer,
                scaler=state.scaler,
                average=state.average,
                schedule=schedule,
                compute=config.compute,
                source=source,
                metrics=metrics,
                world=world,
                first_step=first,
                after_step=saving.after_step,
                should_stop=stop_signal.should_stop,
                seed=config.run.seed,
                name=lambda sample: dataset.sample(sample).key,
            )
            train(run, stack.enter_context(_batches(config, dataset, world, first, source)))
        ended = metrics.last_step == schedule.steps or evaluator.should_end_early()
        number = 0 if ended else stop_signal.signal
        record.why = signal.Signals(number).name if number else record.why
    return number


def _new_state(config: RunConfig, dataset: PackedDataset, world: World) -> TrainingState:
    schedule = config.schedule.scaled()
    module = build_step(config, dataset, world.device).train()
    return TrainingState(
        config=config,
        dataset=dataset,
        module=module,
        average=WeightEma(module, schedule.ema),
        optimizer=build_optimizer(module, schedule),
        scaler=grad_scaler(config.compute, world.device),
    )


class _Saving:
    """What happens between two steps: checkpoints, and evaluations of what they hold."""

    def __init__(
        self,
        state: TrainingState,
        metrics: Metrics,
        evaluator: Evaluator,
        preemption_imminent: Callable[[], bool],
        first: int,
    ) -> None:
        settings = state.config.run
        self.writer = CheckpointWriter(
            state.config.folder / CHECKPOINTS, settings.keep, settings.keep_every, evaluator.best_step
        )
        self.state, self.metrics, self.evaluator, self.preemption_imminent = (
            state,
            metrics,
            evaluator,
            preemption_imminent,
        )
        self.every = settings.checkpoint_every
        self.saved = first

    def after_step(self, done: int, leaves: bool) -> bool:
        """Save where it is due, then evaluate; whether the run ends here for good."""
        self.evaluator.refresh(done)
        due, ends = self.evaluator.due(done), done == self.evaluator.steps or self.evaluator.should_end_early()
        if (self.preemption_imminent() or leaves or due or ends or done % self.every == 0) and done > self.saved:
            taken = self.state.snapshot(done, self.metrics, self.evaluator.best_step())
            if taken is not None:
                self.writer.save(taken)
            self.saved = done
        # Whoever asks all to leave waits for less than an evaluation takes; the next start owes it.
        return self.evaluated(done) if ends or not leaves else False

    def evaluated(self, done: int) -> bool:
        """Evaluate where it is due; whether the run ends after ``done`` steps for good."""
        if self.evaluator.due(done):
            self.evaluator.evaluate(done)
        return done == self.evaluator.steps or self.evaluator.should_end_early()


@contextmanager
def _recorded(config: RunConfig, world: World, metrics: Metrics, first: int) -> Iterator[StartRecorder]:
    """Write down this start and how it ends; a kill leaves it without an end."""
    record = StartRecorder(config.folder, world, first)
    if first and world.is_main:
        log.info("going on from step %d with %d workers", first, world.size)
    try:
        yield record
    except BaseException as error:
        record.why = f"{type(error).__name__}: {error}"[:300]
        raise
    finally:
        record.last_step = metrics.last_step
        record.end()


@contextmanager
def _batches(
    config: RunConfig, dataset: PackedDataset, world: World, first: int, source: SignalSource
) -> Iterator[Iterable[tuple[PageBatch, Any]]]:
    """What this rank reads of the global batches from step ``first`` on; written to the ledger where there is one."""
    schedule, tolerated = config.schedule.scaled(), config.data.bad_samples
    order = CanonicalOrder(dataset.shard_sizes, config.run.seed, schedule.batch)
    places = TrainBatches(order, schedule.batch, world.rank, world.size, first, schedule.steps, schedule.accumulate)
    items = PageDataset(dataset, config.data.view, config.run.seed, config.views, substitute_bad=tolerated > 0)
    loader = page_loader(items, places, config.data.loader_workers, pin=world.device.type == "cuda")
    batches = source.prefetch(limit_bad_samples(loader, tolerated))
    if not config.run.ledger:
        yield batches
        return
    with closing(Ledger(config.folder, world)) as ledger:
        yield ledger.recorded(batches, first, schedule.accumulate)


def _say_what_varies(config: RunConfig, world: World) -> None:
    if config.detector.norm == "batch" and world.is_main:
        log.warning(
            "detector.norm is batch: its statistics are those of one worker's pages, so results depend on how many "
            "workers share schedule.batch %d; frozen, sync (GPU) and group do not",
            config.schedule.batch,
        )


def _distributed(module: TrainingStep, world: World) -> nn.Module:
    if world.size == 1:
        return module
    devices = [world.device.index] if world.device.type == "cuda" else None
    # An adapter gets no gradient where all terms on features have weight 0.
    adapts = not isinstance(module.adapter, nn.Identity)
    return DistributedDataParallel(module, device_ids=devices, find_unused_parameters=adapts)
