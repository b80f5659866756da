"""A few steps on one page in this process, for debugging a config."""

from __future__ import annotations

from pipeline.context import RunContext
from pipeline.core.distributed import World
from pipeline.data.loading.loader import PageDataset, collate
from pipeline.data.loading.order import SampleRef
from pipeline.train.loop import global_mean
from pipeline.train.schedule import build_optimizer
from pipeline.train.signal_source import signal_source
from pipeline.training_step import build_training_step


def smoke(context: RunContext, steps: int = 10) -> list[float]:
    """Train ``steps`` steps on the first page and return their losses. Writes nothing."""
    config, world = context.config, World(device=context.device)
    module = build_training_step(context, world.device).train()
    source = signal_source(context, world.device)
    optimizer = build_optimizer(module, config.schedule)
    pages = PageDataset(context.dataset, config.data.view, config.run.seed, config.views)
    page = collate([pages[SampleRef(0, 0)]]).to(world.device)
    losses = []
    for _ in range(steps):
        loss = global_mean(module(page, source.signals(page)), 1, world)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
