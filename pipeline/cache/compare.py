"""Comparing cached signals with those of the live teacher, at the same boxes of the same views."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from graphkd.batch import PageBatch
from graphkd.detectors import Detector
from graphkd.distill import TrainingStep
from graphkd.method.config import MethodConfig
from graphkd.nodes import NodePolicy, Nodes, choose_nodes, teacher_pass
from graphkd.signals import TeacherSignals
from pipeline.cache.cached_teacher import CachedTeacher
from pipeline.cache.quantize import Precision
from pipeline.context import RunContext
from pipeline.data.loading.augmentation import cached_views
from pipeline.data.loading.loader import PageDataset, collate
from pipeline.data.loading.order import SampleRef
from pipeline.training_step import build_training_step

MAX_RELATIVE_LOSS_DIFFERENCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 5e-3, "int8": 5e-2}
"""Largest relative difference of a distillation loss between cached and live signals. Rounding alone stays well below;
another machine's arithmetic adds to it."""
BATCH = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherComparison:
    """How a sample of cached rows compares with the live teacher."""

    pages: int
    max_error: float
    """Largest absolute difference of a feature."""
    mean_error: float
    """Mean absolute difference of a feature."""
    scale: float
    """Mean absolute feature of the live teacher, for comparison with the errors."""
    cosine: float
    """Minimum over pages of the cosine similarity of all features of a page."""
    loss_difference: float
    """Largest relative difference of a distillation term, over all pages together."""
    same_nodes: float
    """Share of the cached boxes that the live teacher would choose again to within a pixel."""


def compare_with_live(
    context: RunContext,
    cached: CachedTeacher,
    pages: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TeacherComparison:
    """Run the live teacher on ``pages`` rows, evenly spread over the cache, and compute the student's losses from
    both.
    """
    views, view, device = cached.description.views, context.config.data.view, context.device
    refs = evenly_spread(len(context.dataset), views, pages)
    teacher = context.teacher.load(context.dataset.num_classes, device)
    dataset = PageDataset(context.dataset, view, context.config.run.seed, cached_views(views))
    step = _training_step(context).train()
    sums = _Sums()
    for first in range(0, len(refs), BATCH):
        batch = collate(dataset.__getitems__(refs[first : first + BATCH])).to(device)
        stored = cached.signals(batch)
        live, same = live_signals_at(teacher, batch, stored, context.teacher.settings.nodes)
        with torch.no_grad():
            sums.add(stored, live, same, step(batch, stored), step(batch, live))
        progress(min(len(refs), first + BATCH), len(refs))
    return sums.comparison(len(refs))


def _training_step(context: RunContext) -> TrainingStep:
    if context.config.method.name == "none":  # has no losses that depend on a teacher
        context = RunContext(context.config.model_copy(update={"method": MethodConfig(name="graphkd")}))
    return build_training_step(context, context.device)


def evenly_spread(samples: int, views: int, count: int) -> list[SampleRef]:
    """At most ``count`` rows of a cache, evenly spread, cycling through the views."""
    chosen = min(count, samples)
    return [SampleRef(number % views, number * samples // chosen) for number in range(chosen)]


def live_signals_at(
    teacher: Detector, batch: PageBatch, stored: TeacherSignals, policy: NodePolicy
) -> tuple[TeacherSignals, Tensor]:
    """Live signals at the boxes of ``stored``, and which boxes the teacher would choose again: bool [B, N]."""
    done = teacher_pass(teacher, batch, policy)
    nodes = Nodes(boxes=stored.boxes, valid=stored.valid, scores=stored.scores, classes=stored.classes)
    live = done.signals_at(nodes)
    with torch.no_grad():
        chosen = choose_nodes(teacher, done.features, teacher.propose(done.features), batch.targets(), policy)
    distances = (stored.boxes[:, :, None] - chosen.boxes[:, None]).abs().amax(dim=-1)  # [B, N, n]
    same = ((distances <= 1) & chosen.valid[:, None]).any(dim=2)
    return (live.compressed() if stored.is_compressed else live), same & stored.valid


@dataclass(slots=True)
class _Sums:
    max_error: float = 0.0
    error: float = 0.0
    size: float = 0.0
    values: int = 0
    nodes: int = 0
    same: int = 0
    cosine: float = 1.0
    losses: dict[str, list[float]] = field(default_factory=dict)

    def add(
        self,
        stored: TeacherSignals,
        live: TeacherSignals,
        same: Tensor,
        from_stored: dict[str, Tensor],
        from_live: dict[str, Tensor],
    ) -> None:
        for page, valid in enumerate(stored.valid):
            ours, theirs = stored.pooled[page, valid].float(), live.pooled[page, valid].float()
            if len(ours):
                self._add_page((ours - theirs).abs(), theirs.abs())
                self.cosine = min(self.cosine, float(cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)))
        self.nodes += int(stored.valid.sum())
        self.same += int(same.sum())
        for name, values in from_live.items():
            if name.startswith("kd_"):
                pair = self.losses.setdefault(name, [0.0, 0.0])
                pair[0] += float(from_stored[name].sum())
                pair[1] += float(values.sum())

    def _add_page(self, error: Tensor, size: Tensor) -> None:
        self.max_error = max(self.max_error, float(error.max()))
        self.error += float(error.double().sum())
        self.size += float(size.double().sum())
        self.values += error.numel()

    def comparison(self, pages: int) -> TeacherComparison:
        differences = [abs(ours - theirs) / max(abs(theirs), 1e-6) for ours, theirs in self.losses.values()]
        # max() would skip a NaN; without any term, nothing was compared.
        comparable = bool(differences) and all(map(math.isfinite, differences))
        return TeacherComparison(
            pages=pages,
            max_error=self.max_error,
            mean_error=self.error / max(1, self.values),
            scale=self.size / max(1, self.values),
            cosine=self.cosine,
            loss_difference=max(differences) if comparable else math.inf,
            same_nodes=self.same / max(1, self.nodes),
        )
