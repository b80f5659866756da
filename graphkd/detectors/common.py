"""Tensor helpers shared by the adapters."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float32(levels: list[Tensor]) -> list[Tensor]:
    """Convert a head's output of each level to float32."""
    return [level.float() for level in levels]


def page_mask(sizes: Tensor, images: Tensor) -> Tensor:
    """1 on the page and 0 on padding: float32 [B, 1, H, W]; ``sizes`` [B, 2] are height and width in px."""
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    inside = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None, :]
    return inside[:, None].float()
