"""Which regions of a page are neighbours.

Legend: ``B`` pages, ``N`` nodes a page (padded). Boxes are xyxy in any one unit; the result does not depend on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_TABLE = 1 << 22  # entries of one bool table, 4 MiB: 16 pages of 64 nodes


def adjacency(
    boxes: Tensor, valid: Tensor, *, gap: float = 1.0, nearest: int = 2, sight_margin: float = 0.15
) -> Tensor:
    """Join nodes that lie close together with nothing standing between them.

    Nodes i and j are joined where their box gap is at most ``gap`` times the page's median node height, or one is
    among the other's ``nearest`` by box gap; and where the rectangle between them, shrunk on every side by
    ``sight_margin`` of its extent, meets no third box. Follows the figure of arXiv 2402.11401, where edges run only
    between neighbouring regions and none runs through another.

    Args:
        boxes: float [B, N, 4], xyxy.
        valid: bool [B, N], False for padding.
        gap: largest box gap of neighbours, in median node heights.
        nearest: neighbours each node gets however far away they are.
        sight_margin: share of the rectangle between two boxes cut off on each side, 0 to .5.

    Returns:
        bool [B, N, N], symmetric, False on the diagonal and for padding.
    """
    boxes = boxes.float()
    pairs = all_pairs(valid)
    gaps = box_gaps(boxes).masked_fill(~pairs, torch.inf)
    close = gaps <= gap * _median_height(boxes, valid)[:, None, None]
    return (close | _nearest(gaps, nearest)) & pairs & in_sight(boxes, valid, sight_margin)


def all_pairs(valid: Tensor) -> Tensor:
    """The complete graph: bool [B, N], False for padding -> bool [B, N, N], False on the diagonal."""
    own = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    return valid[:, :, None] & valid[:, None, :] & ~own


def box_gaps(boxes: Tensor) -> Tensor:
    """Euclidean gap between every two boxes of a page: [B, N, 4] -> [B, N, N], 0 where they touch or overlap."""
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    return (low - high).clamp(min=0).square().sum(dim=-1).sqrt()


def in_sight(boxes: Tensor, valid: Tensor, margin: float) -> Tensor:
    """Whether no third box stands between two: [B, N, 4], [B, N] -> bool [B, N, N]."""
    first = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    second = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    cut = margin * (high - low)
    low, high = low + cut, high - cut
    return ~_meets_third(low, high, boxes, valid)


def _meets_third(low: Tensor, high: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
    """Whether the rectangle [low, high] of (i, j), float [B, N, N, 2] each, meets a valid box but i and j themselves.

    Time grows with N cubed, which is what the question costs; memory is bounded, since beyond ``LARGEST_TABLE`` some
    rows are taken at a time.
    """
    pages, nodes = valid.shape
    some = max(1, LARGEST_TABLE // max(1, pages * nodes * nodes))
    others = ~torch.eye(nodes, dtype=torch.bool, device=boxes.device)
    left, top, right, bottom = boxes.transpose(1, 2).contiguous()[:, :, None, None, :].unbind(dim=1)
    third = valid[:, None, None, :] & others[None, None]
    rows = []
    for first in range(0, nodes, some):
        part = slice(first, first + some)
        meets = low[:, part, :, 0, None] < right
        meets &= high[:, part, :, 0, None] > left
        meets &= low[:, part, :, 1, None] < bottom
        meets &= high[:, part, :, 1, None] > top
        meets &= third
        meets &= others[None, part, None, :]
        rows.append(meets.any(dim=-1))
    return torch.cat(rows, dim=1) if rows else valid[:, :, None] & valid[:, None, :]


def _median_height(boxes: Tensor, valid: Tensor) -> Tensor:
    # Sorted, since CUDA has no repeatable median.
    heights = (boxes[..., 3] - boxes[..., 1]).masked_fill(~valid, torch.inf)
    ordered = torch.nn.functional.pad(heights, (0, 1), value=torch.inf).sort(dim=1).values  # a page may have no node
    middle = (valid.sum(dim=1, keepdim=True) - 1).clamp(min=0) // 2
    return ordered.gather(1, middle).squeeze(1).masked_fill(~valid.any(dim=1), 0.0)


def _nearest(gaps: Tensor, count: int) -> Tensor:
    count = min(count, gaps.shape[-1])
    nearest = gaps.topk(count, dim=-1, largest=False).indices
    chosen = torch.zeros_like(gaps, dtype=torch.bool).scatter(-1, nearest, True) & gaps.isfinite()
    return chosen | chosen.transpose(1, 2)
