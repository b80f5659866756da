"""Config of a detector, in config files and checkpoints."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Framework = Literal["torchvision", "detectron2", "transformers"]
DETRS = ("rt_detr", "rt_detr_v2", "d_fine")
Norm = Literal["batch", "frozen", "sync", "group"]


class DetectorConfig(BaseModel):
    """Architecture, backbone and head settings of one detector."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    framework: Framework = "torchvision"
    """Adapter; detectron2 must be installed separately, transformers comes with ``graphkd[transformers]``."""
    architecture: Literal["faster_rcnn", "retinanet", "rt_detr", "rt_detr_v2", "d_fine"] = "faster_rcnn"
    """Detector architecture; the last three are transformers'."""
    settings: dict[str, Any] = {}
    """Further settings of transformers' config, such as ``decoder_layers``, by its names; of no other framework. With
    ``backbone_config``, the backbone is transformers' own."""
    backbone: str = "resnet50"
    """timm model name, such as resnet18, efficientnet_b0, mobilenetv2_100 or vit_base_patch16_224."""
    weights: str = "none"
    """Backbone weights: none, imagenet (timm downloads them), package (from an installed package, see
    ``graphkd[pretrained]``), or a path to a .safetensors or .pth state dict."""
    norm: Norm = "frozen"
    """Normalisation of the backbone: batch (not invariant to the number of workers), frozen, sync, or group."""
    fpn_channels: int = Field(default=256, ge=8)
    """Channels of every pyramid level."""
    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
    """Anchor side of each pyramid level, canvas px."""
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Anchor height over width."""
    pooled_side: int = Field(default=7, ge=1)
    """Side of the RoIAlign grid."""
    roi_aligned: bool = False
    """Whether RoIAlign places samples at pixel centres, shifted by half a pixel, like detectron2's ROIAlignV2."""
    roi_samples: int = Field(default=2, ge=0)
    """Points that RoIAlign samples along each side of a cell; 0: one per pixel."""
    anchors_rounded: bool = True
    """Whether anchors are rounded to integer px, as in torchvision; never in detectron2."""
    head_width: int = Field(default=1024, ge=8)
    """Width of the two fully connected layers of the region head."""
    rpn_proposals_before_nms: int = Field(default=2000, ge=1)
    """Proposals per level before NMS in training; half of it in evaluation."""
    rpn_proposals: int = Field(default=1000, ge=1)
    """Proposals per page after NMS; queries of a DETR."""
    rpn_nms_iou: float = Field(default=0.7, gt=0, le=1)
    """IoU above which the weaker of two proposals is dropped."""
    rpn_batch: int = Field(default=256, ge=2)
    """Anchors sampled per page for the proposal loss."""
    roi_batch: int = Field(default=512, ge=4)
    """Regions sampled per page for the detection loss."""
    roi_positive_fraction: float = Field(default=0.25, gt=0, le=1)
    """Maximum share of foreground among them."""
    score_threshold: float = Field(default=0.05, ge=0, lt=1)
    """Detections below this score are dropped."""
    nms_iou: float = Field(default=0.5, gt=0, le=1)
    """IoU above which the weaker of two detections of one class is dropped."""
    detections_per_page: int = Field(default=100, ge=1)
    """Detections kept per page."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """RGB mean subtracted from 0-255 pixels (ImageNet's)."""
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """RGB standard deviation pixels are divided by (ImageNet's)."""

    def __hash__(self) -> int:  # pydantic's cannot hash settings
        return hash(self.model_dump_json())

    @property
    def classifies_regions(self) -> bool:
        """Whether the detector has a region head that classifies pooled regions; RetinaNet has none."""
        return self.architecture == "faster_rcnn"

    @model_validator(mode="before")
    @classmethod
    def _dependent_defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        defaults: dict[str, Any] = {}
        if given.get("framework") == "detectron2":
            defaults["anchors_rounded"] = False
        if given.get("weights") == "package":  # pixels from -1 to 1
            defaults |= {"pixel_mean": (127.0,) * 3, "pixel_std": (128.0,) * 3}
        elif given.get("framework") == "transformers":  # pixels from 0 to 1
            defaults |= {"pixel_mean": (0.0,) * 3, "pixel_std": (255.0,) * 3}
        if given.get("framework") == "transformers":
            defaults |= {"architecture": "rt_detr_v2", "rpn_proposals": 300}
        return defaults | given

    @model_validator(mode="after")
    def _check_levels(self) -> DetectorConfig:
        if len(self.anchor_sizes) != 5:
            raise ValueError(f"anchor_sizes has {len(self.anchor_sizes)} entries, but the pyramid has 5 levels; give 5")
        return self

    @model_validator(mode="after")
    def _check_framework(self) -> DetectorConfig:
        if self.framework == "detectron2" and self.anchors_rounded:
            raise ValueError("detectron2's anchors are never rounded; set detector.anchors_rounded=false")
        if (self.framework == "transformers") != (self.architecture in DETRS):
            raise ValueError(
                f"{self.architecture} is no architecture of {self.framework}; transformers has {', '.join(DETRS)}, the "
                "others faster_rcnn and retinanet"
            )
        if self.settings and self.framework != "transformers":
            raise ValueError("only transformers takes settings; leave detector.settings out")
        return self
