"""RoIAlign of all pages on the pyramid level that a region's size gives (Lin et al., CVPR 2017), in one operation.

``torchvision.ops.MultiScaleRoIAlign`` pools each level by itself, waiting for the number of its regions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, pad
from torchvision.ops import roi_align

CANONICAL_SIDE, CANONICAL_LEVEL = 224, 4  # px and level of a region of ImageNet's size


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where each region lies on the map of its level."""

    page: Tensor
    """int64 [n]."""
    level: Tensor
    """int64 [n]: index of the level, finest first."""
    corners: Tensor
    """float32 [n, 4]: xyxy in px of that level."""


class PyramidPool(nn.Module):
    """RoIAlign over a feature pyramid.

    A region is at least one pixel of its level wide unless ``aligned``. Where that reaches beyond the map, it is pooled
    from the edge; torchvision counts the rest as 0.

    Args:
        levels: names of the pooled maps, finest first.
        first_stride: of the finest, px; each following one doubles it.
        side: P, side of the pooled grid.
        samples: points along each side of a cell; 0: one per pixel.
        aligned: whether samples are at pixel centres, shifted by half a pixel, like detectron2's ROIAlignV2.
    """

    def __init__(self, levels: list[str], *, first_stride: int, side: int, samples: int, aligned: bool) -> None:
        super().__init__()
        self.levels, self.first_stride = levels, first_stride
        self.side, self.samples, self.aligned = side, samples, aligned

    def forward(self, maps: dict[str, Tensor], boxes: Tensor) -> Tensor:
        """Pool boxes [B, N, 4] inside the canvas: [B, N, C, P, P]."""
        chosen = [maps[name] for name in self.levels]
        placed = self.place(boxes)
        # On a CPU, torchvision's backward pass uses one thread.
        gathers = not chosen[0].is_cuda and self.samples > 0 and not torch.compiler.is_exporting()
        pooled = self._gathered(chosen, placed) if gathers else self._aligned(chosen, placed)
        return pooled.to(chosen[0].dtype).unflatten(0, boxes.shape[:2])

    def place(self, boxes: Tensor) -> Placement:
        """Page, level and place of each box [B, N, 4]."""
        flat = boxes.flatten(0, 1)
        sides = ((flat[:, 2] - flat[:, 0]) * (flat[:, 3] - flat[:, 1])).sqrt()
        finest = self.first_stride.bit_length() - 1
        level = (CANONICAL_LEVEL - finest + (sides / CANONICAL_SIDE).log2() + 1e-6).floor()
        level = level.clamp(0, len(self.levels) - 1)
        page = torch.arange(boxes.shape[0], device=boxes.device)[:, None].expand(boxes.shape[:2]).flatten()
        corners = flat / (self.first_stride * level.exp2())[:, None]
        return Placement(page=page, level=level.long(), corners=corners)

    def _aligned(self, maps: list[Tensor], placed: Placement) -> Tensor:
        """By torchvision's operator, on one map that holds all levels."""
        sheet, origins = _on_one_sheet(maps)
        corners = placed.corners + origins[placed.level].repeat(1, 2)
        regions = torch.cat([placed.page[:, None].to(corners), corners], dim=1)
        grid = (self.side, self.side)
        return roi_align(sheet.float(), regions, grid, sampling_ratio=self.samples or -1, aligned=self.aligned)

    def _gathered(self, maps: list[Tensor], placed: Placement) -> Tensor:
        """As weighted sums of pixels."""
        shapes = torch.tensor([level.shape[-2:] for level in maps])
        rows = torch.cat([level.permute(0, 2, 3, 1).flatten(0, 2) for level in maps]).float()
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(dim=1).cumsum(0)[:-1] * len(maps[0])])
        heights, widths = shapes[placed.level].unbind(dim=1)
        row, row_weights = self._samples(placed.corners[:, 1], placed.corners[:, 3], heights)
        column, column_weights = self._samples(placed.corners[:, 0], placed.corners[:, 2], widths)
        first = starts[placed.level] + placed.page * heights * widths
        pixels = first[:, None, None, None, None] + (
            row[:, :, None, :, None] * widths[:, None, None, None, None] + column[:, None, :, None, :]
        )
        weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
        taps = pixels.shape[-1] * pixels.shape[-2]
        weights = weights.reshape(-1, taps)
        summed = embedding_bag(pixels.view(-1, taps), rows, mode="sum", per_sample_weights=weights)
        return summed.view(-1, self.side, self.side, rows.shape[1]).permute(0, 3, 1, 2).contiguous()

    def _samples(self, low: Tensor, high: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels and weights [n, P, 2 x samples] of the linear interpolation along one axis of ``limit`` [n] pixels."""
        shift = 0.5 if self.aligned else 0.0
        low, length = low - shift, high - low
        length = length if self.aligned else length.clamp(min=1)
        points = self.side * self.samples
        steps = (torch.arange(points) + 0.5) / points
        place = (low[:, None] + length[:, None] * steps).clamp(min=0)
        last = limit[:, None] - 1
        before = torch.minimum(place.long(), last)
        share = torch.minimum(place - before, (before < last).to(place))
        pixels = torch.stack([before, torch.minimum(before + 1, last)], dim=-1)
        weights = torch.stack([1 - share, share], dim=-1) / self.samples
        return pixels.view(len(low), self.side, -1), weights.view(len(low), self.side, -1)


def _on_one_sheet(maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One map [B, C, H, W] with the finest level above and the others side by side below it; x and y of each, [L, 2].

    Every level is surrounded by a copy of its edge, with which samples near the edge are interpolated.
    """
    framed = [_framed(level) for level in maps]
    if len(framed) == 1:
        return framed[0], framed[0].new_ones(1, 2, dtype=torch.float32)
    above, below = framed[0], framed[1:]
    height = max(level.shape[-2] for level in below)
    beside = torch.cat([pad(level, (0, 0, 0, height - level.shape[-2])) for level in below], dim=3)
    width = max(above.shape[-1], beside.shape[-1])
    sheet = torch.cat([pad(part, (0, width - part.shape[-1])) for part in (above, beside)], dim=2)
    origins, left = [(1, 1)], 1
    for level in below:
        origins.append((left, above.shape[-2] + 1))
        left += level.shape[-1]
    return sheet, torch.stack([_constant(pair, sheet.device) for pair in origins])


def _framed(level: Tensor) -> Tensor:
    # Not by replication padding, whose backward pass has no repeatable version for GPUs.
    wide = torch.cat([level[..., :1], level, level[..., -1:], level[..., -1:]], dim=3)
    return torch.cat([wide[..., :1, :], wide, wide[..., -1:, :], wide[..., -1:, :]], dim=2)


def _constant(pair: tuple[int, int], device: torch.device) -> Tensor:
    """A pair that is filled in on the device, without a copy from the host."""
    return torch.stack([torch.full((), float(value), device=device) for value in pair])
