"""How often a job may be requeued, counted from the starts and ends in its run folder.

A start without an end was cut short by a node failure or a kill, and counts as a failure. SIGTERM without a warning
cancels a job; if Slurm starts it again nevertheless, it was a preemption.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from cluster.errors import ClusterError
from cluster.site import Site
from cluster.slurm.queue import requeue
from cluster.slurm.slurm_env import SlurmEnv
from pipeline.core.jsonl import append_jsonl, read_jsonl
from pipeline.core.run_paths import JOB_STARTS

log = logging.getLogger("graphkd.cluster")

FINISHED, PREEMPTED, FAILED, CANCELLED, REFUSED = "finished", "preempted", "failed", "cancelled", "refused"
BEGIN = "begin"


class RestartBudget:
    """Starts of one job.

    Args:
        folder: of the run.
        task: which start of which job this is.
        site: with the numbers of preemptions and failures that it allows.
    """

    def __init__(self, folder: Path, task: SlurmEnv, site: Site) -> None:
        self._path = folder / JOB_STARTS
        self._task = task
        self._allowed = {PREEMPTED: site.preemptions, FAILED: site.failures}

    def record_start(self) -> None:
        """Record that this start began."""
        self._record(BEGIN, f"{self._task.nodes} nodes")

    def record_end(self, event: str, reason: str = "") -> None:
        """Record how this start ended."""
        self._record(event, reason)

    def counts(self) -> dict[str, int]:
        """Numbers of preemptions and failures of this job so far."""
        lines, current = self._lines(), self._task.restart
        ends = {line["restart"]: line["event"] for line in lines if line["event"] != BEGIN}
        earlier = [event for restart, event in ends.items() if restart != current]
        begun = {line["restart"] for line in lines if line["event"] == BEGIN and line["restart"] != current}
        preempted = [*ends.values()].count(PREEMPTED) + earlier.count(CANCELLED)
        return {PREEMPTED: preempted, FAILED: [*ends.values()].count(FAILED) + len(begun - set(ends))}

    def has_no_end(self) -> bool:
        """Whether this start has begun and nobody has recorded its end."""
        return [line["event"] for line in self._lines() if line["restart"] == self._task.restart] == [BEGIN]

    def exhausted(self) -> str | None:
        """Why the job must not be requeued, or None."""
        for event, count in self.counts().items():
            if count > self._allowed[event]:
                return f"it ended as {event} {count} times, and the site allows {self._allowed[event]}"
        return None

    def requeue(self, reason: str) -> None:
        """Requeue the job. Raises ClusterError if the budget is exhausted."""
        exhausted = self.exhausted()
        if exhausted:
            raise ClusterError(f"job {self._task.job} is not queued again: {exhausted}; {reason}")
        log.info("job %s is queued again: %s", self._task.job, reason)
        requeue(self._task.job)

    def _lines(self) -> list[dict[str, object]]:
        return [line for line in read_jsonl(self._path) if line["job"] == self._task.job]

    def _record(self, event: str, reason: str) -> None:
        line = {"job": self._task.job, "restart": self._task.restart, "event": event, "why": reason}
        append_jsonl(self._path, {**line, "node": self._task.name, "time": time.time()})
