"""Where a training step gets the teacher's signals from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch

from graphkd.batch import PageBatch
from graphkd.detectors.protocol import Detector
from graphkd.method.config import MethodConfig
from graphkd.nodes import NodePolicy, TeacherPass, teacher_pass
from graphkd.signals import TeacherSignals


class SignalSource(Protocol):
    """Source of teacher signals for training batches."""

    def prefetch(self, batches: Iterable[PageBatch]) -> Iterator[tuple[PageBatch, Any]]:
        """Yield batches, each with what was read for it in advance, to be passed to :meth:`signals`."""
        ...

    def signals(self, batch: PageBatch, prefetched: Any = None) -> TeacherSignals | TeacherPass | None:
        """Signals on the device of ``batch.images``, a teacher pass if nodes depend on the student, or None."""
        ...


class NoTeacher:
    """A detector trained alone."""

    def prefetch(self, batches: Iterable[PageBatch]) -> Iterator[tuple[PageBatch, None]]:
        """Nothing is read in advance."""
        return ((batch, None) for batch in batches)

    def signals(self, batch: PageBatch, prefetched: None = None) -> None:
        """None."""
        return


class LiveTeacher:
    """Runs the teacher in every step.

    Args:
        teacher: detector in evaluation mode.
        policy: which boxes become nodes.
        method: decides whether nodes come from the student, and whether feature maps are needed.
        compress: reduce pooled features to mean and standard deviation per channel, as ``store: descriptors`` does.
        dtype: autocast precision of the teacher's network.
    """

    def __init__(
        self,
        teacher: Detector,
        policy: NodePolicy,
        method: MethodConfig,
        compress: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        self.teacher = teacher
        self.policy = policy
        self.method = method
        self.compress = compress

    def prefetch(self, batches: Iterable[PageBatch]) -> Iterator[tuple[PageBatch, None]]:
        """Nothing is read in advance."""
        return ((batch, None) for batch in batches)

    def signals(self, batch: PageBatch, prefetched: None = None) -> TeacherSignals | TeacherPass:
        """Run the teacher over ``batch``."""
        done = teacher_pass(self.teacher, batch, self.policy, maps=self.method.uses_maps, dtype=self.dtype)
        if self.method.nodes == "student":
            return done
        signals = done.own_signals(batch.targets())
        return signals.compressed() if self.compress else signals
