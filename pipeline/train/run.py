"""Running a config from start to end: check, train on its engine, evaluate."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from graphkd.errors import ConfigError
from pipeline.context import RunContext
from pipeline.core.distributed import World, torchrun_world
from pipeline.core.errors import DataError
from pipeline.core.files import write_json
from pipeline.core.run_paths import CHECKPOINTS, EVALUATION, PREDICTIONS, step_folders
from pipeline.data.loading.loader import start_fork_server
from pipeline.data.loading.region_counts import count_regions, describe_losses
from pipeline.evaluate.inference import evaluate
from pipeline.models import best_checkpoint, load_detector
from pipeline.runs.checkpoint import Checkpoint, newest_checkpoint
from pipeline.runs.checkpoint_writer import prune
from pipeline.runs.evaluations import best_step, out_of_patience, read_evaluations
from pipeline.runs.run_folder import discarded_on_error, open_run_folder
from pipeline.train.engines.local import run_local
from pipeline.train.engines.ray import run_ray
from pipeline.train.metrics_watcher import watch_metrics
from pipeline.train.signal_source import open_cache

log = logging.getLogger(__name__)

MAX_COUNTED_SHARDS = 32  # whose indexes are read at start-up to count regions, each with a request if it is remote


def prepare(context: RunContext, allow_changes: bool = False) -> None:
    """Check everything that can be wrong before workers start, and open the run folder.

    Raises the UserError of whatever is missing or does not fit: dataset, classes, teacher, cache, run folder.
    ``allow_changes`` accepts a config that differs from the run's earlier one.
    """
    config = context.config
    context.open_inputs()
    _report_losses(context)
    if context.distills:
        context.check_teacher_classes()
        _check_categorizer(context)
        if context.teacher.settings.signals == "cache":
            open_cache(context)
    context.check_detector()
    with discarded_on_error(config.folder):
        open_run_folder(config, allow_changes)
        if context.distills:
            context.ensure_statistics()


def _report_losses(context: RunContext) -> None:
    """Say once which regions are no targets or are changed. Raises DataError if no region is a target."""
    config = context.config
    counts = count_regions(context.dataset, config.data.view, MAX_COUNTED_SHARDS)
    if counts.regions and not counts.targets and counts.pages == len(context.dataset):
        raise DataError(
            f"none of the {counts.regions.total()} regions of {config.data.train} is a target: all are crowd; pack it "
            "again with --crowd-as-regions"
        )
    nodes = context.teacher.settings.nodes.count if context.distills else None
    notes = describe_losses(counts, nodes=nodes, detections=config.detector.detections_per_page)
    if notes:
        log.warning("%s, %d of %d pages: %s", config.data.train, counts.pages, len(context.dataset), "; ".join(notes))


def _check_categorizer(context: RunContext) -> None:
    method, dataset = context.config.method, context.dataset
    if method.name != "graphkd" or method.graph.categorizer == "none":
        return
    if not any(dataset.text_classes):
        raise ConfigError(
            f"method.graph.categorizer {method.graph.categorizer} separates text from other regions, but none of the "
            f"categories of {dataset.location} ({', '.join(dataset.class_names)}) is flagged as text; pack it with "
            "--text NAME, or set method.graph.categorizer=none"
        )
    teacher = context.teacher
    if method.graph.categorizer == "teacher_class" and not teacher.detector_config.classifies_regions:
        raise ConfigError(
            f"method.graph.categorizer teacher_class needs a teacher that classifies regions, but "
            f"{teacher.settings.run} is a {teacher.detector_config.architecture}; set method.graph.categorizer=moments"
        )


def train_run(
    context: RunContext, progress: Callable[[dict[str, Any]], None] | None = None, allow_changes: bool = False
) -> Checkpoint:
    """Train to the end unless that is done. Return the checkpoint to evaluate and teach with.

    Under torchrun every rank calls it; rank 0 prepares for all.

    Args:
        context: of the run.
        progress: called with lines of the metrics.
        allow_changes: accept a config that differs from the run's earlier one.
    """
    config = context.config
    if config.engine.name == "local" and config.data.loader_workers:
        start_fork_server()
    is_main = config.engine.name == "ray" or int(os.environ.get("RANK", "0")) == 0
    if is_main:
        prepare(context, allow_changes)
    with torchrun_world(config.engine.device) if config.engine.name == "local" else nullcontext() as world:
        if not _all_finished(context, world):
            with watch_metrics(config.folder, progress if is_main else None):
                run_ray(config) if world is None else run_local(context, world)
    if is_main:  # a kill may have prevented it
        best = best_step(read_evaluations(config.folder))
        prune(config.folder / CHECKPOINTS, config.run.keep, config.run.keep_every, best)
    return best_checkpoint(config.folder)


def is_finished(context: RunContext) -> bool:
    """Whether nothing is left to train, nor to evaluate if that is part of training."""
    config, root = context.config, context.config.folder / CHECKPOINTS
    newest, steps = max(step_folders(root), default=0), config.schedule.scaled().steps
    if newest < steps and not out_of_patience(read_evaluations(config.folder, newest), config.run.patience):
        return False  # without reading any checkpoint
    checkpoint = newest_checkpoint(root)
    if checkpoint is None:
        return False
    evaluations = read_evaluations(config.folder, checkpoint.step)
    if out_of_patience(evaluations, config.run.patience):
        return True
    evaluates = config.run.eval_every and config.run.eval_on == "workers"
    unevaluated = evaluates and all(line["step"] != checkpoint.step for line in evaluations)
    return checkpoint.step >= steps and not unevaluated


def _all_finished(context: RunContext, world: World | None) -> bool:
    # Rank 0 gathers after it has prepared; the others wait for it here.
    return (
        is_finished(context)
        if world is None
        else world.all_gather_object(is_finished(context) if world.is_main else True)[0]
    )


def evaluate_run(
    context: RunContext, checkpoint: Checkpoint | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Score a run's checkpoint on ``data.val``, and store metrics and predictions in its folder."""
    config = context.config
    checkpoint = checkpoint or best_checkpoint(config.folder)
    dataset = context.val_of(checkpoint)
    view, device = config.data.view, context.device
    detector = load_detector(config.detector, dataset.num_classes, view.canvas, checkpoint, device)
    metrics, results = evaluate(
        detector,
        dataset,
        view,
        batch_size=config.run.eval_batch,
        device=device,
        limit=config.run.detection_limit,
        progress=progress,
    )
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    metrics |= {"step": checkpoint.step, "parameters": parameters}
    metrics |= {"dataset": dataset.identity, "model": checkpoint.weights_sha256}
    write_json(config.folder / PREDICTIONS, results)
    write_json(config.folder / EVALUATION, metrics)
    return metrics
