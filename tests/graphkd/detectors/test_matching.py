"""Matching anchors in bounded memory gives what torchvision's matrix of all overlaps gives."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from graphkd.detectors.torchvision import matching
from graphkd.detectors.torchvision.matching import match_anchors


def boxes(count: int, seed: int, rounded: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 200
    found = torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=generator) * 60], dim=1)
    return found.round() if rounded else found


@pytest.mark.parametrize("rounded", [False, True])  # rounded boxes have equal overlaps
@pytest.mark.parametrize("count", [0, 1, 32, 33, 100, 257])
@pytest.mark.parametrize("thresholds", [(0.7, 0.3, True), (0.5, 0.4, False), (0.5, 0.4, True)])
def test_every_anchor_is_matched_as_by_the_whole_matrix(
    thresholds: tuple[float, float, bool], count: int, rounded: bool
) -> None:
    matcher, truth, anchors = Matcher(*thresholds), boxes(count, 1, rounded), boxes(4000, 2, rounded)
    found = match_anchors(matcher, truth, anchors)
    expected = matcher(box_iou(truth, anchors)) if count else torch.full((4000,), -1)
    assert torch.equal(found, expected)


def test_memory_does_not_grow_with_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []

    def recorded(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        rows.append(len(first))
        return box_iou(first, second)

    monkeypatch.setattr(matching, "box_iou", recorded)
    matching.match_anchors(Matcher(0.7, 0.3, True), boxes(1000, 4, rounded=False), boxes(5000, 3, rounded=False))
    assert sum(rows) == 1000 and max(rows) == 32


@pytest.mark.detectron2
@pytest.mark.parametrize("count", [0, 1, 33, 100])
def test_detectron2s_matcher_gives_the_same_in_bounded_memory(count: int) -> None:
    from detectron2.modeling.matcher import Matcher as Detectron2Matcher
    from detectron2.structures import Boxes, pairwise_iou

    from graphkd.detectors.detectron2.common import match_anchors as match

    for labels in ([0.3, 0.7], [0, -1, 1], True), ([0.4, 0.5], [0, -1, 1], False):
        matcher, truth, anchors = Detectron2Matcher(*labels), boxes(count, 1, True), boxes(4000, 2, True)
        found, expected = match(matcher, truth, anchors), matcher(pairwise_iou(Boxes(truth), Boxes(anchors)))
        assert all(torch.equal(own, theirs) for own, theirs in zip(found, expected, strict=True))
