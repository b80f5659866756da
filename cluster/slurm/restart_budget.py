"""How often a job was queued again and why, from its run's record; and when it has been often enough.

A start without an end was cut off: by the failure of a node, or a kill that gave no time. It counts as a failure. One
that was told to leave by SIGTERM was cancelled; where Slurm started the job again all the same, it was preempted.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from cluster.site import Site
from cluster.slurm.slurm_env import SlurmEnv
from graphkd.errors import UserError
from pipeline.core.files import append_line
from pipeline.core.jsonl import read_jsonl

STARTS_FILE = "lives.jsonl"
FINISHED, PREEMPTED, FAILED, CANCELLED, REFUSED = "finished", "preempted", "failed", "cancelled", "refused"


class RestartBudget:
    """The starts of one job."""

    def __init__(self, folder: Path, place: SlurmEnv) -> None:
        self._path = folder / STARTS_FILE
        self._place = place

    def record_start(self) -> None:
        """Write down that this start began."""
        self._write("begin", f"{self._place.nodes} nodes")

    def record_end(self, how: str, why: str = "") -> None:
        """Write down how it ended."""
        self._write(how, why)

    def _write(self, event: str, why: str) -> None:
        line = {"job": self._place.job, "restart": self._place.restart, "event": event, "why": why}
        append_line(self._path, json.dumps({**line, "node": self._place.name, "time": time.time()}))

    def counts(self) -> dict[str, int]:
        """Preemptions and failures of this job's earlier and present starts."""
        own = [line for line in read_jsonl(self._path) if line["job"] == self._place.job]
        ends = {line["restart"]: line["event"] for line in own if line["event"] != "begin"}
        begun = {line["restart"] for line in own if line["event"] == "begin"}
        cut_off = sum(restart not in ends for restart in begun if restart != self._place.restart)
        earlier = [event for restart, event in ends.items() if restart != self._place.restart]
        preempted = list(ends.values()).count(PREEMPTED) + earlier.count(CANCELLED)
        return {PREEMPTED: preempted, FAILED: list(ends.values()).count(FAILED) + cut_off}

    def is_open(self) -> bool:
        """Whether this start has begun and nobody wrote down its end."""
        own = [line for line in read_jsonl(self._path) if line["job"] == self._place.job]
        events = [line["event"] for line in own if line["restart"] == self._place.restart]
        return events == ["begin"]

    def exhausted_budget(self, site: Site) -> str | None:
        """Why this job must not be queued again, or None."""
        counts = self.counts()
        for kind, most in ((PREEMPTED, site.preemptions), (FAILED, site.failures)):
            if counts[kind] > most:
                return f"it ended as {kind} {counts[kind]} times, and the site allows {most}"
        return None


def requeue(job: str) -> None:
    """Queue this job again, which ends this start of it."""
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"scontrol requeue {job} failed: {done.stderr.strip()}; submit the run again")
