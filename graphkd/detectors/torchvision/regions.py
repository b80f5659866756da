"""Anchors and region pooling of the torchvision adapters, which can match detectron2's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

from graphkd.detectors.config import DetectorConfig
from graphkd.detectors.ops.pooling import PyramidPool


class ExactAnchorGenerator(AnchorGenerator):
    """Anchors that are not rounded to integer px, as detectron2's."""

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),
    ) -> Tensor:
        """Anchors [ratios x scales, 4] around the origin, px."""
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        stretch = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        heights, widths = (stretch[:, None] * sides).flatten(), (sides / stretch[:, None]).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2


def region_pool(config: DetectorConfig, levels: list[str], first_stride: int) -> PyramidPool:
    """RoI pooling of ``config`` on the named levels, of which the finest has ``first_stride``."""
    return PyramidPool(
        levels,
        first_stride=first_stride,
        side=config.pooled_side,
        samples=config.roi_samples,
        aligned=config.roi_aligned,
    )


def anchor_generator(config: DetectorConfig, sizes: tuple[tuple[float, ...], ...]) -> AnchorGenerator:
    """Anchor generator with ``sizes`` of each level, px."""
    kind = AnchorGenerator if config.anchors_rounded else ExactAnchorGenerator
    return kind(sizes, (config.aspect_ratios,) * len(sizes))


def all_anchors(generator: AnchorGenerator, maps: list[Tensor], canvas: tuple[int, int]) -> Tensor:
    """Anchors [A, 4] of a page, the same for every page of a canvas. torchvision's own forward repeats them."""
    grids = [[int(side) for side in level.shape[-2:]] for level in maps]
    strides: Any = [[side // own for side, own in zip(canvas, grid, strict=True)] for grid in grids]
    generator.set_cell_anchors(torch.float32, maps[0].device)
    return torch.cat(generator.grid_anchors(grids, strides))
