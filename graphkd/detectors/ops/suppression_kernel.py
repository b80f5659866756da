"""Suppression on a GPU: one program for each list, which keeps its boxes in registers, and no table of overlaps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def suppress_kernel(boxes, kept, count, iou, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Clear the entries of ``kept`` that a better one suppresses; one list of ``count`` boxes for each program."""
    row = tl.program_id(0).to(tl.int64)
    boxes += row * count * 4
    kept += row * count
    place = tl.arange(0, SIZE)
    inside = place < count
    left = tl.load(boxes + place * 4, mask=inside, other=0.0)
    top = tl.load(boxes + place * 4 + 1, mask=inside, other=0.0)
    right = tl.load(boxes + place * 4 + 2, mask=inside, other=0.0)
    bottom = tl.load(boxes + place * 4 + 3, mask=inside, other=0.0)
    area = (right - left) * (bottom - top)
    alive = tl.load(kept + place, mask=inside, other=0).to(tl.int32)
    for best in range(count):
        if tl.sum(tl.where(place == best, alive, 0)) > 0:
            own_left, own_top = tl.load(boxes + best * 4), tl.load(boxes + best * 4 + 1)
            own_right, own_bottom = tl.load(boxes + best * 4 + 2), tl.load(boxes + best * 4 + 3)
            width = tl.maximum(tl.minimum(right, own_right) - tl.maximum(left, own_left), 0.0)
            height = tl.maximum(tl.minimum(bottom, own_bottom) - tl.maximum(top, own_top), 0.0)
            union = area + (own_right - own_left) * (own_bottom - own_top) - width * height
            dropped = (width * height / tl.maximum(union, 1e-9) > iou) & (place > best)
            alive = tl.where(dropped, 0, alive)
    tl.store(kept + place, alive.to(tl.int8), mask=inside)


def launch(boxes: Tensor, valid: Tensor, iou: float) -> Tensor:
    """:func:`graphkd.detectors.ops.suppression.suppress` on a GPU, for contiguous float32 boxes."""
    kept = valid.to(torch.int8)
    size = triton.next_power_of_2(max(16, boxes.shape[1]))
    suppress_kernel[(len(boxes),)](boxes, kept, boxes.shape[1], iou, SIZE=size, num_warps=8 if size >= 1024 else 4)
    return kept.bool()
