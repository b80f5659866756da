"""One task of a job: ``python -m cluster.slurm.task SPEC.json``, started by srun on every node.

Node 0 starts the Ray head, waits for the other nodes, runs the command on the cluster and announces its end; the others
join the head and leave with it. Waiting always ends at a deadline, and a node that fails publishes its error to all.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

from cluster.errors import ClusterError
from cluster.slurm.command import POLL_S, Signals, catch_signals, command_line
from cluster.slurm.head import Head
from cluster.slurm.rendezvous import Rendezvous
from cluster.slurm.slurm_env import SlurmEnv, ipv4_address, read_slurm_env
from cluster.slurm.spec import JobSpec
from cluster.slurm.worker import run_worker
from graphkd.errors import UserError
from pipeline.core.run_paths import CLUSTER

log = logging.getLogger("graphkd.cluster")


def main() -> None:
    """Run the task; exits with the command's exit code, or 1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        code = run(read_spec(), read_slurm_env())
    except UserError as error:
        log.error("%s", error)
        code = 1
    sys.exit(code)


def read_spec() -> JobSpec:
    """Read the job's specification, whose path is the first argument."""
    return JobSpec.model_validate_json(Path(sys.argv[1]).read_text())


def run(spec: JobSpec, task: SlurmEnv) -> int:
    """Run one node's part of the job and return its exit code.

    Raises:
        ClusterError: if the nodes did not come together, or one failed.
    """
    with catch_signals() as signals:
        return _run_on_cluster(spec, task, signals) if spec.ray else _run_alone(spec, task, signals)


def _run_on_cluster(spec: JobSpec, task: SlurmEnv, signals: Signals) -> int:
    deadline = time.time() + spec.site.deadline_s
    rendezvous = Rendezvous(spec.run_folder / CLUSTER, task.job, task.restart, deadline)
    address = spec.site.node_address or ipv4_address(task.name)
    try:
        _check_shared_folders(spec)
        if task.is_head:
            return Head(spec, task, rendezvous, address, signals).run()
        run_worker(spec, task, rendezvous, address)
        return 0
    except UserError as error:
        prefix = f"node {task.node} ({task.name}): "
        if rendezvous.folder.is_dir() and rendezvous.failure() is None:
            rendezvous.fail(task.node, f"{prefix}{error}")
        raise ClusterError(str(error) if str(error).startswith("node ") else f"{prefix}{error}") from error


def _check_shared_folders(spec: JobSpec) -> None:
    for folder in spec.site.shared:
        if not folder.is_dir():
            raise ClusterError(f"shared folder {folder} is not there; correct shared in the site file, or the mount")
    if not spec.run_folder.is_dir():
        raise ClusterError(f"run folder {spec.run_folder} is not there; give one on a file system that all nodes share")


def _run_alone(spec: JobSpec, task: SlurmEnv, signals: Signals) -> int:
    """Run the command without a Ray cluster, such as one task of an array that builds a cache."""
    command = subprocess.Popen(command_line(spec, task), cwd=spec.directory)
    while command.poll() is None:
        signals.forward(command)
        time.sleep(POLL_S)
    return command.returncode


if __name__ == "__main__":
    main()
