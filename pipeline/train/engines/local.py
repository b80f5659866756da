"""The local engine: this process, or each of torchrun's. No Ray."""

from __future__ import annotations

import torch

from pipeline.config import RunConfig
from pipeline.core.distributed import World, local_world
from pipeline.train.shutdown import stopped_error
from pipeline.train.worker import run_worker


def run_local(config: RunConfig, world: World | None = None) -> None:
    """Train in this process as one of ``world``'s, or of torchrun's. Raises StoppedError where a signal came."""
    if world is None:
        with local_world(config.engine.device) as own:
            run_local(config, own)
        return
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    number = run_worker(config, world)
    if number:
        raise stopped_error(number)
