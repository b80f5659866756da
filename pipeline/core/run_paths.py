"""Names of all files in a run folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

RunName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Name of a run, which becomes part of file names and of scripts."""

CONFIG = "config.yaml"
"""Resolved config."""
CONFIG_CHANGES = "changes.jsonl"
"""Differences to earlier configs of the run, from ``--allow-changes``."""
CHECKPOINTS = "checkpoints"
"""Folder of checkpoints."""
METRICS = "metrics.jsonl"
"""One line per logged step."""
TENSORBOARD = "tensorboard"
"""Folder of TensorBoard events."""
EVALUATIONS = "evaluations.jsonl"
"""One line per evaluation during training."""
EVALUATION = "eval.json"
"""COCO metrics of the finished run."""
PREDICTIONS = "predictions.json"
"""COCO results of the finished run."""
START_HISTORY = "starts.jsonl"
"""Starts and stops of training."""
LEDGER = "ledger"
"""Folder with the samples of every step."""
LOG = "log.txt"
"""Log of rank 0."""
LOCK = ".training"
"""Lock file of the process that trains the run."""
STOP_REQUEST = ".stop"
"""Signal number that a driver passes to workers which receive no signals."""
RAY = "ray"
"""Folder of Ray Train's own records, which are never read."""
REPORT = "report.html"
LATENCY = "latency.json"
"""Figures of the last ``graphkd bench``; also of a bundle."""
TEACHER_CACHE = "cache"
"""Default folder of a teacher's statistics and cached signals, in the teacher's run folder."""
JOBS = "jobs.jsonl"
"""Submitted jobs."""
JOB_STARTS = "lives.jsonl"
"""Starts and ends of Slurm jobs, which their restart budget counts."""
CLUSTER = "cluster"
"""Folder in which the nodes of a job find each other."""
SLURM = "cluster/slurm"
"""Folder of job specifications and Slurm logs."""
WRITTEN_BY_JOBS = (CLUSTER, JOBS, JOB_STARTS)
"""Entries that a submitted run has before it trains."""

_STEP_FOLDER = re.compile(r"step-(\d{8})")


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint of ``step``."""
    return checkpoints / f"step-{step:08d}"


def step_folders(checkpoints: Path) -> dict[int, Path]:
    """Checkpoint folders by step, oldest first, complete or not."""
    names = sorted(path.name for path in checkpoints.iterdir()) if checkpoints.is_dir() else []
    matches = [(_STEP_FOLDER.fullmatch(name), name) for name in names]
    return {int(match[1]): checkpoints / name for match, name in matches if match}
