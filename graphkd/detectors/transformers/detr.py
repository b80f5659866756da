"""transformers' RT-DETR, RT-DETRv2 and D-FINE behind the detector interface. They have no region head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers.modeling_outputs import BaseModelOutput

from graphkd.batch import Detections, Features, Proposals, Targets
from graphkd.boxes import clip_to_pages
from graphkd.detectors.common import page_mask
from graphkd.detectors.config import DetectorConfig
from graphkd.detectors.ops.gather import rows
from graphkd.detectors.ops.pooling import PyramidPool
from graphkd.detectors.protocol import DetectorModule, DetectorSpec
from graphkd.detectors.transformers.model import STRIDES, build_detr

CLASS_LOSSES = ("loss_vfl", "loss_ce", "loss_focal")
LEVELS = ["0", "1", "2"]


class DetrDetector(DetectorModule):
    """A DETR with a hybrid encoder, whose maps at strides 8 to 32 are the features, and whose queries are proposals.

    Args:
        config: of the detector.
        num_classes: K.
        canvas: height and width, px; multiples of 32.
        weights: of the backbone.
    """

    CLASS_LAYERS = ("model.class_embed.", "model.model.decoder.class_embed.", "model.model.enc_score_head.")
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        config: DetectorConfig,
        num_classes: int,
        canvas: tuple[int, int],
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        model: Any = build_detr(config, num_classes, canvas, weights)
        self.model = model
        self.spec = DetectorSpec(
            num_classes=num_classes,
            channels=int(model.config.encoder_hidden_dim),
            pooled_side=config.pooled_side,
            activation="sigmoid",
            framework="transformers",
            classifies_regions=False,
        )
        self.region_pool = PyramidPool(
            LEVELS,
            first_stride=STRIDES[0],
            side=config.pooled_side,
            samples=config.roi_samples,
            aligned=config.roi_aligned,
        )
        self.score_threshold, self.detections_per_page = config.score_threshold, config.detections_per_page
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std).view(1, 3, 1, 1), persistent=False)

    def features(self, images: Tensor, sizes: Tensor) -> Features:
        """Normalise uint8 [B, 3, H, W], run backbone and hybrid encoder once; padding has the mean colour."""
        sizes = sizes.to(images.device, non_blocking=True)
        pixels = (images - self.pixel_mean) / self.pixel_std * page_mask(sizes, images)
        inner = self.model.model
        levels = inner.backbone(pixels, torch.ones_like(pixels[:, 0]))
        projected = [project(level) for project, (level, _) in zip(inner.encoder_input_proj, levels, strict=True)]
        maps = inner.encoder(projected).last_hidden_state
        canvas = (images.shape[-2], images.shape[-1])
        return Features(maps=dict(zip(LEVELS, maps, strict=True)), sizes=sizes, canvas=canvas)

    def propose_and_losses(self, features: Features, targets: Targets) -> tuple[Proposals, dict[str, Tensor]]:
        """Return proposals, and the sums of class and box losses over the decoder's layers, each [B]."""
        outputs = self._decode(features)
        losses = [self._page_losses(outputs, page, features, targets) for page in range(len(features.sizes))]
        by_name = {name: torch.stack([page[name] for page in losses]) for name in ("loss_class", "loss_box")}
        return self._proposals(outputs, features), by_name

    def propose(self, features: Features) -> Proposals:
        """Return boxes of the queries, best first."""
        return self._proposals(self._decode(features), features)

    def pool(self, features: Features, boxes: Tensor) -> Tensor:
        """RoIAlign over the encoder's maps: boxes [B, N, 4] -> [B, N, C, P, P]."""
        return self.region_pool(features.maps, boxes)

    def classify(self, pooled: Tensor) -> None:
        """There is no head for arbitrary regions."""
        return

    def detect(self, features: Features) -> list[Detections]:
        """Return the best pairs of query and class, best first, as transformers' post-processing does."""
        outputs = self._decode(features)
        scores = outputs.logits.float().sigmoid().flatten(1)
        best, index = scores.topk(min(self.detections_per_page, outputs.logits.shape[1]), dim=1)
        classes = index % self.spec.num_classes
        boxes = rows(
            self._boxes(outputs.pred_boxes, features), torch.div(index, self.spec.num_classes, rounding_mode="floor")
        )
        kept = best > self.score_threshold
        return [
            Detections(boxes=boxes[page][own], scores=best[page][own], classes=classes[page][own])
            for page, own in enumerate(kept)
        ]

    def compilable_modules(self) -> list[nn.Module]:
        """Backbone and hybrid encoder."""
        return [self.model.model.backbone, self.model.model.encoder]

    def _decode(self, features: Features) -> Any:
        """Outputs of the decoder's last layer, and of all layers."""
        maps = list(features.maps.values())
        encoded = BaseModelOutput(last_hidden_state=maps)  # type: ignore[arg-type]  # a list for these models
        return self.model(pixel_values=None, inputs_embeds=maps[0], encoder_outputs=encoded, return_dict=True)

    @torch.no_grad()
    def _proposals(self, outputs: Any, features: Features) -> Proposals:
        scores, order = outputs.logits.float().sigmoid().amax(dim=-1).sort(dim=1, descending=True, stable=True)
        boxes = rows(self._boxes(outputs.pred_boxes, features), order)
        return Proposals(boxes=boxes, scores=scores, valid=torch.ones_like(scores, dtype=torch.bool))

    @staticmethod
    def _boxes(boxes: Tensor, features: Features) -> Tensor:
        """From centre and size in shares of the canvas [B, Q, 4] to xyxy px within the page."""
        height, width = features.canvas
        corners = box_convert(boxes.float(), "cxcywh", "xyxy") * boxes.new_tensor([width, height] * 2)
        return clip_to_pages(corners, features.sizes)

    def _page_losses(self, outputs: Any, page: int, features: Features, targets: Targets) -> dict[str, Tensor]:
        """Transformers' losses of one page alone: they are divided by the number of boxes of what is given."""
        own = slice(page, page + 1)
        valid, (height, width) = targets.valid[page], features.canvas
        boxes = box_convert(targets.boxes[page][valid], "xyxy", "cxcywh")
        truth = {
            "class_labels": targets.classes[page][valid],
            "boxes": boxes / boxes.new_tensor([width, height] * 2),
        }
        _, losses, _ = self.model.loss_function(
            outputs.logits[own].float(),
            [truth],
            boxes.device,
            outputs.pred_boxes[own].float(),
            self.model.config,
            outputs.intermediate_logits[own].float(),
            outputs.intermediate_reference_points[own].float(),
            **{name: _of_page(outputs, name, own) for name in EXTRA},
        )
        zero = outputs.logits[own].sum() * 0
        of_classes = [value for name, value in losses.items() if name.startswith(CLASS_LOSSES)]
        of_boxes = [value for name, value in losses.items() if not name.startswith(CLASS_LOSSES)]
        return {"loss_class": sum(of_classes, zero), "loss_box": sum(of_boxes, zero)}


EXTRA = ("enc_topk_logits", "enc_topk_bboxes", "predicted_corners", "initial_reference_points")
OUTPUTS = {"predicted_corners": "intermediate_predicted_corners"}


def _of_page(outputs: Any, name: str, page: slice) -> Tensor | None:
    values = getattr(outputs, OUTPUTS.get(name, name))
    return None if values is None else values[page].float()
