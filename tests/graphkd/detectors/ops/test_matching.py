"""Matching all pages at once gives what torchvision's matcher gives for each."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from graphkd.batch import Targets
from graphkd.boxes import pairwise_iou
from graphkd.detectors.ops import matching
from graphkd.detectors.ops.matching import match_boxes


def boxes(count: int, seed: int, rounded: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 200
    found = torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=generator) * 60], dim=1)
    return found.round() if rounded else found


def targets(counts: list[int], rounded: bool) -> Targets:
    pages = [boxes(count, seed, rounded) for seed, count in enumerate(counts)]
    return Targets.from_lists(pages, [torch.zeros(count, dtype=torch.int64) for count in counts], [0] * len(counts))


def expected_matches(thresholds: tuple[float, float, bool], truth: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Of torchvision on one page, whose detectors label every anchor as background on a page without regions."""
    if not len(truth):
        return torch.full((len(anchors),), Matcher.BELOW_LOW_THRESHOLD)
    return Matcher(*thresholds)(box_iou(truth, anchors))  # type: ignore[no-any-return]


@pytest.mark.parametrize("rounded", [False, True])  # rounded boxes have equal overlaps
@pytest.mark.parametrize("thresholds", [(0.7, 0.3, True), (0.5, 0.4, False), (0.5, 0.4, True)])
@pytest.mark.parametrize("pieces", [1, 40])
def test_every_page_is_matched_as_by_torchvision(
    thresholds: tuple[float, float, bool], rounded: bool, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = [0, 1, 33, 100, 257]
    truth, anchors = targets(counts, rounded), boxes(4000, 99, rounded)
    monkeypatch.setattr(matching, "MAX_OVERLAPS", 512 * 5 * 4000 // pieces)
    high, low, rescue = thresholds
    found = match_boxes(truth.boxes, truth.valid, anchors[None], low=low, high=high, rescue=rescue)
    for page, (own, _) in enumerate(truth.by_page()):
        assert torch.equal(found[page], expected_matches(thresholds, own, anchors)), f"{counts[page]} regions"


def test_every_page_can_have_anchors_of_its_own() -> None:
    truth, anchors = targets([3, 20], rounded=False), torch.stack([boxes(500, 7, True), boxes(500, 8, True)])
    found = match_boxes(truth.boxes, truth.valid, anchors, low=0.5, high=0.5, rescue=False)
    for page, (own, _) in enumerate(truth.by_page()):
        assert torch.equal(found[page], expected_matches((0.5, 0.5, False), own, anchors[page]))


def test_memory_is_bounded_on_pages_of_a_thousand_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def recorded(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        overlaps = pairwise_iou(first, second)
        sizes.append(overlaps.numel())
        return overlaps

    monkeypatch.setattr(matching, "pairwise_iou", recorded)
    monkeypatch.setattr(matching, "MAX_OVERLAPS", 1 << 20)
    truth = targets([1000] * 16, rounded=False)
    match_boxes(truth.boxes, truth.valid, boxes(5000, 3, False)[None], low=0.3, high=0.7, rescue=True)
    assert sum(sizes) == 16 * 1024 * 5000 and max(sizes) <= 1 << 20


def test_overlaps_round_as_those_of_torchvision() -> None:
    first, second = boxes(300, 0, rounded=False), boxes(200, 1, rounded=False)
    assert torch.equal(pairwise_iou(first, second), box_iou(first, second))
    assert pairwise_iou(torch.zeros(2, 4), torch.zeros(3, 4)).eq(0).all()


@pytest.mark.detectron2
def test_detectron2s_matcher_gives_the_same() -> None:
    from detectron2.modeling.matcher import Matcher as Detectron2Matcher
    from detectron2.structures import Boxes
    from detectron2.structures import pairwise_iou as detectron2_iou

    from graphkd.detectors.detectron2.common import match_anchors

    counts = [0, 1, 33, 100]
    truth, anchors = targets(counts, rounded=True), boxes(4000, 2, rounded=True)
    for labels in ([0.3, 0.7], [0, -1, 1], True), ([0.4, 0.5], [0, -1, 1], False):
        matcher = Detectron2Matcher(*labels)
        found, fit = match_anchors(matcher, anchors, truth)
        for page, (own, _) in enumerate(truth.by_page()):
            expected, expected_fit = matcher(detectron2_iou(Boxes(own), Boxes(anchors)))
            assert torch.equal(fit[page], expected_fit.long())
            assert torch.equal(found[page][fit[page] == 1], expected[expected_fit == 1])
