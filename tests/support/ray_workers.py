"""Training workers for Ray that die or pause."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.runs import checkpoint_writer
from pipeline.runs.metrics import Metrics
from pipeline.train.engines import ray as ray_engine
from tests.support.processes import die_at

train_normally = ray_engine._worker


def dying_worker(given: dict[str, Any]) -> None:
    """A training worker that is killed at a stage, once."""
    stage, call, after, once = given.pop("dies")
    owner, function = {
        "step": (torch.optim.AdamW, "step"),
        "report": (Metrics, "_write"),
        "temporary": (os, "replace"),
        "hash": (checkpoint_writer, "sha256_file"),
        "rename": (Path, "rename"),
        "remove": (shutil, "rmtree"),
    }[stage]
    if not Path(once).exists():
        Path(once).touch()
        die_at(owner, function, call, after)
    train_normally(given)


def slow_worker(given: dict[str, Any]) -> None:
    """A training worker that pauses in every step."""
    step = torch.optim.AdamW.step
    torch.optim.AdamW.step = lambda *a, **k: (time.sleep(0.3), step(*a, **k))[1]  # type: ignore[method-assign,assignment]
    train_normally(given)
