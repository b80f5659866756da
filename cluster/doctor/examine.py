"""``graphkd doctor``: a short job on a site's nodes that looks for what would make others fail."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.doctor.preflight import results
from cluster.site import Site
from cluster.slurm.rendezvous import Rendezvous
from cluster.slurm.spec import JobSpec
from cluster.slurm.submit import Submission, submit
from graphkd.errors import UserError

POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What was found on one node."""

    node: str
    faults: list[str]
    facts: dict[str, str]


def examine(site: Site, nodes: int, folder: Path, said: Callable[[str], None], wait_s: float = 600) -> list[NodeReport]:
    """Run the job and gather its findings, in order of nodes.

    Args:
        site: where.
        nodes: how many of its nodes.
        folder: on a file system that all nodes share; the job's files go below it.
        said: gets a line about the job.
        wait_s: for the job to begin and end. Raises UserError where it does not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    below = Path(tempfile.mkdtemp(prefix="doctor-", dir=folder)).absolute()
    short = site.model_copy(update={"time_minutes": min(site.time_minutes, 5), "failures": 0, "preemptions": 0})
    spec = JobSpec(command=(), run_folder=below, directory=Path.cwd(), site=short, ray=False, trains=False)
    record = submit(Submission(name="doctor", spec=spec, nodes=str(nodes), module="cluster.doctor.preflight"))
    said(f"job {record.job} on {nodes} nodes; logs {record.logs}")
    meeting = Rendezvous(below / "cluster", record.job, 0, time.time() + wait_s)
    while len(found := results(meeting, nodes)) < nodes:
        if time.time() > meeting.deadline or _gone(record.job):
            silent = sorted(set(range(nodes)) - set(found))
            raise UserError(f"nodes {silent} of job {record.job} said nothing; look at {record.logs}")
        time.sleep(POLL_S)
    return [NodeReport(**result) for _, result in sorted(found.items())]  # type: ignore[arg-type]


def _gone(job: str) -> bool:
    from cluster.jobs import ACTIVE_STATES, slurm_state

    state = slurm_state(job)
    return bool(state) and state.split()[0] not in (*ACTIVE_STATES, "COMPLETED")
