"""What a teacher says of a batch, live or from a cache: the step that learns from it cannot tell which.

Legend: ``B`` pages, ``N`` nodes a page (padded), ``C`` channels, ``P`` pooled side, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

MEAN_STD_SHAPE = (1, 2)
SMALLEST_VARIANCE = 1e-8  # below it a deviation has no gradient worth having


def mean_std_pair(pooled: Tensor) -> Tensor:
    """Mean ``m`` and deviation ``s`` of each channel over the positions, as ``(m - s, m + s)``: [..., C, P, P] ->
    float32 [..., C, 1, 2].

    Such a pair has the mean and the variance of the features it stands for, so whatever is computed from those is the
    same. The mean squared difference of two pairs is ``(m - m')^2 + (s - s')^2``: the squared 2-Wasserstein distance of
    normal distributions with these moments, and never more than that of the features themselves.
    """
    features = pooled.float().flatten(-2)
    mean = features.mean(dim=-1)
    deviation = ((features - mean[..., None]).square().mean(dim=-1) + SMALLEST_VARIANCE).sqrt()
    return torch.stack([mean - deviation, mean + deviation], dim=-1).unsqueeze(-2)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSignals:
    """Teacher outputs at one fixed set of boxes per page; none of them carries a gradient."""

    boxes: Tensor
    """float32 [B, N, 4]: node boxes, xyxy in canvas px; padding is 0."""
    valid: Tensor
    """bool [B, N]: True where a node is, False for padding."""
    scores: Tensor
    """float32 [B, N]: the teacher's foreground probability of the box; 1 for ground truth."""
    classes: Tensor
    """int64 [B, N]: the ground-truth class of a ground-truth box, else the teacher's most probable class."""
    logits: Tensor | None
    """[B, N, K + 1], background last; None for a teacher without a region head."""
    deltas: Tensor | None
    """[B, N, K, 4] with unit coder weights; None for a teacher without a region head."""
    pooled: Tensor
    """[B, N, C, P, P]: pooled features, or [B, N, C, 1, 2]: their :func:`mean_std_pair`."""
    maps: dict[str, Tensor] | None = None
    """Level name -> [B, C, H/stride, W/stride]: the whole pyramid, which only a live teacher gives."""

    def to(self, device: torch.device | str) -> TeacherSignals:
        """Move every tensor to ``device``."""
        moved = {field.name: _each(getattr(self, field.name), lambda value: value.to(device)) for field in fields(self)}
        return replace(self, **moved)

    def detached(self) -> TeacherSignals:
        """The same without a way back: what is learned from a teacher never changes it."""
        cut = {field.name: _each(getattr(self, field.name), torch.Tensor.detach) for field in fields(self)}
        return replace(self, **cut)

    @property
    def is_compressed(self) -> bool:
        """Whether ``pooled`` holds only two points a channel."""
        return tuple(self.pooled.shape[-2:]) == MEAN_STD_SHAPE

    def compressed(self) -> TeacherSignals:
        """The same with two points a channel in place of the pooled features."""
        return replace(self, pooled=mean_std_pair(self.pooled))

    def box_list(self) -> list[Tensor]:
        """All boxes, padding included, as one [N, 4] per page."""
        return list(self.boxes.unbind(0))


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, dict):
        return {name: change(tensor) for name, tensor in value.items()}
    return None if value is None else change(value)
