"""Rank, world size, device and collectives of a training worker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.core.errors import StoppedError

CPU = torch.device("cpu")
COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Timeout of collectives; long, because rank 0 may be computing teacher statistics while the others wait."""
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Rank and device of this process, and the number of ranks."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    cpu_group: Any = None
    """gloo group of all ranks, for CPU objects that must not wait for a GPU; None for one rank."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum of ``values``, which is not modified, over all ranks. A collective."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def all_gather_object(self, value: Value) -> list[Value]:
        """Values of all ranks, by rank, on every rank. A collective; for small objects."""
        gathered: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(gathered, value, group=self.cpu_group)
        return gathered

    def gather_object(self, value: Value) -> list[Value]:
        """Values of all ranks, by rank, on rank 0; an empty list on the others. A collective."""
        if self.size == 1:
            return [value]
        collected: list[Any] = [None] * self.size if self.is_main else []
        dist.gather_object(value, collected if self.is_main else None, dst=0, group=self.cpu_group)
        return collected


def create_world(rank: int, size: int, device: torch.device) -> World:
    """Set the CUDA device and create the gloo group; with several ranks, torch.distributed must be initialised.

    A collective.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cpu_group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if size > 1 else None
    return World(rank=rank, size=size, device=device, cpu_group=cpu_group)


@contextmanager
def torchrun_world(device: str = "auto") -> Iterator[World]:
    """Initialise torch.distributed from torchrun's environment variables; a single rank without ``WORLD_SIZE``."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    resolved = resolve_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size > 1:
        dist.init_process_group("nccl" if resolved.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        yield create_world(int(os.environ.get("RANK", "0")), size, resolved)
    except StoppedError:  # raised on all ranks, so that the barrier cannot hang; other errors skip it
        _barrier_and_destroy(size)
        raise
    _barrier_and_destroy(size)


def _barrier_and_destroy(size: int) -> None:
    if size > 1:
        dist.barrier()  # otherwise, the first rank to exit may close connections that others still use
        dist.destroy_process_group()


def resolve_device(device: str, local_rank: int = 0) -> torch.device:
    """Resolve ``auto``, ``cpu`` or ``cuda`` to a device of this machine."""
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
    return CPU
