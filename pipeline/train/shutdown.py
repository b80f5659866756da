"""Stopping between two steps when a scheduler asks for it: all ranks at the same step, with a checkpoint.

A signal may reach only one process. Its number is therefore reduced over all ranks beside each step and checked after
the next one, so that nobody waits for it. Ray workers receive no signals: their driver writes a file in the run folder.
Each signal is acknowledged on the terminal at once, since a step can take long; a second Ctrl-C ends the process.
"""

from __future__ import annotations

import os
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
from pipeline.core.run_paths import STOP_REQUEST

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopSignal:
    """A signal to stop training early, agreed on by all ranks."""

    def __init__(self, folder: Path, world: World) -> None:
        self.world = world
        self.signal = 0
        """Number of the signal that all ranks agreed on; 0 while there is none."""
        self._file = folder / STOP_REQUEST
        self._received = 0
        self._largest = torch.zeros(1, dtype=torch.int64)
        self._pending: dist.Work | None = None

    def receive(self, number: int, _: FrameType | None = None) -> None:
        """Signal handler: stop after the next steps."""
        acknowledge(number, again=self._received == number)
        self._received = number

    def should_stop(self) -> bool:
        """Whether all ranks stop now. Called once after every step; a new signal counts one step later."""
        own = self._received or (_requested(self._file) if self.world.is_main else 0)
        if self.world.size == 1:
            self.signal = int(own)
            return bool(own)
        self.close()
        self._largest.fill_(int(own))
        self._pending = dist.all_reduce(self._largest, op=dist.ReduceOp.MAX, group=self.world.cpu_group, async_op=True)
        return bool(self.signal)

    def close(self) -> None:
        """Wait for the reduction of the last step."""
        if self._pending is not None:
            self._pending.wait()
            self.signal, self._pending = int(self._largest), None


def acknowledge(number: int, again: bool) -> None:
    """Say on the terminal that a signal was received. Raises KeyboardInterrupt for a second Ctrl-C."""
    if again and number == signal.SIGINT:
        raise KeyboardInterrupt
    hint = "; press Ctrl-C again to stop without one" if number == signal.SIGINT else ""
    line = f"{signal.Signals(number).name} received: saving a checkpoint after the running step{hint}\n"
    os.write(2, line.encode())  # printing is not safe in a signal handler


def _requested(path: Path) -> int:
    """Signal number that a driver left for its workers, or 0."""
    if not path.exists():
        return 0
    text = path.read_text()
    return int(text) if text.isdigit() else signal.SIGTERM


def stopped_error(number: int) -> StoppedError:
    """Error of a run that a signal stopped."""
    name = signal.Signals(number).name
    return StoppedError(f"stopped by {name} after a checkpoint; rerun the same command to resume", number)


@contextmanager
def handle_signals(handler: signal.Handlers | object) -> Iterator[None]:
    """Handle SIGINT, SIGTERM and SIGUSR2. Does nothing outside the main thread, where Python receives no signals."""
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
def forward_signals_to_workers(folder: Path) -> Iterator[list[int]]:
    """In a driver: write received signals to a file that rank 0 reads. Yields the list of received signals."""
    path, received = folder / STOP_REQUEST, list[int]()
    path.unlink(missing_ok=True)

    def receive(number: int, _: FrameType | None) -> None:
        acknowledge(number, again=number in received)
        received.append(number)
        path.write_text(str(int(number)))

    try:
        with handle_signals(receive):
            yield received
    finally:
        path.unlink(missing_ok=True)
