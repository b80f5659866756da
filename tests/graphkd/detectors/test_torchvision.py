"""All pages at once: the proposals and losses of torchvision's own detectors, in a constant number of operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from graphkd.batch import Features, PageBatch, Targets
from graphkd.detectors import DetectorConfig, DetectorModule, build_detector
from graphkd.detectors.sampling import Sampled, SeededSampler
from graphkd.detectors.torchvision.fixed import fixed_detections
from graphkd.distill import TrainingStep
from tests.support.runs import SMALL_DETECTOR

CANVAS, CLASSES, PAGES = (128, 96), 4, 3


def built(architecture: str, **changes: Any) -> DetectorModule:
    torch.manual_seed(0)
    detector = build_detector(DetectorConfig(architecture=architecture, **SMALL_DETECTOR | changes), CLASSES, CANVAS)  # type: ignore[arg-type]
    for parameter in detector.parameters():  # random heads give the same to every anchor
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    return detector


def batch(pages: int) -> PageBatch:
    generator = torch.Generator().manual_seed(1)
    boxes = []
    for page in range(pages):
        low = torch.rand(page % 4, 2, generator=generator) * 60
        boxes.append(torch.cat([low, low + 6 + torch.rand(page % 4, 2, generator=generator) * 30], dim=1))
    classes = [torch.randint(0, CLASSES, (len(page),), generator=generator) for page in boxes]
    images = torch.randint(0, 256, (pages, 3, *CANVAS), generator=generator, dtype=torch.uint8)
    return PageBatch.from_images(images, boxes, classes)


def computed(detector: DetectorModule) -> tuple[Features, Targets, dict[str, torch.Tensor], Any]:
    pages = batch(PAGES)
    features = detector.features(pages.images, pages.sizes)
    proposals, losses = detector.propose_and_losses(features, pages.targets())
    return features, pages.targets(), losses, proposals


def torchvision_truth(targets: Targets, first_class: int) -> list[dict[str, torch.Tensor]]:
    return [{"boxes": boxes, "labels": classes + first_class} for boxes, classes in targets.by_page()]


def rpn_outputs(detector: DetectorModule, features: Features) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    objectness, deltas = detector.model.rpn.head(list(features.maps.values()))  # type: ignore[operator, union-attr]
    per_level = [level[0].numel() for level in objectness]
    objectness, deltas = concat_box_prediction_layers(list(objectness), list(deltas))
    return objectness.view(PAGES, -1), deltas.view(PAGES, -1, 4), per_level


def test_proposals_are_those_of_torchvision() -> None:
    detector = built("faster_rcnn")
    features, _, _, proposals = computed(detector)
    rpn: Any = detector.model.rpn  # type: ignore[union-attr]
    objectness, deltas, per_level = rpn_outputs(detector, features)
    anchors = detector.anchors(features)  # type: ignore[operator]
    boxes = rpn.box_coder.decode(deltas.detach().view(-1, 4), [anchors] * PAGES).view(PAGES, -1, 4)
    levels = torch.cat([torch.full((count,), level) for level, count in enumerate(per_level)])
    best = rpn._get_top_n_idx(objectness.detach(), per_level)
    for page in range(PAGES):
        index = best[page]
        own = clip_boxes_to_image(boxes[page, index], CANVAS)
        scores, level = objectness[page, index].sigmoid().detach(), levels[index]
        usable = remove_small_boxes(own, 1e-3)
        own, scores, level = own[usable], scores[usable], level[usable]
        apart = own + 1000 * level[:, None]  # so that rounding is as in our code, levels are suppressed one by one
        assert len(apart)
        kept = torch.cat([(level == each).nonzero()[:, 0][_nms(own, scores, level == each)] for each in level.unique()])
        kept = kept[scores[kept].argsort(descending=True, stable=True)][:30]
        count = int(proposals.valid[page].sum())
        assert count == len(kept)
        torch.testing.assert_close(proposals.boxes[page, :count], own[kept])
        torch.testing.assert_close(proposals.scores[page, :count], scores[kept])


def _nms(boxes: torch.Tensor, scores: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return batched_nms(boxes[own], scores[own], torch.zeros(int(own.sum())), 0.7)


class Recorder(SeededSampler):
    """Keeps what was sampled."""

    def __init__(self, sampler: SeededSampler) -> None:
        self.__dict__ |= sampler.__dict__
        self.last: Sampled | None = None

    def sample(self, labels: torch.Tensor, seeds: torch.Tensor) -> Sampled:
        self.last = super().sample(labels, seeds)
        return self.last

    def masks(self, entries: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """As torchvision's sampler returns them."""
        assert self.last is not None
        found = []
        for chosen in (self.last.positive, self.last.negative):
            masks = torch.zeros(PAGES, entries, dtype=torch.uint8)
            for page in range(PAGES):
                masks[page, self.last.indices[page][chosen[page]]] = 1
            found.append(list(masks))
        return found[0], found[1]


def test_losses_of_faster_rcnn_are_those_of_torchvision_on_the_same_sample() -> None:
    detector: Any = built("faster_rcnn")
    detector.anchor_sampler, detector.region_sampler = map(Recorder, (detector.anchor_sampler, detector.region_sampler))
    features, targets, losses, proposals = computed(detector)
    rpn, heads = detector.model.rpn, detector.model.roi_heads
    objectness, deltas, _ = rpn_outputs(detector, features)
    anchors = [detector.anchors(features)] * PAGES
    truth = torchvision_truth(targets, first_class=1)
    labels, matched = rpn.assign_targets_to_anchors(anchors, truth)
    regression = rpn.box_coder.encode(matched, anchors)
    positives, negatives = detector.anchor_sampler.masks(len(anchors[0]))
    for page in range(PAGES):
        rpn.fg_bg_sampler = lambda _, page=page: ([positives[page]], [negatives[page]])
        expected = rpn.compute_loss(objectness[page, :, None], deltas[page], [labels[page]], [regression[page]])
        torch.testing.assert_close((losses["loss_objectness"][page], losses["loss_rpn_box"][page]), expected)
    boxes, classes, regression, sampled = detector._sample_regions(proposals, targets)
    logits, class_deltas = detector.region_outputs(detector.pool(features, boxes))
    for page in range(PAGES):
        own = sampled.valid[page]
        assert torch.equal(classes[page, own] > 0, sampled.positive[page, own])
        found = fastrcnn_loss(
            logits[page, own], class_deltas[page, own].flatten(1), [classes[page, own]], [regression[page, own]]
        )
        torch.testing.assert_close((losses["loss_class"][page], losses["loss_box"][page]), found)
    lists = [page[valid] for page, valid in zip(proposals.boxes, proposals.valid, strict=True)]
    chosen, lists = [], heads.add_gt_proposals(lists, [page["boxes"] for page in truth])
    _, expected_labels = heads.assign_targets_to_proposals(
        lists, [page["boxes"] for page in truth], [page["labels"] for page in truth]
    )
    for page in range(PAGES):  # every sampled box has torchvision's label
        for box, label in zip(boxes[page, sampled.valid[page]], classes[page, sampled.valid[page]], strict=True):
            chosen.append(int(expected_labels[page][(lists[page] == box).all(dim=1)][0]) == int(label))
    assert all(chosen)


def test_losses_of_retinanet_are_those_of_torchvision() -> None:
    detector: Any = built("retinanet")
    features, targets, losses, _ = computed(detector)
    outputs, anchors = detector.head_outputs(features), detector.anchors(features)
    truth = torchvision_truth(targets, first_class=0)
    for page in range(PAGES):
        own = {name: output[page : page + 1] for name, output in outputs.items()}
        expected = detector.model.compute_loss([truth[page]], own, [anchors])
        torch.testing.assert_close(losses["loss_class"][page], expected["classification"])
        torch.testing.assert_close(losses["loss_box"][page], expected["bbox_regression"])


def in_order(boxes: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Rows of class and box in an order of their own, since equal scores have none."""
    return torch.tensor(sorted(torch.cat([classes[:, None].float(), boxes], dim=1).round(decimals=3).tolist()))


@pytest.mark.parametrize("architecture", ["faster_rcnn", "retinanet"])
def test_detections_in_fixed_shapes_are_those_in_lists(architecture: str) -> None:
    detector: Any = built(architecture, score_threshold=0.15, detections_per_page=40).eval()
    pages = batch(PAGES)
    with torch.no_grad():
        features = detector.features(pages.images, torch.tensor([[128, 96], [100, 96], [128, 60]]))
        boxes, classes, scores = fixed_detections(detector, features)
        for page, expected in enumerate(detector.detect(features)):
            count = len(expected.boxes)
            assert count > 3 and not scores[page, count:].any()
            torch.testing.assert_close(scores[page, :count], expected.scores)
            ours = in_order(boxes[page, :count], classes[page, :count])
            torch.testing.assert_close(ours, in_order(expected.boxes, expected.classes))


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["faster_rcnn", "retinanet"])
def test_a_step_takes_as_many_operations_for_sixteen_pages_as_for_two(architecture: str) -> None:
    from graphkd.method.config import MethodConfig

    step = TrainingStep(built(architecture), MethodConfig())
    counts = []
    for pages in (2, 16):
        given = batch(pages)
        with Operations() as operations:
            losses = step(given, None)
            torch.stack([values.sum() for values in losses.values()]).sum().backward()
        counts.append(operations.count)
    assert counts[0] == counts[1] > 100
