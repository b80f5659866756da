"""Base class of the detectron2 adapters."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from graphkd.batch import Features, Targets
from graphkd.detectors.common import MAX_ROWS, best_overlaps, page_mask
from graphkd.detectors.protocol import DetectorModule, DetectorSpec


class Detectron2Detector(DetectorModule):
    """BGR pixels, names of pyramid levels, and ground truth as Instances.

    Args:
        model: detectron2 model with ``backbone``, ``pixel_mean`` and ``pixel_std``.
        spec: of the detector.
        levels: detectron2's names of pyramid levels -> names that all adapters use.
    """

    def __init__(self, model: nn.Module, spec: DetectorSpec, levels: dict[str, str]) -> None:
        super().__init__()
        self.model: Any = model
        self.spec = spec
        self.levels = levels

    def features(self, images: Tensor, image_sizes: list[tuple[int, int]]) -> Features:
        """Normalise uint8 RGB [B, 3, H, W] as BGR and run the backbone once; padding has the mean colour."""
        pixels = (images.flip(1) - self.model.pixel_mean) / self.model.pixel_std
        maps = self.model.backbone(pixels * page_mask(image_sizes, images))
        canvas = (images.shape[-2], images.shape[-1])
        named = {self.levels[name]: level for name, level in maps.items()}
        return Features(maps=named, image_sizes=image_sizes, canvas=canvas)

    def maps_of(self, features: Features, names: list[str]) -> list[Tensor]:
        """Maps of the levels with these detectron2 names."""
        return [features.maps[self.levels[name]] for name in names]

    def compilable_modules(self) -> list[nn.Module]:
        """Backbone and pyramid."""
        return [self.model.backbone]

    def inheritable_parameters(self) -> dict[str, Tensor]:
        """Heads and outputs of the pyramid."""
        backbone, outputs = "model.backbone.", "model.backbone.fpn_output"
        return {
            name: values
            for name, values in self.state_dict().items()
            if not name.startswith(backbone) or name.startswith(outputs)
        }


def instances(features: Features, targets: Targets) -> list[Instances]:
    """Ground truth in detectron2's format."""
    pages = zip(features.image_sizes, targets.boxes, targets.classes, strict=True)
    return [Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes) for size, boxes, classes in pages]


def match_anchors(matcher: Matcher, boxes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``matcher(pairwise_iou(boxes, anchors))`` does, in bounded memory: matches and labels [A]."""
    if len(boxes) <= MAX_ROWS:
        matches, labels = matcher(pairwise_iou(Boxes(boxes), Boxes(anchors)))
        return matches, labels
    best, matches, wanted = best_overlaps(boxes, anchors, lambda some, others: pairwise_iou(Boxes(some), Boxes(others)))
    labels = torch.ones_like(matches, dtype=torch.int8)
    for label, low, high in zip(matcher.labels, matcher.thresholds[:-1], matcher.thresholds[1:], strict=True):
        labels[(best >= low) & (best < high)] = label
    if matcher.allow_low_quality_matches:
        labels[wanted] = 1
    return matches, labels


def matched_boxes(boxes: Tensor, matches: Tensor, anchors: Tensor) -> Tensor:
    """Box of each anchor's match, [A, 4]; zeros without boxes."""
    return boxes[matches] if len(boxes) else torch.zeros_like(anchors)
