"""Side evaluation: another process evaluates each newest checkpoint until the run ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.context import RunContext
from pipeline.core.errors import CheckpointError
from pipeline.core.run_paths import CHECKPOINTS, step_folders
from pipeline.evaluate.inference import evaluate
from pipeline.models import load_detector
from pipeline.runs.checkpoint import Checkpoint, newest_checkpoint
from pipeline.runs.checkpoint_writer import in_use_marker
from pipeline.runs.evaluations import best_step, out_of_patience, read_evaluations, write_evaluation

POLL_S = 2.0
Progress = Callable[[int, int], None]


def watch(
    context: RunContext,
    on_evaluation: Callable[[dict[str, Any]], None],
    progress: Progress | None = None,
    poll_s: float = POLL_S,
) -> None:
    """Evaluate each newest complete checkpoint, until the run's last one is evaluated.

    Evaluations are added to the run's, by which training finds its best checkpoint and stops early. The best checkpoint
    so far is marked as in use, so that training keeps it.

    Args:
        context: of the run.
        on_evaluation: called with each new line.
        progress: called with (pages done, pages in total).
        poll_s: seconds between checks for new checkpoints.
    """
    folder, steps = context.config.folder, context.config.schedule.scaled().steps
    root, patience = folder / CHECKPOINTS, context.config.run.patience
    while True:
        newest = max(step_folders(root), default=0)
        evaluations = read_evaluations(folder)
        known = {line["step"] for line in evaluations}
        # Opening a checkpoint reads all of it, so only new ones are opened.
        checkpoint = newest_checkpoint(root) if newest and newest not in known else None
        if checkpoint is not None and checkpoint.step not in known:
            in_use_marker(root, checkpoint.step).touch()
            try:
                line = _evaluate(context, checkpoint, progress)
            except CheckpointError:
                continue  # pruned before it was marked; there is a newer one
            write_evaluation(folder, line)
            _mark_best(root, best_step(read_evaluations(folder)))
            on_evaluation(line)
        elif newest in known and (newest >= steps or out_of_patience(evaluations, patience)):
            return
        else:
            time.sleep(poll_s)


def _evaluate(context: RunContext, checkpoint: Checkpoint, progress: Progress | None) -> dict[str, Any]:
    dataset, view = context.val_of(checkpoint), context.config.data.view
    detector = load_detector(context.config.detector, dataset.num_classes, view.canvas, checkpoint, context.device)
    run = context.config.run
    metrics, _ = evaluate(
        detector,
        dataset,
        view,
        batch_size=run.eval_batch,
        device=context.device,
        limit=run.detection_limit,
        progress=progress,
    )
    return {"step": checkpoint.step, **metrics}


def _mark_best(root: Path, best: int | None) -> None:
    """Mark only the best checkpoint as in use. Training learns which one it is when it saves the next."""
    for old in root.glob(".in-use-*"):
        if best is None or old != in_use_marker(root, best):
            old.unlink(missing_ok=True)
    if best is not None:
        in_use_marker(root, best).touch()
