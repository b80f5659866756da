"""Evaluation beside training: another process evaluates the newest checkpoint again and again until the run ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pipeline.config import RunConfig
from pipeline.core.distributed import pick_device
from pipeline.core.errors import CheckpointError
from pipeline.data.format.dataset import PackedDataset
from pipeline.evaluate.inference import evaluate
from pipeline.models import CHECKPOINTS, check_num_classes, load_detector
from pipeline.runs.checkpoint import Checkpoint, newest_checkpoint, step_folders
from pipeline.runs.checkpoint_writer import in_use_marker
from pipeline.runs.evaluations import best_step, out_of_patience, read_evaluations, write_evaluation

POLL_S = 2.0
Progress = Callable[[int, int], None]


def watch(
    config: RunConfig,
    on_evaluation: Callable[[dict[str, Any]], None],
    progress: Progress | None = None,
    poll_s: float = POLL_S,
) -> None:
    """Evaluate the newest whole checkpoint whenever there is a new one, until the run's last is evaluated.

    Each evaluation is added to the run's, from which training knows its best checkpoint and when to end early;
    ``on_evaluation`` gets its line. The best one so far is pinned, so that training keeps it.
    """
    root, steps = config.folder / CHECKPOINTS, config.schedule.scaled().steps
    while True:
        newest = max((int(folder.name.removeprefix("step-")) for folder in step_folders(root)), default=0)
        evaluations = read_evaluations(config.folder)
        known = {line["step"] for line in evaluations}
        # Looking at one reads all of it, which is worth it only for one that is new.
        checkpoint = newest_checkpoint(root) if newest and newest not in known else None
        if checkpoint is not None and checkpoint.step not in known:
            in_use_marker(root, checkpoint.step).touch()
            try:
                line = _evaluated(config, checkpoint, progress)
            except CheckpointError:
                continue  # dropped before it was pinned; there is a newer one
            write_evaluation(config.folder, line)
            _pin_best(config)
            on_evaluation(line)
        elif newest in known and (newest >= steps or out_of_patience(evaluations, config.run.patience)):
            return
        else:
            time.sleep(poll_s)


def _evaluated(config: RunConfig, checkpoint: Checkpoint, progress: Progress | None) -> dict[str, Any]:
    assert config.data.val is not None
    dataset, device = PackedDataset(config.data.val, config.data.storage), pick_device(config.engine.device, 0)
    detector = load_detector(config, check_num_classes(config, dataset), checkpoint, device)
    batch, view = config.run.eval_batch, config.data.view
    figures, _ = evaluate(detector, dataset, view, batch=batch, device=device, progress=progress)
    return {"step": checkpoint.step, **figures}


def _pin_best(config: RunConfig) -> None:
    """Training reads which is the best when it saves; until then the pin says so."""
    root, best = config.folder / CHECKPOINTS, best_step(read_evaluations(config.folder))
    for old in root.glob(".in-use-*"):
        if best is None or old != in_use_marker(root, best):
            old.unlink(missing_ok=True)
    if best is not None:
        in_use_marker(root, best).touch()
