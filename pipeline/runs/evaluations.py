"""Evaluations during training, one JSON line each: they say which checkpoint is the best and whether it is enough.

Both are functions of the lines up to a step, so a run that was killed comes to the same decisions again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.core.files import append_line
from pipeline.core.jsonl import read_jsonl

EVALUATIONS_FILE = "evaluations.jsonl"
Evaluations = list[dict[str, Any]]
"""By step: ``step`` and the figures of :func:`pipeline.evaluate.coco_ap.score`."""


def read_evaluations(folder: Path, up_to: int | None = None) -> Evaluations:
    """A run's evaluations by step; of a step that was evaluated again the later one counts."""
    by_step = {int(line["step"]): line for line in read_jsonl(folder / EVALUATIONS_FILE) if "step" in line}
    return [by_step[step] for step in sorted(by_step) if up_to is None or step <= up_to]


def write_evaluation(folder: Path, line: dict[str, Any]) -> None:
    """Add one evaluation."""
    append_line(folder / EVALUATIONS_FILE, json.dumps(line))


def best_step(evaluations: Evaluations) -> int | None:
    """The step of the best AP, the first where several are equal; None without evaluations."""
    return None if not evaluations else int(max(evaluations, key=lambda line: line["ap"])["step"])


def out_of_patience(evaluations: Evaluations, patience: int) -> bool:
    """Whether the last ``patience`` evaluations brought no better AP; never with 0."""
    best = best_step(evaluations)
    return (
        bool(patience) and sum(line["step"] > best for line in evaluations) >= patience if best is not None else False
    )
