"""Greedy non-maximum suppression of many lists of boxes at once.

torchvision's handles one list after the other, each on one multiprocessor of a GPU, and waits for its length.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from graphkd.boxes import pairwise_iou

BLOCK = 128  # boxes whose overlaps with all later ones are held at a time


def suppress(boxes: Tensor, valid: Tensor, iou: float) -> Tensor:
    """Whether each box is kept: bool [R, k]. A box is dropped if a better one that is kept overlaps it by more.

    The boxes kept are those of ``torchvision.ops.nms`` for each list.

    Args:
        boxes: float32 [R, k, 4]: R lists, best first.
        valid: bool [R, k]: False for padding.
        iou: IoU above which boxes are dropped.
    """
    kept: Tensor = _suppress(boxes, valid, iou)
    return kept


@torch.library.custom_op("graphkd::suppress", mutates_args=())
def _suppress(boxes: Tensor, valid: Tensor, iou: float) -> Tensor:
    limit = _float32_below(iou)
    if boxes.is_cuda and find_spec("triton") is not None:
        from graphkd.detectors.ops.suppression_kernel import launch

        return launch(boxes.float().contiguous(), valid, limit)
    return _in_blocks(boxes.float(), valid, limit)


@_suppress.register_fake
def _(boxes: Tensor, valid: Tensor, iou: float) -> Tensor:
    return torch.empty_like(valid)


def _float32_below(value: float) -> float:
    """The largest float32 that is not above ``value``: a float32 exceeds both or neither, as in torchvision."""
    rounded = np.float32(value)
    return float(rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(0)))


def _in_blocks(boxes: Tensor, valid: Tensor, iou: float) -> Tensor:
    kept = valid.clone()
    for first in range(0, boxes.shape[1], BLOCK):
        own, later = slice(first, first + BLOCK), slice(first + BLOCK, None)
        overlaps = pairwise_iou(boxes[:, own], boxes[:, first:]) > iou
        among, with_later = overlaps[:, :, :BLOCK].triu(1), overlaps[:, :, BLOCK:]
        kept[:, own] = _settle(kept[:, own], among)
        kept[:, later] &= ~(with_later & kept[:, own, None]).any(dim=1)
    return kept


def _settle(usable: Tensor, overlaps: Tensor) -> Tensor:
    """Greedy suppression as a fixed point: an entry is kept unless a kept, better one overlaps it.

    The first n entries are right after n rounds at the latest, usually all after a few.
    """
    kept = usable
    while True:
        following = usable & ~(overlaps & kept[:, :, None]).any(dim=1)
        if torch.equal(following, kept):
            return kept
        kept = following
