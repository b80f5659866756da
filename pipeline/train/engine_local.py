"""The local engine: this process, or each of torchrun's. No Ray."""

from __future__ import annotations

import torch

from pipeline.config import RunConfig
from pipeline.runs.world import leave, local_world
from pipeline.train.session import run_worker
from pipeline.train.stopping import stopped


def run_local(config: RunConfig) -> None:
    """Train in this process; under torchrun, as one of its workers. Raises StoppedError where a signal came."""
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    world = local_world(config.engine.device)
    number = run_worker(config, world)
    leave(world)
    if number:
        raise stopped(number)
