"""Builders on Ray: actors that load the teacher once, one per GPU or per share of the CPUs, as many as the cluster has.

Each has one shard in flight and gets the next when it is done, so nothing piles up; files go straight to the cache
folder, which all nodes must see. An actor that dies is started again and does its shard anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from graphkd.errors import ConfigError
from pipeline.cache.build import Builders
from pipeline.cache.builder import Progress
from pipeline.config import RunConfig
from pipeline.core.ray_session import ray_session, to_user_error
from pipeline.data.format.dataset import PackedDataset

RESTARTS = 3  # of one builder, and tries of one shard
CPU_THREADS = 4  # of a builder without a GPU


@dataclass(frozen=True, slots=True)
class Share:
    """How the cluster is divided among builders."""

    builders: int
    threads: int
    gpus: int
    """Of each builder."""


def shares(student: RunConfig, nodes: list[dict[str, float]], shards: int, workers: int) -> Share:
    """Divide a cluster whose nodes have these resources; ``workers`` is the most builders wanted, 0 for all that fit.

    Raises ConfigError where no node has ``engine.threads`` CPUs.
    """
    cpus = [max(1, int(node.get("CPU", 1))) for node in nodes]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    most, wanted = min(shards, workers or shards), student.engine.threads
    if wanted > max(cpus):
        raise ConfigError(f"engine.threads {wanted} is more than the {max(cpus)} CPUs of the largest node; give fewer")
    if sum(gpus) and student.engine.device != "cpu":
        per_gpu = min(count // own for count, own in zip(cpus, gpus, strict=True) if own)
        return Share(min(sum(gpus), most), wanted or max(1, per_gpu), 1)
    threads = wanted or min(CPU_THREADS, *cpus)
    builders = max(1, min(sum(count // threads for count in cpus), most))
    if not wanted and builders <= len(cpus):  # few builders: each gets what its node has
        threads = min(cpus)
    return Share(builders, threads, 0)


class RayBuilders:
    """A pool of actors."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def statistics(self, progress: Progress) -> None:
        """Have the first actor compute them."""
        import ray

        progress(0, 1)
        with _own_errors():
            ray.get(self._actors[0].statistics.remote())
        progress(1, 1)

    def build(self, shards: Sequence[int], written: Callable[[int], None]) -> Iterator[tuple[int, bool]]:
        """Results as they come; rows are told of by whole files only."""
        from ray.util import ActorPool

        with _own_errors():
            pool: Any = ActorPool(self._actors)
            yield from pool.map_unordered(lambda actor, shard: actor.build.remote(shard), list(shards))


@contextmanager
def ray_builders(student: RunConfig, workers: int = 0) -> Iterator[Builders]:
    """Builders on the cluster that RAY_ADDRESS names, or on this machine; raises ConfigError where Ray is missing."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed; pip install 'graphkd[ray]', or give --engine local") from error
    shards = len(PackedDataset(student.data.train, student.data.storage).shard_sizes)
    with ray_session(workers or 1):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = shares(student, nodes, shards, workers)
        actor = ray.remote(_Builder).options(
            num_cpus=share.threads if not share.gpus else 1,
            num_gpus=share.gpus,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )
        config = student.model_dump(mode="json")
        actors: list[Any] = [actor.remote(config, os.getcwd(), share.threads) for _ in range(share.builders)]
        try:
            yield RayBuilders(actors)
        finally:
            for handle in actors:
                ray.kill(handle)


@contextmanager
def _own_errors() -> Iterator[None]:
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise to_user_error(error, "building the cache") from error


class _Builder:
    """A builder in an actor of its own."""

    def __init__(self, config: dict[str, Any], directory: str, threads: int) -> None:
        import torch

        from pipeline.cache.builder import CacheBuilder
        from pipeline.config import resolve
        from pipeline.core.distributed import pick_device

        os.chdir(directory)
        torch.set_num_threads(threads)
        student = resolve(config, "the submitted config")
        self.builder = CacheBuilder(student, pick_device(student.engine.device, 0))

    def statistics(self) -> None:
        """Compute the teacher's statistics where they are not there yet."""
        self.builder.statistics()

    def build(self, shard: int) -> tuple[int, bool]:
        """Make one file."""
        return shard, self.builder.build(shard)
