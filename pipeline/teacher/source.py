"""Where a training step gets the teacher's signals from: what can be read ahead of it, and what is computed in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from graphkd.batch import PageBatch
from graphkd.detectors.protocol import Detector
from graphkd.method.config import MethodConfig
from graphkd.nodes import NodePolicy, TeacherPass, live_signals, teacher_pass
from graphkd.signals import TeacherSignals


class SignalSource(Protocol):
    """Gives what the teacher says of a batch, or None where no teacher takes part."""

    def prefetch(self, batches: Iterable[PageBatch]) -> Iterator[tuple[PageBatch, Any]]:
        """Batches, each with what was read of it before its step, for :meth:`signals`."""
        ...

    def signals(self, batch: PageBatch, read: Any = None) -> TeacherSignals | TeacherPass | None:
        """Signals on the device of ``batch.images``, or a pass that can be asked about nodes of the student's."""
        ...


def no_prefetch(batches: Iterable[PageBatch]) -> Iterator[tuple[PageBatch, None]]:
    """Batches of a source that has nothing to read."""
    return ((batch, None) for batch in batches)


class NoTeacher:
    """A detector trained alone."""

    def prefetch(self, batches: Iterable[PageBatch]) -> Iterator[tuple[PageBatch, None]]:
        """Nothing is read."""
        return no_prefetch(batches)

    def signals(self, batch: PageBatch, read: None = None) -> None:
        """Nothing."""
        return


class LiveTeacher:
    """Runs the teacher beside every step; ``compress`` gives two points a channel in place of pooled features."""

    def __init__(self, teacher: Detector, policy: NodePolicy, method: MethodConfig, compress: bool = False) -> None:
        self.teacher = teacher
        self.policy = policy
        self.method = method
        self.compress = compress

    def prefetch(self, batches: Iterable[PageBatch]) -> Iterator[tuple[PageBatch, None]]:
        """Nothing is read."""
        return no_prefetch(batches)

    def signals(self, batch: PageBatch, read: None = None) -> TeacherSignals | TeacherPass:
        """One pass of the teacher over ``batch``."""
        if self.method.nodes == "student":
            return teacher_pass(self.teacher, batch, self.policy, maps=self.method.uses_maps)
        said = live_signals(self.teacher, batch, self.policy, maps=self.method.uses_maps)
        return said.compressed() if self.compress else said
