"""Submitting a job to Slurm, and its record in the run folder."""

from __future__ import annotations

import re
import subprocess
import time

from cluster.records import JobRecord, record_job
from cluster.slurm.script import Submission, sbatch_script
from graphkd.errors import UserError
from pipeline.core.files import write_atomic


def submit(submission: Submission) -> JobRecord:
    """Submit a job and record it in its run folder. Raises UserError with Slurm's reason if it refuses."""
    spec = submission.spec
    text = sbatch_script(submission)
    script = submission.folder / f"{submission.name}.sh"
    script.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(submission.spec_file, spec.model_dump_json(indent=1))
    write_atomic(script, text)
    job = _sbatch(submission.name, ["sbatch", str(script)])
    record = JobRecord(
        scheduler="slurm",
        job=job,
        name=submission.name,
        submitted=time.time(),
        command=spec.command,
        logs=str(submission.folder / f"{job}_*_log.out"),
        site=spec.site.name,
        resubmit=spec.model_dump(mode="json") | {"nodes": submission.nodes, "tasks": submission.tasks},
    )
    record_job(spec.run_folder, record)
    return record


def _sbatch(name: str, command: list[str]) -> str:
    """Run sbatch and return the job's id."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"Slurm did not take job {name}: {error}; run this where sbatch is installed") from error
    job = re.search(r"job (\d+)", done.stdout)
    if done.returncode or job is None:
        lines = [line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"Slurm did not take job {name}: {'; '.join(lines) or done.stdout.strip()}")
    return job[1]
