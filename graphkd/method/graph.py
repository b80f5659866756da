"""The structured graph of a page: categorised nodes, neighbour edges, merged text.

Symbols: ``B`` pages, ``N`` nodes per page (padded), ``C`` channels, ``P`` pooled side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from graphkd.boxes import pairwise_iou
from graphkd.method.adjacency import adjacency, all_pairs
from graphkd.method.edges import Lengths, cosine_lengths, descriptors, edge_lengths
from graphkd.method.merging import ROUNDS, Merge, cluster_boxes, merge_text_nodes
from graphkd.method.statistics import TeacherStatistics
from graphkd.method.text import Categorizer, text_score
from graphkd.signals import TeacherSignals


class GraphConfig(BaseModel):
    """How the graph is built from the teacher's signals."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    categorizer: Categorizer | Literal["none"] = "teacher_class"
    """Classifier of text: teacher_class, moments or covariance_trace; none: no node is text, all have the same weight,
    and none are merged."""
    edges: Literal["neighbours", "complete", "none"] = "neighbours"
    """neighbours as in the paper's figure, complete for all pairs, or none."""
    lengths: Lengths = "mahalanobis"
    """Edge length: mahalanobis under the teacher's covariance, or cosine."""
    merge: bool = True
    """Whether text nodes are merged."""
    distinct_iou: float = Field(default=0.5, gt=0, le=1)
    """IoU above which the less confident of two nodes is left out of the graph; it still counts in the node loss."""
    min_score: float = Field(default=0.1, ge=0, le=1)
    """Minimum foreground probability of a node in the graph."""
    gap: float = Field(default=1.0, ge=0)
    """Maximum gap between neighbours, in median node heights."""
    nearest: int = Field(default=2, ge=0)
    """Number of neighbours that each node has at any distance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredGraph:
    """Graph of each page, built from the teacher and applied to the features of both networks."""

    boxes: Tensor
    """float32 [B, N, 4]: node boxes after merging, xyxy in canvas px."""
    valid: Tensor
    """bool [B, N]: nodes after merging."""
    regions: Tensor
    """bool [B, N]: original nodes that have edges and can merge; others count in the node loss only."""
    text: Tensor
    """bool [B, N]: text nodes after merging."""
    membership: Tensor
    """float32 [B, N, N]: row i averages, weighted by area, the original nodes merged into node i."""
    adjacent: Tensor
    """bool [B, N, N]: edges between merged nodes, symmetric, no diagonal."""
    inner: Tensor
    """float32 [B, N, N]: 1 for adjacent original nodes merged into one node: the edges of its self-loop."""
    merge: Merge
    """Assignment of original nodes to merged nodes."""
    measure: Lengths
    """Edge length."""

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

    Runs in every step, so that a cache does not depend on its settings: it never synchronises with the host, and does
    not loop over pages or nodes up to 4 million triples of nodes, such as 16 pages of 64. Follows arXiv 2402.11401 with
    the choices of ``docs/method.md``.

    Raises:
        ValueError: if the teacher's classes and the statistics' text flags differ in number, or the inputs of
            the categoriser are missing.
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
    """Nodes without near duplicates and background: bool [B, N].

    Excludes a node if a more confident one overlaps it by more than ``distinct_iou``, or its foreground probability is
    below ``min_score``. Such nodes are worth imitating, but in the graph they would separate neighbours: half of the
    nodes had no edge.
    """
    scores = signals.scores
    overlap = pairwise_iou(signals.boxes.float(), signals.boxes.float())
    better = signals.valid[:, None, :] & (scores[:, None, :] > scores[:, :, None])
    duplicate = ((overlap > config.distinct_iou) & better).any(dim=-1)
    return signals.valid & ~duplicate & (scores >= config.min_score)


def node_lengths(nodes: Tensor, statistics: TeacherStatistics, measure: Lengths) -> Tensor:
    """Length between each pair of descriptors: [B, N, C] -> float32 [B, N, N], independent of the number of channels.

    Mahalanobis lengths are divided by sqrt(C), so that two unrelated nodes are about sqrt(2) apart in any network;
    shrinkage lowers that, the more so the lower the rank of the features.
    """
    if measure == "cosine":
        return cosine_lengths(nodes)
    # Distances do not depend on the origin; near the nodes, differences of squares lose little precision. The origin is
    # constant, so that padding does not move it.
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
    areas = areas.clamp(min=1e-3) * signals.valid  # a node without area still counts
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
