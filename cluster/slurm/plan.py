"""From a config and a site to jobs: what each is to run, where its folder is, and how it is named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.jobs import JobRecord
from cluster.site import Site
from cluster.slurm.spec import JobSpec
from cluster.slurm.submit import Submission
from graphkd.errors import ConfigError
from pipeline.config.layers import read_layers


def training_job(
    config: Path, overrides: Sequence[str], site: Site, *, nodes: str = "1", after: tuple[str, ...] = ()
) -> Submission:
    """The job that trains ``config`` on all of its nodes."""
    if not re.fullmatch(r"\d+(-\d+)?", nodes):
        raise ConfigError(f"--nodes {nodes!r} is neither a number nor a range such as 1-4")
    content = read_layers(config, overrides)
    command = ("train", str(config.resolve()), *overrides)
    return Submission(name=name_of(content, config), spec=_spec(content, command, site), nodes=nodes, after=after)


def cache_job(
    config: Path,
    overrides: Sequence[str],
    site: Site,
    *,
    tasks: int = 0,
    nodes: str = "1",
    after: tuple[str, ...] = (),
) -> Submission:
    """The job that builds the cache of the student ``config``: an array of tasks, or one job on a Ray cluster."""
    content = read_layers(config, overrides)
    command: tuple[str, ...] = ("cache", "build", str(config.resolve()), *overrides)
    if tasks:
        command += ("engine.name=local",)
    spec = _spec(content, command, site, ray=not tasks, trains=False)
    return Submission(name=f"{name_of(content, config)}-cache", spec=spec, nodes=nodes, after=after, tasks=tasks)


def resubmission(record: JobRecord) -> Submission:
    """The same submission once more."""
    content = dict(record.resubmit)
    nodes, tasks = content.pop("nodes"), content.pop("tasks")
    return Submission(name=record.name, spec=JobSpec.model_validate(content), nodes=nodes, tasks=tasks)


def name_of(content: dict[str, Any], config: Path) -> str:
    """The name of the run in ``config``; raises ConfigError where it has none."""
    name = content.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"{config} has no name; add one, such as name: my-run")
    return name


def folder_of(content: dict[str, Any]) -> Path:
    """The folder of the run, as its config says it."""
    return Path((content.get("run") or {}).get("folder") or Path("runs") / str(content.get("name")))


def _spec(
    content: dict[str, Any], command: tuple[str, ...], site: Site, *, ray: bool = True, trains: bool = True
) -> JobSpec:
    folder = folder_of(content).absolute()
    return JobSpec(command=command, run_folder=folder, directory=Path.cwd(), site=site, ray=ray, trains=trains)
