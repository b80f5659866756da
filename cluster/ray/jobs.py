"""Submitting to a Ray cluster by its job API: the config goes along, data and runs stay where they are."""

from __future__ import annotations

import asyncio
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from tenacity import Retrying, retry_if_exception_message, stop_after_delay, wait_fixed

from cluster.jobs import JobRecord, record_job
from cluster.slurm.plan import folder_of, name_of
from graphkd.errors import ConfigError, UserError
from pipeline.config.layers import read_layers
from pipeline.core.files import write_atomic

AGENT_WAIT_S = 60
STOP_WAIT_S = 120
"""That a stopped job is given to save; Ray's default of 3 s is too little."""


def submit_ray(
    config: Path,
    overrides: Sequence[str],
    address: str,
    directory: Path,
    said: Callable[[str], None],
    wait: bool = True,
) -> tuple[JobRecord, str]:
    """Submit the training of ``config`` and, with ``wait``, pass on its log until it ends; gives its last status.

    Args:
        config: read here, with its bases and overrides, and sent along whole.
        overrides: as for ``graphkd train``.
        address: of the cluster's dashboard, such as http://127.0.0.1:8265.
        directory: folder of the cluster that relative paths of the config refer to.
        said: gets each piece of the log.
        wait: whether to stay until the job ends.
    """
    content = read_layers(config, overrides)
    name, folder = name_of(content, config), directory / folder_of(content)
    client = _client(address)
    with tempfile.TemporaryDirectory(prefix="graphkd-job-") as sent:
        write_atomic(Path(sent) / "config.yaml", yaml.safe_dump(content, sort_keys=False))
        train = 'python -m pipeline train "$here/config.yaml"'
        job = _taken(
            client,
            address,
            entrypoint=f"here=$PWD; cd {shlex.quote(str(directory))} && exec {train}",
            runtime_env={"working_dir": sent, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}},
            metadata={"run": name},
        )
    record = JobRecord(
        scheduler="ray",
        job=job,
        name=name,
        submitted=time.time(),
        command=("train", str(config.resolve()), *overrides),
        logs=address,
        site=address,
        resubmit={"config": str(config.resolve()), "overrides": list(overrides), "directory": str(directory)},
    )
    if directory.is_dir():  # else the cluster shares no folder with this machine
        folder.mkdir(parents=True, exist_ok=True)
        record_job(folder, record)
    if wait:
        asyncio.run(_pass_on(client, job, said))
    return record, str(client.get_job_status(job))


def _taken(client: Any, address: str, **job: Any) -> str:
    """Submit, while the cluster's agents are still coming up again and again; raises UserError with Ray's reason."""
    retrying = Retrying(
        retry=retry_if_exception_message(match=r"(.|\n)*No available agent"),
        stop=stop_after_delay(AGENT_WAIT_S),
        wait=wait_fixed(1),
        reraise=True,
    )
    try:
        return str(retrying(client.submit_job, **job))
    except RuntimeError as error:
        raise UserError(f"the Ray cluster at {address} did not take the job: {str(error).splitlines()[0]}") from error


def status(record: JobRecord) -> str:
    """What the cluster says of a job, or an empty text where it does not answer."""
    try:
        return str(_client(record.site).get_job_status(record.job))
    except (UserError, RuntimeError):
        return ""


def stop(record: JobRecord) -> None:
    """Ask a job to save and leave."""
    _client(record.site).stop_job(record.job)


def logs(record: JobRecord) -> str:
    """What a job has said so far."""
    return str(_client(record.site).get_job_logs(record.job))


def _client(address: str) -> Any:
    try:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise ConfigError("Ray is not installed; pip install 'graphkd[ray]'") from error
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"the Ray cluster at {address} asks for its token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to its "
            "file"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"no Ray cluster answers at {address} ({reason}); give the address of its dashboard") from error


async def _pass_on(client: Any, job: str, said: Callable[[str], None]) -> None:
    async for piece in client.tail_job_logs(job):
        said(piece)
