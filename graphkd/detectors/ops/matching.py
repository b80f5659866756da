"""Matching anchors and proposals with ground truth, as torchvision's ``Matcher`` does for one page."""

from __future__ import annotations

import torch
from torch import Tensor

from graphkd.boxes import pairwise_iou

BACKGROUND, IGNORED = -1, -2
MAX_OVERLAPS = 1 << 25  # held at a time, 128 MB; those of 16 pages of 1,000 regions would take 16 GB at 1184 x 832 px


def match_boxes(boxes: Tensor, valid: Tensor, anchors: Tensor, *, low: float, high: float, rescue: bool) -> Tensor:
    """Index of each anchor's ground-truth box: int64 [B, A]; ``BACKGROUND`` below ``low``, else ``IGNORED`` below
    ``high``.

    Args:
        boxes: ground truth [B, G, 4], xyxy in canvas px.
        valid: bool [B, G], False for padding.
        anchors: [B, A, 4], or [1, A, 4] for the same on every page.
        low: minimum IoU of anchors that are not background.
        high: minimum IoU of anchors that are matched.
        rescue: whether anchors with the highest IoU of some box are matched however low it is.
    """
    shape = len(boxes), anchors.shape[1]
    best, matches = boxes.new_full(shape, -1.0), boxes.new_zeros(shape, dtype=torch.int64)
    wanted = torch.zeros_like(best, dtype=torch.bool)
    rows = max(1, MAX_OVERLAPS // best.numel())
    for first in range(0, boxes.shape[1], rows):
        own = valid[:, first : first + rows, None]
        overlaps = pairwise_iou(boxes[:, first : first + rows], anchors).masked_fill_(~own, -1)
        values, found = overlaps.max(dim=1)
        better = values > best
        best, matches = torch.where(better, values, best), torch.where(better, found + first, matches)
        if rescue:
            wanted |= ((overlaps == overlaps.amax(dim=2, keepdim=True)) & own).any(dim=1)
    labelled = torch.where(best < high, IGNORED, matches)
    labelled = torch.where(best < low, BACKGROUND, labelled)
    return torch.where(wanted, matches, labelled)


def match_labels(matches: Tensor) -> Tensor:
    """1 for foreground, 0 for background and -1 for neither, of what :func:`match_boxes` returns."""
    return torch.where(matches >= 0, 1, torch.where(matches == BACKGROUND, 0, -1))
