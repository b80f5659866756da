"""Distillation losses on a structured graph.

Every loss is [B], one value per page, so that the training loop can normalise by the global batch.
Symbols: ``B`` pages, ``N`` nodes per page (padded), ``C`` channels, ``P`` pooled side, ``K`` classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from graphkd.batch import RegionPredictions
from graphkd.method.edges import descriptors
from graphkd.method.graph import StructuredGraph, node_lengths
from graphkd.method.loss_terms import box_loss, logit_loss, masked_mean, require_same_nodes, standardised
from graphkd.method.statistics import TeacherStatistics
from graphkd.signals import TeacherSignals

NodeMetric = Literal["scaled", "mse", "pearson"]
Merged = Literal["members", "mean"]


class LossWeights(BaseModel):
    """Weights and variants of the loss terms."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    node: float = Field(default=3.0, ge=0)
    """Weight of the node terms (published: 0.5, of unscaled squared errors)."""
    node_metric: NodeMetric = "scaled"
    """scaled: squared error over each channel's variance between the teacher's nodes; mse: over the teacher's mean
    square; pearson: of channels standardised over positions (PKD)."""
    text_floor: float = Field(default=1.0, ge=0, le=1)
    """Minimum weight of text nodes relative to others; with 0 it is the ratio of other to text nodes."""
    merged: Merged = "members"
    """Error of a merged node: members: mean of its members' errors; mean: error of their mean feature."""
    edge: float = Field(default=2.0, ge=0)
    """Weight of the edge term (published: 2.0)."""
    text_edge: float = Field(default=0.5, ge=0)
    """Weight of edges between text nodes and of self-loops, relative to edges of other nodes."""
    logits: float = Field(default=1.0, ge=0)
    """Weight of the class term; published: 3 for its mean over classes, 3 / (K + 1) for this sum."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the class term (published: 1)."""
    boxes: float = Field(default=1.0, ge=0)
    """Weight of the box term (published: 1.0)."""
    maps: float = Field(default=0.0, ge=0)
    """Weight of the feature pyramid's squared error (published: 0.5); only with a live teacher."""


def graphkd_loss(
    student_pooled: Tensor,
    student_regions: RegionPredictions | None,
    signals: TeacherSignals,
    graph: StructuredGraph,
    statistics: TeacherStatistics,
    weights: LossWeights,
) -> dict[str, Tensor]:
    """Return all weighted terms of GraphKD by name, each float32 [B].

    ``L = w_node (L_nontext + a L_text) + w_edge L_edge + w_cls L_cls + w_box L_box`` (``docs/method.md``).

    Args:
        student_pooled: [B, N, C, P, P], the student's features at the signals' boxes, in the teacher's channels.
        student_regions: the student's logits [B, N, K + 1] and deltas [B, N, K, 4], or None without a region head.
        signals: of the teacher.
        graph: built from ``signals``.
        statistics: of the teacher.
        weights: of the terms; terms of weight 0 are omitted.

    Raises:
        ValueError: if the two networks' node features differ in shape.
    """
    require_same_nodes(student_pooled, signals)
    signals = signals.detached()
    terms: dict[str, Tensor] = {}
    if weights.node:
        terms["kd_node"] = weights.node * node_loss(student_pooled, signals, graph, statistics, weights)
    if weights.edge:
        terms["kd_edge"] = weights.edge * edge_loss(student_pooled, signals, graph, statistics, weights.text_edge)
    if student_regions is not None and signals.logits is not None and signals.deltas is not None:
        if weights.logits:
            terms["kd_logits"] = weights.logits * logit_loss(student_regions.logits, signals, weights.temperature)
        if weights.boxes:
            terms["kd_boxes"] = weights.boxes * box_loss(student_regions.deltas, signals)
    return terms


def node_loss(
    student_pooled: Tensor,
    signals: TeacherSignals,
    graph: StructuredGraph,
    statistics: TeacherStatistics,
    weights: LossWeights,
) -> Tensor:
    """``L_nontext + a L_text`` on merged nodes, [B]; a is N_nontext / N_text between ``text_floor`` and 1, and 1 on
    pages with text only.

    A merged node counts once. Its error is the area-weighted mean of its members' errors, or the error of their
    area-weighted mean feature, in which opposite errors cancel.
    """
    student, teacher = student_pooled.float(), signals.pooled.float()
    if weights.merged == "mean":
        student, teacher = graph.merged(student), graph.merged(teacher)
    error = node_errors(student, teacher, statistics, weights.node_metric)
    if weights.merged == "members":
        error = graph.merged(error)
    text, other = graph.text, graph.valid & ~graph.text
    balance = (other.sum(dim=1) / text.sum(dim=1).clamp(min=1)).clamp(min=weights.text_floor, max=1)
    balance = torch.where(other.any(dim=1), balance, 1)
    return masked_mean(error, other) + balance * masked_mean(error, text)


def node_errors(student: Tensor, teacher: Tensor, statistics: TeacherStatistics, metric: NodeMetric) -> Tensor:
    """Distance of each node from the teacher's: float32 [B, N, C, P, P] twice -> [B, N].

    ``scaled``: ``mean_cp (s - t)^2 / (sigma_c^2 + g mean sigma^2)``, the squared Mahalanobis distance under the
    covariance's diagonal over C. ``mse``: ``mean_cp (s - t)^2 / mean t^2``, Dsig's error, independent of the teacher's
    scale. ``pearson``: the error of standardised channels, ``2 (1 - r)`` (PKD, Cao et al., NeurIPS 2022).
    """
    if metric == "pearson":
        return (standardised(student) - standardised(teacher)).square().mean(dim=(-3, -2, -1))
    by_channel = (student - teacher).square().mean(dim=(-2, -1))
    if metric == "scaled":
        return (by_channel * statistics.channel_scale).mean(dim=-1)
    return by_channel.mean(dim=-1) / statistics.mean_square


def edge_loss(
    student_pooled: Tensor,
    signals: TeacherSignals,
    graph: StructuredGraph,
    statistics: TeacherStatistics,
    text_edge: float,
) -> Tensor:
    """Weighted mean over edges and self-loops of the squared difference between the networks' lengths, [B].

    ``sum_ij w_ij (d^T_ij - d^S_ij)^2 / E`` with ``w`` 1 for edges that touch a non-text node and ``text_edge`` for
    others; a self-loop is the mean over the edges inside a merged node. Lengths: :func:`graphkd.method.node_lengths`.
    """
    student, teacher = descriptors(student_pooled), descriptors(signals.pooled)
    between = _length_error(graph.merged(student), graph.merged(teacher), statistics, graph)
    within = _length_error(student, teacher, statistics, graph)
    text_pair = graph.text[:, :, None] & graph.text[:, None, :]
    weight = torch.where(text_pair, text_edge, 1.0) * graph.adjacent
    loops = graph.self_loops(within)
    has_loop = graph.self_loops(torch.ones_like(within))
    total = (weight * between).sum(dim=(1, 2)) / 2 + text_edge * loops.sum(dim=1)
    count = graph.adjacent.sum(dim=(1, 2)) / 2 + has_loop.sum(dim=1)
    return total / count.clamp(min=1)


def _length_error(student: Tensor, teacher: Tensor, statistics: TeacherStatistics, graph: StructuredGraph) -> Tensor:
    lengths = [node_lengths(nodes, statistics, graph.measure) for nodes in (student, teacher)]
    return (lengths[0] - lengths[1]).square()
