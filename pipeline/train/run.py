"""Running a whole config: prepare, train on its engine, evaluate."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from graphkd.errors import ConfigError
from pipeline.cache.reader import CachedTeacher
from pipeline.config import RunConfig
from pipeline.core.distributed import World, local_world, pick_device
from pipeline.core.files import write_json
from pipeline.data.format.dataset import PackedDataset
from pipeline.evaluate.inference import evaluate
from pipeline.models import CHECKPOINTS, best_checkpoint, check_num_classes, load_detector
from pipeline.runs.checkpoint import Checkpoint, newest_checkpoint
from pipeline.runs.checkpoint_writer import prune
from pipeline.runs.evaluations import best_step, out_of_patience, read_evaluations
from pipeline.runs.folder import create_run_folder, store_config
from pipeline.runs.start_history import run_lock
from pipeline.teacher.identity import TeacherRun, cache_identity, open_teacher
from pipeline.teacher.statistics import ensure_statistics
from pipeline.train.engines.local import run_local
from pipeline.train.engines.ray import run_ray
from pipeline.train.progress import watch_metrics

EVALUATION_FILE = "eval.json"
PREDICTIONS_FILE = "predictions.json"


def prepare(config: RunConfig, allow_changes: bool = False) -> None:
    """Check everything that can be wrong before workers start, and open the run folder.

    With ``allow_changes`` a run goes on under a config that computes something else. Raises the UserError of whatever
    is missing or does not fit: dataset, classes, teacher, cache, run folder.
    """
    dataset = PackedDataset(config.data.train, config.data.storage)
    check_num_classes(config, dataset)
    if config.data.val is not None:
        check_num_classes(config, PackedDataset(config.data.val, config.data.storage))
    if config.run.init is not None:
        best_checkpoint(config.run.init)
    if config.method.name != "none" and config.teacher is not None:
        _require_text_flags(config, dataset)
        teacher = open_teacher(config)
        _require_categorizer(config, teacher)
        if config.teacher.signals == "cache":
            identity = cache_identity(config, teacher, dataset)
            CachedTeacher(config.cache_location, dataset, identity, config.data.storage)
    with run_lock(create_run_folder(config)):
        store_config(config, allow_changes)
    if config.method.name != "none" and config.teacher is not None:
        device = pick_device(config.engine.device, 0)
        ensure_statistics(config, open_teacher(config), dataset, device)


def _require_text_flags(config: RunConfig, dataset: PackedDataset) -> None:
    method = config.method
    if method.name == "graphkd" and method.graph.categorizer != "none" and not any(dataset.text_classes):
        raise ConfigError(
            f"method.graph.categorizer {method.graph.categorizer} sorts text from the rest, but none of the categories "
            f"of {dataset.location} ({', '.join(dataset.class_names)}) is flagged as text; pack it with --text "
            "NAME, or set method.graph.categorizer=none"
        )


def _require_categorizer(config: RunConfig, teacher: TeacherRun) -> None:
    method, detector = config.method, teacher.config.detector
    if method.name == "graphkd" and method.graph.categorizer == "teacher_class" and not detector.classifies_regions:
        raise ConfigError(
            f"method.graph.categorizer teacher_class needs a teacher that classifies regions, but "
            f"{teacher.settings.run} is a {detector.architecture}; set method.graph.categorizer=moments"
        )


def train_run(
    config: RunConfig,
    progress: Callable[[dict[str, Any]], None] | None = None,
    allow_changes: bool = False,
) -> Checkpoint:
    """Train to the end, or find that it was reached; ``progress`` gets lines of the metrics.

    Under torchrun every rank calls it; the first prepares for all. Gives the checkpoint that the run is judged by.
    """
    is_main = config.engine.name == "ray" or int(os.environ.get("RANK", "0")) == 0
    if is_main:
        prepare(config, allow_changes)
    with local_world(config.engine.device) if config.engine.name == "local" else nullcontext() as world:
        if not _agreed_finished(config, world):
            with watch_metrics(config.folder, progress if is_main else None):
                run_ray(config) if world is None else run_local(config, world)
    if is_main:  # where a kill came before that
        best = best_step(read_evaluations(config.folder))
        prune(config.folder / CHECKPOINTS, config.run.keep, config.run.keep_every, best)
    return best_checkpoint(config.folder)


def is_finished(config: RunConfig) -> bool:
    """Whether nothing is left to train, nor to evaluate where that is done during training."""
    checkpoint = newest_checkpoint(config.folder / CHECKPOINTS)
    if checkpoint is None:
        return False
    evaluations = read_evaluations(config.folder, checkpoint.step)
    if out_of_patience(evaluations, config.run.patience):
        return True
    in_training = config.run.eval_every and config.run.eval_on == "workers"
    owes = in_training and all(line["step"] != checkpoint.step for line in evaluations)
    return checkpoint.step >= config.schedule.scaled().steps and not owes


def _agreed_finished(config: RunConfig, world: World | None) -> bool:
    # The first rank's gather comes after it has prepared; the others wait for it here.
    return is_finished(config) if world is None else world.gather(is_finished(config) if world.is_main else True)[0]


def evaluate_run(
    config: RunConfig,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score a run's checkpoint on ``data.val`` and store ``eval.json`` and ``predictions.json`` in its folder."""
    assert config.data.val is not None
    checkpoint = checkpoint or best_checkpoint(config.folder)
    dataset = PackedDataset(config.data.val, config.data.storage)
    device = pick_device(config.engine.device, 0)
    detector = load_detector(config, check_num_classes(config, dataset), checkpoint, device)
    view, batch = config.data.view, config.run.eval_batch
    figures, results = evaluate(detector, dataset, view, batch=batch, device=device, progress=progress)
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    figures |= {"step": checkpoint.step, "parameters": parameters}
    figures |= {"dataset": dataset.identity, "model": checkpoint.weights_sha256}
    write_json(config.folder / PREDICTIONS_FILE, results)
    write_json(config.folder / EVALUATION_FILE, figures)
    return figures
