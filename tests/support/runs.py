"""What several test modules build on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.cache.build import build_cache, local_builders
from pipeline.cache.format import CacheJson
from pipeline.config import RunConfig
from pipeline.context import RunContext
from pipeline.core.distributed import torchrun_world
from pipeline.train.engines.local import run_local

SMALL_DETECTOR: dict[str, Any] = {
    "backbone": "resnet18",
    "norm": "group",
    "fpn_channels": 16,
    "head_width": 32,
    "anchor_sizes": [8, 16, 32, 64, 128],
    "rpn_proposals_before_nms": 60,
    "rpn_proposals": 30,
    "rpn_batch": 32,
    "roi_batch": 16,
}

VIEW = {"view": {"canvas": [128, 96], "shortest_edge": [96, 96]}}
StudentOf = Callable[..., RunConfig]
"""``student_of(cache, **teacher)``: see the fixture."""


def small_run(folder: Path, packed: Path, name: str, **changes: Any) -> dict[str, Any]:
    """The content of a config that trains in seconds; ``changes`` are merged in section by section."""
    content: dict[str, Any] = {
        "name": name,
        "data": {
            "train": str(packed),
            "val": str(packed),
            "loader_workers": 0,
            "view": {"canvas": [128, 96], "shortest_edge": [80, 96]},
        },
        "detector": dict(SMALL_DETECTOR),
        "schedule": {
            "steps": 4,
            "batch": 2,
            "reference_batch": 2,
            "optimizer": "adamw",
            "lr": 1e-3,
            "policy": "one_cycle",
        },
        "engine": {"name": "local", "device": "cpu"},
        "run": {"folder": str(folder / name), "checkpoint_every": 2, "log_every": 1, "eval_batch": 4},
    }
    for section, values in changes.items():
        content[section] = {**content.get(section, {}), **values}
    return content


def train_here(config: RunConfig) -> None:
    """Run the training workers alone, without preparing or evaluating: this process is one of torchrun's ranks."""
    with torchrun_world(config.engine.device) as world:
        run_local(RunContext(config), world)


def build_here(config: RunConfig) -> CacheJson:
    """Build a student's cache in this process."""
    return build_cache(RunContext(config), local_builders(RunContext(config)))
