"""detectron2's Faster R-CNN behind the detector interface.

Its own ``GeneralizedRCNN`` is built and trained, with detectron2's losses and inference. Only sampling is seeded by
the page, and losses are computed page by page. The order of channels is BGR; background is the last class.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from graphkd.batch import Detections, Features, Proposals, RegionPredictions, Targets
from graphkd.detectors.common import to_float32
from graphkd.detectors.config import DetectorConfig
from graphkd.detectors.detectron2.common import Detectron2Detector, instances, match_anchors
from graphkd.detectors.detectron2.model import build_rcnn
from graphkd.detectors.ops.gather import rows
from graphkd.detectors.protocol import DetectorSpec
from graphkd.detectors.sampling import SeededSampler

LEVELS = {"p2": "0", "p3": "1", "p4": "2", "p5": "3", "p6": "pool"}
"""detectron2's names of pyramid levels -> names that all adapters use."""


class Detectron2FasterRCNN(Detectron2Detector):
    """A GeneralizedRCNN of detectron2's with a feature pyramid."""

    CLASS_LAYERS = ("model.roi_heads.box_predictor.",)

    def __init__(self, config: DetectorConfig, num_classes: int, backbone: nn.Module) -> None:
        spec = DetectorSpec(
            num_classes=num_classes,
            channels=config.fpn_channels,
            pooled_side=config.pooled_side,
            activation="softmax",
            framework="detectron2",
            classifies_regions=True,
        )
        super().__init__(build_rcnn(config, num_classes, backbone), spec, LEVELS)
        self._anchor_sampler = SeededSampler(config.rpn_batch, 0.5, salt=0)
        self._region_sampler = SeededSampler(config.roi_batch, config.roi_positive_fraction, salt=1)
        self._seeds: Iterator[Tensor] = iter(())
        self.model.roi_heads._sample_proposals = self._sample_regions

    def propose_and_losses(self, features: Features, targets: Targets) -> tuple[Proposals, dict[str, Tensor]]:
        """Return proposals and detectron2's four losses under the names that all adapters use, each [B]."""
        with EventStorage():  # required by detectron2's losses
            anchors, logits, deltas = self._propose(features)
            found = self._best(anchors, logits, deltas, features)
            losses = self._proposal_losses(anchors, logits, deltas, targets)
            losses |= self._region_losses(features, found, targets)
        return _proposals(found), losses

    def propose(self, features: Features) -> Proposals:
        """Return proposals of the region proposal network, best first."""
        return _proposals(self._best(*self._propose(features), features))

    def pool(self, features: Features, boxes: Tensor) -> Tensor:
        """RoIAlign of the config: boxes [B, N, 4] -> [B, N, C, P, P]."""
        return self._pool(features, list(boxes)).unflatten(0, boxes.shape[:2])

    def classify(self, pooled: Tensor) -> RegionPredictions:
        """Return class logits [..., K + 1], background last, and deltas [..., K, 4] with unit coder weights."""
        shape = pooled.shape[:-3]
        logits, deltas = self._heads(pooled.flatten(0, -4))
        per_class = deltas.view(*shape, self.spec.num_classes, 4)
        weights = self.model.roi_heads.box_predictor.box2box_transform.weights
        return RegionPredictions(logits=logits.view(*shape, -1), deltas=per_class / per_class.new_tensor(weights))

    def detect(self, features: Features) -> list[Detections]:
        """Return detections after NMS per class, best first."""
        proposals = self._best(*self._propose(features), features)
        predictions = self._heads(self._pool(features, [page.proposal_boxes.tensor for page in proposals]))
        found, _ = self.model.roi_heads.box_predictor.inference(predictions, proposals)
        return [
            Detections(boxes=page.pred_boxes.tensor, scores=page.scores, classes=page.pred_classes) for page in found
        ]

    def _pool(self, features: Features, boxes: list[Tensor]) -> Tensor:
        """RoIAlign of boxes [N_i, 4] of each page: [sum N_i, C, P, P]."""
        heads = self.model.roi_heads
        maps = self.maps_of(features, heads.box_in_features)
        pooled: Tensor = heads.box_pooler(maps, [Boxes(page) for page in boxes])
        return pooled

    def _heads(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.model.roi_heads
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        return logits.float(), deltas.float()

    def _propose(self, features: Features) -> tuple[list[Boxes], list[Tensor], list[Tensor]]:
        """Anchors, objectness [B, A_l] and deltas [B, A_l, 4] of each level."""
        rpn = self.model.proposal_generator
        maps = self.maps_of(features, rpn.in_features)
        anchors = rpn.anchor_generator(maps)
        logits, deltas = map(to_float32, rpn.rpn_head(maps))
        logits = [level.permute(0, 2, 3, 1).flatten(1) for level in logits]
        deltas = [level.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in deltas]
        return anchors, logits, deltas

    @torch.no_grad()
    def _best(
        self, anchors: list[Boxes], logits: list[Tensor], deltas: list[Tensor], features: Features
    ) -> list[Instances]:
        rpn = self.model.proposal_generator
        boxes = rpn._decode_proposals(anchors, deltas)
        # With training=True, non-finite values would end this rank alone; the training loop ends all ranks.
        return find_top_rpn_proposals(
            boxes,
            logits,
            features.image_sizes,
            rpn.nms_thresh,
            rpn.pre_nms_topk[self.training],
            rpn.post_nms_topk[self.training],
            rpn.min_box_size,
            training=False,
        )

    def _proposal_losses(
        self, anchors: list[Boxes], logits: list[Tensor], deltas: list[Tensor], targets: Targets
    ) -> dict[str, Tensor]:
        rpn, losses = self.model.proposal_generator, []
        matches, fit = match_anchors(rpn.anchor_matcher, Boxes.cat(anchors).tensor, targets)
        sampled, matched = self._sampled(self._anchor_sampler, fit, targets.seeds), rows(targets.boxes, matches)
        for page in range(len(fit)):
            page_logits, page_deltas = ([level[page : page + 1] for level in part] for part in (logits, deltas))
            losses.append(rpn.losses(anchors, page_logits, [sampled[page]], page_deltas, [matched[page]]))
        return {
            "loss_objectness": torch.stack([page["loss_rpn_cls"] for page in losses]),
            "loss_rpn_box": torch.stack([page["loss_rpn_loc"] for page in losses]),
        }

    def _region_losses(self, features: Features, proposals: list[Instances], targets: Targets) -> dict[str, Tensor]:
        heads, self._seeds = self.model.roi_heads, iter(targets.seeds.split(1))
        sampled = heads.label_and_sample_proposals(proposals, instances(features, targets))
        counts = [len(page) for page in sampled]
        logits, deltas = self._heads(self._pool(features, [page.proposal_boxes.tensor for page in sampled]))
        pages = zip(logits.split(counts), deltas.split(counts), sampled, strict=True)
        losses = [heads.box_predictor.losses((scores, page_deltas), [page]) for scores, page_deltas, page in pages]
        return {
            "loss_class": torch.stack([page["loss_cls"] for page in losses]),
            "loss_box": torch.stack([page["loss_box_reg"] for page in losses]),
        }

    def _sample_regions(self, matched: Tensor, fit: Tensor, true_classes: Tensor) -> tuple[Tensor, Tensor]:
        """Replaces ``ROIHeads._sample_proposals``: indices [S] and classes [S], K for background."""
        background = self.spec.num_classes
        classes = true_classes[matched] if len(true_classes) else torch.full_like(matched, background)
        if len(true_classes):
            classes = classes.masked_fill(fit == 0, background).masked_fill(fit == -1, -1)
        labels = torch.where(classes == background, 0, torch.where(classes >= 0, 1, -1))
        (kept,) = self._sampled(self._region_sampler, labels[None], next(self._seeds))
        chosen = torch.cat([(kept == 1).nonzero()[:, 0], (kept == 0).nonzero()[:, 0]])
        return chosen, classes[chosen]

    @staticmethod
    def _sampled(sampler: SeededSampler, labels: Tensor, seeds: Tensor) -> Tensor:
        """Labels [B, A], and -1 for entries outside the sample, as detectron2 takes them."""
        sampled = sampler.sample(labels, seeds)
        chosen = torch.zeros(len(labels), labels.shape[1] + 1, dtype=torch.bool, device=labels.device)
        index = sampled.indices.masked_fill(~sampled.valid, labels.shape[1])  # the last column collects padding
        return torch.where(chosen.scatter(1, index, value=True)[:, :-1], labels, -1)


def _proposals(found: list[Instances]) -> Proposals:
    return Proposals.from_lists(
        [page.proposal_boxes.tensor for page in found], [page.objectness_logits.sigmoid() for page in found]
    )
