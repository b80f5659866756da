"""``graphkd doctor``: run the preflight checks as a short job on a site's nodes and collect the results."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.doctor.preflight import read_reports
from cluster.jobs import is_active
from cluster.site import Site
from cluster.slurm.queue import job_state
from cluster.slurm.rendezvous import Rendezvous
from cluster.slurm.script import Submission
from cluster.slurm.spec import JobSpec
from cluster.slurm.submit import submit
from graphkd.errors import UserError
from pipeline.core.run_paths import CLUSTER

POLL_S = 0.5
TIME_LIMIT_MINUTES = 5


@dataclass(frozen=True, slots=True)
class NodeReport:
    """Results of one node's checks."""

    node: str
    faults: list[str]
    info: dict[str, str]


def examine(
    site: Site, nodes: int, folder: Path, on_submit: Callable[[str], None], timeout_s: float = 600
) -> list[NodeReport]:
    """Run the checks as a job, and return one report per node, sorted by node.

    Args:
        site: cluster to check.
        nodes: number of nodes to check.
        folder: on a file system that all nodes share; the job's files are written to a new folder in it.
        on_submit: called with one line about the job.
        timeout_s: maximum time until the job has finished.

    Raises:
        UserError: if the job fails, or a node does not report in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job_folder = Path(tempfile.mkdtemp(prefix="doctor-", dir=folder)).absolute()
    minutes = min(site.time_minutes, TIME_LIMIT_MINUTES)
    limited_site = site.model_copy(update={"time_minutes": minutes, "failures": 0, "preemptions": 0})
    spec = JobSpec(command=(), run_folder=job_folder, directory=Path.cwd(), site=limited_site, ray=False, trains=False)
    record = submit(Submission(name="doctor", spec=spec, nodes=str(nodes), module="cluster.doctor.preflight"))
    on_submit(f"job {record.job} on {nodes} nodes; logs {record.logs}")
    rendezvous = Rendezvous(job_folder / CLUSTER, record.job, restart=0, deadline=time.time() + timeout_s)
    while len(reports := read_reports(rendezvous, nodes)) < nodes:
        if time.time() > rendezvous.deadline or _has_failed(record.job):
            missing = sorted(set(range(nodes)) - set(reports))
            raise UserError(f"nodes {missing} of job {record.job} have not reported; look at {record.logs}")
        time.sleep(POLL_S)
    return [NodeReport(**report) for _, report in sorted(reports.items())]  # type: ignore[arg-type]


def _has_failed(job: str) -> bool:
    state = job_state(job)  # reports of a completed job may still be on their way through the file system
    return bool(state) and not is_active(state) and state.split()[0] != "COMPLETED"
