"""Cached signals beside those of the live teacher, at the same boxes of the same views."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from graphkd.batch import PageBatch
from graphkd.detectors import Detector
from graphkd.method.config import MethodConfig
from graphkd.nodes import NodePolicy, choose_nodes, teacher_pass
from graphkd.signals import TeacherSignals
from pipeline.cache.quantize import Precision
from pipeline.cache.reader import CachedTeacher
from pipeline.config import RunConfig
from pipeline.data.loading.loader import PageDataset, collate
from pipeline.data.loading.order import SampleRef
from pipeline.teacher.identity import open_teacher
from pipeline.train.builders import build_step

LOSS_BOUND: dict[Precision, float] = {"fp32": 1e-3, "fp16": 5e-3, "int8": 5e-2}
"""Largest relative difference of a distillation loss between cached and live signals. Rounding alone stays well below;
another machine's arithmetic adds to it."""
PAGES_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How a sample of cached rows compares with the live teacher."""

    pages: int
    max_error: float
    """Largest absolute difference of a feature."""
    mean_error: float
    """Mean absolute difference of a feature."""
    scale: float
    """Mean absolute feature of the live teacher, beside which the errors may be read."""
    cosine: float
    """Least over the pages, between all features of a page."""
    loss_difference: float
    """Largest relative difference of a distillation term, over all the pages together."""
    same_nodes: float
    """Share of the cached boxes that the live teacher would choose again to within a pixel."""


def compare_with_live(
    student: RunConfig,
    cached: CachedTeacher,
    device: torch.device,
    pages: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Agreement:
    """Have the live teacher look at ``pages`` rows, evenly spread over the cache, and the student's losses learn from
    both.
    """
    dataset, views = cached.dataset, cached.description.views
    refs = evenly_spread(len(dataset), views, pages)
    teacher = open_teacher(student).detector(dataset.num_classes, device)
    items = PageDataset(dataset, student.data.view, student.run.seed, views if views > 1 else -1)
    assert student.teacher is not None
    policy = student.teacher.nodes
    if student.method.name == "none":  # whose losses do not listen to a teacher
        student = student.model_copy(update={"method": MethodConfig(name="graphkd")})
    step = build_step(student, dataset, device).train()
    sums = _Sums()
    for first in range(0, len(refs), PAGES_AT_ONCE):
        batch = collate(items.__getitems__(refs[first : first + PAGES_AT_ONCE])).to(device)
        stored = cached.signals(batch)
        live, alike = live_signals_at(teacher, batch, stored, policy)
        with torch.no_grad():
            sums.add(stored, live, alike, step(batch, stored), step(batch, live))
        progress(min(len(refs), first + PAGES_AT_ONCE), len(refs))
    return sums.agreement(len(refs))


def evenly_spread(samples: int, views: int, count: int) -> list[SampleRef]:
    """At most ``count`` rows of a cache, evenly spread, in every view in turn."""
    chosen = min(count, samples)
    return [SampleRef(number % views, number * samples // chosen) for number in range(chosen)]


def live_signals_at(
    teacher: Detector, batch: PageBatch, stored: TeacherSignals, policy: NodePolicy
) -> tuple[TeacherSignals, Tensor]:
    """What the live teacher says at the boxes of ``stored``, and which it would choose again, bool [B, N]."""
    done = teacher_pass(teacher, batch, policy)
    live = done.at(stored.boxes, stored.valid, stored.scores, stored.classes)
    with torch.no_grad():
        chosen, _, _ = choose_nodes(teacher, done.features, teacher.propose(done.features), batch.targets(), policy)
    alike = torch.zeros_like(stored.valid)
    for page, boxes in enumerate(chosen):
        apart = (stored.boxes[page, :, None] - boxes[None]).abs().amax(dim=-1)  # [N, n]
        alike[page] = (apart <= 1).any(dim=1)
    return (live.compressed() if stored.is_compressed else live), alike & stored.valid


@dataclass(slots=True)
class _Sums:
    largest: float = 0.0
    error: float = 0.0
    size: float = 0.0
    values: int = 0
    nodes: int = 0
    alike: int = 0
    cosine: float = 1.0
    losses: dict[str, list[float]] = field(default_factory=dict)

    def add(
        self,
        stored: TeacherSignals,
        live: TeacherSignals,
        alike: Tensor,
        from_stored: dict[str, Tensor],
        from_live: dict[str, Tensor],
    ) -> None:
        for page, valid in enumerate(stored.valid):
            ours, theirs = stored.pooled[page, valid].float(), live.pooled[page, valid].float()
            if len(ours):
                self._add_page((ours - theirs).abs(), theirs.abs())
                self.cosine = min(self.cosine, float(cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)))
        self.nodes += int(stored.valid.sum())
        self.alike += int(alike.sum())
        for name, values in from_live.items():
            if name.startswith("kd_"):
                pair = self.losses.setdefault(name, [0.0, 0.0])
                pair[0] += float(from_stored[name].sum())
                pair[1] += float(values.sum())

    def _add_page(self, error: Tensor, size: Tensor) -> None:
        self.largest = max(self.largest, float(error.max()))
        self.error += float(error.double().sum())
        self.size += float(size.double().sum())
        self.values += error.numel()

    def agreement(self, pages: int) -> Agreement:
        differences = [abs(ours - theirs) / max(abs(theirs), 1e-6) for ours, theirs in self.losses.values()]
        # max() would pass over a NaN; without a term nothing was compared.
        comparable = bool(differences) and all(map(math.isfinite, differences))
        return Agreement(
            pages=pages,
            max_error=self.largest,
            mean_error=self.error / max(1, self.values),
            scale=self.size / max(1, self.values),
            cosine=self.cosine,
            loss_difference=max(differences) if comparable else math.inf,
            same_nodes=self.alike / max(1, self.nodes),
        )
