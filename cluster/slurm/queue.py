"""Slurm commands about one job: its state, cancelling and requeueing it."""

from __future__ import annotations

import subprocess

from graphkd.errors import UserError

TIMEOUT_S = 30


def job_state(job: str) -> str:
    """State such as ``RUNNING``, or an empty string if Slurm has forgotten the job or does not answer."""
    squeue = ["squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job]
    sacct = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", "--jobs", job]
    for command in (squeue, sacct):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            continue
        state = done.stdout.split("\n")[0].strip()
        if done.returncode == 0 and state:
            return state
    return ""


def cancel(job: str) -> None:
    """Cancel a job; Slurm does not requeue it."""
    _run(["scancel", job])


def requeue(job: str) -> None:
    """Requeue a running job, which ends its present start."""
    _run(["scontrol", "requeue", job], remedy="; submit the run again")


def _run(command: list[str], remedy: str = "") -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip()}{remedy}")
