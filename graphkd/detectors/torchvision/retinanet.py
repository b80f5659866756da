"""torchvision's RetinaNet behind the detector interface. It has no region head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.ops import batched_nms, clip_boxes_to_image

from graphkd.batch import Detections, Features, Proposals, Targets
from graphkd.detectors.config import DetectorConfig
from graphkd.detectors.protocol import DetectorSpec
from graphkd.detectors.torchvision.common import TorchvisionDetector, torchvision_targets
from graphkd.detectors.torchvision.matching import match_anchors
from graphkd.detectors.torchvision.regions import anchor_generator

if TYPE_CHECKING:
    from graphkd.detectors.backbones import PyramidBackbone

POOLED_LEVELS = ["0", "1", "2"]  # P3-P5


class RetinaNetDetector(TorchvisionDetector):
    """RetinaNet (Lin et al., ICCV 2017). Its detections, without classes, serve as proposals."""

    CLASS_LAYERS = ("model.head.classification_head.cls_logits.",)

    def __init__(self, backbone: PyramidBackbone, config: DetectorConfig, num_classes: int) -> None:
        spec = DetectorSpec(
            num_classes=num_classes,
            channels=backbone.out_channels,
            pooled_side=config.pooled_side,
            activation="sigmoid",
            framework="torchvision",
            classifies_regions=config.classifies_regions,
        )
        super().__init__(_build_model(backbone, config, num_classes), spec, config, POOLED_LEVELS)
        self.max_proposals = config.rpn_proposals
        self.proposal_nms_iou = config.rpn_nms_iou

    def propose_and_losses(self, features: Features, targets: Targets) -> tuple[Proposals, dict[str, Tensor]]:
        """Return proposals and the focal and box losses, each [B] and normalised by the page's foreground anchors."""
        outputs, anchors = self._heads(features), self.anchors(features)
        ground_truth = torchvision_targets(targets, first_class=0)
        losses = [self._page_losses(outputs, anchors, ground_truth, page) for page in range(len(anchors))]
        by_name = {
            "loss_class": torch.stack([page["classification"] for page in losses]),
            "loss_box": torch.stack([page["bbox_regression"] for page in losses]),
        }
        return self._proposals(outputs, anchors, features.image_sizes), by_name

    def propose(self, features: Features) -> Proposals:
        """Return boxes of the most confident anchors, best first."""
        return self._proposals(self._heads(features), self.anchors(features), features.image_sizes)

    def classify(self, pooled: Tensor) -> None:
        """RetinaNet has no head for arbitrary regions."""
        return

    def detect(self, features: Features) -> list[Detections]:
        """Return detections after NMS per class, best first."""
        outputs, anchors = self._heads(features), self.anchors(features)
        per_level = [level.shape[-2] * level.shape[-1] * self._anchors_per_cell() for level in features.maps.values()]
        by_level = {name: list(output.split(per_level, dim=1)) for name, output in outputs.items()}
        anchors_by_level = [list(page.split(per_level)) for page in anchors]
        found = self.model.postprocess_detections(by_level, anchors_by_level, features.image_sizes)
        return [Detections(boxes=page["boxes"], scores=page["scores"], classes=page["labels"]) for page in found]

    def _heads(self, features: Features) -> dict[str, Tensor]:
        outputs = self.model.head(list(features.maps.values()))
        return {name: output.float() for name, output in outputs.items()}

    def _anchors_per_cell(self) -> int:
        return self.model.anchor_generator.num_anchors_per_location()[0]

    def _page_losses(
        self, outputs: dict[str, Tensor], anchors: list[Tensor], ground_truth: list[dict[str, Tensor]], page: int
    ) -> dict[str, Tensor]:
        own = {name: output[page : page + 1] for name, output in outputs.items()}
        matches = match_anchors(self.model.proposal_matcher, ground_truth[page]["boxes"], anchors[page])
        return self.model.head.compute_loss([ground_truth[page]], own, [anchors[page]], [matches])

    @torch.no_grad()
    def _proposals(
        self, outputs: dict[str, Tensor], anchors: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> Proposals:
        confidence = outputs["cls_logits"].sigmoid().amax(dim=-1)
        pages = [
            self._page_proposals(scores, deltas, page_anchors, size)
            for scores, deltas, page_anchors, size in zip(
                confidence, outputs["bbox_regression"], anchors, image_sizes, strict=True
            )
        ]
        return Proposals(boxes=[boxes for boxes, _ in pages], scores=[scores for _, scores in pages])

    def _page_proposals(
        self, scores: Tensor, deltas: Tensor, anchors: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        scores, best = scores.topk(min(len(scores), self.max_proposals))
        boxes = self.model.box_coder.decode_single(deltas[best], anchors[best])
        boxes = clip_boxes_to_image(boxes, size)
        keep = batched_nms(boxes, scores, torch.zeros_like(best), self.proposal_nms_iou)
        return boxes[keep], scores[keep]


def _build_model(backbone: PyramidBackbone, config: DetectorConfig, num_classes: int) -> RetinaNet:
    octaves = tuple(
        tuple(size * 2 ** (step / 3) for step in range(3)) for size in config.anchor_sizes
    )  # three scales per octave, as published
    return RetinaNet(
        backbone,
        num_classes=num_classes,
        anchor_generator=anchor_generator(config, octaves),
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_iou,
        detections_per_img=config.detections_per_page,
    )
