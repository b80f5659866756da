"""Process group of Ray Train workers on one machine, whose sockets listen on loopback only.

Ray's own has rank 0 listen on every interface, without a token.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from ray.train.backend import Backend, BackendConfig
from torch.distributed import TCPStore

from pipeline.core.distributed import COLLECTIVE_TIMEOUT

LOOPBACK, INTERFACE = "127.0.0.1", "lo"
_listening: list[socket.socket] = []  # of rank 0, until its store takes it over


@dataclass
class LoopbackConfig(BackendConfig):
    """Takes the place of Ray's ``TorchConfig``.

    Args:
        backend: gloo or nccl.
    """

    backend: str = "gloo"

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray calls on each group of workers."""
        return _LoopbackBackend


class _LoopbackBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Join all workers of a new group."""
        import ray

        port, size = worker_group.execute_single(0, _listen), len(worker_group)
        joined = [
            worker_group.execute_single_async(rank, _join, rank, size, port, backend_config.backend)
            for rank in range(size)
        ]
        ray.get(joined)


def _listen() -> int:
    """Listen on a free port of loopback, and return it."""
    server = socket.socket()
    server.bind((LOOPBACK, 0))
    server.listen()
    _listening[:] = [server]
    return int(server.getsockname()[1])


def _join(rank: int, size: int, port: int, backend: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", INTERFACE)
    server = _listening.pop().detach() if rank == 0 else None
    store = TCPStore(LOOPBACK, port, size, rank == 0, timeout=COLLECTIVE_TIMEOUT, master_listen_fd=server)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
