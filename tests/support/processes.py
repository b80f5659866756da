"""Processes that die at a chosen call of a chosen function, and what is left of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest


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


def spawn_ranks(command: list[str], ranks: int) -> list[subprocess.Popen[bytes]]:
    """Start ``command`` once for each rank, as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that what a rank leaves behind is found
        )
        for rank in range(ranks)
    ]


def output_of(processes: list[subprocess.Popen[bytes]]) -> str:
    """Their output, once all processes that they started have ended: loader workers must not outlive their rank."""
    deadline = time.monotonic() + 20
    for process in processes:
        while group_lives(process.pid):
            assert time.monotonic() < deadline, f"rank {process.args} has left processes behind"
            time.sleep(0.05)
    return b"\n".join(process.communicate()[1] for process in processes).decode()


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def end_ranks(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of ``size`` mounted at ``folder``; skips the test where none can be mounted."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
