"""The local engine: this process, or each process of torchrun. Works without Ray."""

from __future__ import annotations

import torch

from pipeline.context import RunContext
from pipeline.core.distributed import World
from pipeline.train.shutdown import stopped_error
from pipeline.train.worker import run_worker


def run_local(context: RunContext, world: World) -> None:
    """Train in this process, as one of ``world``'s ranks. Raises StoppedError if a signal stopped training."""
    if context.config.engine.threads:
        torch.set_num_threads(context.config.engine.threads)
    number = run_worker(context, world)
    if number:
        raise stopped_error(number)
