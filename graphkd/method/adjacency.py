"""Adjacency of the regions of a page.

Symbols: ``B`` pages, ``N`` nodes per page (padded). Boxes are xyxy, in any unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_TABLE_BYTES = 1 << 22  # 16 pages of 64 nodes
UNBOUNDED_NODES, MAX_CANDIDATES = 64, 32


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
    candidates = (close | _nearest(gaps, nearest)) & pairs
    return _in_sight(boxes, valid, candidates, gaps, sight_margin)


def all_pairs(valid: Tensor) -> Tensor:
    """Edges of the complete graph: bool [B, N], False for padding -> bool [B, N, N], False on the diagonal."""
    own = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    return valid[:, :, None] & valid[:, None, :] & ~own


def box_gaps(boxes: Tensor) -> Tensor:
    """Euclidean gap between each pair of boxes of a page: [B, N, 4] -> [B, N, N], 0 if they touch or overlap."""
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    return (low - high).clamp(min=0).square().sum(dim=-1).sqrt()


def _in_sight(boxes: Tensor, valid: Tensor, candidates: Tensor, gaps: Tensor, margin: float) -> Tensor:
    """Candidate pairs with no third box between them: bool [B, N, N].

    On pages of more than ``UNBOUNDED_NODES`` nodes, only the ``MAX_CANDIDATES`` nearest candidates of each node are
    looked at, the first of equally near ones; a pair counts if either node is among the other's. Time then grows with
    the square of N, not with its cube.
    """
    nodes = valid.shape[1]
    own = torch.arange(nodes, device=boxes.device)
    third = valid[:, None, None, :] & (own[:, None] != own)[None, :, None, :]
    if nodes <= UNBOUNDED_NODES:
        third = third & (own[:, None] != own)[None, None]
        return candidates & ~meets_any(*_between(boxes[:, :, None], boxes[:, None], margin), boxes, third)
    order = gaps.masked_fill(~candidates, torch.inf).argsort(dim=-1, stable=True)[..., :MAX_CANDIDATES]
    low, high = _between(boxes[:, :, None], take(boxes, order), margin)
    seen = candidates.gather(-1, order) & ~meets_any(low, high, boxes, third, order)
    edges = torch.zeros_like(candidates).scatter(-1, order, seen)
    return edges | edges.transpose(1, 2)


def meets_any(low: Tensor, high: Tensor, boxes: Tensor, counted: Tensor, partners: Tensor | None = None) -> Tensor:
    """Whether rectangles intersect one of the counted boxes of their page.

    Args:
        low: left and top of each rectangle, [B, N, K, 2].
        high: right and bottom.
        boxes: [B, M, 4].
        counted: which boxes count for a rectangle; bool, broadcastable to [B, N, K, M].
        partners: number of a box that does not count for each rectangle, [B, N, K]; None counts all.

    Returns:
        bool [B, N, K]. Memory is bounded: rows are processed in parts of at most ``MAX_TABLE_BYTES``.
    """
    pages, rows, count, _ = low.shape
    size = max(1, MAX_TABLE_BYTES // max(1, pages * count * boxes.shape[1]))
    left, top, right, bottom = boxes.transpose(1, 2).contiguous()[:, :, None, None, :].unbind(dim=1)
    number = torch.arange(boxes.shape[1], device=boxes.device)
    parts = []
    for first in range(0, rows, size):
        part = slice(first, first + size)
        meets = low[:, part, :, 0, None] < right
        meets &= high[:, part, :, 0, None] > left
        meets &= low[:, part, :, 1, None] < bottom
        meets &= high[:, part, :, 1, None] > top
        meets &= counted if counted.shape[1] == 1 else counted[:, part]
        if partners is not None:
            meets &= partners[:, part, :, None] != number
        parts.append(meets.any(dim=-1))
    return torch.cat(parts, dim=1) if parts else low.new_zeros(low.shape[:3], dtype=torch.bool)


def take(boxes: Tensor, numbers: Tensor) -> Tensor:
    """Boxes of nodes by number: [B, N, 4], [B, n, K] -> [B, n, K, 4]."""
    flat = numbers.flatten(1)[..., None].expand(-1, -1, 4)
    return boxes.gather(1, flat).view(*numbers.shape, 4)


def _between(first: Tensor, second: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Corners [..., 2] of the rectangle between two boxes, shrunk by ``margin`` of its extent on each side."""
    starts = torch.maximum(first[..., :2], second[..., :2])
    ends = torch.minimum(first[..., 2:], second[..., 2:])
    low, high = torch.minimum(starts, ends), torch.maximum(starts, ends)
    cut = margin * (high - low)
    return low + cut, high - cut


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
