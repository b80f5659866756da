"""Processes that die at a chosen call of a chosen function, and what is left of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any


def die_at(owner: Any, function: str, call: int, after: bool) -> None:
    """Have this process killed around the ``call``-th call of ``owner.function`` from now on."""
    original, calls = getattr(owner, function), 0

    def dying(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **named)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, function, dying)


def clean_processes(*modules: str) -> ForkServerContext:
    """Where processes come from that have imported ``modules`` already."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["pipeline.data.loading.loader", *modules])
    return context


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 90) -> None:
    """Return when ``condition`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.02)


def processes_of(session: int) -> dict[int, str]:
    """Command lines of the living processes of a session."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def end_all(session: int) -> None:
    """Kill what is left of a session."""
    for pid in processes_of(session):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
