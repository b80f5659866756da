"""Teacher outputs for a batch, the same whether from a live network or from a cache.

Symbols: ``B`` pages, ``N`` nodes per page (padded), ``C`` channels, ``P`` pooled side, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

MEAN_STD_SHAPE = (1, 2)
MIN_VARIANCE = 1e-8  # keeps the gradient of the deviation finite


def mean_std_pair(pooled: Tensor) -> Tensor:
    """Compress each channel to ``(m - s, m + s)`` of its mean and deviation over positions: [..., C, P, P] -> float32
    [..., C, 1, 2].

    A pair has the mean and variance of the features that it replaces. The mean squared difference of two pairs is
    ``(m - m')^2 + (s - s')^2``: the squared 2-Wasserstein distance between normal distributions with these moments, and
    a lower bound of that between the features.
    """
    features = pooled.float().flatten(-2)
    mean = features.mean(dim=-1)
    deviation = ((features - mean[..., None]).square().mean(dim=-1) + MIN_VARIANCE).sqrt()
    return torch.stack([mean - deviation, mean + deviation], dim=-1).unsqueeze(-2)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSignals:
    """Teacher outputs at one set of boxes per page, without gradients."""

    boxes: Tensor
    """float32 [B, N, 4]: node boxes, xyxy in canvas px; padding is 0."""
    valid: Tensor
    """bool [B, N]: False for padding."""
    scores: Tensor
    """float32 [B, N]: foreground probability under the teacher; 1 for ground truth."""
    classes: Tensor
    """int64 [B, N]: class of a ground-truth box, otherwise the teacher's most probable class."""
    logits: Tensor | None
    """[B, N, K + 1], background last; None for a teacher without a region head."""
    deltas: Tensor | None
    """[B, N, K, 4] with unit coder weights; None for a teacher without a region head."""
    pooled: Tensor
    """[B, N, C, P, P]: pooled features, or [B, N, C, 1, 2]: their :func:`mean_std_pair`."""
    maps: dict[str, Tensor] | None = None
    """Level name -> [B, C, H/stride, W/stride]: the feature pyramid; only from a live teacher."""

    def to(self, device: torch.device | str) -> TeacherSignals:
        """Move every tensor to ``device``."""
        moved = {field.name: _each(getattr(self, field.name), lambda value: value.to(device)) for field in fields(self)}
        return replace(self, **moved)

    def detached(self) -> TeacherSignals:
        """Copy without gradient paths to the teacher."""
        cut = {field.name: _each(getattr(self, field.name), torch.Tensor.detach) for field in fields(self)}
        return replace(self, **cut)

    @property
    def is_compressed(self) -> bool:
        """Whether ``pooled`` is a :func:`mean_std_pair`."""
        return tuple(self.pooled.shape[-2:]) == MEAN_STD_SHAPE

    def compressed(self) -> TeacherSignals:
        """Copy whose pooled features are replaced by their :func:`mean_std_pair`."""
        return replace(self, pooled=mean_std_pair(self.pooled))


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, dict):
        return {name: change(tensor) for name, tensor in value.items()}
    return None if value is None else change(value)
