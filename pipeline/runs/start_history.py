"""When a run was started, by whom, from which step, and how each start ended; and that only one trains it at a time."""

from __future__ import annotations

import json
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
from pipeline.core.errors import NoLocksError, OutputError
from pipeline.core.files import append_line, locked
from pipeline.core.jsonl import read_jsonl

log = logging.getLogger(__name__)

STARTS_FILE = "starts.jsonl"
LOG_FILE = "log.txt"
LOCK_FILE = ".training"
WAIT_S = 60
"""For the processes of a start that was killed to end."""
POLL_S = 0.2
SHOWN_HOSTS = 4
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
    """Of the workers; several with commas between them."""
    ended: float | None
    """Unix time; None where nobody wrote it down."""
    last_step: int
    """Steps done when it ended, as far as it is known."""
    why: str
    """finished, a signal's name, what went wrong, or killed; empty where it may still run."""


def read_start_history(folder: Path) -> list[RunStart]:
    """The starts of a run in their order; one that has no end, and another after it, was killed."""
    lines, metrics = read_jsonl(folder / STARTS_FILE), read_jsonl(folder / "metrics.jsonl")
    begun = [line for line in lines if line.get("event") == "start"]
    ends = {line["start"]: line for line in lines if line.get("event") == "end"}
    return [_start(line, ends.get(line["time"]), begun[place + 1 :], metrics) for place, line in enumerate(begun)]


def _start(
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
        why=end["why"] if end else (KILLED if later else ""),
    )


class StartRecorder:
    """One start in its run's file; ``last_step`` and ``why`` are for its end. Made by all ranks together."""

    def __init__(self, folder: Path, world: World, step: int) -> None:
        self._path = folder / STARTS_FILE if world.is_main else None
        self._time = time.time()
        self.last_step = step
        self.why = FINISHED
        hosts = _listed(sorted(set(world.gather(socket.gethostname()))))
        self._write({"event": "start", "step": step, "workers": world.size, "host": hosts}, self._time)

    def end(self) -> None:
        """Write down how it ended."""
        self._write({"event": "end", "start": self._time, "step": self.last_step, "why": self.why}, time.time())

    def _write(self, line: dict[str, Any], now: float) -> None:
        if self._path is not None:
            append_line(self._path, json.dumps({**line, "time": now, "pid": os.getpid()}))


def _listed(hosts: list[str]) -> str:
    more = len(hosts) - SHOWN_HOSTS
    return ", ".join(hosts[:SHOWN_HOSTS]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def run_lock(folder: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Hold a run's lock, after waiting for what a killed start left running; it ends with its process.

    Raises OutputError where another process goes on training the run.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            with locked(folder / LOCK_FILE, wait=False) as free:
                if free:
                    yield
                    return
        except NoLocksError as error:
            log.warning("nothing keeps a second start from training the same run: %s", error)
            yield
            return
        if time.monotonic() > deadline:
            raise OutputError(
                f"{folder} is being trained by another process; wait for it to end, end it, or give another run.folder"
            )
        time.sleep(POLL_S)


@contextmanager
def log_to_file(folder: Path, world: World) -> Iterator[None]:
    """Have what the leading rank's pipeline says appended to the run's log file as well."""
    if not world.is_main:
        yield
        return
    handler = logging.FileHandler(folder / LOG_FILE, encoding="utf8")
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
