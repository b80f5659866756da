"""Adjacency of the regions of a page.

Symbols: ``B`` pages, ``N`` nodes per page (padded). Boxes are xyxy, in any unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_TABLE_BYTES = 1 << 22  # 16 pages of 64 nodes


def adjacency(
    boxes: Tensor, valid: Tensor, *, gap: float = 1.0, nearest: int = 2, sight_margin: float = 0.15
) -> Tensor:
    """Connect nodes that are close together with no other node between them.

    Nodes i and j are connected if their box gap is at most ``gap`` times the page's median node height, or one is
    among the other's ``nearest`` by box gap; and if the rectangle between them, shrunk on every side by
    ``sight_margin`` of its extent, intersects no third box. Follows the figure of arXiv 2402.11401, in which edges
    connect neighbouring regions only and do not cross others.

    Args:
        boxes: float [B, N, 4], xyxy.
        valid: bool [B, N], False for padding.
        gap: maximum box gap, in median node heights.
        nearest: number of neighbours that each node has at any distance.
        sight_margin: share of the rectangle between two boxes that is cut off on each side, 0 to .5.

    Returns:
        bool [B, N, N], symmetric, False on the diagonal and for padding.
    """
    boxes = boxes.float()
    pairs = all_pairs(valid)
    gaps = box_gaps(boxes).masked_fill(~pairs, torch.inf)
    close = gaps <= gap * _median_height(boxes, valid)[:, None, None]
    return (close | _nearest(gaps, nearest)) & pairs & in_sight(boxes, valid, sight_margin)


def all_pairs(valid: Tensor) -> Tensor:
    """Edges of the complete graph: bool [B, N], False for padding -> bool [B, N, N], False on the diagonal."""
    own = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    return valid[:, :, None] & valid[:, None, :] & ~own


def box_gaps(boxes: Tensor) -> Tensor:
    """Euclidean gap between each pair of boxes of a page: [B, N, 4] -> [B, N, N], 0 if they touch or overlap."""
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    return (low - high).clamp(min=0).square().sum(dim=-1).sqrt()


def in_sight(boxes: Tensor, valid: Tensor, margin: float) -> Tensor:
    """Whether no third box is between two: [B, N, 4], [B, N] -> bool [B, N, N]."""
    first = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    second = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    cut = margin * (high - low)
    low, high = low + cut, high - cut
    return ~_meets_third(low, high, boxes, valid)


def _meets_third(low: Tensor, high: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
    """Whether the rectangle [low, high] of (i, j), float [B, N, N, 2] each, intersects a valid box other than i and j.

    Time is cubic in N. Memory is bounded: rows are processed in parts of at most ``MAX_TABLE_BYTES``.
    """
    pages, nodes = valid.shape
    size = max(1, MAX_TABLE_BYTES // max(1, pages * nodes * nodes))
    others = ~torch.eye(nodes, dtype=torch.bool, device=boxes.device)
    left, top, right, bottom = boxes.transpose(1, 2).contiguous()[:, :, None, None, :].unbind(dim=1)
    third = valid[:, None, None, :] & others[None, None]
    rows = []
    for first in range(0, nodes, size):
        part = slice(first, first + size)
        meets = low[:, part, :, 0, None] < right
        meets &= high[:, part, :, 0, None] > left
        meets &= low[:, part, :, 1, None] < bottom
        meets &= high[:, part, :, 1, None] > top
        meets &= third
        meets &= others[None, part, None, :]
        rows.append(meets.any(dim=-1))
    return torch.cat(rows, dim=1) if rows else valid[:, :, None] & valid[:, None, :]


def _median_height(boxes: Tensor, valid: Tensor) -> Tensor:
    # Sorted, since CUDA's median is not deterministic.
    heights = (boxes[..., 3] - boxes[..., 1]).masked_fill(~valid, torch.inf)
    ordered = torch.nn.functional.pad(heights, (0, 1), value=torch.inf).sort(dim=1).values  # a page may have no nodes
    middle = (valid.sum(dim=1, keepdim=True) - 1).clamp(min=0) // 2
    return ordered.gather(1, middle).squeeze(1).masked_fill(~valid.any(dim=1), 0.0)


def _nearest(gaps: Tensor, count: int) -> Tensor:
    count = min(count, gaps.shape[-1])
    nearest = gaps.topk(count, dim=-1, largest=False).indices
    chosen = torch.zeros_like(gaps, dtype=torch.bool).scatter(-1, nearest, True) & gaps.isfinite()
    return chosen | chosen.transpose(1, 2)
