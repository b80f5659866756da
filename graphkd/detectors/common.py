"""Tensor helpers shared by the adapters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_ROWS = 32  # regions that are matched at a time


def to_float32(levels: list[Tensor]) -> list[Tensor]:
    """Convert a head's output of each level to float32."""
    return [level.float() for level in levels]


def page_mask(image_sizes: list[tuple[int, int]], images: Tensor) -> Tensor:
    """1 on the page and 0 on padding: float32 [B, 1, H, W] on the device of ``images``."""
    limits = torch.tensor(image_sizes).to(images.device, non_blocking=True)[:, :, None]
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    inside = (rows < limits[:, 0])[:, :, None] & (columns < limits[:, 1])[:, None, :]
    return inside[:, None].float()


def best_overlaps(
    boxes: Tensor, anchors: Tensor, overlap: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Match anchors with ground truth in bounded memory, whatever the number of regions.

    The whole matrix of overlaps takes 8.6 MB for each region at the default canvas, so 9 GB on a page of 1,000.

    Args:
        boxes: ground truth [G, 4], at least one, xyxy in canvas px.
        anchors: [A, 4].
        overlap: IoU [g, A] of some boxes and all anchors.

    Returns:
        The highest overlap of each anchor [A], the first box that has it [A], and whether the anchor has the highest
        overlap of some box [A].
    """
    best = anchors.new_full((len(anchors),), -1.0)
    matches = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    wanted = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
    for first in range(0, len(boxes), MAX_ROWS):
        overlaps = overlap(boxes[first : first + MAX_ROWS], anchors)
        values, rows = overlaps.max(dim=0)
        better = values > best
        best = torch.where(better, values, best)
        matches = torch.where(better, rows + first, matches)
        wanted |= (overlaps == overlaps.amax(dim=1, keepdim=True)).any(dim=0)
    return best, matches, wanted
