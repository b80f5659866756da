"""Batches of page images with their ground truth, and the outputs of detectors.

Symbols used across this package: ``B`` pages of a batch, ``M`` ground-truth boxes of all its pages, ``N`` nodes or
regions of one page, ``K`` classes, ``C`` feature channels, ``P`` pooled side, ``H, W`` canvas height and width in px.
Boxes are ``xyxy`` in canvas px, classes 0-based in dataset order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PageBatch:
    """Pages on one fixed canvas, packed into a handful of tensors so that a batch crosses processes cheaply."""

    images: Tensor
    """uint8 [B, 3, H, W], RGB; the page is at the top left, the rest of the canvas is 0."""
    sizes: Tensor
    """int64 [B, 2] on the CPU: height and width of the page on the canvas, px."""
    boxes: Tensor
    """float32 [M, 4]: ground-truth boxes of all pages, concatenated."""
    classes: Tensor
    """int64 [M]: their classes."""
    counts: Tensor
    """int64 [B] on the CPU: number of boxes of each page."""
    samples: Tensor
    """int64 [B] on the CPU: index of each page in the dataset's canonical order; -1 for none."""
    seeds: Tensor
    """int64 [B] on the CPU: seed of all random decisions of a detector on the page."""
    view_index: Tensor
    """int64 [B] on the CPU: index of the view that each page is rendered in."""
    affine: Tensor
    """float32 [B, 4] on the CPU: (a, b, c, d) with ``x_canvas = a x_image + c`` and ``y_canvas = b y_image + d``, px;
    a is negative where the page is mirrored."""
    replaced_sample: Tensor
    """int64 [B] on the CPU: index of an unreadable sample that the page replaces, or -1."""

    @classmethod
    def from_images(cls, images: Tensor, boxes: list[Tensor], classes: list[Tensor]) -> PageBatch:
        """Make a batch of pages that fill their canvas.

        Args:
            images: uint8 [B, 3, H, W], RGB.
            boxes: ground truth of each page, [M_i, 4], xyxy in px.
            classes: of the boxes, [M_i], 0-based.
        """
        pages, index = len(images), torch.arange(len(images))
        return cls(
            images=images,
            sizes=torch.tensor([images.shape[-2:]] * pages),
            boxes=torch.cat(boxes).float(),
            classes=torch.cat(classes).long(),
            counts=torch.tensor([len(page) for page in boxes]),
            samples=index,
            seeds=index,
            view_index=torch.zeros(pages, dtype=torch.long),
            affine=torch.tensor([[1.0, 1.0, 0.0, 0.0]]).repeat(pages, 1),
            replaced_sample=torch.full((pages,), -1),
        )

    def __len__(self) -> int:
        return self.images.shape[0]

    def __reduce__(self) -> tuple[Callable[..., PageBatch], tuple[Tensor, dict[str, NDArray[Any]]]]:
        # Sending a tensor to another process opens a connection for each; small ones are sent as bytes.
        small = {part.name: getattr(self, part.name).numpy() for part in fields(self) if part.name != "images"}
        return _from_parts, (self.images, small)

    def to(self, device: torch.device | str) -> PageBatch:
        """Move images and ground truth to ``device``; everything else stays on the CPU."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("images", "boxes", "classes")}
        return replace(self, **moved)

    def pin_memory(self) -> PageBatch:
        """Pin the tensors that :meth:`to` moves (called by torch's DataLoader)."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("images", "boxes", "classes")}
        return replace(self, **pinned)

    def targets(self) -> Targets:
        """Split the packed ground truth into one entry per page."""
        counts = self.counts.tolist()
        return Targets(
            boxes=list(self.boxes.split(counts)), classes=list(self.classes.split(counts)), seeds=self.seeds.tolist()
        )

    def overlaps_ground_truth(self, boxes: Tensor, min_iou: float = 0.5) -> Tensor:
        """Whether the IoU with ground truth of the box's page is at least ``min_iou``: [B, N, 4] -> bool [B, N]."""
        from torchvision.ops import box_iou  # here, so that the method can be used without torchvision

        pages = torch.arange(len(self)).repeat_interleave(self.counts).to(boxes.device, non_blocking=True)
        own = torch.arange(len(self), device=boxes.device)[:, None] == pages  # [B, M]
        overlap = box_iou(boxes.flatten(0, 1), self.boxes).unflatten(0, boxes.shape[:2])
        return ((overlap >= min_iou) & own[:, None, :]).any(dim=-1)

    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each page on the canvas, px, as torchvision takes them."""
        return [(int(height), int(width)) for height, width in self.sizes.tolist()]


def _from_parts(images: Tensor, small: dict[str, NDArray[Any]]) -> PageBatch:
    return PageBatch(images=images, **{name: torch.from_numpy(values) for name, values in small.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Ground truth, one entry per page."""

    boxes: list[Tensor]
    """float32 [M_i, 4] each."""
    classes: list[Tensor]
    """int64 [M_i] each."""
    seeds: list[int]
    """Seed of each page's sampling."""

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """One backbone pass over a batch."""

    maps: dict[str, Tensor]
    """Level name -> [B, C, H/stride, W/stride]."""
    image_sizes: list[tuple[int, int]]
    """(height, width) in px of each page on the canvas."""
    canvas: tuple[int, int]
    """(height, width) in px of the canvas."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposals:
    """Class-agnostic regions of each page, best first."""

    boxes: list[Tensor]
    """float32 [R_i, 4] each."""
    scores: list[Tensor]
    """float32 [R_i] each, 0 to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionPredictions:
    """Outputs of a detector's region head for pooled regions, in canonical form."""

    logits: Tensor
    """[..., K + 1], background last."""
    deltas: Tensor
    """[..., K, 4]: (dx, dy, dw, dh) with unit coder weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Detections:
    """Final detections of one page, best first."""

    boxes: Tensor
    """float32 [D, 4]."""
    scores: Tensor
    """float32 [D], 0 to 1."""
    classes: Tensor
    """int64 [D]."""
