"""Loss terms shared by the methods: class logits, box deltas, standardised features, means over nodes.

Every term is [B], one value per page, so that the training loop can normalise by the global batch.
Symbols: ``B`` pages, ``N`` nodes per page (padded), ``C`` channels, ``K`` classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div, smooth_l1_loss

from graphkd.signals import TeacherSignals


def require_same_nodes(student_pooled: Tensor, signals: TeacherSignals) -> None:
    """Raise ValueError if the two networks' node features [B, N, C, P, P] differ in shape, naming both."""
    if student_pooled.shape != signals.pooled.shape:
        raise ValueError(
            f"student nodes {tuple(student_pooled.shape)} and teacher nodes {tuple(signals.pooled.shape)} differ; "
            "pool both at the same boxes and adapt the student's channels"
        )


def logit_loss(logits: Tensor, signals: TeacherSignals, temperature: float) -> Tensor:
    """``T^2 KL(teacher || student)`` of class probabilities (Hinton et al., 2015), mean over nodes, [B]."""
    assert signals.logits is not None
    student = (logits.float() / temperature).log_softmax(dim=-1)
    teacher = (signals.logits.float() / temperature).log_softmax(dim=-1)
    divergence = kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    return temperature**2 * masked_mean(divergence, signals.valid)


def box_loss(deltas: Tensor, signals: TeacherSignals) -> Tensor:
    """Smooth L1 between the deltas of the teacher's class, mean over foreground nodes, [B].

    Foreground are nodes whose most probable class is not background. Deltas are multiplied by the usual coder weights
    (10, 10, 5, 5), which give them unit variance (Ren et al., 2015).
    """
    assert signals.deltas is not None and signals.logits is not None
    classes = signals.logits[..., :-1].argmax(dim=-1)
    foreground = signals.valid & (signals.logits.argmax(dim=-1) < signals.logits.shape[-1] - 1)
    student, teacher = deltas_of_class(deltas, classes), deltas_of_class(signals.deltas, classes)
    return masked_mean(smooth_l1_loss(student, teacher, reduction="none").sum(dim=-1), foreground)


def deltas_of_class(deltas: Tensor, classes: Tensor) -> Tensor:
    """Deltas of each node's class, times the coder weights: [B, N, K, 4] and int64 [B, N] -> float32 [B, N, 4]."""
    index = classes[..., None, None].expand(*classes.shape, 1, 4)
    own = deltas.float().gather(2, index).squeeze(2)
    return torch.cat([own[..., :2] * 10, own[..., 2:] * 5], dim=-1)  # without copying a constant to the GPU


def standardised(features: Tensor) -> Tensor:
    """Standardise each channel over positions (PKD, Cao et al., NeurIPS 2022)."""
    centred = features - features.mean(dim=(-2, -1), keepdim=True)
    return centred / (centred.square().mean(dim=(-2, -1), keepdim=True) + 1e-6).sqrt()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True entries of each row: [B, N] -> [B]; 0, with a gradient path, if there are none."""
    return torch.where(mask, values, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
