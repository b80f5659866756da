"""What a cluster is like: one YAML file per site, shared by all who submit there."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graphkd.errors import ConfigError
from pipeline.config.layers import read_yaml_mapping


class Site(BaseModel):
    """A Slurm cluster as jobs of this project see it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_minutes: int = Field(default=1440, ge=1)
    """Wall time of a job; a run that needs more goes on in the next."""
    cpus_per_node: int = Field(default=8, ge=1)
    gpus_per_node: int = Field(default=0, ge=0)
    mem_gb: float | None = Field(default=None, gt=0)
    """Memory of a node; None takes the partition's default."""
    workers_per_node: int | None = Field(default=None, ge=1)
    """Training workers of a node; by default one per GPU, or one."""
    signal_lead_s: int = Field(default=120, ge=10)
    """Seconds before the time limit at which training is asked to save and leave."""
    prologue: tuple[str, ...] = ()
    """Shell lines that every task runs first, such as ``module load cuda`` or ``source /shared/venv/bin/activate``."""
    python: str = "python"
    """Interpreter of a task, as found after the prologue; with a container, inside it."""
    container: tuple[str, ...] = ()
    """Words before the interpreter, such as ``apptainer exec --nv image.sif``."""
    shared: tuple[Path, ...] = ()
    """Folders that all nodes must see alike; the run folder is one of them anyway."""
    ray_temp: Path = Path("/tmp")
    """Folder of each node for Ray's sockets and logs, whose paths must be short."""
    node_address: str | None = None
    """Address of a node for Ray; by default what its host name resolves to."""
    interface: str | None = None
    """Network interface for NCCL and gloo, such as ib0."""
    deadline_s: float = Field(default=300, gt=0)
    """Within which the head and all nodes must have come up."""
    preemptions: int = Field(default=50, ge=0)
    """Times that a job may be queued again after preemption or its time limit."""
    failures: int = Field(default=3, ge=0)
    """Times that it may be queued again after a crash or the failure of a node."""
    options: dict[str, str] = {}
    """More options of sbatch by their long names."""

    @property
    def workers(self) -> int:
        """Training workers of a node."""
        return self.workers_per_node or max(1, self.gpus_per_node)

    @property
    def network(self) -> dict[str, str]:
        """Environment of processes that speak to other nodes."""
        return dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), self.interface) if self.interface else {}

    def ray_folder(self, job: str) -> Path:
        """Ray's temporary folder of one job of this user."""
        return self.ray_temp / f"graphkd-{os.getuid()}-{job}"


def load_site(path: Path) -> Site:
    """Read a site file; raises ConfigError with every mistake, one per line."""
    content = read_yaml_mapping(path, "site", "configs/sites/")
    try:
        return Site.model_validate(content)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, problem['loc'])) or 'site'}: {problem['msg']}" for problem in error.errors()]
        raise ConfigError("\n".join([f"{path}: {len(lines)} mistakes", *lines])) from error
