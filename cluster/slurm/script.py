"""The sbatch script of a job."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from cluster.site import Site
from cluster.slurm.spec import JobSpec
from graphkd.errors import ConfigError
from pipeline.core.run_paths import SLURM

# In the options and environment of jobs since version 0.1: sites' accounting and epilogues may select jobs by them.
WCKEY, EXPORT = "submitit", "export SUBMITIT_EXECUTOR=slurm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A job to submit."""

    name: str
    spec: JobSpec
    nodes: str = "1"
    """Number such as 2, or range such as 1-4."""
    after: tuple[str, ...] = ()
    """Ids of jobs that must finish first."""
    tasks: int = 0
    """Size of a job array; 0 for a single job."""
    module: str = "cluster.slurm.task"
    """Module that each task runs."""

    @property
    def folder(self) -> Path:
        """Folder of the specification, the script and the logs."""
        return self.spec.run_folder / SLURM

    @property
    def spec_file(self) -> Path:
        """Path of the specification that the tasks read."""
        return self.folder / f"{self.name}.json"

    def log(self, task: str) -> str:
        """Path of a task's log, with Slurm's placeholders for the job's id."""
        return str(self.folder / f"{'%A_%a' if self.tasks else '%j'}_{task}_log.out")


def sbatch_script(submission: Submission) -> str:
    """Return the text of the script.

    Raises:
        ConfigError: if a name, path or option cannot be passed to sbatch.
    """
    site, spec_file = submission.spec.site, submission.spec_file
    _check(submission)
    directives = [_directive(name, value) for name, value in sorted(_options(submission).items())]
    # If a task is killed, the head task must live on to requeue the job. Recent Slurm versions do not pass
    # --cpus-per-task of the job on to its steps. Tasks per node are given to srun only: given to the job, Slurm
    # allocates the fewest nodes of a range that hold the tasks.
    srun = ["srun", "--unbuffered", "--output", submission.log("%t"), "--kill-on-bad-exit=0", "--ntasks-per-node=1"]
    srun.append(f"--cpus-per-task={site.cpus_per_node}")
    return "\n".join(
        [
            "#!/bin/bash\n\n# Parameters",
            *directives,
            f"\n# command\n{EXPORT}",
            f"{shlex.join(srun)} {_python_module(site, submission.module, spec_file)}\n\n",
            "# teardown\ncode=$?",
            f'{_python_module(site, "cluster.slurm.epilogue", spec_file)} "$code"',
        ]
    )


def _check(submission: Submission) -> None:
    folder = str(submission.spec.run_folder)
    site, options = submission.spec.site, _options(submission)
    plain = [folder, str(submission.spec.directory), site.python, *site.container, *submission.after]
    for text in (*plain, *options, *(value or "" for value in options.values())):
        if not text.isprintable():  # an option is one line of the script, whatever its quoting
            raise ConfigError(f"{text!r} contains a newline or control character, which no script may; change it")
    for job in submission.after:
        if not re.fullmatch(r"\d+([_+]\d+)?|[A-Z]+", job):  # capitals stand for a job that is not yet submitted
            raise ConfigError(f"--after {job!r} is no id of a job, such as 4711")
    if "%" in folder:
        raise ConfigError(f"{folder} contains a %, which Slurm replaces in paths; give another folder")


def _options(submission: Submission) -> dict[str, str | None]:
    """Options of sbatch by their long names; None for a flag."""
    site = submission.spec.site
    optional = {
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "mem": None if site.mem_gb is None else f"{int(site.mem_gb * 1024)}M",
        "gpus-per-node": str(site.gpus_per_node) if site.gpus_per_node else None,
        "array": f"0-{submission.tasks - 1}%{submission.tasks}" if submission.tasks else None,
        "dependency": f"afterok:{':'.join(submission.after)}" if submission.after else None,
        "kill-on-invalid-dep": "yes" if submission.after else None,  # cancel dependants of a failed job
    }
    return {name: value for name, value in optional.items() if value is not None} | {
        "job-name": submission.name,
        "nodes": submission.nodes,
        "cpus-per-task": str(site.cpus_per_node),
        "time": str(site.time_minutes),
        "signal": f"USR2@{site.signal_lead_s}",
        "output": submission.log("0"),
        "open-mode": "append",
        "wckey": WCKEY,
        "chdir": str(submission.spec.directory),
        "requeue": None,
        **{name.replace("_", "-"): value for name, value in site.options.items()},
    }


def _directive(name: str, value: str | None) -> str:
    return f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={shlex.quote(value)}"


def _python_module(site: Site, module: str, spec_file: Path) -> str:
    command = [*site.container, site.python, "-u", "-m", module, str(spec_file)]
    if not site.prologue:
        return shlex.join(command)
    # Every task runs the prologue: srun passes on the batch script's environment, but neither a container nor another
    # node has what it set up.
    return shlex.join(["bash", "-c", "\n".join([*site.prologue, f'exec {shlex.join(command)} "$@"']), "bash"])
