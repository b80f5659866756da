"""A task's place in its job, from the environment that Slurm sets."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from graphkd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SlurmEnv:
    """One task of a job; there is one per node."""

    job: str
    restart: int
    """Number of times that the job was requeued."""
    node: int
    """0-based; node 0 is the head."""
    nodes: int
    name: str
    """Host name of the node."""

    @property
    def is_head(self) -> bool:
        """Whether this task runs the Ray head and the command."""
        return self.node == 0


def read_slurm_env() -> SlurmEnv:
    """Read the environment. Raises ConfigError outside a Slurm job."""
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


def ipv4_address(name: str) -> str:
    """IPv4 address of a host."""
    return socket.gethostbyname(name)
