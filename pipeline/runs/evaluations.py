"""Evaluations during training, one JSON line each. They decide the best checkpoint and early stopping.

Both decisions depend only on the lines up to a step, so a killed run repeats them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core.jsonl import append_jsonl, read_jsonl
from pipeline.core.run_paths import EVALUATIONS

Evaluations = list[dict[str, Any]]
"""By step: ``step`` and the metrics of :func:`pipeline.evaluate.coco_ap.score`."""


def read_evaluations(folder: Path, up_to: int | None = None) -> Evaluations:
    """A run's evaluations by step. If a step was evaluated twice, the later line counts."""
    by_step = {int(line["step"]): line for line in read_jsonl(folder / EVALUATIONS) if "step" in line}
    return [by_step[step] for step in sorted(by_step) if up_to is None or step <= up_to]


def write_evaluation(folder: Path, line: dict[str, Any]) -> None:
    """Append one evaluation."""
    append_jsonl(folder / EVALUATIONS, line)


def best_step(evaluations: Evaluations) -> int | None:
    """Step of the highest AP, the first of equals; None without evaluations."""
    return None if not evaluations else int(max(evaluations, key=lambda line: line["ap"])["step"])


def out_of_patience(evaluations: Evaluations, patience: int) -> bool:
    """Whether the last ``patience`` evaluations brought no higher AP. Never with patience 0."""
    best = best_step(evaluations)
    if not patience or best is None:
        return False
    return sum(line["step"] > best for line in evaluations) >= patience
