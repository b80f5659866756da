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
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from graphkd.boxes import pairwise_iou

MIN_TARGETS = 16  # boxes that ground truth is padded to


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
        """Ground truth of each page, padded, on the device of the boxes."""
        place = torch.arange(_padded_count(self.counts))
        valid = place < self.counts[:, None]
        index = (self.counts.cumsum(0) - self.counts)[:, None] + place
        index = index.masked_fill(~valid, len(self.boxes)).to(self.boxes.device, non_blocking=True)
        return Targets(
            boxes=torch.cat([self.boxes, self.boxes.new_zeros(1, 4)])[index],
            classes=torch.cat([self.classes, self.classes.new_zeros(1)])[index],
            valid=valid.to(self.boxes.device, non_blocking=True),
            seeds=self.seeds.to(self.boxes.device, non_blocking=True),
        )


def _padded_count(counts: Tensor) -> int:
    """Boxes of a page to pad to: a power of two."""
    return max(MIN_TARGETS, 1 << (int(counts.max()) - 1).bit_length())


def _from_parts(images: Tensor, small: dict[str, NDArray[Any]]) -> PageBatch:
    return PageBatch(images=images, **{name: torch.from_numpy(values) for name, values in small.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Ground truth of each page, padded to G boxes. G is a power of two, so that few shapes are compiled."""

    boxes: Tensor
    """float32 [B, G, 4]; padding is 0."""
    classes: Tensor
    """int64 [B, G]; padding is 0."""
    valid: Tensor
    """bool [B, G]: False for padding."""
    seeds: Tensor
    """int64 [B]: seed of each page's sampling."""

    @classmethod
    def from_lists(cls, boxes: list[Tensor], classes: list[Tensor], seeds: list[int]) -> Targets:
        """Pad the ground truth of each page: boxes [M_i, 4], classes [M_i], and the seed of its sampling."""
        counts = torch.tensor([len(page) for page in boxes])
        most, device = _padded_count(counts), boxes[0].device
        return cls(
            boxes=torch.stack([pad(page.float(), (0, 0, 0, most - len(page))) for page in boxes]),
            classes=torch.stack([pad(page, (0, most - len(page))) for page in classes]),
            valid=(torch.arange(most) < counts[:, None]).to(device),
            seeds=torch.tensor(seeds, device=device),
        )

    def __len__(self) -> int:
        return len(self.boxes)

    def overlap(self, boxes: Tensor, min_iou: float = 0.5) -> Tensor:
        """Whether boxes [B, N, 4] have an IoU of at least ``min_iou`` with ground truth of their page: bool [B, N]."""
        return ((pairwise_iou(boxes, self.boxes) >= min_iou) & self.valid[:, None, :]).any(dim=-1)

    def by_page(self) -> list[tuple[Tensor, Tensor]]:
        """Boxes [M_i, 4] and classes [M_i] of each page. Waits for a GPU."""
        pages = zip(self.boxes, self.classes, self.valid.sum(dim=1).tolist(), strict=True)
        return [(boxes[:count], classes[:count]) for boxes, classes, count in pages]


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """One backbone pass over a batch."""

    maps: dict[str, Tensor]
    """Level name -> [B, C, H/stride, W/stride]."""
    sizes: Tensor
    """int64 [B, 2], on the device of the maps: height and width in px of each page on the canvas."""
    canvas: tuple[int, int]
    """(height, width) in px of the canvas."""

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each page, as torchvision and detectron2 take them. Waits for a GPU."""
        return [(int(height), int(width)) for height, width in self.sizes.tolist()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposals:
    """Class-agnostic regions of each page, best first, padded to R."""

    boxes: Tensor
    """float32 [B, R, 4]; padding is 0."""
    scores: Tensor
    """float32 [B, R], 0 to 1; padding is 0."""
    valid: Tensor
    """bool [B, R]: False for padding."""

    @classmethod
    def from_lists(cls, boxes: list[Tensor], scores: list[Tensor]) -> Proposals:
        """Pad the regions of each page: boxes [R_i, 4] and scores [R_i], best first."""
        stacked = pad_sequence(boxes, batch_first=True)
        counts = torch.tensor([len(page) for page in boxes])
        valid = (torch.arange(stacked.shape[1]) < counts[:, None]).to(stacked.device, non_blocking=True)
        return cls(boxes=stacked, scores=pad_sequence(scores, batch_first=True), valid=valid)


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
