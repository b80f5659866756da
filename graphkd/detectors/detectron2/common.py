"""Base class of the detectron2 adapters."""

from __future__ import annotations

from typing import Any

from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from graphkd.batch import Features, Targets
from graphkd.detectors.common import page_mask
from graphkd.detectors.ops.matching import match_boxes, match_labels
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

    def features(self, images: Tensor, sizes: Tensor) -> Features:
        """Normalise uint8 RGB [B, 3, H, W] as BGR and run the backbone once; padding has the mean colour."""
        sizes = sizes.to(images.device, non_blocking=True)
        pixels = (images.flip(1) - self.model.pixel_mean) / self.model.pixel_std
        maps = self.model.backbone(pixels * page_mask(sizes, images))
        canvas = (images.shape[-2], images.shape[-1])
        named = {self.levels[name]: level for name, level in maps.items()}
        return Features(maps=named, sizes=sizes, canvas=canvas)

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
    pages = zip(features.image_sizes, targets.by_page(), strict=True)
    return [Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes) for size, (boxes, classes) in pages]


def match_anchors(matcher: Matcher, anchors: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """What ``matcher`` finds for anchors [A, 4] on every page: indices of boxes and labels (1, 0, -1), each [B, A]."""
    low, high = matcher.thresholds[1], matcher.thresholds[-2]
    rescue = matcher.allow_low_quality_matches
    matches = match_boxes(targets.boxes, targets.valid, anchors[None], low=low, high=high, rescue=rescue)
    return matches.clamp(min=0), match_labels(matches)
