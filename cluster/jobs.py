"""Jobs of runs: a small record in each run folder, what the scheduler says, and what the run itself knows."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.slurm.restart_budget import STARTS_FILE
from graphkd.errors import UserError
from pipeline.core.files import append_line
from pipeline.core.jsonl import read_jsonl

JOBS_FILE = "jobs.jsonl"
ACTIVE_STATES = ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED")


class JobRecord(BaseModel):
    """One submission."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheduler: str
    job: str
    name: str
    submitted: float
    """Unix time."""
    command: tuple[str, ...]
    logs: str
    """Path or pattern of its log files."""
    site: str
    resubmit: dict[str, Any] = {}
    """What submits it again."""


def record_job(folder: Path, record: JobRecord) -> None:
    """Add a submission to the run's record."""
    append_line(folder / JOBS_FILE, record.model_dump_json())


def read_jobs(folder: Path) -> list[JobRecord]:
    """The submissions of a run, oldest first."""
    return [JobRecord.model_validate(line) for line in read_jsonl(folder / JOBS_FILE)]


def runs_below(root: Path) -> list[Path]:
    """Run folders at or below ``root`` that were submitted."""
    return sorted(
        {path.parent for pattern in (JOBS_FILE, f"*/{JOBS_FILE}", f"*/*/{JOBS_FILE}") for path in root.glob(pattern)}
    )


def state_of(folder: Path, record: JobRecord) -> str:
    """What became of a job: the scheduler's word, else the run's own record of how it ended."""
    said = _ray_state(record) if record.scheduler == "ray" else slurm_state(record.job)
    if said and said.split()[0] in ACTIVE_STATES:
        return said
    own = [line for line in read_jsonl(folder / STARTS_FILE) if line["job"] == record.job and line["event"] != "begin"]
    if own and own[-1]["event"] != "preempted":
        return str(own[-1]["event"]).upper()
    return said or "FORGOTTEN"


def _ray_state(record: JobRecord) -> str:
    from cluster.ray.jobs import status

    return status(record)


def slurm_state(job: str) -> str:
    """What Slurm says of a job, or an empty text where it has forgotten it."""
    queue = ["squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job]
    account = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", "--jobs", job]
    for command in (queue, account):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        lines = done.stdout.split("\n")
        if done.returncode == 0 and lines[0].strip():
            return lines[0].strip()
    return ""


def cancel(record: JobRecord) -> None:
    """End a job; it is not queued again."""
    if record.scheduler == "ray":
        from cluster.ray.jobs import stop

        stop(record)
        return
    done = subprocess.run(["scancel", record.job], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"scancel {record.job} failed: {done.stderr.strip()}")


def log_files(record: JobRecord) -> list[Path]:
    """The files that a job's tasks write to."""
    pattern = Path(record.logs)
    return sorted(pattern.parent.glob(pattern.name))


def as_json(folder: Path, record: JobRecord) -> str:
    """One job for programs."""
    return json.dumps(
        {"run": str(folder), "state": state_of(folder, record), **record.model_dump(exclude={"resubmit"})}
    )
