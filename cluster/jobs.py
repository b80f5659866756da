"""State, logs and cancellation of a run's jobs, whatever their scheduler."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.ray import jobs as ray_jobs
from cluster.records import JobRecord
from cluster.slurm import queue
from pipeline.core.jsonl import read_jsonl
from pipeline.core.run_paths import JOB_STARTS

ACTIVE_STATES = ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED")


def is_active(state: str) -> bool:
    """Whether a job in this state is queued or running."""
    return bool(state) and state.split()[0] in ACTIVE_STATES


def job_state(folder: Path, record: JobRecord) -> str:
    """State by the scheduler, or if it has forgotten the job, by the run's own record; else ``FORGOTTEN``."""
    state = ray_jobs.status(record) if record.scheduler == "ray" else queue.job_state(record.job)
    if is_active(state):
        return state
    ends = [line for line in read_jsonl(folder / JOB_STARTS) if line["job"] == record.job and line["event"] != "begin"]
    if ends and ends[-1]["event"] != "preempted":
        return str(ends[-1]["event"]).upper()
    return state or "FORGOTTEN"


def cancel(record: JobRecord) -> None:
    """End a job without requeueing it. Raises UserError with the scheduler's reason if it refuses."""
    if record.scheduler == "ray":
        ray_jobs.stop(record)
    else:
        queue.cancel(record.job)


def log_files(record: JobRecord) -> list[Path]:
    """Log files of a Slurm job, one per task."""
    pattern = Path(record.logs)
    return sorted(pattern.parent.glob(pattern.name))


def as_json(folder: Path, record: JobRecord) -> str:
    """One job as a line of JSON."""
    state = job_state(folder, record)
    return json.dumps({"run": str(folder), "state": state, **record.model_dump(exclude={"resubmit"})})
