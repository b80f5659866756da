"""Where a training step gets the teacher's signals from."""

from __future__ import annotations

from typing import Protocol

from graphkd.detectors.protocol import Detector
from graphkd.methods import MethodConfig
from graphkd.nodes import NodePolicy, TeacherPass, live_signals, teacher_pass
from graphkd.pages import PageBatch
from graphkd.signals import TeacherSignals


class SignalSource(Protocol):
    """Gives what the teacher says of a batch, or None where no teacher takes part."""

    def signals(self, batch: PageBatch) -> TeacherSignals | TeacherPass | None:
        """Signals on the device of ``batch.images``, or a pass that can be asked about nodes of the student's."""
        ...


class NoTeacher:
    """A detector trained alone."""

    def signals(self, batch: PageBatch) -> None:
        """Nothing."""
        return


class LiveTeacher:
    """Runs the teacher beside every step."""

    def __init__(self, teacher: Detector, policy: NodePolicy, method: MethodConfig) -> None:
        self.teacher = teacher
        self.policy = policy
        self.method = method

    def signals(self, batch: PageBatch) -> TeacherSignals | TeacherPass:
        """One pass of the teacher over ``batch``."""
        ask = teacher_pass if self.method.nodes == "student" else live_signals
        return ask(self.teacher, batch, self.policy, maps=self.method.uses_maps)
