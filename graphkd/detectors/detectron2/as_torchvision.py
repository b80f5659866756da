"""detectron2's detectors as torchvision's, with the same detections, for export: shapes are fixed there."""

from __future__ import annotations

from torch import Tensor, nn

from graphkd.detectors.config import DetectorConfig
from graphkd.detectors.detectron2.common import Detectron2Detector
from graphkd.detectors.detectron2.names import from_detectron2
from graphkd.detectors.torchvision.common import TorchvisionDetector
from graphkd.detectors.torchvision.faster_rcnn import FasterRCNNDetector
from graphkd.detectors.torchvision.retinanet import RetinaNetDetector

RCNN_HEADS = {
    "rpn.head.conv.0.0": "proposal_generator.rpn_head.conv",
    "rpn.head.cls_logits": "proposal_generator.rpn_head.objectness_logits",
    "rpn.head.bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
    "roi_heads.box_head.fc6": "roi_heads.box_head.fc1",
    "roi_heads.box_head.fc7": "roi_heads.box_head.fc2",
    "roi_heads.box_predictor.cls_score": "roi_heads.box_predictor.cls_score",
    "roi_heads.box_predictor.bbox_pred": "roi_heads.box_predictor.bbox_pred",
}
SUBNETS = {"classification_head": "cls_subnet", "regression_head": "bbox_subnet"}
RETINANET_HEADS = {
    "head.classification_head.cls_logits": "head.cls_score",
    "head.regression_head.bbox_reg": "head.bbox_pred",
    **{f"head.{own}.conv.{n}.0": f"head.{theirs}.{2 * n}" for own, theirs in SUBNETS.items() for n in range(4)},
}
ANCHOR_LAYERS = ("head.cls_score", "head.bbox_pred")  # whose channels are grouped by anchor


class _Backbone(nn.Module):
    """detectron2's backbone and pyramid for RGB, with the names of levels that all adapters use."""

    def __init__(self, detector: Detectron2Detector) -> None:
        super().__init__()
        self.body = detector.model.backbone
        self.names = detector.levels
        self.out_channels = detector.spec.channels

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] -> [B, C, H / stride, W / stride] by level."""
        return {self.names[name]: level for name, level in self.body(pixels.flip(1)).items()}


def as_torchvision(detector: Detectron2Detector, config: DetectorConfig) -> TorchvisionDetector:
    """A torchvision adapter that shares the backbone of ``detector`` and has a copy of its heads."""
    exact = config.model_copy(update={"framework": "torchvision", "anchors_rounded": False})
    retina = config.architecture == "retinanet"
    kind = RetinaNetDetector if retina else FasterRCNNDetector
    built = kind(_Backbone(detector), exact, detector.spec.num_classes)  # type: ignore[arg-type]
    built.clips_before_suppression = not retina
    source = detector.model.state_dict()
    for own, theirs in (RETINANET_HEADS if retina else RCNN_HEADS).items():
        layer = built.model.get_submodule(own)
        layer.load_state_dict({part: _converted(f"{theirs}.{part}", source, config) for part in layer.state_dict()})
    return built.train(detector.training)


def _converted(name: str, source: dict[str, Tensor], config: DetectorConfig) -> Tensor:
    values = from_detectron2(name, source[name])
    if not name.startswith(ANCHOR_LAYERS):
        return values
    ratios = len(config.aspect_ratios)  # detectron2 orders a cell's anchors by size, torchvision by shape
    scales = 3
    by_anchor = values.unflatten(0, (scales, ratios, -1))
    return by_anchor.transpose(0, 1).flatten(0, 2)
