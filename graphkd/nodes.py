"""Choosing the nodes of a page, and the signals of a live teacher at them.

Nodes are chosen from the teacher's proposals, or from the student's proposals of the step as in Dsig.

Symbols: ``B`` pages, ``N`` nodes per page (padded), ``K`` classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torchvision.ops import nms

from graphkd.batch import Features, PageBatch, Proposals, RegionPredictions, Targets
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
class TeacherPass:
    """A live teacher's backbone pass over a batch, from which signals at any nodes can be computed."""

    teacher: Detector
    features: Features
    policy: NodePolicy
    maps: bool = False
    """Whether signals include the feature pyramid."""

    @torch.no_grad()
    def signals(self, proposals: Proposals, targets: Targets) -> TeacherSignals:
        """Signals at the nodes that the policy chooses from ``proposals`` and ground truth."""
        boxes, classes, scores = choose_nodes(self.teacher, self.features, proposals, targets, self.policy)
        count = self.policy.count
        counts = torch.tensor([len(page) for page in boxes])
        valid = (torch.arange(count) < counts[:, None]).to(boxes[0].device)
        return self.signals_at(_pad(boxes, count), valid, _pad(scores, count), _pad(classes, count))

    @torch.no_grad()
    def signals_at(self, boxes: Tensor, valid: Tensor, scores: Tensor, classes: Tensor) -> TeacherSignals:
        """Signals at given nodes: boxes [B, N, 4], others [B, N]; the teacher predicts classes given as -1."""
        pooled = self.teacher.pool(self.features, list(boxes.unbind(0)))
        regions = self.teacher.classify(pooled)
        shape = boxes.shape[:2]
        return TeacherSignals(
            boxes=boxes,
            valid=valid,
            scores=scores,
            classes=_predicted(classes, regions),
            logits=None if regions is None else regions.logits.unflatten(0, shape),
            deltas=None if regions is None else regions.deltas.unflatten(0, shape),
            pooled=pooled.unflatten(0, shape),
            maps=dict(self.features.maps) if self.maps else None,
        )


@torch.no_grad()
def teacher_pass(teacher: Detector, batch: PageBatch, policy: NodePolicy, *, maps: bool = False) -> TeacherPass:
    """Run the teacher's backbone on a batch."""
    features = teacher.features(batch.images, batch.image_sizes())
    return TeacherPass(teacher=teacher, features=features, policy=policy, maps=maps)


@torch.no_grad()
def live_signals(teacher: Detector, batch: PageBatch, policy: NodePolicy, *, maps: bool = False) -> TeacherSignals:
    """Run the teacher on a batch and return its signals at nodes that ``policy`` chooses from its proposals."""
    done = teacher_pass(teacher, batch, policy, maps=maps)
    return done.signals(teacher.propose(done.features), batch.targets())


def choose_nodes(
    teacher: Detector, features: Features, proposals: Proposals, targets: Targets, policy: NodePolicy
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return boxes [n_i, 4], classes [n_i] (-1 unless ground truth) and scores [n_i] of each page's nodes.

    Scores are 1 for ground truth, otherwise the teacher's foreground probabilities; those of ``proposals`` if the
    teacher has no region head.
    """
    limit = policy.candidates * policy.count
    boxes = [page[:limit] for page in proposals.boxes]
    scores = [page[:limit] for page in proposals.scores]
    regions = teacher.classify(teacher.pool(features, boxes))
    if regions is not None:
        foreground = 1 - regions.logits.float().softmax(dim=-1)[:, -1]
        scores = list(foreground.split([len(page) for page in boxes]))
    pages = zip(boxes, scores, targets.boxes, targets.classes, strict=True)
    chosen = [_choose_page(*page, policy) for page in pages]
    return [page[0] for page in chosen], [page[1] for page in chosen], [page[2] for page in chosen]


def _choose_page(
    boxes: Tensor, scores: Tensor, true_boxes: Tensor, true_classes: Tensor, policy: NodePolicy
) -> tuple[Tensor, Tensor, Tensor]:
    likely = scores >= policy.min_score
    boxes, scores = boxes[likely], scores[likely]
    if len(true_boxes) > policy.count:
        first = _first_regions(true_boxes, true_classes, policy.count)
        true_boxes, true_classes = true_boxes[first], true_classes[first]
    all_boxes = torch.cat([true_boxes, boxes])
    all_scores = torch.cat([scores.new_ones(len(true_boxes)), scores])
    classes = torch.cat([true_classes, true_classes.new_full((len(boxes),), -1)])
    rank = all_scores.clone()
    rank[: len(true_boxes)] += 1  # before every proposal
    kept = nms(all_boxes, rank, policy.nms_iou)
    kept = kept[kept >= len(true_boxes)]  # ground truth is kept even if regions overlap
    kept = torch.cat([torch.arange(len(true_boxes), device=kept.device), kept])[: policy.count]
    return all_boxes[kept], classes[kept], all_scores[kept]


def _first_regions(boxes: Tensor, classes: Tensor, count: int) -> Tensor:
    """Indices of ``count`` regions in their order: those of classes with fewer regions first, then the larger."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    by_area = area.argsort(descending=True, stable=True)
    frequency = classes.bincount()[classes[by_area]]
    return by_area[frequency.argsort(stable=True)][:count].sort().values


def _pad(rows: list[Tensor], count: int) -> Tensor:
    padded = rows[0].new_zeros(len(rows), count, *rows[0].shape[1:])
    for page, values in enumerate(rows):
        padded[page, : len(values)] = values
    return padded


def _predicted(classes: Tensor, regions: RegionPredictions | None) -> Tensor:
    if regions is None:
        return classes.clamp(min=0)
    best = regions.logits[:, :-1].argmax(dim=-1).view_as(classes)
    return torch.where(classes >= 0, classes, best)
