"""Site files: one YAML file describes a Slurm cluster for all of its users."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graphkd.errors import ConfigError
from pipeline.config.layers import read_yaml_mapping


class Site(BaseModel):
    """A Slurm cluster and the resources that a job takes there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_minutes: int = Field(default=1440, ge=1)
    """Time limit of a job; a longer run continues in the next one."""
    cpus_per_node: int = Field(default=8, ge=1)
    gpus_per_node: int = Field(default=0, ge=0)
    mem_gb: float | None = Field(default=None, gt=0)
    """Memory per node; None uses the partition's default."""
    workers_per_node: int | None = Field(default=None, ge=1)
    """Training workers per node; default: one per GPU, or one."""
    signal_lead_s: int = Field(default=120, ge=10)
    """Seconds between the warning signal, on which training saves and exits, and the time limit."""
    prologue: tuple[str, ...] = ()
    """Shell lines that every task runs first, such as ``module load cuda`` or ``source /shared/venv/bin/activate``."""
    python: str = "python"
    """Python interpreter after the prologue; with a container, inside it."""
    container: tuple[str, ...] = ()
    """Command before the interpreter, such as ``apptainer exec --nv image.sif``."""
    shared: tuple[Path, ...] = ()
    """Folders that all nodes share, besides the run folder."""
    ray_temp: Path = Path("/tmp")
    """Local folder for Ray's sockets and logs; its path must be short."""
    node_address: str | None = None
    """Address of a node for Ray; default: its host name, resolved."""
    interface: str | None = None
    """Network interface for NCCL and Gloo, such as ib0."""
    deadline_s: float = Field(default=300, gt=0)
    """Seconds within which the Ray head and all nodes must be up."""
    preemptions: int = Field(default=50, ge=0)
    """How often a job may be requeued after preemption or its time limit."""
    failures: int = Field(default=3, ge=0)
    """How often a job may be requeued after a crash or node failure."""
    options: dict[str, str] = {}
    """More options of sbatch by their long names."""

    @property
    def workers(self) -> int:
        """Number of training workers per node."""
        return self.workers_per_node or max(1, self.gpus_per_node)

    @property
    def network(self) -> dict[str, str]:
        """Environment variables of processes that communicate with other nodes."""
        return dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), self.interface) if self.interface else {}

    def ray_folder(self, job: str) -> Path:
        """Temporary folder of Ray for one job of this user."""
        return self.ray_temp / f"graphkd-{os.getuid()}-{job}"


def load_site(path: Path) -> Site:
    """Read a site file. Raises ConfigError with every mistake, one per line."""
    content = read_yaml_mapping(path, "site", "configs/sites/")
    try:
        return Site.model_validate(content)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, problem['loc'])) or 'site'}: {problem['msg']}" for problem in error.errors()]
        raise ConfigError("\n".join([f"{path}: {len(lines)} mistakes", *lines])) from error
