"""Choosing the nodes of a page, and the signals of a live teacher at them.

Nodes are chosen from the teacher's proposals, or from the student's proposals of the step as in Dsig.

Symbols: ``B`` pages, ``N`` nodes per page (padded), ``K`` classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import pad

from graphkd.batch import Features, PageBatch, Proposals, RegionPredictions, Targets
from graphkd.boxes import box_areas
from graphkd.detectors.ops.gather import first_rows, rows, valid_rows
from graphkd.detectors.ops.suppression import suppress
from graphkd.detectors.protocol import Detector
from graphkd.signals import TeacherSignals


class NodePolicy(BaseModel):
    """Boxes that become nodes: ground truth first, then the teacher's proposals by foreground score.

    On pages with more ground truth than nodes, classes with fewer regions on the page come first, and within a class
    larger regions.

    Many are near duplicates or background. Fewer of those, by a lower ``nms_iou`` or a higher ``min_score``, gave
    worse students (``docs/method.md``): they show where boxes end, and what is background.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(default=64, ge=1)
    """N, maximum number of nodes per page."""
    nms_iou: float = Field(default=0.7, gt=0, le=1)
    """Class-agnostic IoU above which the weaker of two nodes is dropped; ground truth is never dropped."""
    min_score: float = Field(default=0.01, ge=0, lt=1)
    """Minimum foreground probability of a proposal under the teacher."""
    candidates: int = Field(default=4, ge=1)
    """Proposals scored per node, so that the region head does not run on all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """Chosen boxes of each page, padded to N."""

    boxes: Tensor
    """float32 [B, N, 4]; padding is 0."""
    valid: Tensor
    """bool [B, N]: False for padding."""
    scores: Tensor
    """float32 [B, N]: 1 for ground truth, else the foreground probability under the teacher, or the proposal's score if
    the teacher has no region head; padding is 0."""
    classes: Tensor
    """int64 [B, N]: class of ground truth; -1 where the teacher predicts it; padding is 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherPass:
    """A live teacher's backbone pass over a batch, from which signals at any nodes can be computed."""

    teacher: Detector
    features: Features
    policy: NodePolicy
    maps: bool = False
    """Whether signals include the feature pyramid."""
    dtype: torch.dtype = torch.float32
    """Autocast precision of the teacher's network. Signals are float32."""

    @torch.no_grad()
    def signals(self, proposals: Proposals, targets: Targets) -> TeacherSignals:
        """Signals at the nodes that the policy chooses from ``proposals`` and ground truth."""
        with _autocast(self.dtype, proposals.boxes):
            nodes = choose_nodes(self.teacher, self.features, proposals, targets, self.policy)
        return self.signals_at(nodes)

    def own_signals(self, targets: Targets) -> TeacherSignals:
        """Signals at nodes chosen from the teacher's own proposals."""
        with torch.no_grad(), _autocast(self.dtype, self.features.sizes):
            proposals = self.teacher.propose(self.features)
        return self.signals(proposals, targets)

    @torch.no_grad()
    def signals_at(self, nodes: Nodes) -> TeacherSignals:
        """Signals at given nodes."""
        with _autocast(self.dtype, nodes.boxes):
            pooled = self.teacher.pool(self.features, nodes.boxes)
            regions = self.teacher.classify(pooled)
        return TeacherSignals(
            boxes=nodes.boxes,
            valid=nodes.valid,
            scores=nodes.scores,
            classes=_predicted(nodes.classes, regions),
            logits=None if regions is None else regions.logits,
            deltas=None if regions is None else regions.deltas,
            pooled=pooled.float(),
            maps={name: level.float() for name, level in self.features.maps.items()} if self.maps else None,
        )


@torch.no_grad()
def teacher_pass(
    teacher: Detector,
    batch: PageBatch,
    policy: NodePolicy,
    *,
    maps: bool = False,
    dtype: torch.dtype = torch.float32,
) -> TeacherPass:
    """Run the teacher's backbone on a batch, under autocast if ``dtype`` is not float32."""
    with _autocast(dtype, batch.images):
        features = teacher.features(batch.images, batch.sizes)
    return TeacherPass(teacher=teacher, features=features, policy=policy, maps=maps, dtype=dtype)


def live_signals(teacher: Detector, batch: PageBatch, policy: NodePolicy, *, maps: bool = False) -> TeacherSignals:
    """Run the teacher on a batch and return its signals at nodes that ``policy`` chooses from its proposals."""
    return teacher_pass(teacher, batch, policy, maps=maps).own_signals(batch.targets())


def _autocast(dtype: torch.dtype, on: Tensor) -> torch.autocast:
    """Context of the teacher's network on the device of ``on``; without autocast for float32."""
    return torch.autocast(on.device.type, dtype, enabled=dtype != torch.float32)


def choose_nodes(
    teacher: Detector, features: Features, proposals: Proposals, targets: Targets, policy: NodePolicy
) -> Nodes:
    """Choose the nodes of each page by ``policy``."""
    limit = policy.candidates * policy.count
    boxes, scores = proposals.boxes[:, :limit], proposals.scores[:, :limit]
    regions = teacher.classify(teacher.pool(features, boxes))
    if regions is not None:
        scores = 1 - regions.logits.float().softmax(dim=-1)[..., -1]
    likely = proposals.valid[:, :limit] & (scores >= policy.min_score)
    order = scores.masked_fill(~likely, -1).argsort(dim=1, descending=True, stable=True)
    truth = _first_regions(targets, policy.count)
    return _merged(truth, rows(boxes, order), rows(scores, order), likely.gather(1, order), policy)


def _merged(truth: Targets, boxes: Tensor, scores: Tensor, likely: Tensor, policy: NodePolicy) -> Nodes:
    """Ground truth, then the proposals that neither it nor a better one suppresses."""
    all_boxes, usable = torch.cat([truth.boxes, boxes], dim=1), torch.cat([truth.valid, likely], dim=1)
    kept = suppress(all_boxes, usable, policy.nms_iou)
    true = truth.boxes.shape[1]
    kept = torch.cat([truth.valid, kept[:, true:]], dim=1)  # ground truth is kept even if regions overlap
    order, valid = first_rows(kept, policy.count)
    return Nodes(
        boxes=_padded(valid_rows(all_boxes, order, valid), policy.count),
        valid=_padded(valid, policy.count),
        scores=_padded(valid_rows(torch.cat([truth.valid.float(), scores], dim=1), order, valid), policy.count),
        classes=_padded(valid_rows(pad(truth.classes, (0, boxes.shape[1]), value=-1), order, valid), policy.count),
    )


def _first_regions(targets: Targets, count: int) -> Targets:
    """Up to ``count`` regions of each page, in their order: of classes with fewer regions first, then the larger."""
    if targets.boxes.shape[1] <= count:
        return targets
    classes = targets.classes.masked_fill(~targets.valid, -1)
    by_area = box_areas(targets.boxes).argsort(dim=1, descending=True, stable=True)  # padding has no area
    alike = (classes[:, :, None] == classes[:, None, :]).sum(dim=-1)
    frequency = alike.masked_fill(~targets.valid, targets.boxes.shape[1] + 1).gather(1, by_area)
    first = by_area.gather(1, frequency.argsort(dim=1, stable=True))[:, :count].sort(dim=1).values
    return replace(
        targets,
        boxes=rows(targets.boxes, first),
        classes=rows(targets.classes, first),
        valid=rows(targets.valid, first),
    )


def _padded(values: Tensor, count: int) -> Tensor:
    """Pad [B, n, ...] to [B, count, ...]."""
    return pad(values, (0, 0) * (values.ndim - 2) + (0, count - values.shape[1]))


def _predicted(classes: Tensor, regions: RegionPredictions | None) -> Tensor:
    if regions is None:
        return classes.clamp(min=0)
    best = regions.logits[..., :-1].argmax(dim=-1)
    return torch.where(classes >= 0, classes, best)
