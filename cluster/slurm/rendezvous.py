"""Files through which the tasks of a job find each other, in a folder of the job that all nodes share.

The folder is named after the job and its restart count, so files of an earlier start are never read.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import ClusterError
from pipeline.core.files import write_atomic

HEAD, JOINED, ENDED, FAILED = "head", "joined", "ended", "failed"
"""Names under which the nodes publish."""
HEARTBEAT_S = 5.0
DEAD_AFTER_S = 60.0
"""Age of a heartbeat beyond which a node counts as dead."""
POLL_S = 0.2
MAX_POLL_S = 2.0
Value = TypeVar("Value")


class Rendezvous:
    """Shared files of one start of a job.

    Args:
        root: folder that all nodes share.
        job: id of the job.
        restart: number of times that it was requeued.
        deadline: Unix time at which waiting ends.
    """

    def __init__(self, root: Path, job: str, restart: int, deadline: float) -> None:
        self.folder = root / f"{job}-{restart}"
        self.deadline = deadline

    def open(self) -> None:
        """Create the folder, for its user only."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            self.folder.mkdir(mode=0o700)
        self._check(self.folder, stat.S_ISDIR)

    def _check(self, path: Path, is_kind: Callable[[int], bool]) -> None:
        """Raise ClusterError if ``path`` is a link, or someone else owns or can read it."""
        status = path.lstat()
        if not is_kind(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise ClusterError(
                f"{path} must be this user's alone and no link, but has mode {stat.filemode(status.st_mode)} and owner "
                f"{status.st_uid}; remove it, and find out who made it"
            )

    def publish(self, name: str, **content: Any) -> None:
        """Publish ``name`` to the other tasks."""
        self.open()
        write_atomic(self.folder / f"{name}.json", json.dumps(content))

    def get(self, name: str) -> dict[str, Any] | None:
        """Content that was published as ``name``, or None."""
        try:
            self._check(self.folder, stat.S_ISDIR)
            descriptor = os.open(self.folder / f"{name}.json", os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor) as file:
            content: dict[str, Any] = json.load(file)
        return content

    def published_nodes(self, name: str) -> set[int]:
        """Nodes that have published ``name-NODE``."""
        return {int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"{name}-*.json")}

    def heartbeat(self, node: int) -> None:
        """Signal that ``node`` is alive; call it repeatedly."""
        (self.folder / f"alive-{node}").touch()

    def is_dead(self, node: int, observer: int, timeout_s: float) -> bool:
        """Whether the heartbeat of ``node`` is older than that of ``observer`` by more than ``timeout_s``.

        Both are times of the file system's clock. A node without any heartbeat is not dead.
        """
        try:
            last = (self.folder / f"alive-{node}").stat().st_mtime
        except FileNotFoundError:
            return False
        return (self.folder / f"alive-{observer}").stat().st_mtime - last > timeout_s

    def failure(self) -> str | None:
        """Error of a node that failed, or None."""
        content = self.get(FAILED)
        return None if content is None else str(content["line"])

    def fail(self, node: int, error: str) -> None:
        """Tell the others that ``node`` failed. One file for all nodes, since every task polls it."""
        self.publish(FAILED, node=node, line=error)

    def wait_until(self, ready: Callable[[], Value | None], timeout_message: Callable[[], str]) -> Value:
        """Poll ``ready`` until it returns a value other than None, and return that.

        Raises:
            ClusterError: if a node failed, or with ``timeout_message`` at the deadline.
        """
        pause = POLL_S
        while (value := ready()) is None:
            failed = self.failure()
            if failed:
                raise ClusterError(failed)
            if time.time() > self.deadline:
                raise ClusterError(timeout_message())
            time.sleep(pause)
            pause = min(MAX_POLL_S, pause * 1.2)
        return value

    def token(self) -> Path:
        """File of the Ray cluster's token, created once by the head and readable by its user only."""
        path = self.folder / "token"
        self._check(self.folder, stat.S_ISDIR)
        with suppress(FileExistsError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(os.urandom(32).hex())
        self._check(path, stat.S_ISREG)
        return path
