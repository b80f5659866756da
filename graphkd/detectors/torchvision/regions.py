"""Anchors and RoIAlign that match detectron2's, which differ from torchvision's by rounding and by half a pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from graphkd.detectors.config import DetectorConfig


class ExactAnchorGenerator(AnchorGenerator):
    """Anchors that are not rounded to integer px."""

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


class PyramidPool(nn.Module):
    """RoIAlign at pixel centres, on the pyramid level given by a region's size (Lin et al., CVPR 2017).

    Args:
        levels: names of the pooled levels, of strides 4, 8, 16 and 32 px.
        side: P, of the pooled grid.
        samples: points along each side of a cell; 0: one per pixel.
    """

    STRIDES = (4, 8, 16, 32)

    def __init__(self, levels: list[str], side: int, samples: int) -> None:
        super().__init__()
        self.levels, self.side, self.samples = levels, side, samples
        self.level_of = LevelMapper(2, 1 + len(levels))

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], _: list[tuple[int, int]]) -> Tensor:
        """Pool boxes [N_i, 4] of each page: [sum N_i, C, P, P]."""
        pages = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(page) for page in boxes]))
        corners, chosen = torch.cat(boxes), self.level_of(boxes)
        regions = torch.cat([pages[:, None].to(corners), corners], dim=1)
        first = maps[self.levels[0]]
        pooled = first.new_zeros(len(regions), first.shape[1], self.side, self.side)
        for number, (name, stride) in enumerate(zip(self.levels, self.STRIDES, strict=False)):
            own = (chosen == number).nonzero()[:, 0]
            level = roi_align(
                maps[name],
                regions[own].to(maps[name].dtype),
                (self.side, self.side),
                spatial_scale=1 / stride,
                sampling_ratio=self.samples or -1,
                aligned=True,
            )
            pooled = pooled.index_copy(0, own, level)
        return pooled


def region_pool(config: DetectorConfig, levels: list[str]) -> nn.Module:
    """RoI pooling of ``config``."""
    if config.roi_aligned:
        return PyramidPool(levels, config.pooled_side, config.roi_samples)
    return MultiScaleRoIAlign(levels, config.pooled_side, sampling_ratio=config.roi_samples or -1)


def anchor_generator(config: DetectorConfig, sizes: tuple[tuple[float, ...], ...]) -> AnchorGenerator:
    """Anchor generator with ``sizes`` of each level, px."""
    kind = AnchorGenerator if config.anchors_rounded else ExactAnchorGenerator
    return kind(sizes, (config.aspect_ratios,) * len(sizes))
