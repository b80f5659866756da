"""The jobs that train a config, build its teacher cache, or predict pages at a site."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.records import JobRecord
from cluster.run_config import run_folder, run_name
from cluster.site import Site
from cluster.slurm.script import Submission
from cluster.slurm.spec import JobSpec
from graphkd.errors import ConfigError
from pipeline.config.layers import read_layers


def training_job(
    config: Path, overrides: Sequence[str], site: Site, *, nodes: str = "1", after: tuple[str, ...] = ()
) -> Submission:
    """Job that trains ``config`` on all of its nodes. Raises ConfigError for a wrong config or number of nodes."""
    _check_nodes(nodes)
    content = read_layers(config, overrides)
    command = ("train", str(config.resolve()), *overrides)
    return Submission(name=run_name(content, config), spec=_spec(content, command, site), nodes=nodes, after=after)


def cache_job(
    config: Path,
    overrides: Sequence[str],
    site: Site,
    *,
    tasks: int = 0,
    nodes: str = "1",
    after: tuple[str, ...] = (),
) -> Submission:
    """Job that builds the cache of the student ``config``: an array of ``tasks``, or one Ray cluster if that is 0."""
    content = read_layers(config, overrides)
    command: tuple[str, ...] = ("cache", "build", str(config.resolve()), *overrides)
    if tasks:
        command += ("engine.name=local",)
    spec = _spec(content, command, site, ray=not tasks, trains=False)
    return Submission(name=f"{run_name(content, config)}-cache", spec=spec, nodes=nodes, after=after, tasks=tasks)


def prediction_job(
    model: Path, arguments: Sequence[str], out: Path, site: Site, *, nodes: str = "1", after: tuple[str, ...] = ()
) -> Submission:
    """Job that predicts with ``model`` on all of its nodes; ``arguments`` are inputs and options of the command."""
    _check_nodes(nodes)
    folder = out.absolute()
    command = ("predict", str(model.absolute()), *arguments, "--out", str(folder), "--engine", "ray")
    spec = JobSpec(command=command, run_folder=folder, directory=Path.cwd(), site=site, trains=False)
    return Submission(name="predict", spec=spec, nodes=nodes, after=after)


def resubmission(record: JobRecord) -> Submission:
    """The submission that ``record`` is of."""
    content = dict(record.resubmit)
    nodes, tasks = content.pop("nodes"), content.pop("tasks")
    return Submission(name=record.name, spec=JobSpec.model_validate(content), nodes=nodes, tasks=tasks)


def _check_nodes(nodes: str) -> None:
    if not re.fullmatch(r"\d+(-\d+)?", nodes):
        raise ConfigError(f"--nodes {nodes!r} is neither a number nor a range such as 1-4")


def _spec(
    content: dict[str, Any], command: tuple[str, ...], site: Site, *, ray: bool = True, trains: bool = True
) -> JobSpec:
    folder = run_folder(content).absolute()
    return JobSpec(command=command, run_folder=folder, directory=Path.cwd(), site=site, ray=ray, trains=trains)
