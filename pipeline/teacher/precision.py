"""Features in the precision of a cache: fp32 as they are, fp16 rounded, int8 with one scale per page and channel.

Legend: ``n`` nodes of a page, ``C`` channels, ``P`` pooled side.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Precision = Literal["fp16", "fp32", "int8"]
LARGEST = 127


def encode(pooled: NDArray[np.float32], precision: Precision) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """Features [n, C, P, P] as they are stored, and the scales [C] of int8 (empty otherwise)."""
    if precision != "int8":
        return pooled.astype(np.float16 if precision == "fp16" else np.float32), np.zeros(0, dtype=np.float32)
    scales = np.abs(pooled).max(axis=(0, 2, 3), initial=0.0).astype(np.float32) / LARGEST
    # A channel that is zero all over the page has scale 0; dividing by 1 instead keeps it zero.
    safe = np.where(scales > 0, scales, 1)[:, None, None]
    return np.rint(pooled / safe).astype(np.int8), scales


def decode(stored: NDArray[np.generic], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Features float32 [n, C, P, P] from what was stored; off by at most half a scale where there are scales."""
    features = stored.astype(np.float32)
    return features * scales[:, None, None] if len(scales) else features
