"""The ``graphkd`` command of a job, and the signals that are forwarded to it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cluster.slurm.slurm_env import SlurmEnv
from cluster.slurm.spec import JobSpec

POLL_S = 0.5


class Signals:
    """Signals that a task has received from Slurm."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._forwarded = 0

    def forward(self, command: subprocess.Popen[bytes]) -> None:
        """Send signals that arrived since the last call to ``command``, which saves a checkpoint and exits."""
        pending = self.received[self._forwarded :]
        for number in pending:
            command.send_signal(number)
        self._forwarded += len(pending)

    def __contains__(self, number: int) -> bool:
        return number in self.received


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """Collect Slurm's warning (SIGUSR2) and SIGTERM instead of dying of them."""
    signals = Signals()

    def receive(number: int, _: FrameType | None) -> None:
        signals.received.append(number)

    previous = {number: signal.signal(number, receive) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def command_line(spec: JobSpec, task: SlurmEnv) -> list[str]:
    """Return the command, with as many training workers as the job's nodes have."""
    command = [sys.executable, "-m", "pipeline", *spec.command]
    if spec.ray and spec.trains:
        command += ["engine.name=ray", f"engine.workers={task.nodes * spec.site.workers}"]
    return command
