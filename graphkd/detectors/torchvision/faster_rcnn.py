"""torchvision's Faster R-CNN behind the detector interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, smooth_l1_loss
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign

from graphkd.batch import Detections, Features, Proposals, RegionPredictions, Targets
from graphkd.detectors.common import to_float32
from graphkd.detectors.config import DetectorConfig
from graphkd.detectors.protocol import DetectorSpec
from graphkd.detectors.sampling import SeededSampler
from graphkd.detectors.torchvision.common import TorchvisionDetector, torchvision_targets
from graphkd.detectors.torchvision.matching import match_anchors
from graphkd.detectors.torchvision.regions import anchor_generator

if TYPE_CHECKING:
    from graphkd.detectors.backbones import PyramidBackbone

RPN_BETA = 1 / 9  # of the smooth L1 loss of proposals, as in torchvision
POOLED_LEVELS = ["0", "1", "2", "3"]  # P2-P5; P6 only proposes (Lin et al., CVPR 2017)


class FasterRCNNDetector(TorchvisionDetector):
    """Faster R-CNN with a feature pyramid; torchvision has the background class first, the interface last."""

    CLASS_LAYERS = ("model.roi_heads.box_predictor.",)

    def __init__(self, backbone: PyramidBackbone, config: DetectorConfig, num_classes: int) -> None:
        spec = DetectorSpec(
            num_classes=num_classes,
            channels=backbone.out_channels,
            pooled_side=config.pooled_side,
            activation="softmax",
            framework="torchvision",
            classifies_regions=config.classifies_regions,
        )
        super().__init__(_build_model(backbone, config, num_classes), spec, config, POOLED_LEVELS)
        self.model.roi_heads.box_roi_pool = self.region_pool
        rpn, roi_heads = self.model.rpn, self.model.roi_heads
        rpn.fg_bg_sampler = SeededSampler(config.rpn_batch, 0.5, salt=0)
        roi_heads.fg_bg_sampler = SeededSampler(config.roi_batch, config.roi_positive_fraction, salt=1)

    def propose_and_losses(self, features: Features, targets: Targets) -> tuple[Proposals, dict[str, Tensor]]:
        """Return proposals and the four losses of Faster R-CNN, each [B] and normalised within its page."""
        ground_truth = torchvision_targets(targets, first_class=1)
        proposals, losses = self._proposals(features, ground_truth, targets.seeds)
        losses |= self._region_losses(features, proposals.boxes, ground_truth, targets.seeds)
        return proposals, losses

    def propose(self, features: Features) -> Proposals:
        """Return proposals of the region proposal network, best first."""
        return self._proposals(features, None, [])[0]

    def classify(self, pooled: Tensor) -> RegionPredictions:
        """Return class logits [N, K + 1], background last, and deltas [N, K, 4] with unit coder weights."""
        heads = self.model.roi_heads
        logits, deltas = self._heads(pooled)
        logits = torch.cat([logits[:, 1:], logits[:, :1]], dim=1)
        per_class = deltas.view(len(deltas), -1, 4)[:, 1:]
        return RegionPredictions(logits=logits, deltas=per_class / per_class.new_tensor(heads.box_coder.weights))

    def detect(self, features: Features) -> list[Detections]:
        """Return detections after NMS per class, best first."""
        heads, boxes = self.model.roi_heads, self.propose(features).boxes
        logits, deltas = self._heads(self.pool(features, boxes))
        found = heads.postprocess_detections(logits, deltas, boxes, features.image_sizes)
        return [
            Detections(boxes=page_boxes, scores=scores, classes=labels - 1)
            for page_boxes, scores, labels in zip(*found, strict=True)
        ]

    def _heads(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.model.roi_heads
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        return logits.float(), deltas.float()

    def _proposals(
        self, features: Features, ground_truth: list[dict[str, Tensor]] | None, seeds: list[int]
    ) -> tuple[Proposals, dict[str, Tensor]]:
        rpn = self.model.rpn
        objectness, deltas = map(to_float32, rpn.head(list(features.maps.values())))
        per_level = [level[0].numel() for level in objectness]
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        anchors = self.anchors(features)
        boxes = rpn.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
        kept, scores = rpn.filter_proposals(boxes, objectness, features.image_sizes, per_level)
        proposals = Proposals(boxes=kept, scores=scores)
        if ground_truth is None:
            return proposals, {}
        return proposals, self._proposal_losses(objectness, deltas, anchors, ground_truth, seeds)

    def _proposal_losses(
        self,
        objectness: Tensor,
        deltas: Tensor,
        anchors: list[Tensor],
        ground_truth: list[dict[str, Tensor]],
        seeds: list[int],
    ) -> dict[str, Tensor]:
        rpn, pages = self.model.rpn, len(anchors)
        labels, matched = self._anchor_targets(anchors, ground_truth)
        sampled = rpn.fg_bg_sampler.sample(labels, seeds)
        counts = sampled.valid.sum(dim=1).clamp(min=1)
        logits = objectness.view(pages, -1).gather(1, sampled.indices)
        errors = binary_cross_entropy_with_logits(logits, sampled.positive.to(logits.dtype), reduction="none")
        index = sampled.indices[..., None].expand(-1, -1, 4)
        boxes, own = matched.gather(1, index).flatten(0, 1), torch.stack(anchors).gather(1, index).flatten(0, 1)
        expected = rpn.box_coder.encode_single(boxes, own).view(index.shape)
        predicted = deltas.view(pages, -1, 4).gather(1, index)
        box_errors = smooth_l1_loss(predicted, expected, beta=RPN_BETA, reduction="none").sum(dim=-1)
        return {
            "loss_objectness": errors.masked_fill(~sampled.valid, 0).sum(dim=1) / counts,
            "loss_rpn_box": box_errors.masked_fill(~sampled.positive, 0).sum(dim=1) / counts,
        }

    def _anchor_targets(self, anchors: list[Tensor], ground_truth: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """Labels [B, A], 1 for foreground, 0 for background and -1 for neither, and matched boxes [B, A, 4]."""
        matcher, labels, matched = self.model.rpn.proposal_matcher, [], []
        for own, truth in zip(anchors, ground_truth, strict=True):
            matches = match_anchors(matcher, truth["boxes"], own)
            background = torch.where(matches == matcher.BELOW_LOW_THRESHOLD, 0.0, -1.0)
            labels.append(torch.where(matches >= 0, 1.0, background))
            boxes = truth["boxes"] if len(truth["boxes"]) else own.new_zeros(1, 4)
            matched.append(boxes[matches.clamp(min=0)])
        return torch.stack(labels), torch.stack(matched)

    def _region_losses(
        self, features: Features, proposals: list[Tensor], ground_truth: list[dict[str, Tensor]], seeds: list[int]
    ) -> dict[str, Tensor]:
        heads = self.model.roi_heads
        heads.fg_bg_sampler.seeds = seeds
        boxes, _, labels, regression = heads.select_training_samples(list(proposals), ground_truth)
        counts = [len(page) for page in boxes]
        logits, deltas = self._heads(self.pool(features, boxes))
        pages = zip(logits.split(counts), deltas.split(counts), labels, regression, strict=True)
        losses = [fastrcnn_loss(page[0], page[1], [page[2]], [page[3]]) for page in pages]
        class_losses, box_losses = zip(*losses, strict=True)
        return {"loss_class": torch.stack(class_losses), "loss_box": torch.stack(box_losses)}


def _build_model(backbone: PyramidBackbone, config: DetectorConfig, num_classes: int) -> FasterRCNN:
    width, side = config.head_width, config.pooled_side
    return FasterRCNN(
        backbone,
        num_classes=None,
        rpn_anchor_generator=anchor_generator(config, tuple((size,) for size in config.anchor_sizes)),
        rpn_pre_nms_top_n_train=config.rpn_proposals_before_nms,
        rpn_pre_nms_top_n_test=max(1, config.rpn_proposals_before_nms // 2),
        rpn_post_nms_top_n_train=config.rpn_proposals,
        rpn_post_nms_top_n_test=config.rpn_proposals,
        rpn_nms_thresh=config.rpn_nms_iou,
        box_roi_pool=MultiScaleRoIAlign(POOLED_LEVELS, side, sampling_ratio=2),  # required, but replaced
        box_head=TwoMLPHead(backbone.out_channels * side**2, width),
        box_predictor=FastRCNNPredictor(width, num_classes + 1),
        box_score_thresh=config.score_threshold,
        box_nms_thresh=config.nms_iou,
        box_detections_per_img=config.detections_per_page,
    )
