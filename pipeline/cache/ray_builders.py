"""Builders on Ray: actors that load the teacher once, one per GPU or share of CPUs, as many as fit.

Each builds one shard at a time, so nothing piles up. Files go straight to the cache folder, which all nodes must see.
An actor that dies is restarted and repeats its shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from graphkd.errors import ConfigError
from pipeline.cache.build import Builders
from pipeline.cache.builder import Progress
from pipeline.context import RunContext
from pipeline.core.ray_session import ray_session, set_ray_environment, to_user_error
from pipeline.core.ray_share import divide_cluster

MAX_RESTARTS = 3  # of one builder, and of one shard


class RayBuilders:
    """A pool of builder actors."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def statistics(self, progress: Progress) -> None:
        """Compute the statistics on the first actor."""
        import ray

        progress(0, 1)
        with _user_errors():
            ray.get(self._actors[0].statistics.remote())
        progress(1, 1)

    def build(self, shards: Sequence[int], written: Callable[[int], None]) -> Iterator[tuple[int, bool]]:
        """Yield results as files complete; progress within files is not reported."""
        from ray.util import ActorPool

        with _user_errors():
            pool: Any = ActorPool(self._actors)
            yield from pool.map_unordered(lambda actor, shard: actor.build.remote(shard), list(shards))


@contextmanager
def ray_builders(context: RunContext, workers: int = 0) -> Iterator[Builders]:
    """Builders on the cluster that RAY_ADDRESS names, or on a local one. Raises ConfigError if Ray is missing."""
    set_ray_environment()
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed; pip install 'graphkd[ray]', or give --engine local") from error
    with ray_session(workers or 1):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        engine, shards = context.config.engine, len(context.dataset.shard_sizes)
        share = divide_cluster(nodes, shards, threads=engine.threads, device=engine.device, actors=workers)
        actor = ray.remote(_Builder).options(
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )
        config = context.config.model_dump(mode="json")
        actors: list[Any] = [actor.remote(config, os.getcwd(), share.threads) for _ in range(share.actors)]
        try:
            yield RayBuilders(actors)
        finally:
            for handle in actors:
                ray.kill(handle)


@contextmanager
def _user_errors() -> Iterator[None]:
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise to_user_error(error, "building the cache") from error


class _Builder:
    """A builder in an actor."""

    def __init__(self, config: dict[str, Any], directory: str, threads: int) -> None:
        import torch

        from pipeline.cache.builder import CacheBuilder
        from pipeline.config import resolve

        os.chdir(directory)
        torch.set_num_threads(threads)
        self.context = RunContext(resolve(config, "the submitted config"))
        self.builder = CacheBuilder(self.context)

    def statistics(self) -> None:
        """Compute the teacher's statistics unless they exist."""
        self.context.ensure_statistics()

    def build(self, shard: int) -> tuple[int, bool]:
        """Build one file."""
        return shard, self.builder.build(shard)
