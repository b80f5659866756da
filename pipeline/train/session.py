"""One training worker, whatever engine started it: put the parts together, go on from the newest checkpoint, train."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from graphkd.distill import TrainingStep
from graphkd.errors import ConfigError
from graphkd.inheriting import inherit
from graphkd.pages import PageBatch
from pipeline.config import RunConfig
from pipeline.data.batches import StepBatches
from pipeline.data.dataset import PackedDataset
from pipeline.data.loader import PageItems, page_loader, within_budget
from pipeline.data.order import CanonicalOrder, require_pages_for_all
from pipeline.data.state import DataState, read_state
from pipeline.runs.checkpoint import (
    MODEL,
    load_weights,
    newest_checkpoint,
    restore_module,
    restore_optimizer,
)
from pipeline.runs.checkpoint_save import CheckpointWriter, snapshot
from pipeline.runs.ledger import Ledger
from pipeline.runs.metrics import Metrics
from pipeline.runs.trained import CHECKPOINTS, dataset_classes, new_detector, start_from
from pipeline.runs.world import World
from pipeline.teacher.cache_read import CachedTeacher
from pipeline.teacher.identity import TeacherRun, cache_identity, open_teacher, statistics_identity
from pipeline.teacher.source import LiveTeacher, NoTeacher, SignalSource
from pipeline.teacher.statistics import read_statistics
from pipeline.train.loop import Training, train
from pipeline.train.optim import build_optimizer
from pipeline.train.stopping import Stopping, listening

log = logging.getLogger(__name__)


def run_worker(config: RunConfig, world: World) -> int:
    """Train ``config`` as one of ``world``'s workers; gives the number of the signal that ended it early, or 0."""
    dataset = PackedDataset(config.data.train, config.data.storage)
    schedule = config.schedule.scaled()
    require_pages_for_all(schedule.batch, world.size)
    _say_what_varies(config, world)
    module = build_step(config, dataset, world.device).train()
    optimizer = build_optimizer(module, schedule)
    first, state = _restore(config, dataset, module, optimizer)
    metrics = Metrics(config.folder, world, config.run.log_every, first)
    metrics.restore(state.get("metrics"))
    writer = CheckpointWriter(config.folder / CHECKPOINTS, config.run.keep, config.run.keep_every)
    source, stopping = signal_source(config, dataset, world.device), Stopping(config.folder, world)
    run = Training(
        step=_distributed(module, world),
        optimizer=optimizer,
        schedule=schedule,
        source=source,
        metrics=metrics,
        world=world,
        first_step=first,
        after_step=_after_step(config, dataset, world, module, optimizer, metrics, writer),
        leaving=stopping.agreed,
        seed=config.run.seed,
    )
    with (
        closing(metrics),
        closing(writer),
        closing(stopping),
        listening(stopping.receive),
        _batches(config, dataset, world, first, source) as batches,
    ):
        train(run, batches)
    return stopping.signal if metrics.last_step < schedule.steps else 0


@contextmanager
def _batches(
    config: RunConfig, dataset: PackedDataset, world: World, first: int, source: SignalSource
) -> Iterator[Iterable[tuple[PageBatch, Any]]]:
    """What this rank reads of the global batches from step ``first`` on; written to the ledger where there is one."""
    schedule, tolerated = config.schedule.scaled(), config.data.bad_samples
    order = CanonicalOrder(dataset.shard_sizes, config.run.seed, schedule.batch)
    places = StepBatches(order, schedule.batch, world.rank, world.size, first, schedule.steps)
    items = PageItems(dataset, config.data.view, config.run.seed, config.views, stand_ins=tolerated > 0)
    loader = page_loader(items, places, config.data.loader_workers, pin=world.device.type == "cuda")
    batches = source.ahead(within_budget(loader, tolerated))
    if not config.run.ledger:
        yield batches
        return
    with closing(Ledger(config.folder, world)) as ledger:
        yield ledger.recorded(batches, first)


def _say_what_varies(config: RunConfig, world: World) -> None:
    if config.detector.norm == "batch" and world.leads:
        log.warning(
            "detector.norm is batch: its statistics are those of one worker's pages, so results depend on how many "
            "workers share schedule.batch %d; frozen, sync (GPU) and group do not",
            config.schedule.batch,
        )


def build_step(config: RunConfig, dataset: PackedDataset, device: torch.device) -> TrainingStep:
    """The detector with its first weights, the method, and the teacher's statistics where one takes part."""
    detector = new_detector(config, dataset_classes(config, dataset))
    if config.run.init is not None:
        anew = start_from(detector, config.run.init)
        log.info("starting from %s; %d tensors start anew: %s", config.run.init, len(anew), ", ".join(anew) or "none")
    statistics = None
    if config.method.name != "none":
        teacher = open_teacher(config)
        identity = statistics_identity(config, teacher, dataset)
        statistics = read_statistics(config.cache_location, identity, config.data.storage).to(device)
        if config.method.inherits and same_anchors(config, teacher):
            taken = inherit(detector, teacher.detector(dataset.num_classes, torch.device("cpu")), config.method)
            log.info("%d tensors inherited from %s", len(taken), teacher.settings.run)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return TrainingStep(detector, config.method, statistics).to(device)


def same_anchors(config: RunConfig, teacher: TeacherRun) -> bool:
    """Whether student and teacher propose from the same anchors, without which a proposal head means something else.

    Raises ConfigError where they do not and ``method.inherit`` asks for the teacher's heads.
    """
    ours, theirs = config.detector, teacher.config.detector
    same = (ours.anchor_sizes, ours.aspect_ratios) == (theirs.anchor_sizes, theirs.aspect_ratios)
    if not same and config.method.inherit:
        raise ConfigError(
            f"method.inherit is true, but the student has anchors {ours.anchor_sizes}, {ours.aspect_ratios} and the "
            f"teacher {theirs.anchor_sizes}, {theirs.aspect_ratios}; give both the same, or leave method.inherit out"
        )
    return same


def signal_source(config: RunConfig, dataset: PackedDataset, device: torch.device) -> SignalSource:
    """Live teacher, cache or nothing, as the config says."""
    if config.method.name == "none" or config.teacher is None:
        return NoTeacher()
    teacher = open_teacher(config)
    if config.teacher.signals == "live":
        describe = config.teacher.store == "descriptors"
        detector = teacher.detector(dataset.num_classes, device)
        return LiveTeacher(detector, config.teacher.nodes, config.method, describe)
    identity = cache_identity(config, teacher, dataset)
    return CachedTeacher(config.cache_location, dataset, identity, config.data.storage)


def _restore(
    config: RunConfig, dataset: PackedDataset, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]]:
    """Steps done and the state of the newest whole checkpoint, which module and optimiser get; (0, {}) without one."""
    checkpoint = newest_checkpoint(config.folder / CHECKPOINTS)
    if checkpoint is None:
        return 0, {}
    state = read_state(checkpoint.state.get("data"), checkpoint.step, str(checkpoint.folder))
    state.require_same_order(_data_state(config, dataset, checkpoint.step), str(checkpoint.folder))
    restore_module(module, load_weights(checkpoint.folder / MODEL), checkpoint.folder)
    restore_optimizer(optimizer, checkpoint)
    return checkpoint.step, checkpoint.state


def _data_state(config: RunConfig, dataset: PackedDataset, step: int) -> DataState:
    batch = config.schedule.batch
    return DataState(dataset=dataset.identity, seed=config.run.seed, batch=batch, position=step * batch)


def _after_step(
    config: RunConfig,
    dataset: PackedDataset,
    world: World,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    metrics: Metrics,
    writer: CheckpointWriter,
) -> Callable[[int, bool], None]:
    def after_step(done: int, leaves: bool) -> None:
        if not leaves and done % config.run.checkpoint_every:
            return
        state = {"data": _data_state(config, dataset, done).model_dump(), "metrics": metrics.state()}
        if world.leads:
            writer.save(snapshot(done, module, optimizer, state))

    return after_step


def _distributed(module: TrainingStep, world: World) -> nn.Module:
    if world.size == 1:
        return module
    devices = [world.device.index] if world.device.type == "cuda" else None
    # An adapter gets no gradient where all terms on features have weight 0.
    adapts = not isinstance(module.adapter, nn.Identity)
    return DistributedDataParallel(module, device_ids=devices, find_unused_parameters=adapts)
