"""The distillation losses on a structured graph.

Every loss is [B], one value a page, so that the training loop can normalise by the global batch.
Legend: ``B`` pages, ``N`` nodes a page (padded), ``C`` channels, ``P`` pooled side, ``K`` classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import kl_div, smooth_l1_loss

from graphkd.method.edges import descriptors, edge_lengths
from graphkd.method.graph import StructuredGraph
from graphkd.method.statistics import TeacherStatistics
from graphkd.pages import RegionPredictions
from graphkd.signals import TeacherSignals


class LossWeights(BaseModel):
    """Weights and variants of the loss terms."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    node: float = Field(default=1.0, ge=0)
    """Weight of the node terms."""
    node_metric: Literal["mse", "pearson"] = "mse"
    """mse on features as they are, or pearson: each channel standardised over the positions first (PKD)."""
    edge: float = Field(default=2.0, ge=0)
    """Weight of the edge term (published: 2.0)."""
    text_edge: float = Field(default=0.5, ge=0)
    """Weight of an edge between two text nodes and of self-loops, where one that touches a non-text node has 1."""
    logits: float = Field(default=3.0, ge=0)
    """Weight of the class term (published: 3.0)."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the class term (published: 1)."""
    boxes: float = Field(default=1.0, ge=0)
    """Weight of the box term (published: 1.0)."""


def graphkd_loss(
    student_pooled: Tensor,
    student_regions: RegionPredictions | None,
    signals: TeacherSignals,
    graph: StructuredGraph,
    statistics: TeacherStatistics,
    weights: LossWeights,
) -> dict[str, Tensor]:
    """All weighted terms of GraphKD by name, each float32 [B].

    ``L = w_node (L_nontext + a L_text) + w_edge L_edge + w_cls L_cls + w_box L_box`` (``docs/method.md``).

    Args:
        student_pooled: [B, N, C, P, P], the student's features at the signals' boxes, in the teacher's channels.
        student_regions: the student's logits [B, N, K + 1] and deltas [B, N, K, 4], or None without a region head.
        signals: the teacher's side, without gradient.
        graph: built from ``signals``.
        statistics: whose whitening measures edges.
        weights: of each term; a term of weight 0 is left out.

    Raises:
        ValueError: where the two networks' node features differ in shape.
    """
    if student_pooled.shape != signals.pooled.shape:
        raise ValueError(
            f"student nodes {tuple(student_pooled.shape)} and teacher nodes {tuple(signals.pooled.shape)} differ; "
            "pool both at the same boxes and adapt the student's channels"
        )
    terms: dict[str, Tensor] = {}
    if weights.node:
        terms["kd_node"] = weights.node * node_loss(
            student_pooled, signals, graph, statistics.energy, weights.node_metric
        )
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
    energy: float,
    metric: Literal["mse", "pearson"],
) -> Tensor:
    """``L_nontext + a L_text`` on merged nodes, [B]; ``a = min(1, N_nontext / N_text)``, 1 without non-text nodes.

    The squared error is measured in the teacher's mean square ``energy``, so that one weight suits any teacher.
    """
    student, teacher = graph.merged(student_pooled), graph.merged(signals.pooled)
    if metric == "pearson":
        student, teacher, energy = standardised(student), standardised(teacher), 1.0
    error = (student - teacher).square().mean(dim=(-3, -2, -1)) / energy
    text, other = graph.text, graph.valid & ~graph.text
    balance = (other.sum(dim=1) / text.sum(dim=1).clamp(min=1)).clamp(max=1)
    balance = torch.where(other.any(dim=1), balance, 1)
    return masked_mean(error, other) + balance * masked_mean(error, text)


def edge_loss(
    student_pooled: Tensor,
    signals: TeacherSignals,
    graph: StructuredGraph,
    statistics: TeacherStatistics,
    text_edge: float,
) -> Tensor:
    """Weighted mean over edges and self-loops of the squared difference of Mahalanobis lengths, [B].

    Lengths are divided by sqrt(C), the length an edge between unrelated nodes has times sqrt(2), so that the term
    does not grow with the width of the network.
    """
    scale = student_pooled.shape[2] ** -0.5
    student, teacher = descriptors(student_pooled), descriptors(signals.pooled)
    whiten = statistics.whitening * scale
    between = edge_lengths(graph.merged(student), whiten) - edge_lengths(graph.merged(teacher), whiten)
    within = edge_lengths(student, whiten) - edge_lengths(teacher, whiten)
    text_pair = graph.text[:, :, None] & graph.text[:, None, :]
    weight = torch.where(text_pair, text_edge, 1.0) * graph.adjacent
    loops = graph.self_loops(within.square())
    has_loop = graph.self_loops(torch.ones_like(within))
    total = (weight * between.square()).sum(dim=(1, 2)) / 2 + text_edge * loops.sum(dim=1)
    count = graph.adjacent.sum(dim=(1, 2)) / 2 + has_loop.sum(dim=1)
    return total / count.clamp(min=1)


def logit_loss(logits: Tensor, signals: TeacherSignals, temperature: float) -> Tensor:
    """``T^2 KL(teacher || student)`` of class probabilities (Hinton et al., 2015), mean over nodes, [B]."""
    assert signals.logits is not None
    student = (logits.float() / temperature).log_softmax(dim=-1)
    teacher = (signals.logits.float() / temperature).log_softmax(dim=-1)
    divergence = kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    return temperature**2 * masked_mean(divergence, signals.valid)


def box_loss(deltas: Tensor, signals: TeacherSignals) -> Tensor:
    """Smooth L1 between the deltas of the teacher's class, mean over foreground nodes, [B].

    Foreground are nodes whose most probable class is not background. Deltas are taken times the usual coder weights
    (10, 10, 5, 5), the scale at which they have unit variance (Ren et al., 2015).
    """
    assert signals.deltas is not None and signals.logits is not None
    classes = signals.logits[..., :-1].argmax(dim=-1)
    foreground = signals.valid & (signals.logits.argmax(dim=-1) < signals.logits.shape[-1] - 1)
    index = classes[..., None, None].expand(*classes.shape, 1, 4)
    scale = deltas.new_tensor((10.0, 10.0, 5.0, 5.0), dtype=torch.float32)
    student = deltas.float().gather(2, index).squeeze(2) * scale
    teacher = signals.deltas.float().gather(2, index).squeeze(2) * scale
    return masked_mean(smooth_l1_loss(student, teacher, reduction="none").sum(dim=-1), foreground)


def standardised(pooled: Tensor) -> Tensor:
    """Each channel with mean 0 and variance 1 over the positions (PKD, Cao et al., NeurIPS 2022); same shape."""
    centred = pooled - pooled.mean(dim=(-2, -1), keepdim=True)
    return centred / (centred.square().mean(dim=(-2, -1), keepdim=True) + 1e-6).sqrt()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True entries of each row, 0 with a gradient path where there is none: [B, N] -> [B]."""
    return torch.where(mask, values, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
