"""The place of this process among the training workers."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Rank, number of ranks, and the device of this one."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def leads(self) -> bool:
        """Whether this rank writes files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over all ranks; a collective where there are several."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values


def local_world(device: str = "auto") -> World:
    """The world that torchrun describes in the environment, or this one process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    where = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    return World(rank=int(os.environ.get("RANK", "0")), size=size, device=where)


def leave(world: World) -> None:
    """End together with the other ranks: one that leaves first can make the others' last messages fail."""
    if world.size > 1:
        dist.barrier()
        dist.destroy_process_group()


def pick_device(device: str, local_rank: int) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` stands for on this machine."""
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
    return torch.device("cpu")
