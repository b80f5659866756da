"""Where a task runs, as Slurm says in its environment."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from graphkd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SlurmEnv:
    """One task's place in its job."""

    job: str
    restart: int
    node: int
    """0-based; node 0 has the head."""
    nodes: int
    name: str
    """Of the node."""

    @property
    def is_head(self) -> bool:
        """Whether this task has the head and the driver."""
        return self.node == 0


def read_slurm_env() -> SlurmEnv:
    """Read it from the environment; raises ConfigError outside a Slurm job."""
    try:
        return SlurmEnv(
            job=os.environ["SLURM_JOB_ID"],
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            node=int(os.environ["SLURM_NODEID"]),
            nodes=int(os.environ["SLURM_JOB_NUM_NODES"]),
            name=os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        )
    except KeyError as error:
        raise ConfigError(f"{error} is not set; this runs inside a Slurm job, see graphkd submit slurm") from error


def address_of(name: str) -> str:
    """The IPv4 address of a node."""
    return socket.gethostbyname(name)
