"""Matching anchors with ground truth in bounded memory.

The whole matrix of overlaps takes 8.6 MB for each region at the default canvas, so 9 GB on a page of 1,000.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

MAX_ROWS = 32  # regions at a time


def match_anchors(matcher: Matcher, boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return what ``matcher(box_iou(boxes, anchors))`` does, int64 [A], and background without boxes.

    Args:
        matcher: torchvision's, with its thresholds.
        boxes: ground truth [G, 4], xyxy in canvas px.
        anchors: [A, 4].
    """
    if not len(boxes):
        return anchors.new_full((len(anchors),), matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64)
    if len(boxes) <= MAX_ROWS:
        return matcher(box_iou(boxes, anchors))
    best = anchors.new_full((len(anchors),), -1.0)
    matches = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    wanted = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
    for first in range(0, len(boxes), MAX_ROWS):
        overlaps = box_iou(boxes[first : first + MAX_ROWS], anchors)
        values, rows = overlaps.max(dim=0)
        better = values > best
        best = torch.where(better, values, best)
        matches = torch.where(better, rows + first, matches)
        wanted |= (overlaps == overlaps.amax(dim=1, keepdim=True)).any(dim=0)
    found = torch.where(best < matcher.high_threshold, matcher.BETWEEN_THRESHOLDS, matches)
    found = torch.where(best < matcher.low_threshold, matcher.BELOW_LOW_THRESHOLD, found)
    return torch.where(wanted, matches, found) if matcher.allow_low_quality_matches else found
