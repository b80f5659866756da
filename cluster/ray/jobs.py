"""Jobs on an existing Ray cluster, through Ray's job API: the config is sent along, data and runs stay there."""

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

from cluster.records import JobRecord, record_job
from cluster.run_config import run_folder, run_name
from graphkd.errors import ConfigError, UserError
from pipeline.config.layers import read_layers
from pipeline.core.files import write_atomic

AGENT_TIMEOUT_S = 60
STOP_TIMEOUT_S = 120
"""Grace period in which a stopped job saves a checkpoint; Ray's default of 3 s is too short."""


def submit(
    config: Path,
    overrides: Sequence[str],
    address: str,
    directory: Path,
    on_log: Callable[[str], None],
    wait: bool = True,
) -> tuple[JobRecord, str]:
    """Submit the training of ``config`` and return the job and its last status.

    Args:
        config: read here with its bases and overrides, and sent along as one file.
        overrides: as for ``graphkd train``.
        address: of the cluster's dashboard, such as http://127.0.0.1:8265.
        directory: folder of the cluster that relative paths of the config refer to.
        on_log: called with each piece of the job's log.
        wait: follow the log until the job ends.

    Raises:
        ConfigError: if the config is wrong or Ray is not installed.
        UserError: if no cluster answers, or it refuses the job.
    """
    content = read_layers(config, overrides)
    name = run_name(content, config)
    client = _client(address)
    with tempfile.TemporaryDirectory(prefix="graphkd-job-") as working_dir:
        write_atomic(Path(working_dir) / "config.yaml", yaml.safe_dump(content, sort_keys=False))
        train = 'python -m pipeline train "$here/config.yaml"'
        job = _submit_with_retry(
            client,
            address,
            entrypoint=f"here=$PWD; cd {shlex.quote(str(directory))} && exec {train}",
            runtime_env={"working_dir": working_dir, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_TIMEOUT_S)}},
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
    if directory.is_dir():  # otherwise the cluster shares no folder with this machine
        folder = directory / run_folder(content)
        folder.mkdir(parents=True, exist_ok=True)
        record_job(folder, record)
    if wait:
        asyncio.run(_follow_log(client, job, on_log))
    return record, str(client.get_job_status(job))


def _submit_with_retry(client: Any, address: str, **job: Any) -> str:
    """Submit the job, retrying while the agents of a cluster that has just started are not ready."""
    retrying = Retrying(
        retry=retry_if_exception_message(match=r"(.|\n)*No available agent"),
        stop=stop_after_delay(AGENT_TIMEOUT_S),
        wait=wait_fixed(1),
        reraise=True,
    )
    try:
        return str(retrying(client.submit_job, **job))
    except RuntimeError as error:
        raise UserError(f"the Ray cluster at {address} did not take the job: {str(error).splitlines()[0]}") from error


def status(record: JobRecord) -> str:
    """Status of a job such as ``RUNNING``, or an empty string if the cluster does not answer."""
    try:
        return str(_client(record.site).get_job_status(record.job))
    except (UserError, RuntimeError):
        return ""


def stop(record: JobRecord) -> None:
    """Ask a job to save a checkpoint and exit."""
    _client(record.site).stop_job(record.job)


def logs(record: JobRecord) -> str:
    """Log of a job so far."""
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


async def _follow_log(client: Any, job: str, on_log: Callable[[str], None]) -> None:
    async for piece in client.tail_job_logs(job):
        on_log(piece)
