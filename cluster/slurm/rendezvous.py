"""How the tasks of a job find each other: small files in a folder of the job's own, each whole or absent.

The folder's name holds the job and how often it was started, so nothing of an earlier start is ever read.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from graphkd.errors import UserError
from pipeline.core.files import write_atomic

FAILED = "failed"
POLL_S = 0.2
LONGEST_POLL_S = 2.0
Value = TypeVar("Value")


class ClusterError(UserError):
    """The nodes of a job did not come together; the message says which one and why."""


class Rendezvous:
    """The files of one start of a job.

    Args:
        root: folder that all nodes share.
        job: the job's id.
        restart: how often it was queued again.
        deadline: Unix time by which everybody must be there.
    """

    def __init__(self, root: Path, job: str, restart: int, deadline: float) -> None:
        self.folder = root / f"{job}-{restart}"
        self.deadline = deadline

    def open(self) -> None:
        """Make the folder, which only its user can read."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder.chmod(0o700)

    def publish(self, name: str, **content: Any) -> None:
        """Publish ``name`` to the other tasks."""
        write_atomic(self.folder / f"{name}.json", json.dumps(content))

    def get(self, name: str) -> dict[str, Any] | None:
        """What was published as ``name``, or None."""
        try:
            content: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        except FileNotFoundError:
            return None
        return content

    def published_nodes(self, name: str) -> set[int]:
        """The nodes that have published ``name-NODE``."""
        return {int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"{name}-*.json")}

    def heartbeat(self, node: int) -> None:
        """Say that ``node`` is there; to be repeated."""
        (self.folder / f"alive-{node}").touch()

    def is_dead(self, node: int, by: int, after_s: float) -> bool:
        """Whether ``node`` was heard of so much less lately than ``by``, both by the clock of the file system."""
        try:
            theirs = (self.folder / f"alive-{node}").stat().st_mtime
        except FileNotFoundError:
            return False
        return (self.folder / f"alive-{by}").stat().st_mtime - theirs > after_s

    def failure(self) -> str | None:
        """The line of a node that failed."""
        get = self.get(FAILED)
        return None if get is None else str(get["line"])

    def fail(self, node: int, line: str) -> None:
        """Tell the others that ``node`` cannot go on; one file for all, since everybody looks at it all the time."""
        self.publish(FAILED, node=node, line=line)

    def wait_until(self, ready: Callable[[], Value | None], late: Callable[[], str]) -> Value:
        """Wait until ``ready`` gives something; raises ClusterError where a node failed, or ``late`` in the end."""
        pause = POLL_S
        while True:
            value = ready()
            if value is not None:
                return value
            failed = self.failure()
            if failed:
                raise ClusterError(failed)
            if time.time() > self.deadline:
                raise ClusterError(late())
            time.sleep(pause)
            pause = min(LONGEST_POLL_S, pause * 1.2)

    def token(self) -> Path:
        """The file of the cluster's token, written once by the head and readable by its user only."""
        path = self.folder / "token"
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(os.urandom(32).hex())
        return path
