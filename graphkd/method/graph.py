"""The structured graph of a page: categorised nodes, neighbour edges, merged text.

Legend: ``B`` pages, ``N`` nodes a page (padded), ``C`` channels, ``P`` pooled side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from graphkd.method.adjacency import adjacency, all_pairs
from graphkd.method.edges import Lengths, cosine_lengths, descriptors, edge_lengths
from graphkd.method.merging import ROUNDS, Merge, cluster_boxes, merge_text_nodes
from graphkd.method.statistics import TeacherStatistics
from graphkd.method.text import Categorizer, text_score
from graphkd.signals import TeacherSignals


class GraphConfig(BaseModel):
    """How the graph is built from the teacher's signals; every part has its switch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    categorizer: Categorizer | Literal["none"] = "teacher_class"
    """What tells text from the rest: teacher_class, moments, covariance_trace; or none: no node counts as text, all
    weigh alike, and nothing merges."""
    edges: Literal["neighbours", "complete", "none"] = "neighbours"
    """neighbours as the paper draws them, complete for all pairs, or none at all."""
    lengths: Lengths = "mahalanobis"
    """What edges measure: mahalanobis under the teacher's covariance, or cosine."""
    merge: bool = True
    """Whether text nodes merge."""
    distinct_iou: float = Field(default=0.5, gt=0, le=1)
    """IoU above which the less confident of two nodes is no region of the graph, but still a node of the losses."""
    min_score: float = Field(default=0.1, ge=0, le=1)
    """Least foreground probability of a region of the graph."""
    gap: float = Field(default=1.0, ge=0)
    """Largest gap of neighbours, in median node heights."""
    nearest: int = Field(default=2, ge=0)
    """Neighbours that each node gets however far away they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredGraph:
    """The graph that the teacher's features span over a page, applied alike to teacher and student."""

    boxes: Tensor
    """float32 [B, N, 4]: node boxes after merging, xyxy in canvas px."""
    valid: Tensor
    """bool [B, N]: True for nodes that are left after merging."""
    regions: Tensor
    """bool [B, N]: True for original nodes that can have edges and merge; others only count in the losses of nodes."""
    text: Tensor
    """bool [B, N]: True for text nodes."""
    membership: Tensor
    """float32 [B, N, N]: row i averages, weighted by area, the original nodes merged into node i."""
    adjacent: Tensor
    """bool [B, N, N]: edges between merged nodes, symmetric, no diagonal."""
    inner: Tensor
    """float32 [B, N, N]: 1 where two adjacent original nodes were merged into one: the edges of its self-loop."""
    merge: Merge
    """Which original node went where."""
    measure: Lengths
    """What its edges measure."""

    def merged(self, nodes: Tensor) -> Tensor:
        """Area-weighted mean of each cluster's members: [B, N, ...] -> float32 [B, N, ...]."""
        flat = nodes.float().reshape(*nodes.shape[:2], -1)
        return (self.membership @ flat).view(nodes.shape)

    def self_loops(self, lengths: Tensor) -> Tensor:
        """Mean edge length inside each cluster: original lengths [B, N, N] -> [B, N], 0 for single nodes."""
        total = torch.zeros_like(self.membership[..., 0])
        inside = (lengths * self.inner).sum(dim=-1)
        pairs = self.inner.sum(dim=-1)
        summed = total.scatter_add(1, self.merge.cluster, inside)
        counted = total.scatter_add(1, self.merge.cluster, pairs)
        return summed / counted.clamp(min=1)


def build_graph(signals: TeacherSignals, statistics: TeacherStatistics, config: GraphConfig) -> StructuredGraph:
    """Build the graph of every page from the teacher alone: categories, edges, merged text.

    Cheap enough for every step, so that a cache holds no decision of this function: nothing is waited for on the host,
    and up to 4 million triples of nodes, such as 16 pages of 64, there is no loop over pages or nodes. The steps are
    those of arXiv 2402.11401; ``docs/method.md`` has the choices made here.

    Raises:
        ValueError: where the teacher's classes and the statistics' text flags differ in number, or the categoriser
            lacks what it is computed from.
    """
    signals = signals.detached()
    text = _text_nodes(signals, statistics, config)
    regions = deduplicated_nodes(signals, config)
    if config.edges == "complete":
        adjacent = all_pairs(regions)
    else:
        adjacent = adjacency(signals.boxes, regions, gap=config.gap, nearest=config.nearest)
    lengths = node_lengths(descriptors(signals.pooled), statistics, config.lengths)
    rounds = ROUNDS if config.merge and config.categorizer != "none" else 0
    merge = merge_text_nodes(adjacent, lengths, text, signals.boxes, regions, rounds=rounds)
    merge = replace(merge, valid=merge.valid | (signals.valid & ~regions))
    return _merged_graph(signals, regions, text, adjacent, merge, config)


def deduplicated_nodes(signals: TeacherSignals, config: GraphConfig) -> Tensor:
    """Nodes that stand for a region of their own: bool [B, N].

    A node does not where a more confident one overlaps it by more than ``distinct_iou``, or the teacher's foreground
    probability is below ``min_score``. Near duplicates and background are worth imitating, but as regions of the graph
    they would stand between neighbours: half the nodes then had no edge at all.
    """
    scores = signals.scores
    overlap = box_overlaps(signals.boxes)
    better = signals.valid[:, None, :] & (scores[:, None, :] > scores[:, :, None])
    duplicate = ((overlap > config.distinct_iou) & better).any(dim=-1)
    return signals.valid & ~duplicate & (scores >= config.min_score)


def box_overlaps(boxes: Tensor) -> Tensor:
    """IoU of every two boxes of a page: [B, N, 4] -> float32 [B, N, N], 0 for boxes without area."""
    boxes = boxes.float()
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    areas = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)
    return shared / (areas[:, :, None] + areas[:, None, :] - shared).clamp(min=1e-9)


def node_lengths(nodes: Tensor, statistics: TeacherStatistics, measure: Lengths) -> Tensor:
    """Lengths between every two descriptors, [B, N, C] -> float32 [B, N, N], in units that do not grow with C.

    Mahalanobis lengths are divided by sqrt(C): without shrinkage two unrelated nodes are then about sqrt(2) apart in
    any network, and with it less, the more so the fewer directions the features really use.
    """
    if measure == "cosine":
        return cosine_lengths(nodes)
    # Distances do not depend on the origin; with it among the nodes, squares and products cancel without much loss.
    # A constant one, since padding must not move it.
    return edge_lengths(nodes.float() - statistics.mean, statistics.whitening * nodes.shape[-1] ** -0.5)


def _text_nodes(signals: TeacherSignals, statistics: TeacherStatistics, config: GraphConfig) -> Tensor:
    if config.categorizer == "none":
        return torch.zeros_like(signals.valid)
    score = text_score(
        signals.pooled,
        signals.logits,
        categorizer=config.categorizer,
        text_classes=statistics.text_classes,
        discriminant=statistics.discriminant,
    )
    return (score > statistics.thresholds[config.categorizer]) & signals.valid


def _merged_graph(
    signals: TeacherSignals, regions: Tensor, text: Tensor, adjacent: Tensor, merge: Merge, config: GraphConfig
) -> StructuredGraph:
    areas = (signals.boxes[..., 2:] - signals.boxes[..., :2]).clamp(min=0).prod(dim=-1)
    areas = areas.clamp(min=1e-3) * signals.valid  # a node without area still has features
    membership = merge.membership(areas)
    member = (membership > 0).float()
    between = member @ adjacent.float() @ member.transpose(1, 2) > 0
    own = torch.eye(between.shape[-1], dtype=torch.bool, device=between.device)
    pairs = merge.valid[:, :, None] & merge.valid[:, None, :] & ~own
    if config.edges == "none":
        pairs = torch.zeros_like(pairs)
    together = merge.cluster[:, :, None] == merge.cluster[:, None, :]
    return StructuredGraph(
        boxes=cluster_boxes(merge.cluster, signals.boxes),
        valid=merge.valid,
        regions=regions,
        text=text & merge.valid,
        membership=membership,
        adjacent=between & pairs,
        inner=(together & adjacent).float() * (config.edges != "none"),
        merge=merge,
        measure=config.lengths,
    )
