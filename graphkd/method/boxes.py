"""Arithmetic of boxes and the rectangles between them. Legend: ``B`` pages, ``N`` nodes a page (padded)."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_TABLE = 1 << 26  # entries of one bool table: 64 MiB; 8 pages of 64 nodes, and even of 200, need a single one


def meets_any(low: Tensor, high: Tensor, boxes: Tensor, counted: Tensor, *, own: bool) -> Tensor:
    """Whether the rectangle of each pair of nodes meets a box of the page: bool [B, N, N].

    Time grows with N cubed, which is what the question costs; memory is bounded, since beyond ``LARGEST_TABLE``
    boxes are taken some at a time.

    Args:
        low: float [B, N, N, 2], left and top of the rectangle of pair (i, j).
        high: float [B, N, N, 2], right and bottom.
        boxes: float [B, N, 4], xyxy.
        counted: bool [B, N], the boxes that count.
        own: whether boxes i and j count for the rectangle of (i, j) themselves.
    """
    pages, nodes = counted.shape
    some = max(1, LARGEST_TABLE // max(1, pages * nodes * nodes))
    found = torch.zeros(pages, nodes, nodes, dtype=torch.bool, device=boxes.device)
    itself = torch.eye(nodes, dtype=torch.bool, device=boxes.device)
    for first in range(0, nodes, some):
        part = boxes[:, None, None, first : first + some]
        meets = low[..., None, 0] < part[..., 2]
        meets &= high[..., None, 0] > part[..., 0]
        meets &= low[..., None, 1] < part[..., 3]
        meets &= high[..., None, 1] > part[..., 1]
        meets &= counted[:, None, None, first : first + some]
        if not own:
            others = ~itself[:, first : first + some]
            meets &= others[None, :, None, :]
            meets &= others[None, None, :, :]
        found |= meets.any(dim=-1)
    return found
