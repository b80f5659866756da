"""Baseline methods, with the formulas and settings of their papers.

Every loss is [B], one value per page. Symbols: ``B`` pages, ``N`` nodes per page (padded), ``C`` channels, ``P`` pooled
side, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from graphkd.batch import RegionPredictions
from graphkd.method.edges import cosine_lengths
from graphkd.method.loss_terms import deltas_of_class, logit_loss, masked_mean, require_same_nodes, standardised
from graphkd.signals import TeacherSignals


class DsigWeights(BaseModel):
    """Weights of Dsig's terms, as published."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    foreground: float = Field(default=0.5, ge=0)
    """Weight of foreground nodes."""
    background: float = Field(default=0.5, ge=0)
    """Weight of background nodes, times N_fg / (7.5 N_bg)."""
    edge: float = Field(default=2.0, ge=0)
    """Weight of the edges of the complete graph."""
    logits: float = Field(default=3.0, ge=0)
    """Weight of the class term."""
    boxes: float = Field(default=1.0, ge=0)
    """Weight of the box term."""
    maps: float = Field(default=0.5, ge=0)
    """Weight of the feature pyramid's squared error; only with a live teacher."""
    hard_background: float = Field(default=0.6, ge=0)
    """Minimum cross-entropy, nats, of a background node under the teacher for it to have edges."""


class PkdWeights(BaseModel):
    """Weight of PKD, as published for two-stage detectors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    maps: float = Field(default=6.0, ge=0)
    """Weight of the standardised pyramid's squared error."""


def dsig_loss(
    student_pooled: Tensor,
    student_regions: RegionPredictions | None,
    signals: TeacherSignals,
    foreground: Tensor,
    mean_square: float,
    weights: DsigWeights,
) -> dict[str, Tensor]:
    """Structured instance graph (Chen et al., "Deep Structured Instance Graph", ICCV 2021), each term float32 [B].

    ``L = w_fg L_fg + w_bg N_fg / (7.5 N_bg + 1e-4) L_bg + w_e L_edge + w_cls L_cls + w_box L_box``, as in the published
    code: mean squared errors of foreground and of background nodes; half the mean, over all ordered pairs of
    foreground and hard background nodes, of the squared difference of cosines; KL, mean
    over nodes and over classes; L1 of the deltas of a foreground node's class, over all nodes. One difference: squared
    errors are divided by ``mean_square``, so that the published weights suit a teacher of any scale.

    Args:
        student_pooled: [B, N, C, P, P], the student's features at the signals' boxes, in the teacher's channels.
        student_regions: the student's logits [B, N, K + 1] and deltas [B, N, K, 4], or None without a region head.
        signals: of the teacher.
        foreground: bool [B, N], True for nodes that overlap ground truth by IoU .5 or more.
        mean_square: mean squared feature of the teacher.
        weights: of the terms; terms of weight 0 are omitted.

    Raises:
        ValueError: if the two networks' node features differ in shape.
    """
    require_same_nodes(student_pooled, signals)
    signals = signals.detached()
    foreground = foreground & signals.valid
    terms: dict[str, Tensor] = {}
    if weights.foreground or weights.background:
        terms["kd_node"] = _node_errors(student_pooled, signals, foreground, mean_square, weights)
    if weights.edge:
        hard = hard_background(signals, foreground, weights.hard_background)
        terms["kd_edge"] = weights.edge * _cosine_edges(student_pooled, signals, foreground | hard)
    if student_regions is not None and signals.logits is not None and signals.deltas is not None:
        if weights.logits:
            divergence = logit_loss(student_regions.logits, signals, temperature=1.0)
            terms["kd_logits"] = weights.logits * divergence / signals.logits.shape[-1]
        if weights.boxes:
            terms["kd_boxes"] = weights.boxes * _box_distance(student_regions.deltas, signals, foreground)
    return terms


def hard_background(signals: TeacherSignals, foreground: Tensor, min_cross_entropy: float) -> Tensor:
    """Background nodes whose cross-entropy under the teacher is at least ``min_cross_entropy`` nats: bool [B, N].

    Without logits, the foreground score is used as the teacher's probability.
    """
    if signals.logits is None:
        cross_entropy = -(1 - signals.scores.float()).clamp(min=1e-6).log()
    else:
        cross_entropy = -signals.logits.float().log_softmax(dim=-1)[..., -1]
    return signals.valid & ~foreground & (cross_entropy >= min_cross_entropy)


def _node_errors(
    student_pooled: Tensor, signals: TeacherSignals, foreground: Tensor, mean_square: float, weights: DsigWeights
) -> Tensor:
    background = signals.valid & ~foreground
    error = (student_pooled.float() - signals.pooled.float()).square().mean(dim=(-3, -2, -1)) / mean_square
    share = foreground.sum(dim=1) / (7.5 * background.sum(dim=1) + 1e-4)
    front, back = masked_mean(error, foreground), masked_mean(error, background)
    return weights.foreground * front + weights.background * share * back


def _cosine_edges(student_pooled: Tensor, signals: TeacherSignals, nodes: Tensor) -> Tensor:
    gaps = (cosine_lengths(student_pooled.flatten(2)) - cosine_lengths(signals.pooled.flatten(2))).square()
    pairs = nodes[:, :, None] & nodes[:, None, :]  # includes the diagonal, whose difference is 0
    return 0.5 * masked_mean(gaps.flatten(1), pairs.flatten(1))


def _box_distance(deltas: Tensor, signals: TeacherSignals, foreground: Tensor) -> Tensor:
    assert signals.deltas is not None
    gaps = deltas_of_class(deltas, signals.classes) - deltas_of_class(signals.deltas, signals.classes)
    return masked_mean(torch.where(foreground, gaps.abs().sum(dim=-1), 0), signals.valid)


def map_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], mean_square: float) -> Tensor:
    """Mean squared error of maps [B, C, H_l, W_l], summed over common levels, over ``mean_square``: float32 [B]."""
    pairs = _common_levels(student, teacher)
    errors = [(own.float() - maps.detach().float()).square().mean(dim=(1, 2, 3)) for own, maps in pairs]
    return torch.stack(errors).sum(dim=0) / mean_square


def pkd_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], weights: PkdWeights) -> dict[str, Tensor]:
    """Pearson distillation of the pyramid (Cao et al., "PKD", NeurIPS 2022): ``w sum_l MSE(norm(s_l), norm(t_l)) / 2``.

    Channels are standardised over the positions of their own page, not of the batch as in the published code, so that
    a page's loss does not depend on its batch neighbours.

    Args:
        student: level name -> [B, C, H_l, W_l], in the teacher's channels.
        teacher: the same of the teacher.
        weights: weight of the term.

    Returns:
        ``{"kd_maps": float32 [B]}``.

    Raises:
        ValueError: if no level of the two pyramids has the same size, or channels differ, naming both.
    """
    errors = [
        (standardised(own.float()) - standardised(maps.detach().float())).square().mean(dim=(1, 2, 3)) / 2
        for own, maps in _common_levels(student, teacher)
    ]
    return {"kd_maps": weights.maps * torch.stack(errors).sum(dim=0)}


def _common_levels(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Levels of the same size, of student and teacher: by name where the pyramids are alike."""
    ours = {name: tuple(maps.shape) for name, maps in student.items()}
    theirs = {name: tuple(maps.shape) for name, maps in teacher.items()}
    if ours == theirs:
        return [(student[name], maps) for name, maps in teacher.items()]
    by_size = {maps.shape[-2:]: maps for maps in student.values()}
    pairs = [(by_size[maps.shape[-2:]], maps) for maps in teacher.values() if maps.shape[-2:] in by_size]
    if not pairs or any(own.shape != maps.shape for own, maps in pairs):
        raise ValueError(
            f"student maps {ours} and teacher maps {theirs} have no level in common; give both the same canvas, and "
            "adapt the student's channels"
        )
    return pairs
