"""A few steps on one page in this process, for debugging a config or a debugger session."""

from __future__ import annotations

from pipeline.config import RunConfig
from pipeline.core.distributed import World, pick_device
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.loader import PageDataset, collate
from pipeline.data.loading.order import SampleRef
from pipeline.train.builders import build_step, signal_source
from pipeline.train.loop import global_mean
from pipeline.train.schedule import build_optimizer


def smoke(config: RunConfig, steps: int = 10) -> list[float]:
    """The loss of each of ``steps`` steps on the first page; nothing is written."""
    world = World(device=pick_device(config.engine.device, 0))
    dataset = PackedDataset(config.data.train, config.data.storage)
    module = build_step(config, dataset, world.device).train()
    source = signal_source(config, dataset, world.device)
    optimizer = build_optimizer(module, config.schedule)
    items = PageDataset(dataset, config.data.view, config.run.seed, config.views)
    page = collate([items[SampleRef(0, 0)]]).to(world.device)
    losses = []
    for _ in range(steps):
        loss = global_mean(module(page, source.signals(page)), 1, world)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
