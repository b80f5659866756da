"""Precision of cached features: fp32, fp16, or int8 with one scale per page and channel.

Legend: ``n`` nodes of a page, ``C`` channels, ``P`` pooled side.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp16", "fp32", "int8"]
INT8_MAX = 127


def quantize(pooled: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Convert features float32 [n, C, P, P] to the stored precision, with int8's scales float32 [C] (else empty)."""
    if precision != "int8":
        return pooled.to(torch.float16 if precision == "fp16" else torch.float32), pooled.new_zeros(0)
    if not len(pooled):
        return pooled.to(torch.int8), pooled.new_zeros(pooled.shape[1])
    scales = pooled.abs().amax(dim=(0, 2, 3)) / INT8_MAX
    # A channel that is zero on the whole page has scale 0; dividing by 1 keeps it zero.
    divisor = torch.where(scales > 0, scales, 1)[:, None, None]
    return (pooled / divisor).round().to(torch.int8), scales


def dequantize(stored: Tensor, scales: Tensor) -> Tensor:
    """Features float32 [..., n, C, P, P] from stored ones and scales [..., C or 0]; int8 is off by half a scale."""
    features = stored.float()
    return features * scales[..., None, :, None, None] if scales.shape[-1] else features
