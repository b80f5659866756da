"""What a job is to do, as a JSON file in the run folder that each of its tasks reads."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from cluster.site import Site


class JobSpec(BaseModel):
    """One job: a command of ``graphkd`` on a Ray cluster of the job's nodes, or in each task by itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: tuple[str, ...]
    """Words after ``graphkd``."""
    run_folder: Path
    """Absolute, on a file system that all nodes share."""
    directory: Path
    """Working directory, which relative paths of the config refer to."""
    site: Site
    ray: bool = True
    """Whether the job's nodes form a Ray cluster that the command uses."""
    trains: bool = True
    """Whether the command takes ``engine.workers``."""
