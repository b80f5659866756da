"""torchvision's Faster R-CNN behind the detector interface."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, smooth_l1_loss
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from graphkd.batch import Detections, Features, Proposals, RegionPredictions, Targets
from graphkd.boxes import clip_to_pages
from graphkd.detectors.common import to_float32
from graphkd.detectors.config import DetectorConfig
from graphkd.detectors.ops.gather import rows, valid_rows
from graphkd.detectors.ops.matching import match_boxes, match_labels
from graphkd.detectors.ops.suppression import suppress
from graphkd.detectors.protocol import DetectorSpec
from graphkd.detectors.sampling import Sampled, SeededSampler
from graphkd.detectors.torchvision.common import TorchvisionDetector, encode, match_anchors
from graphkd.detectors.torchvision.regions import anchor_generator, region_pool

if TYPE_CHECKING:
    from graphkd.detectors.backbones import PyramidBackbone

BETA = 1 / 9  # of the smooth L1 losses, as in torchvision
MIN_SIDE = 1e-3  # px; smaller proposals are dropped, as in torchvision
FOREGROUND_IOU = 0.5  # of regions
REGION_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the deltas of regions; those of proposals are 1
POOLED_LEVELS = ["0", "1", "2", "3"]  # P2-P5; P6 only proposes (Lin et al., CVPR 2017)


class FasterRCNNDetector(TorchvisionDetector):
    """Faster R-CNN with a feature pyramid; torchvision has the background class first, the interface last."""

    CLASS_LAYERS = ("model.roi_heads.box_predictor.",)
    region_weights: Tensor

    def __init__(self, backbone: PyramidBackbone, config: DetectorConfig, num_classes: int) -> None:
        spec = DetectorSpec(
            num_classes=num_classes,
            channels=backbone.out_channels,
            pooled_side=config.pooled_side,
            activation="softmax",
            framework="torchvision",
            classifies_regions=config.classifies_regions,
        )
        pool = region_pool(config, POOLED_LEVELS, first_stride=4)
        super().__init__(_build_model(backbone, config, num_classes), spec, config, pool)
        self.anchor_sampler = SeededSampler(config.rpn_batch, 0.5, salt=0)
        self.region_sampler = SeededSampler(config.roi_batch, config.roi_positive_fraction, salt=1)
        self.register_buffer("region_weights", torch.tensor(REGION_WEIGHTS), persistent=False)

    def propose_and_losses(self, features: Features, targets: Targets) -> tuple[Proposals, dict[str, Tensor]]:
        """Return proposals and the four losses of Faster R-CNN, each [B] and normalised within its page."""
        outputs = self._propose(features)
        proposals = self._best(*outputs, features.sizes)
        losses = self._proposal_losses(*outputs, targets)
        return proposals, losses | self._region_losses(features, proposals, targets)

    def propose(self, features: Features) -> Proposals:
        """Return proposals of the region proposal network, best first."""
        return self._best(*self._propose(features), features.sizes)

    def classify(self, pooled: Tensor) -> RegionPredictions:
        """Return class logits [..., K + 1], background last, and deltas [..., K, 4] with unit coder weights."""
        logits, deltas = self.region_outputs(pooled)
        logits = torch.cat([logits[..., 1:], logits[..., :1]], dim=-1)
        return RegionPredictions(logits=logits, deltas=deltas[..., 1:, :] / self.region_weights)

    def detect(self, features: Features) -> list[Detections]:
        """Return detections after NMS per class, best first."""
        heads, found = self.model.roi_heads, self.propose(features)
        logits, deltas = self.region_outputs(self.pool(features, found.boxes))
        boxes = [page[valid] for page, valid in zip(found.boxes, found.valid, strict=True)]
        detected = heads.postprocess_detections(
            logits[found.valid], deltas.flatten(2)[found.valid], boxes, features.image_sizes
        )
        return [
            Detections(boxes=page_boxes, scores=scores, classes=labels - 1)
            for page_boxes, scores, labels in zip(*detected, strict=True)
        ]

    def region_outputs(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [..., 1 + K] and deltas [..., 1 + K, 4], background first, of regions [..., C, P, P]."""
        heads, shape = self.model.roi_heads, pooled.shape[:-3]
        logits, deltas = heads.box_predictor(heads.box_head(pooled.flatten(0, -4)))
        return logits.float().view(*shape, -1), deltas.float().view(*shape, -1, 4)

    def _propose(self, features: Features) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Objectness [B, A], deltas [B, A, 4], anchors [A, 4] and the number of anchors of each level."""
        objectness, deltas = map(to_float32, self.model.rpn.head(list(features.maps.values())))
        per_level = [level[0].numel() for level in objectness]
        logits = torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in objectness], dim=1)
        boxes = [level.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in deltas]
        return logits, torch.cat(boxes, dim=1), self.anchors(features), per_level

    @torch.no_grad()
    def _best(
        self, objectness: Tensor, deltas: Tensor, anchors: Tensor, per_level: list[int], sizes: Tensor
    ) -> Proposals:
        """What is left of each level's best anchors after suppression within the level, as in torchvision."""
        rpn, parts = self.model.rpn, []
        for levels, logits, boxes in self._best_of_levels(objectness, deltas, anchors, per_level):
            clipped = clip_to_pages(boxes, sizes.repeat(levels, 1))
            sides, scores = clipped[..., 2:] - clipped[..., :2], logits.sigmoid()
            usable = (sides >= MIN_SIDE).all(dim=-1) & (scores >= rpn.score_thresh)
            kept = suppress(clipped, usable, rpn.nms_thresh)
            parts.append([_by_page(part, levels) for part in (clipped, scores, kept)])
        boxes, scores, kept = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        order = scores.masked_fill(~kept, -1).argsort(dim=1, descending=True, stable=True)
        order = order[:, : rpn.post_nms_top_n()]
        valid = rows(kept, order)
        return Proposals(boxes=valid_rows(boxes, order, valid), scores=valid_rows(scores, order, valid), valid=valid)

    def _best_of_levels(
        self, objectness: Tensor, deltas: Tensor, anchors: Tensor, per_level: list[int]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """L, logits [L x B, k] and boxes [L x B, k, 4] of the best anchors, together for L levels of the same k."""
        rpn, found, start = self.model.rpn, [], 0
        for count in per_level:
            logits, index = objectness[:, start : start + count].topk(min(count, rpn.pre_nms_top_n()), dim=1)
            index = index + start
            own = rows(deltas, index).flatten(0, 1)
            boxes = rpn.box_coder.decode_single(own, anchors[index].flatten(0, 1))
            found.append((logits, boxes.view(*index.shape, 4)))
            start += count
        for _, group in groupby(found, key=lambda level: level[0].shape[1]):
            logits_of, boxes_of = zip(*group, strict=True)
            yield len(logits_of), torch.cat(logits_of), torch.cat(boxes_of)

    def _proposal_losses(
        self, objectness: Tensor, deltas: Tensor, anchors: Tensor, _: list[int], targets: Targets
    ) -> dict[str, Tensor]:
        matches = match_anchors(self.model.rpn.proposal_matcher, anchors, targets)
        sampled = self.anchor_sampler.sample(match_labels(matches), targets.seeds)
        counts = sampled.valid.sum(dim=1).clamp(min=1)
        logits = objectness.gather(1, sampled.indices)
        errors = binary_cross_entropy_with_logits(logits, sampled.positive.to(logits.dtype), reduction="none")
        truth = rows(targets.boxes, matches.gather(1, sampled.indices).clamp(min=0))
        expected = encode(truth, anchors[sampled.indices], torch.ones_like(self.region_weights))
        box_errors = _box_errors(rows(deltas, sampled.indices), expected, sampled)
        return {
            "loss_objectness": errors.masked_fill(~sampled.valid, 0).sum(dim=1) / counts,
            "loss_rpn_box": box_errors / counts,
        }

    def _region_losses(self, features: Features, proposals: Proposals, targets: Targets) -> dict[str, Tensor]:
        boxes, classes, expected, sampled = self._sample_regions(proposals, targets)
        logits, deltas = self.region_outputs(self.pool(features, boxes))
        counts = sampled.valid.sum(dim=1).clamp(min=1)
        errors = cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(classes)
        predicted = rows(deltas.flatten(0, 1), classes.view(-1, 1)).view_as(expected)
        return {
            "loss_class": errors.masked_fill(~sampled.valid, 0).sum(dim=1) / counts,
            "loss_box": _box_errors(predicted, expected, sampled) / counts,
        }

    @torch.no_grad()
    def _sample_regions(self, proposals: Proposals, targets: Targets) -> tuple[Tensor, Tensor, Tensor, Sampled]:
        """Boxes [B, S, 4] from proposals and ground truth, their classes [B, S], 0 for background, and deltas."""
        boxes = torch.cat([proposals.boxes, targets.boxes], dim=1)
        valid = torch.cat([proposals.valid, targets.valid], dim=1)
        iou = FOREGROUND_IOU
        matches = match_boxes(targets.boxes, targets.valid, boxes, low=iou, high=iou, rescue=False)
        truth = matches.clamp(min=0)
        labels = torch.where(matches >= 0, targets.classes.gather(1, truth) + 1, 0)
        sampled = self.region_sampler.sample(labels.masked_fill(~valid, -1), targets.seeds)
        classes = labels.gather(1, sampled.indices).masked_fill(~sampled.valid, 0)
        chosen = rows(boxes, sampled.indices)
        expected = encode(rows(targets.boxes, truth.gather(1, sampled.indices)), chosen, self.region_weights)
        return chosen, classes, expected, sampled


def _by_page(values: Tensor, levels: int) -> Tensor:
    """[L x B, k, ...] -> [B, L x k, ...]."""
    return values.unflatten(0, (levels, -1)).transpose(0, 1).flatten(1, 2)


def _box_errors(predicted: Tensor, expected: Tensor, sampled: Sampled) -> Tensor:
    """Sum of the smooth L1 errors [B] of the positives."""
    expected = expected.masked_fill(~sampled.positive[..., None], 0)  # of a box without area it is not finite
    errors = smooth_l1_loss(predicted, expected, beta=BETA, reduction="none").sum(dim=-1)
    return errors.masked_fill(~sampled.positive, 0).sum(dim=1)


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
