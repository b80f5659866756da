"""Scores that classify nodes as text or not.

Symbols: ``B`` pages, ``N`` nodes per page, ``C`` channels, ``P`` pooled side, ``K`` classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Categorizer = Literal["teacher_class", "moments", "covariance_trace"]


def text_score(
    pooled: Tensor,
    logits: Tensor | None,
    *,
    categorizer: Categorizer,
    text_classes: Tensor,
    discriminant: Tensor | None = None,
) -> Tensor:
    """Score nodes; those above the fitted threshold are text.

    Args:
        pooled: float [..., C, P, P] teacher features.
        logits: float [..., K + 1] teacher logits, background last; only for ``teacher_class``.
        categorizer: one of the three scores below.
        text_classes: bool [K], True for classes of text.
        discriminant: float [2C], weights of the linear discriminant; only for ``moments``.

    Returns:
        float32 [...].

    ``teacher_class``: ``logsumexp(text logits) - logsumexp(non-text logits)``, the teacher's own log odds.
    ``moments``: a linear discriminant on each channel's mean and log variance over the P x P positions.
    ``covariance_trace``: the negated trace of the covariance over the squared mean, a literal reading of "based on
    their covariance" in the paper; kept for comparison.

    Raises:
        ValueError: if inputs of the score are missing, or the numbers of logits and text flags differ.
    """
    if categorizer == "teacher_class":
        if logits is None:
            raise ValueError("categorizer teacher_class needs class logits; use moments with a teacher without them")
        if logits.shape[-1] - 1 != len(text_classes):
            raise ValueError(
                f"the teacher gives logits of {logits.shape[-1] - 1} classes and background, but {len(text_classes)} "
                "classes have a text flag; use the statistics of the dataset that the teacher was trained on"
            )
        return _class_margin(logits.float(), text_classes)
    if categorizer == "moments":
        if discriminant is None:
            raise ValueError("categorizer moments needs a fitted discriminant [2C]; rebuild the teacher's statistics")
        return moments(pooled) @ discriminant
    mean, variance = _mean_and_variance(pooled)
    return -variance.sum(dim=-1) / mean.square().sum(dim=-1).clamp(min=1e-6)


def moments(pooled: Tensor) -> Tensor:
    """Mean and log variance of each channel over the positions: [..., C, P, P] -> float32 [..., 2C]."""
    mean, variance = _mean_and_variance(pooled)
    return torch.cat([mean, (variance + 1e-6).log()], dim=-1)


def _mean_and_variance(pooled: Tensor) -> tuple[Tensor, Tensor]:
    features = pooled.float().flatten(-2)
    mean = features.mean(dim=-1)
    return mean, (features - mean[..., None]).square().mean(dim=-1)


def _class_margin(logits: Tensor, text_classes: Tensor) -> Tensor:
    foreground = logits[..., :-1]
    text = foreground.masked_fill(~text_classes, -torch.inf).logsumexp(dim=-1)
    other = foreground.masked_fill(text_classes, -torch.inf).logsumexp(dim=-1)
    # If all classes are text, or none, the margin is infinite with the right sign; keep it finite.
    return torch.nan_to_num(text - other, nan=0.0, posinf=1e4, neginf=-1e4)
