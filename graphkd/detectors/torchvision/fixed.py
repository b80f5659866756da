"""Final detections of torchvision's detectors in fixed shapes, for export. ``detect`` gives the same in lists."""

from __future__ import annotations

import torch
from torch import Tensor

from graphkd.batch import Features
from graphkd.boxes import clip_to_pages
from graphkd.detectors.ops.gather import rows
from graphkd.detectors.ops.suppression import suppress
from graphkd.detectors.torchvision.common import TorchvisionDetector
from graphkd.detectors.torchvision.faster_rcnn import FasterRCNNDetector
from graphkd.detectors.torchvision.retinanet import RetinaNetDetector

MIN_SIDE = 1e-2  # px; smaller detections are dropped, as in torchvision
Candidates = tuple[Tensor, Tensor, Tensor]


def fixed_detections(detector: TorchvisionDetector, features: Features) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of each page, best first, padded to D with score 0.

    Returns:
        Boxes [B, D, 4], xyxy in canvas px within the page, classes int64 [B, D] and scores [B, D].
    """
    if isinstance(detector, FasterRCNNDetector):
        found, settings = _of_regions(detector, features), detector.model.roi_heads
    else:
        assert isinstance(detector, RetinaNetDetector)
        found, settings = _of_anchors(detector, features), detector.model
    boxes, scores, usable = found  # [B, K, N, 4] and [B, K, N], best first
    kept = suppress(boxes.flatten(0, 1), usable.flatten(0, 1), settings.nms_thresh).view(usable.shape)
    count = min(settings.detections_per_img, scores[0].numel())
    best, index = scores.masked_fill(~kept, 0).flatten(1).topk(count, dim=1)
    classes = torch.div(index, scores.shape[2], rounding_mode="floor")
    clipped = clip_to_pages(rows(boxes.flatten(1, 2), index), features.sizes)
    return clipped, classes.masked_fill(best <= 0, 0), best


def _of_regions(detector: FasterRCNNDetector, features: Features) -> Candidates:
    """Boxes [B, K, R, 4] and scores [B, K, R] of each class, best first, and which can be detections."""
    heads, proposals = detector.model.roi_heads, detector.propose(features)
    logits, deltas = detector.region_outputs(detector.pool(features, proposals.boxes))
    shape = deltas.shape  # [B, R, 1 + K, 4]
    decoded = heads.box_coder.decode_single(deltas.flatten(2).flatten(0, 1), proposals.boxes.flatten(0, 1))
    clipped = clip_to_pages(decoded.view(shape[0], -1, 4), features.sizes).view(shape)[:, :, 1:]
    scores = (logits.softmax(dim=-1)[..., 1:] * proposals.valid[..., None]).transpose(1, 2)
    best, order = scores.topk(scores.shape[2], dim=2)
    boxes = rows(clipped.transpose(1, 2).flatten(0, 1), order.flatten(0, 1)).view(*order.shape, 4)
    return boxes, best, (best > heads.score_thresh) & _large(boxes)


def _of_anchors(detector: RetinaNetDetector, features: Features) -> Candidates:
    """As :func:`_of_regions`, from the best anchors and classes of each level."""
    model, outputs, anchors = detector.model, detector.head_outputs(features), detector.anchors(features)
    classes_of, start, found = outputs["cls_logits"].shape[-1], 0, []
    for count in detector.anchors_per_level(features):
        logits = outputs["cls_logits"][:, start : start + count].flatten(1)
        best, index = logits.sigmoid().topk(min(model.topk_candidates, logits.shape[1]), dim=1)
        anchor = torch.div(index, classes_of, rounding_mode="floor") + start
        found.append((best, anchor, index % classes_of))
        start += count
    scores, anchor, classes = (torch.cat(part, dim=1) for part in zip(*found, strict=True))
    scores, order = scores.topk(scores.shape[1], dim=1)
    anchor, classes = rows(anchor, order), rows(classes, order)
    deltas = rows(outputs["bbox_regression"], anchor).flatten(0, 1)
    boxes = model.box_coder.decode_single(deltas, anchors[anchor].flatten(0, 1)).view(*anchor.shape, 4)
    if detector.clips_before_suppression:
        boxes = clip_to_pages(boxes, features.sizes)
    boxes = boxes[:, None].expand(-1, classes_of, -1, -1)
    own = classes[:, None] == torch.arange(classes_of, device=classes.device)[:, None]
    scores = scores[:, None].expand(-1, classes_of, -1) * own
    return boxes, scores, own & (scores > model.score_thresh)


def _large(boxes: Tensor) -> Tensor:
    return ((boxes[..., 2:] - boxes[..., :2]) >= MIN_SIDE).all(dim=-1)
