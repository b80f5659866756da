"""Features in the precision of a cache: fp32 as they are, fp16 rounded, int8 with one scale per page and channel.

Legend: ``n`` nodes of a page, ``C`` channels, ``P`` pooled side.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp16", "fp32", "int8"]
BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}
LARGEST = 127


def quantize(pooled: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Features float32 [n, C, P, P] as they are stored, and the scales float32 [C] of int8 (empty otherwise)."""
    if precision != "int8":
        return pooled.to(torch.float16 if precision == "fp16" else torch.float32), pooled.new_zeros(0)
    if not len(pooled):
        return pooled.to(torch.int8), pooled.new_zeros(pooled.shape[1])
    scales = pooled.abs().amax(dim=(0, 2, 3)) / LARGEST
    # A channel that is zero all over the page has scale 0; dividing by 1 instead keeps it zero.
    safe = torch.where(scales > 0, scales, 1)[:, None, None]
    return (pooled / safe).round().to(torch.int8), scales


def dequantize(stored: Tensor, scales: Tensor) -> Tensor:
    """Features float32 [..., n, C, P, P] from what was stored, off by half a scale at most; scales [..., C or 0]."""
    features = stored.float()
    return features * scales[..., None, :, None, None] if scales.shape[-1] else features
