"""detectron2's RetinaNet behind the detector interface. It has no region head."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from graphkd.batch import Detections, Features, Proposals, Targets
from graphkd.detectors.common import to_float32
from graphkd.detectors.config import DetectorConfig
from graphkd.detectors.detectron2.common import Detectron2Detector, match_anchors
from graphkd.detectors.detectron2.model import build_retinanet
from graphkd.detectors.ops.gather import rows
from graphkd.detectors.protocol import DetectorSpec

LEVELS = {"p3": "0", "p4": "1", "p5": "2", "p6": "p6", "p7": "p7"}
POOLED = ["p3", "p4", "p5"]


class Detectron2RetinaNet(Detectron2Detector):
    """detectron2's RetinaNet. Its detections, without classes, serve as proposals."""

    CLASS_LAYERS = ("model.head.cls_score.",)

    def __init__(self, config: DetectorConfig, num_classes: int, backbone: nn.Module) -> None:
        spec = DetectorSpec(
            num_classes=num_classes,
            channels=config.fpn_channels,
            pooled_side=config.pooled_side,
            activation="sigmoid",
            framework="detectron2",
            classifies_regions=False,
        )
        super().__init__(build_retinanet(config, num_classes, backbone), spec, LEVELS)
        # A moving average over batches would make a page's loss depend on earlier pages and on the worker.
        self.model._ema_update = _of_this_page
        kind = "ROIAlignV2" if config.roi_aligned else "ROIAlign"
        self.region_pool = ROIPooler(config.pooled_side, [1 / 8, 1 / 16, 1 / 32], config.roi_samples, kind)
        self.max_proposals, self.proposal_nms_iou = config.rpn_proposals, config.rpn_nms_iou

    def propose_and_losses(self, features: Features, targets: Targets) -> tuple[Proposals, dict[str, Tensor]]:
        """Return proposals and the focal and box losses, each [B] and normalised by the page's foreground anchors."""
        anchors, logits, deltas = self._heads(features)
        with EventStorage():  # required by detectron2's losses
            labels, boxes = self._anchor_targets(Boxes.cat(anchors).tensor, targets)
            losses = [
                self.model.losses(anchors, _page(logits, page), [labels[page]], _page(deltas, page), [boxes[page]])
                for page in range(len(labels))
            ]
        by_name = {
            "loss_class": torch.stack([page["loss_cls"] for page in losses]),
            "loss_box": torch.stack([page["loss_box_reg"] for page in losses]),
        }
        return self._proposals(anchors, logits, deltas, features), by_name

    def propose(self, features: Features) -> Proposals:
        """Return boxes of the most confident anchors, best first."""
        return self._proposals(*self._heads(features), features)

    def pool(self, features: Features, boxes: Tensor) -> Tensor:
        """RoIAlign of the config: boxes [B, N, 4] -> [B, N, C, P, P]."""
        pooled: Tensor = self.region_pool(self.maps_of(features, POOLED), [Boxes(page) for page in boxes])
        return pooled.unflatten(0, boxes.shape[:2])

    def classify(self, pooled: Tensor) -> None:
        """RetinaNet has no head for arbitrary regions."""
        return

    def detect(self, features: Features) -> list[Detections]:
        """Return detections after NMS per class, best first."""
        anchors, logits, deltas = self._heads(features)
        found = []
        for page, size in enumerate(features.image_sizes):
            page_scores, page_deltas = [level[page].sigmoid() for level in logits], [level[page] for level in deltas]
            kept = self.model.inference_single_image(anchors, page_scores, page_deltas, size)
            kept.pred_boxes.clip(size)
            found.append(Detections(boxes=kept.pred_boxes.tensor, scores=kept.scores, classes=kept.pred_classes))
        return found

    def _heads(self, features: Features) -> tuple[list[Boxes], list[Tensor], list[Tensor]]:
        """Anchors, logits [B, A_l, K] and deltas [B, A_l, 4] of each level."""
        maps = self.maps_of(features, self.model.head_in_features)
        outputs = [to_float32(part) for part in self.model.head(maps)]
        logits, deltas = self.model._transpose_dense_predictions(outputs, [self.spec.num_classes, 4])
        return self.model.anchor_generator(maps), logits, deltas

    @torch.no_grad()
    def _anchor_targets(self, anchors: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Like ``RetinaNet.label_anchors`` for all pages: classes [B, A], K for background, and boxes [B, A, 4]."""
        matches, fit = match_anchors(self.model.anchor_matcher, anchors, targets)
        classes = targets.classes.gather(1, matches).masked_fill(fit == 0, self.spec.num_classes)
        return classes.masked_fill(fit == -1, -1), rows(targets.boxes, matches)

    @torch.no_grad()
    def _proposals(
        self, anchors: list[Boxes], logits: list[Tensor], deltas: list[Tensor], features: Features
    ) -> Proposals:
        all_anchors = Boxes.cat(anchors).tensor
        confidence = torch.cat([level.sigmoid().amax(dim=-1) for level in logits], dim=1)
        pages = zip(confidence, torch.cat(deltas, dim=1), features.image_sizes, strict=True)
        found = [self._page_proposals(scores, own, all_anchors, size) for scores, own, size in pages]
        return Proposals.from_lists([boxes for boxes, _ in found], [scores for _, scores in found])

    def _page_proposals(
        self, scores: Tensor, deltas: Tensor, anchors: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        scores, best = scores.topk(min(len(scores), self.max_proposals))
        boxes = Boxes(self.model.box2box_transform.apply_deltas(deltas[best], anchors[best]))
        boxes.clip(size)
        keep = batched_nms(boxes.tensor, scores, torch.zeros_like(best), self.proposal_nms_iou)
        return boxes.tensor[keep], scores[keep]


def _page(levels: list[Tensor], page: int) -> list[Tensor]:
    return [level[page : page + 1] for level in levels]


def _of_this_page(_: str, value: float, *__: Any) -> float:
    return value
