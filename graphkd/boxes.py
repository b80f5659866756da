"""Geometry of boxes of several pages at once. Boxes are ``xyxy`` in canvas px."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_AREA = 1e-9  # px^2


def box_areas(boxes: Tensor) -> Tensor:
    """Areas of boxes [..., 4]: [...]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of each box with each of the others: [..., N, 4] and [..., M, 4] -> [..., N, M], 0 for two without area.

    Rounds as ``torchvision.ops.box_iou``, which takes one page.
    """
    left, top, right, bottom = boxes[..., :, None, :].unbind(dim=-1)
    other_left, other_top, other_right, other_bottom = others[..., None, :, :].unbind(dim=-1)
    shared = (torch.minimum(right, other_right) - torch.maximum(left, other_left)).clamp_(min=0)
    shared = shared.mul_((torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)).clamp_(min=0))
    union = (box_areas(boxes)[..., :, None] + box_areas(others)[..., None, :]).sub_(shared)
    return shared.div_(union.clamp_(min=MIN_AREA))


def clip_to_pages(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [B, N, 4] clipped to pages of ``sizes`` [B, 2], height and width in px."""
    limits = sizes.flip(-1).repeat(1, 2)[:, None].to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limits)
