"""Short runs that tests kill and resume, and all that must be the same afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.config import RunConfig, resolve
from pipeline.context import RunContext
from pipeline.runs.checkpoint import load_weights, newest_checkpoint
from pipeline.runs.ledger import read_ledger
from pipeline.runs.metrics import read_metrics
from pipeline.train.run import train_run
from tests.support.runs import small_run

STEPS = 6
Outcome = tuple[dict[str, torch.Tensor], Any, list[dict[str, Any]], dict[int, list[int]]]


def configured(root: Path, packed: Path, name: str, kind: str, **engine: Any) -> RunConfig:
    """A teacher, or a student with a live or cached one; a log line covers steps from before and after a checkpoint."""
    changes: dict[str, Any] = {
        "schedule": {"steps": STEPS},
        "run": {"ledger": True, "log_every": 3},
        "engine": {"threads": 1, **engine},
        "data": {"val": None},
    }
    if kind != "teacher":
        nodes = {"count": 8, "min_score": 0.0}
        teacher = {"run": str(root / "teacher-unkilled"), "statistics_pages": 4, "nodes": nodes, "signals": kind}
        changes |= {"method": {"name": "graphkd"}, "teacher": teacher}
    return resolve(small_run(root, packed, name, **changes), name)


def outcome(config: RunConfig) -> Outcome:
    """Weights, optimiser, metrics without times, and ledger of a finished run."""
    checkpoint = newest_checkpoint(config.folder / "checkpoints")
    assert checkpoint is not None and checkpoint.step == config.schedule.steps
    optimizer = torch.load(checkpoint.folder / "optimizer.pt", weights_only=True)
    lines = [{name: line[name] for name in ("step", "loss", "terms", "lr")} for line in read_metrics(config.folder)]
    return load_weights(checkpoint.folder / "model.safetensors"), optimizer, lines, read_ledger(config.folder)


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def check(config: RunConfig, expected: Outcome) -> None:
    """Train to the end: everything is that of the run that was not killed, and nothing else is left behind."""
    train_run(RunContext(config))
    assert same(outcome(config), expected)
    left = [path.name for path in (config.folder / "checkpoints").iterdir()]
    assert sorted(left) == [f"step-{step:08d}" for step in (STEPS - 2, STEPS)]
    assert not list(config.folder.rglob("*.tmp")) and not list(config.folder.glob(".stop"))
