"""Matching anchors with ground truth as torchvision's Matcher does, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from graphkd.detectors.common import MAX_ROWS, best_overlaps


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
    best, matches, wanted = best_overlaps(boxes, anchors, box_iou)
    found = torch.where(best < matcher.high_threshold, matcher.BETWEEN_THRESHOLDS, matches)
    found = torch.where(best < matcher.low_threshold, matcher.BELOW_LOW_THRESHOLD, found)
    return torch.where(wanted, matches, found) if matcher.allow_low_quality_matches else found
