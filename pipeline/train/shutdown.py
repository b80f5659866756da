"""Stopping between two steps when a scheduler asks for it: all ranks at the same step, with a checkpoint.

A signal reaches one process, maybe not all; its number is therefore passed to all ranks beside each step and looked at
after the next, so that nobody waits for it. Ray's workers get no signals: their driver leaves a file in the run folder.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from pipeline.core.distributed import World
from pipeline.core.errors import StoppedError

STOP_FILE = ".stop"
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StopSignal:
    """Whether this run is to end early, agreed on by all ranks."""

    def __init__(self, folder: Path, world: World) -> None:
        self.world = world
        self.signal = 0
        """The signal that all ranks agreed to leave for; 0 while there is none."""
        self._file = folder / STOP_FILE
        self._received = 0
        self._largest = torch.zeros(1, dtype=torch.int64)
        self._pending: dist.Work | None = None

    def receive(self, number: int, _: FrameType | None = None) -> None:
        """Handle a signal: leave after the next steps."""
        self._received = number

    def should_stop(self) -> bool:
        """Called once after every step: whether all ranks leave now; what comes in counts one step later."""
        own = self._received or (_left_in(self._file) if self.world.is_main else 0)
        if self.world.size == 1:
            self.signal = int(own)
            return bool(own)
        self.close()
        self._largest.fill_(int(own))
        self._pending = dist.all_reduce(self._largest, op=dist.ReduceOp.MAX, group=self.world.cpu_group, async_op=True)
        return bool(self.signal)

    def close(self) -> None:
        """Finish what was begun beside the last step."""
        if self._pending is not None:
            self._pending.wait()
            self.signal, self._pending = int(self._largest), None


def _left_in(path: Path) -> int:
    """The signal that a driver left for its workers, or 0."""
    if not path.exists():
        return 0
    text = path.read_text()
    return int(text) if text.isdigit() else signal.SIGTERM


def stopped_error(number: int) -> StoppedError:
    """The error of a run that left early because of a signal."""
    name = signal.Signals(number).name
    return StoppedError(f"stopped by {name} after a checkpoint; the same command goes on from there", number)


@contextmanager
def handle_signals(handler: signal.Handlers | object) -> Iterator[None]:
    """Have SIGTERM and SIGUSR2 handled; outside of the main thread, where Python hears none, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def stop_file(folder: Path) -> Iterator[list[int]]:
    """In a driver whose workers run elsewhere: a signal becomes a file that their leader sees; yields what came."""
    path, received = folder / STOP_FILE, list[int]()
    path.unlink(missing_ok=True)

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)
        path.write_text(str(int(number)))

    try:
        with handle_signals(receive):
            yield received
    finally:
        path.unlink(missing_ok=True)
