"""Where a training step gets the teacher's signals from."""

from __future__ import annotations

from typing import Protocol

from graphkd.detectors.protocol import Detector
from graphkd.nodes import NodePolicy, live_signals
from graphkd.pages import PageBatch
from graphkd.signals import TeacherSignals


class SignalSource(Protocol):
    """Gives what the teacher says of a batch, or None where no teacher takes part."""

    def signals(self, batch: PageBatch) -> TeacherSignals | None:
        """Signals on the device of ``batch.images``."""
        ...


class NoTeacher:
    """A detector trained alone."""

    def signals(self, batch: PageBatch) -> None:
        """Nothing."""
        return


class LiveTeacher:
    """Runs the teacher beside every step."""

    def __init__(self, teacher: Detector, policy: NodePolicy) -> None:
        self.teacher = teacher
        self.policy = policy

    def signals(self, batch: PageBatch) -> TeacherSignals:
        """One forward pass of the teacher on ``batch``."""
        return live_signals(self.teacher, batch, self.policy)
