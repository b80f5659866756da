"""Attempts of a run: each start of its workers, and how it ended."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.distributed import World
from pipeline.core.jsonl import append_jsonl, read_jsonl
from pipeline.core.run_paths import METRICS, START_HISTORY

MAX_HOSTS = 4  # listed by name
FINISHED = "finished"
KILLED = "killed"


@dataclass(frozen=True, slots=True)
class RunAttempt:
    """One start of a run's workers, until they ended."""

    started: float
    """Unix time."""
    step: int
    """Steps completed before this attempt."""
    workers: int
    hosts: str
    """Host names of the workers, separated by commas."""
    ended: float | None
    """Unix time; None if the end was not recorded."""
    last_step: int
    """Steps completed at the end; from the metrics if the end was not recorded."""
    reason: str
    """``finished``, a signal's name, an error, or ``killed``; empty if the attempt may still be running."""


def read_attempts(folder: Path) -> list[RunAttempt]:
    """Attempts of a run in order. One without an end that is followed by another was killed."""
    lines, metrics = read_jsonl(folder / START_HISTORY), read_jsonl(folder / METRICS)
    starts = [line for line in lines if line.get("event") == "start"]
    ends = {line["start"]: line for line in lines if line.get("event") == "end"}
    return [_run_attempt(line, ends.get(line["time"]), starts[n + 1 :], metrics) for n, line in enumerate(starts)]


def _run_attempt(
    line: dict[str, Any], end: dict[str, Any] | None, later: list[dict[str, Any]], metrics: list[dict[str, Any]]
) -> RunAttempt:
    next_start = later[0]["time"] if later else float("inf")
    logged = [entry["step"] for entry in metrics if line["time"] <= entry.get("time", 0) < next_start]
    return RunAttempt(
        started=line["time"],
        step=line["step"],
        workers=line["workers"],
        hosts=line["host"],
        ended=None if end is None else end["time"],
        last_step=end["step"] if end else max(logged, default=line["step"]),
        reason=end["why"] if end else (KILLED if later else ""),
    )


class AttemptRecorder:
    """Records the start of an attempt, and its end by :meth:`end`. Creating it is a collective."""

    def __init__(self, folder: Path, world: World, step: int) -> None:
        self._path = folder / START_HISTORY if world.is_main else None
        self._time = time.time()
        self.last_step = step
        self.reason = FINISHED
        hosts = _host_list(sorted(set(world.all_gather_object(socket.gethostname()))))
        self._write({"event": "start", "step": step, "workers": world.size, "host": hosts}, self._time)

    def end(self) -> None:
        """Record the end, with ``last_step`` and ``reason``."""
        self._write({"event": "end", "start": self._time, "step": self.last_step, "why": self.reason}, time.time())

    def _write(self, line: dict[str, Any], now: float) -> None:
        if self._path is not None:
            append_jsonl(self._path, {**line, "time": now, "pid": os.getpid()})


def _host_list(hosts: list[str]) -> str:
    more = len(hosts) - MAX_HOSTS
    return ", ".join(hosts[:MAX_HOSTS]) + (f" and {more} more" if more > 0 else "")
