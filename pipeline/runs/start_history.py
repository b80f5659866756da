"""History of a run's starts and stops, and its log file."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.distributed import World
from pipeline.core.jsonl import append_jsonl, read_jsonl
from pipeline.core.run_paths import LOG, METRICS, START_HISTORY

MAX_HOSTS = 4  # listed by name
FINISHED = "finished"
KILLED = "killed"


@dataclass(frozen=True, slots=True)
class RunStart:
    """One start of a run's workers."""

    time: float
    """Unix time."""
    step: int
    """Steps that were done before."""
    workers: int
    host: str
    """Hosts of the workers, separated by commas."""
    ended: float | None
    """Unix time; None if the end was not recorded."""
    last_step: int
    """Steps done at the end, as far as known."""
    reason: str
    """``finished``, a signal's name, an error, or ``killed``; empty if the start may still be running."""


def read_start_history(folder: Path) -> list[RunStart]:
    """Starts of a run in order. A start without an end that is followed by another was killed."""
    lines, metrics = read_jsonl(folder / START_HISTORY), read_jsonl(folder / METRICS)
    begun = [line for line in lines if line.get("event") == "start"]
    ends = {line["start"]: line for line in lines if line.get("event") == "end"}
    return [_run_start(line, ends.get(line["time"]), begun[n + 1 :], metrics) for n, line in enumerate(begun)]


def _run_start(
    line: dict[str, Any], end: dict[str, Any] | None, later: list[dict[str, Any]], metrics: list[dict[str, Any]]
) -> RunStart:
    until = later[0]["time"] if later else float("inf")
    logged = [entry["step"] for entry in metrics if line["time"] <= entry.get("time", 0) < until]
    return RunStart(
        time=line["time"],
        step=line["step"],
        workers=line["workers"],
        host=line["host"],
        ended=None if end is None else end["time"],
        last_step=end["step"] if end else max(logged, default=line["step"]),
        reason=end["why"] if end else (KILLED if later else ""),
    )


class StartRecorder:
    """Records one start in the run's history, and its end by :meth:`end`. Creating it is a collective."""

    def __init__(self, folder: Path, world: World, step: int) -> None:
        self._path = folder / START_HISTORY if world.is_main else None
        self._time = time.time()
        self.last_step = step
        self.reason = FINISHED
        hosts = _host_list(sorted(set(world.gather(socket.gethostname()))))
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


@contextmanager
def log_to_file(folder: Path, world: World) -> Iterator[None]:
    """Also append the pipeline's log records of rank 0 to the run's log file."""
    if not world.is_main:
        yield
        return
    handler = logging.FileHandler(folder / LOG, encoding="utf8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.INFO)
    logger = logging.getLogger("pipeline")
    before = logger.level
    logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()
