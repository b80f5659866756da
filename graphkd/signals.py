"""What a teacher says of a batch, live or from a cache: the step that learns from it cannot tell which.

Legend: ``B`` pages, ``N`` nodes a page (padded), ``C`` channels, ``P`` pooled side, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


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
    """[B, N, C, P, P]: pooled features."""
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

    def box_list(self) -> list[Tensor]:
        """All boxes, padding included, as one [N, 4] per page."""
        return list(self.boxes.unbind(0))


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, dict):
        return {name: change(tensor) for name, tensor in value.items()}
    return None if value is None else change(value)
