"""Submitting to Slurm through submitit: the script, the submission, and the record of it in the run folder."""

from __future__ import annotations

import io
import shlex
import time
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.jobs import JobRecord, record_job
from cluster.site import Site
from cluster.slurm.spec import JobSpec
from graphkd.errors import ConfigError, UserError
from pipeline.core.files import write_atomic

SUBMITIT_FOLDER = "cluster/slurm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A job to submit."""

    name: str
    spec: JobSpec
    nodes: str = "1"
    """How many, such as 2, or 1-4 for what there is room for."""
    after: tuple[str, ...] = ()
    """Jobs that must have finished before."""
    tasks: int = 0
    """Of an array; 0 for one job."""
    module: str = "cluster.slurm.task"
    """What a task runs."""


def script(submission: Submission) -> str:
    """The sbatch script, without submitting it or writing anything."""
    text: str = _executor(submission)._make_submission_file_text(_task_command(submission), "")
    return text


def submit(submission: Submission) -> JobRecord:
    """Submit the job and write it down in its run folder; raises UserError with Slurm's reason."""
    from submitit.core.utils import FailedJobError

    folder = submission.spec.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(_spec_file(submission), submission.spec.model_dump_json(indent=1))
    executor = _executor(submission)
    executor.folder.mkdir(parents=True, exist_ok=True)
    said = io.StringIO()  # submitit passes on what sbatch says, and raises only the last of it
    try:
        with redirect_stderr(said):
            job = executor._submit_command(_task_command(submission))
    except (FailedJobError, OSError) as error:
        reasons = [line.removeprefix("sbatch: error: ") for line in said.getvalue().splitlines() if line.strip()]
        reason = "; ".join(reasons) or str(error)
        raise UserError(f"Slurm did not take job {submission.name}: {reason}") from error
    record = JobRecord(
        scheduler="slurm",
        job=job.job_id,
        name=submission.name,
        submitted=time.time(),
        command=submission.spec.command,
        logs=str(executor.folder / f"{job.job_id}_*_log.out"),
        site=submission.spec.site.name,
        resubmit=submission.spec.model_dump(mode="json") | {"nodes": submission.nodes, "tasks": submission.tasks},
    )
    record_job(folder, record)
    return record


def _spec_file(submission: Submission) -> Path:
    return submission.spec.run_folder / SUBMITIT_FOLDER / f"{submission.name}.json"


def _task_command(submission: Submission) -> str:
    return _shell(submission.spec.site, submission.module, _spec_file(submission))


def _shell(site: Site, module: str, spec: Path) -> str:
    command = [*site.container, site.python, "-u", "-m", module, str(spec)]
    if not site.prologue:
        return shlex.join(command)
    # In every task, since srun hands on the batch script's environment but not what a container or node needs.
    return shlex.join(["bash", "-c", "\n".join([*site.prologue, f'exec {shlex.join(command)} "$@"']), "bash"])


def _executor(submission: Submission) -> Any:
    try:
        from submitit.slurm.slurm import SlurmExecutor
    except ImportError as error:
        raise ConfigError("submitit is not installed; pip install 'graphkd[slurm]'") from error

    class Executor(SlurmExecutor):  # type: ignore[misc,unused-ignore]
        """Writes scripts also where there is no Slurm."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    site = submission.spec.site
    # An option has one line of the script, which shell quoting cannot save from a newline.
    for text in (str(submission.spec.run_folder), submission.name, *site.options.values()):
        if "\n" in text:
            raise ConfigError(f"{text!r} holds a newline, which no option of sbatch can; give another name")
    if "%" in str(submission.spec.run_folder):
        raise ConfigError(f"{submission.spec.run_folder} holds a %, which Slurm replaces in paths; give another folder")
    executor = Executor(folder=submission.spec.run_folder / SUBMITIT_FOLDER, python=site.python)
    executor.update_parameters(
        **_parameters(submission),
        additional_parameters=_additional(submission),
        # A task that is killed must not take the head with it before that has queued the job again.
        # Newer Slurm does not hand --cpus-per-task of the job on to its steps. Tasks a node are said here only: said of
        # the job, Slurm takes the fewest nodes of a range for the number of tasks, and never gives more.
        srun_args=["--kill-on-bad-exit=0", "--ntasks-per-node=1", f"--cpus-per-task={site.cpus_per_node}"],
        teardown=["code=$?", f'{_shell(site, "cluster.slurm.epilogue", _spec_file(submission))} "$code"'],
    )
    if submission.tasks:
        executor.parameters["map_count"] = submission.tasks
    return executor


def _parameters(submission: Submission) -> dict[str, Any]:
    site = submission.spec.site
    named = {"partition": site.partition, "account": site.account, "qos": site.qos}
    named |= {"dependency": f"afterok:{':'.join(submission.after)}" if submission.after else None}
    named |= {"mem": None if site.mem_gb is None else f"{int(site.mem_gb * 1024)}M"}
    return {name: value for name, value in named.items() if value is not None} | {
        "job_name": submission.name,
        "nodes": int(submission.nodes.rpartition("-")[2]),
        "cpus_per_task": site.cpus_per_node,
        "time": site.time_minutes,
        "signal_delay_s": site.signal_lead_s,
        "stderr_to_stdout": True,
        **({"gpus_per_node": site.gpus_per_node} if site.gpus_per_node else {}),
    }


def _additional(submission: Submission) -> dict[str, Any]:
    return {
        "requeue": True,
        "nodes": submission.nodes,
        # Else a job would wait for ever for one that failed.
        **({"kill_on_invalid_dep": "yes"} if submission.after else {}),
        "chdir": str(submission.spec.directory),
        **submission.spec.site.options,
    }
