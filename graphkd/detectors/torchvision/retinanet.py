"""torchvision's RetinaNet behind the detector interface. It has no region head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import l1_loss
from torchvision.models.detection import RetinaNet
from torchvision.ops import sigmoid_focal_loss

from graphkd.batch import Detections, Features, Proposals, Targets
from graphkd.boxes import clip_to_pages
from graphkd.detectors.config import DetectorConfig
from graphkd.detectors.ops.gather import first_rows, rows, valid_rows
from graphkd.detectors.ops.matching import IGNORED
from graphkd.detectors.ops.suppression import suppress
from graphkd.detectors.protocol import DetectorSpec
from graphkd.detectors.torchvision.common import TorchvisionDetector, encode, match_anchors
from graphkd.detectors.torchvision.regions import anchor_generator, region_pool

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
        pool = region_pool(config, POOLED_LEVELS, first_stride=8)
        super().__init__(_build_model(backbone, config, num_classes), spec, config, pool)
        self.max_proposals = config.rpn_proposals
        self.proposal_nms_iou = config.rpn_nms_iou

    def propose_and_losses(self, features: Features, targets: Targets) -> tuple[Proposals, dict[str, Tensor]]:
        """Return proposals and the focal and box losses, each [B] and normalised by the page's foreground anchors."""
        outputs, anchors = self.head_outputs(features), self.anchors(features)
        return self._proposals(outputs, anchors, features.sizes), self._losses(outputs, anchors, targets)

    def propose(self, features: Features) -> Proposals:
        """Return boxes of the most confident anchors, best first."""
        return self._proposals(self.head_outputs(features), self.anchors(features), features.sizes)

    def classify(self, pooled: Tensor) -> None:
        """RetinaNet has no head for arbitrary regions."""
        return

    def detect(self, features: Features) -> list[Detections]:
        """Return detections after NMS per class, best first."""
        outputs, anchors = self.head_outputs(features), self.anchors(features)
        pages = len(features.sizes)
        per_level = self.anchors_per_level(features)
        by_level = {name: list(output.split(per_level, dim=1)) for name, output in outputs.items()}
        anchors_by_level = [list(anchors.split(per_level))] * pages
        found = self.model.postprocess_detections(by_level, anchors_by_level, features.image_sizes)
        return [Detections(boxes=page["boxes"], scores=page["scores"], classes=page["labels"]) for page in found]

    def head_outputs(self, features: Features) -> dict[str, Tensor]:
        """Logits ``cls_logits`` [B, A, K] and deltas ``bbox_regression`` [B, A, 4] of all anchors."""
        outputs = self.model.head(list(features.maps.values()))
        return {name: output.float() for name, output in outputs.items()}

    def anchors_per_level(self, features: Features) -> list[int]:
        """Number of anchors of each level."""
        per_cell = self.model.anchor_generator.num_anchors_per_location()[0]
        return [level.shape[-2] * level.shape[-1] * per_cell for level in features.maps.values()]

    def _losses(self, outputs: dict[str, Tensor], anchors: Tensor, targets: Targets) -> dict[str, Tensor]:
        matches = match_anchors(self.model.proposal_matcher, anchors, targets)
        foreground, truth = matches >= 0, matches.clamp(min=0)
        counts = foreground.sum(dim=1).clamp(min=1)
        logits = outputs["cls_logits"]
        classes = targets.classes.gather(1, truth).masked_fill(~foreground, -1)
        expected = (classes[..., None] == torch.arange(logits.shape[-1], device=logits.device)).to(logits.dtype)
        errors = sigmoid_focal_loss(logits, expected).sum(dim=-1)
        boxes, unit = rows(targets.boxes, truth), torch.ones_like(anchors[0])
        deltas = encode(boxes, anchors.expand_as(boxes), unit).masked_fill(~foreground[..., None], 0)
        box_errors = l1_loss(outputs["bbox_regression"], deltas, reduction="none").sum(dim=-1)
        return {
            "loss_class": errors.masked_fill(matches == IGNORED, 0).sum(dim=1) / counts,
            "loss_box": box_errors.masked_fill(~foreground, 0).sum(dim=1) / counts,
        }

    @torch.no_grad()
    def _proposals(self, outputs: dict[str, Tensor], anchors: Tensor, sizes: Tensor) -> Proposals:
        confidence = outputs["cls_logits"].amax(dim=-1).sigmoid()
        scores, best = confidence.topk(min(len(anchors), self.max_proposals), dim=1)
        deltas = rows(outputs["bbox_regression"], best).flatten(0, 1)
        boxes = self.model.box_coder.decode_single(deltas, anchors[best].flatten(0, 1)).view(*best.shape, 4)
        boxes = clip_to_pages(boxes, sizes)
        order, valid = first_rows(suppress(boxes, scores >= 0, self.proposal_nms_iou), best.shape[1])
        return Proposals(boxes=valid_rows(boxes, order, valid), scores=valid_rows(scores, order, valid), valid=valid)


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
