"""What the tasks of a job run: a JSON file in the run folder that each of them reads."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from cluster.site import Site


class JobSpec(BaseModel):
    """A ``graphkd`` command, run once on a Ray cluster of the job's nodes, or by every task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: tuple[str, ...]
    """Arguments of ``graphkd``."""
    run_folder: Path
    """Absolute, on a file system that all nodes share."""
    directory: Path
    """Working directory, which relative paths of the config refer to."""
    site: Site
    ray: bool = True
    """Whether the nodes form a Ray cluster, on which node 0 runs the command."""
    trains: bool = True
    """Whether the command takes ``engine.workers``."""
