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

    def sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over all ranks. A collective."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, value: Value) -> list[Value]:
        """Values of all ranks, by rank, on every rank. A collective; for small objects."""
        gathered: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(gathered, value, group=self.cpu_group)
        return gathered

    def collect(self, value: Value) -> list[Value]:
        """Values of all ranks, by rank, on rank 0; an empty list on the others. A collective."""
        if self.size == 1:
            return [value]
        collected: list[Any] = [None] * self.size if self.is_main else []
        dist.gather_object(value, collected if self.is_main else None, dst=0, group=self.cpu_group)
        return collected


def init_distributed(rank: int, size: int, device: torch.device) -> World:
    """World of a process whose process group, if any, is initialised. A collective."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cpu_group = dist.new_group(backend="gloo") if size > 1 else None
    return World(rank=rank, size=size, device=device, cpu_group=cpu_group)


@contextmanager
def local_world(device: str = "auto") -> Iterator[World]:
    """World that torchrun's environment variables describe, or of this process alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    where = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size > 1:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        yield init_distributed(int(os.environ.get("RANK", "0")), size, where)
    except StoppedError:  # raised by all ranks together, unlike other errors
        _leave(size)
        raise
    _leave(size)


def _leave(size: int) -> None:
    if size > 1:
        dist.barrier()  # a rank that exits first can break the last messages of the others
        dist.destroy_process_group()


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """Resolve ``auto``, ``cpu`` or ``cuda`` to a device of this machine."""
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
    return CPU
