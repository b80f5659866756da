"""Pooling all levels in one operation gives what torchvision gives level by level."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from graphkd.detectors.ops.pooling import PyramidPool

CANVAS = (256, 192)


def maps(first_stride: int, levels: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    strides = [first_stride << level for level in range(levels)]
    shapes = [[side // stride for side in CANVAS] for stride in strides]
    return {
        str(level): torch.randn(2, 8, *shape, generator=generator).requires_grad_()
        for level, shape in enumerate(shapes)
    }


def regions() -> torch.Tensor:
    """Of all sizes, some at the edges, one of the whole canvas, and padding."""
    generator = torch.Generator().manual_seed(1)
    limit = torch.tensor([CANVAS[1], CANVAS[0]])
    low = torch.rand(2, 40, 2, generator=generator) * limit
    low = torch.minimum(low, limit - 64)  # so that no region is widened beyond a map, where torchvision's is 0
    high = torch.minimum(low + torch.rand(2, 40, 2, generator=generator) ** 2 * limit, limit)
    boxes = torch.cat([low, high], dim=2)
    boxes[:, 0], boxes[:, 1] = torch.tensor([0.0, 0, CANVAS[1], CANVAS[0]]), 0
    return boxes


def expected(
    levels: dict[str, torch.Tensor], boxes: torch.Tensor, first_stride: int, samples: int, aligned: bool
) -> torch.Tensor:
    names = list(levels)
    if not aligned:
        pool = MultiScaleRoIAlign(names, 7, sampling_ratio=samples or -1)
        return pool(levels, list(boxes), [CANVAS, CANVAS])  # type: ignore[no-any-return]
    first = first_stride.bit_length() - 1
    level_of = LevelMapper(first, first + len(names) - 1)([boxes[0], boxes[1]])
    page = torch.arange(2.0).repeat_interleave(boxes.shape[1])[:, None]
    rows = torch.cat([page, boxes.flatten(0, 1)], dim=1)
    pooled = [
        roi_align(
            levels[names[level]], row[None], (7, 7), 1 / (first_stride << int(level)), samples or -1, aligned=True
        )
        for row, level in zip(rows, level_of, strict=True)
    ]
    return torch.cat(pooled)


@pytest.mark.parametrize("one_sheet", [False, True], ids=["gathered", "one sheet"])
@pytest.mark.parametrize(("first_stride", "levels"), [(4, 4), (8, 3), (16, 1)])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("samples", [0, 1, 2])
def test_regions_are_pooled_as_by_torchvision(
    one_sheet: bool, first_stride: int, levels: int, aligned: bool, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if one_sheet:
        monkeypatch.setattr(PyramidPool, "_gathered", PyramidPool._aligned)
    ours, theirs = maps(first_stride, levels), maps(first_stride, levels)
    pool = PyramidPool(list(ours), first_stride=first_stride, side=7, samples=samples, aligned=aligned)
    found = pool(ours, regions())
    assert found.shape == (2, 40, 8, 7, 7)
    wanted = expected(theirs, regions(), first_stride, samples, aligned)
    torch.testing.assert_close(found.flatten(0, 1), wanted, rtol=1e-4, atol=1e-4)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    (found.flatten(0, 1) * weights).sum().backward()
    (wanted * weights).sum().backward()
    for name in ours:
        gradient = theirs[name].grad  # none of a level without regions
        wanted = torch.zeros_like(theirs[name]) if gradient is None else gradient
        torch.testing.assert_close(ours[name].grad, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["_gathered", "_aligned"])
def test_a_thin_region_at_the_edge_is_pooled_from_the_edge(name: str) -> None:
    level = torch.arange(48.0).expand(1, 1, 64, 48)
    pool = PyramidPool(["0"], first_stride=4, side=7, samples=2, aligned=False)
    placed = pool.place(torch.tensor([[[191.0, 100.0, 192.0, 130.0]]]))
    pooled = getattr(pool, name)([level], placed)[0, 0]
    assert torch.allclose(pooled[:, -1], torch.tensor(47.0)) and float(pooled.min()) > 46.9
