"""Base class of the torchvision adapters."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from graphkd.batch import Features, Targets
from graphkd.detectors.common import page_mask
from graphkd.detectors.config import DetectorConfig
from graphkd.detectors.protocol import DetectorModule, DetectorSpec
from graphkd.detectors.torchvision.regions import region_pool


class TorchvisionDetector(DetectorModule):
    """Backbone pass and RoI pooling without torchvision's resizing.

    ``GeneralizedRCNNTransform`` resizes in evaluation even when told not to. Pages have their final size already, and
    only mean and standard deviation are applied.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: nn.Module, spec: DetectorSpec, config: DetectorConfig, pooled_levels: list[str]) -> None:
        super().__init__()
        model.transform = nn.Identity()
        self.model: Any = model
        self.spec = spec
        self.region_pool = region_pool(config, pooled_levels)
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std).view(1, 3, 1, 1), persistent=False)

    def features(self, images: Tensor, image_sizes: list[tuple[int, int]]) -> Features:
        """Normalise uint8 [B, 3, H, W] and run the backbone once; padding has the mean colour."""
        pixels = (images - self.pixel_mean) / self.pixel_std
        pixels = pixels * page_mask(image_sizes, images)
        canvas = (images.shape[-2], images.shape[-1])
        return Features(maps=self.model.backbone(pixels), image_sizes=image_sizes, canvas=canvas)

    def pool(self, features: Features, boxes: list[Tensor]) -> Tensor:
        """RoIAlign over the pyramid: [sum N_i, C, P, P]."""
        # The pyramid level of a box depends on the image size given here. With the canvas instead of the page sizes, a
        # page's features are independent of the other pages of its batch.
        with _without_compiling(features):
            return self.region_pool(features.maps, boxes, [features.canvas] * len(boxes))

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

    def anchors(self, features: Features) -> list[Tensor]:
        """Anchors [A, 4] of every page."""
        generator = self.model.rpn.anchor_generator if hasattr(self.model, "rpn") else self.model.anchor_generator
        return generator(image_list(features), list(features.maps.values()))


def _without_compiling(features: Features) -> AbstractContextManager[object]:
    """Context in which torchvision's deterministic RoIAlign for GPUs is not compiled.

    It would be recompiled for minutes for each level and number of regions.
    """
    on_gpu = next(iter(features.maps.values())).is_cuda
    if on_gpu and torch.are_deterministic_algorithms_enabled():
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def image_list(features: Features) -> ImageList:
    """Torchvision's image list of a batch; without pixels, since anchors need the canvas size only."""
    batch = next(iter(features.maps.values()))
    blank = batch.new_empty(()).expand(batch.shape[0], 3, *features.canvas)
    return ImageList(blank, features.image_sizes)


def torchvision_targets(targets: Targets, first_class: int) -> list[dict[str, Tensor]]:
    """Ground truth as torchvision takes it, with classes counted from ``first_class``."""
    pairs = zip(targets.boxes, targets.classes, strict=True)
    return [{"boxes": boxes, "labels": classes + first_class} for boxes, classes in pairs]
