"""Building detectron2 models from a detector config, with detectron2's ResNets or timm's backbones.

detectron2's conventions are BGR pixels, and per-class deltas with the background class last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import detectron2.modeling.backbone as d2_backbone
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_anchor_generator, build_proposal_generator, build_roi_heads
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from torch import Tensor, nn

from graphkd.detectors.backbones import build_bottom_up
from graphkd.detectors.config import DetectorConfig

NORMS = {"batch": "BN", "frozen": "FrozenBN", "sync": "SyncBN", "group": "GN"}
RESNETS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
STAGES = {"faster_rcnn": ["res2", "res3", "res4", "res5"], "retinanet": ["res3", "res4", "res5"]}


class TimmBackbone(d2_backbone.Backbone):
    """A timm backbone in detectron2's interface; ``names`` are of its levels."""

    def __init__(
        self, body: nn.Module, levels: nn.Module, channels: list[int], strides: list[int], names: list[str]
    ) -> None:
        super().__init__()
        self.body = body
        self.levels = levels
        self.names = names
        self._shapes = {
            name: ShapeSpec(channels=width, stride=stride)
            for name, width, stride in zip(names, channels, strides, strict=True)
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] -> [B, C_i, H / stride, W / stride] by name."""
        return dict(zip(self.names, self.levels(self.body(images)), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each level."""
        return self._shapes


@d2_backbone.BACKBONE_REGISTRY.register()  # type: ignore[untyped-decorator,unused-ignore]
def build_graphkd_timm_fpn_backbone(cfg: CfgNode, _: ShapeSpec) -> nn.Module:
    """Backbone for detectron2's configs, with ``NAME`` and ``CANVAS`` in ``cfg.MODEL.TIMM``."""
    config = DetectorConfig(backbone=cfg.MODEL.TIMM.NAME, fpn_channels=cfg.MODEL.FPN.OUT_CHANNELS)
    height, width = cfg.MODEL.TIMM.CANVAS
    return build_pyramid(config, (height, width))


def build_pyramid(
    config: DetectorConfig, canvas: tuple[int, int], weights: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Build the backbone with its pyramid, P2-P6 or P3-P7; ResNets are detectron2's, others timm's."""
    names, own = STAGES[config.architecture], config.backbone in RESNETS and config.weights == "none"
    if own:
        bottom_up: Any = d2_backbone.build_resnet_backbone(build_cfg(config, 1), ShapeSpec(channels=3))
    else:
        bottom_up = TimmBackbone(*build_bottom_up(config, canvas, weights), names)
    last = bottom_up.output_shape()[names[-1]].channels
    retina = config.architecture == "retinanet"
    top = LastLevelP6P7(last, config.fpn_channels) if retina else LastLevelMaxPool()
    return FPN(bottom_up, names, config.fpn_channels, norm="", top_block=top)


def build_rcnn(config: DetectorConfig, num_classes: int, backbone: Any) -> nn.Module:
    """Build a GeneralizedRCNN."""
    cfg, shapes = build_cfg(config, num_classes), backbone.output_shape()
    model: nn.Module = META_ARCH_REGISTRY.get("GeneralizedRCNN")(
        backbone=backbone,
        proposal_generator=build_proposal_generator(cfg, shapes),
        roi_heads=build_roi_heads(cfg, shapes),
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        input_format="BGR",
    )
    return model


def build_retinanet(config: DetectorConfig, num_classes: int, backbone: Any) -> nn.Module:
    """Build a RetinaNet."""
    cfg, shapes = build_cfg(config, num_classes), backbone.output_shape()
    levels = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
    settings = cfg.MODEL.RETINANET
    return RetinaNet(
        backbone=backbone,
        head=RetinaNetHead(cfg, levels),
        head_in_features=settings.IN_FEATURES,
        anchor_generator=build_anchor_generator(cfg, levels),
        box2box_transform=Box2BoxTransform(weights=settings.BBOX_REG_WEIGHTS),
        anchor_matcher=Matcher(settings.IOU_THRESHOLDS, settings.IOU_LABELS, allow_low_quality_matches=True),
        num_classes=num_classes,
        smooth_l1_beta=0.0,
        test_score_thresh=config.score_threshold,
        test_nms_thresh=config.nms_iou,
        max_detections_per_image=config.detections_per_page,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        input_format="BGR",
    )


def build_cfg(config: DetectorConfig, num_classes: int) -> CfgNode:
    """Convert ``config`` to detectron2's config."""
    cfg = get_cfg()
    model: Any = cfg.MODEL
    model.PIXEL_MEAN, model.PIXEL_STD = list(config.pixel_mean[::-1]), list(config.pixel_std[::-1])
    model.BACKBONE.FREEZE_AT = 0
    model.RESNETS.DEPTH = RESNETS.get(config.backbone, 50)
    model.RESNETS.RES2_OUT_CHANNELS = 64 if model.RESNETS.DEPTH < 50 else 256
    model.RESNETS.STRIDE_IN_1X1 = False
    model.RESNETS.NORM = NORMS[config.norm]
    model.RESNETS.OUT_FEATURES = STAGES[config.architecture]
    scales = 3 if config.architecture == "retinanet" else 1  # per octave, as published
    model.ANCHOR_GENERATOR.SIZES = [[size * 2 ** (step / 3) for step in range(scales)] for size in config.anchor_sizes]
    model.ANCHOR_GENERATOR.ASPECT_RATIOS = [list(config.aspect_ratios)]
    levels = ["p2", "p3", "p4", "p5", "p6"]
    model.RPN.IN_FEATURES, model.ROI_HEADS.IN_FEATURES = levels, levels[:4]
    before = config.rpn_proposals_before_nms
    model.RPN.PRE_NMS_TOPK_TRAIN, model.RPN.PRE_NMS_TOPK_TEST = before, max(1, before // 2)
    model.RPN.POST_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TEST = config.rpn_proposals
    model.RPN.NMS_THRESH, model.RPN.BATCH_SIZE_PER_IMAGE = config.rpn_nms_iou, config.rpn_batch
    model.RETINANET.NUM_CLASSES = num_classes
    model.ROI_HEADS.NAME, model.ROI_HEADS.NUM_CLASSES = "StandardROIHeads", num_classes
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = config.roi_batch
    model.ROI_HEADS.POSITIVE_FRACTION = config.roi_positive_fraction
    model.ROI_HEADS.SCORE_THRESH_TEST, model.ROI_HEADS.NMS_THRESH_TEST = config.score_threshold, config.nms_iou
    cfg.TEST.DETECTIONS_PER_IMAGE = config.detections_per_page
    head = model.ROI_BOX_HEAD
    head.NAME, head.NUM_FC, head.FC_DIM = "FastRCNNConvFCHead", 2, config.head_width
    head.POOLER_RESOLUTION, head.POOLER_SAMPLING_RATIO = config.pooled_side, config.roi_samples
    head.POOLER_TYPE = "ROIAlignV2" if config.roi_aligned else "ROIAlign"
    return cfg
