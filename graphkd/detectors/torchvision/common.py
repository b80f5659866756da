"""Base class of the torchvision adapters."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher, encode_boxes

from graphkd.batch import Features, Targets
from graphkd.detectors.common import page_mask
from graphkd.detectors.config import DetectorConfig
from graphkd.detectors.ops.matching import match_boxes
from graphkd.detectors.ops.pooling import PyramidPool
from graphkd.detectors.protocol import DetectorModule, DetectorSpec
from graphkd.detectors.torchvision.regions import all_anchors


class TorchvisionDetector(DetectorModule):
    """Backbone pass, anchors and RoI pooling without torchvision's resizing.

    ``GeneralizedRCNNTransform`` resizes in evaluation even when told not to. Pages have their final size already, and
    only mean and standard deviation are applied.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    clips_before_suppression = True
    """Whether RetinaNet's boxes are clipped to the page before suppression, as in torchvision."""

    def __init__(self, model: nn.Module, spec: DetectorSpec, config: DetectorConfig, region_pool: PyramidPool) -> None:
        super().__init__()
        model.transform = nn.Identity()
        self.model: Any = model
        self.spec = spec
        self.region_pool = region_pool
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std).view(1, 3, 1, 1), persistent=False)

    def features(self, images: Tensor, sizes: Tensor) -> Features:
        """Normalise uint8 [B, 3, H, W] and run the backbone once; padding has the mean colour."""
        sizes = sizes.to(images.device, non_blocking=True)
        pixels = (images - self.pixel_mean) / self.pixel_std
        pixels = pixels * page_mask(sizes, images)
        return Features(maps=self.model.backbone(pixels), sizes=sizes, canvas=(images.shape[-2], images.shape[-1]))

    def pool(self, features: Features, boxes: Tensor) -> Tensor:
        """RoIAlign over the pyramid: boxes [B, N, 4] -> [B, N, C, P, P]."""
        with _without_compiling(features):
            return self.region_pool(features.maps, boxes)

    def compilable_modules(self) -> list[nn.Module]:
        """Backbone and pyramid."""
        return [self.model.backbone]

    def inheritable_parameters(self) -> dict[str, Tensor]:
        """Proposal and region heads, and the pyramid after its lateral connections."""
        backbone, lateral = "model.backbone.", "model.backbone.fpn.inner_blocks."
        pyramid = "model.backbone.fpn."
        return {
            name: values
            for name, values in self.state_dict().items()
            if not name.startswith(backbone) or (name.startswith(pyramid) and not name.startswith(lateral))
        }

    def anchors(self, features: Features) -> Tensor:
        """Anchors [A, 4], the same on every page."""
        generator = self.model.rpn.anchor_generator if hasattr(self.model, "rpn") else self.model.anchor_generator
        return all_anchors(generator, list(features.maps.values()), features.canvas)


def match_anchors(matcher: Matcher, anchors: Tensor, targets: Targets) -> Tensor:
    """What torchvision's ``matcher`` finds for anchors [A, 4] on every page: see :func:`match_boxes`, [B, A]."""
    low, high, rescue = matcher.low_threshold, matcher.high_threshold, matcher.allow_low_quality_matches
    return match_boxes(targets.boxes, targets.valid, anchors[None], low=low, high=high, rescue=rescue)


def encode(truth: Tensor, boxes: Tensor, weights: Tensor) -> Tensor:
    """Deltas [B, S, 4] from boxes to ground truth; not finite where one of them has no area."""
    deltas: Tensor = encode_boxes(truth.flatten(0, 1), boxes.flatten(0, 1), weights)
    return deltas.view_as(truth)


def _without_compiling(features: Features) -> AbstractContextManager[object]:
    """Context in which torchvision's deterministic RoIAlign for GPUs is not compiled by itself, which takes minutes."""
    on_gpu = next(iter(features.maps.values())).is_cuda
    if on_gpu and torch.are_deterministic_algorithms_enabled() and not torch.compiler.is_compiling():
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
