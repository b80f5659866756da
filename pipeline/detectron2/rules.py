"""Rules that convert each key of detectron2's YAML, and of the Distillation project's ``KD`` node, to one of ours.

:mod:`pipeline.detectron2.config_import` applies them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphkd.errors import ConfigError
from pipeline.detectron2.yaml_reader import leaves

Tree = dict[str, Any]
DEFAULTS: Tree = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "MODEL.FPN.OUT_CHANNELS": 256,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 2000,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.MAX_ITER": 40000,
    "SOLVER.STEPS": [30000],
    "INPUT.MIN_SIZE_TRAIN": [800],
}
BACKBONES = {
    "build_resnet_backbone": "resnet",
    "build_resnet_fpn_backbone": "resnet",
    "build_resnet_fpn_backbone_kd": "resnet",
    "build_retinanet_resnet_fpn_backbone": "resnet",
    "build_mobilenetv2_fpn_backbone": "mobilenetv2_100",
    "build_retinanet_mnv2_fpn_backbone": "mobilenetv2_100",
    "build_e0_fpn_backbone_kd": "efficientnet_b0",
    "build_retinanet_e0_fpn_backbone": "efficientnet_b0",
    "build_vit_fpn_backbone": "vit_base_patch16_224",
}
NORMS = {"FrozenBN": "frozen", "BN": "batch", "SyncBN": "sync", "naiveSyncBN": "sync", "GN": "group"}
DISTILLS = ("Distillation", "RetinaNetKD")
ARCHITECTURES = {"GeneralizedRCNN": "faster_rcnn", "Distillation": "faster_rcnn"}
ARCHITECTURES |= {"RetinaNet": "retinanet", "RetinaNetKD": "retinanet"}


class D2File:
    """One model's part of a file: ``given`` has its dotted keys; indexing also knows defaults."""

    def __init__(self, content: Tree) -> None:
        self.given = dict(leaves(content))

    def __getitem__(self, key: str) -> Any:
        return self.given.get(key, DEFAULTS.get(key))

    def weight(self, switch: str, weight: str) -> float:
        """Weight of a loss of the KD node, 0 if it is switched off."""
        return float(self.given.get(f"KD.{weight}", 1.0)) if self.given.get(f"KD.{switch}", False) else 0.0


Rule = Callable[[D2File, Any], tuple[str, Any] | str]
"""Returns our key with its value, or why the key is ignored."""


def _to(key: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    return lambda _, value: (key, convert(value))


def _ignored(why: str) -> Rule:
    return lambda *_: why


def _backbone(file: D2File, _: Any) -> tuple[str, Any]:
    name = file["MODEL.BACKBONE.NAME"]
    if name not in BACKBONES:
        raise ConfigError(f"MODEL.BACKBONE.NAME {name} is not known; known are {', '.join(sorted(BACKBONES))}")
    depth = file.given.get("MODEL.RESNETS.DEPTH", 50)
    return "detector.backbone", f"resnet{depth}" if BACKBONES[name] == "resnet" else BACKBONES[name]


def _architecture(file: D2File, value: Any) -> tuple[str, Any]:
    if value not in ARCHITECTURES:
        raise ConfigError(f"MODEL.META_ARCHITECTURE {value} is not known; known are {', '.join(sorted(ARCHITECTURES))}")
    return "detector.architecture", ARCHITECTURES[value]


def _rgb(key: str) -> Rule:
    def convert(file: D2File, value: Any) -> tuple[str, Any]:
        bgr = file.given.get("INPUT.FORMAT", "BGR") == "BGR"
        return key, list(reversed(value)) if bgr else list(value)

    return convert


def _depth(file: D2File, value: Any) -> tuple[str, Any] | str:
    if BACKBONES.get(file["MODEL.BACKBONE.NAME"]) == "resnet":
        return _backbone(file, value)
    return "the backbone is not a ResNet"


def _norm(family: str) -> Rule:
    def convert(file: D2File, value: Any) -> tuple[str, Any] | str:
        backbone = BACKBONES.get(file["MODEL.BACKBONE.NAME"], "")
        if not backbone.startswith(family):
            return f"the backbone is {backbone}"
        if value not in NORMS:
            raise ConfigError(f"norm {value!r} is not known; known are {', '.join(NORMS)}")
        return "detector.norm", NORMS[value]

    return convert


def _edges(_: D2File, value: Any) -> tuple[str, Any]:
    """One size per level; RetinaNet's octaves are derived from it."""
    return "detector.anchor_sizes", [round(level[0]) for level in value]


def _ratios(_: D2File, value: Any) -> tuple[str, Any]:
    return "detector.aspect_ratios", list(value[0] if isinstance(value[0], (list, tuple)) else value)


def _shortest_edge(_: D2File, value: Any) -> tuple[str, Any]:
    sizes = value if isinstance(value, (list, tuple)) else [value]
    return "data.view.shortest_edge", [int(min(sizes)), int(max(sizes))]


def _steps(value: Any) -> list[int]:
    return [int(step) for step in value]


def _dataset(key: str) -> Rule:
    def convert(_: D2File, value: Any) -> tuple[str, Any]:
        name = str(value[0] if isinstance(value, (list, tuple)) else value)
        stem, part = name.rpartition("_")[::2]
        return key, f"data/{stem or name}/{part if stem else 'train'}"

    return convert


def _amp(_: D2File, value: Any) -> tuple[str, Any]:
    return "compute.precision", "fp16" if value else "fp32"


def _clip(file: D2File, value: Any) -> tuple[str, Any] | str:
    if not file.given.get("SOLVER.CLIP_GRADIENTS.ENABLED", False):
        return "clipping is off"
    kind = file.given.get("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value")
    return (
        ("schedule.clip_norm", value)
        if kind == "full_model"
        else f"clips by {kind}; only the norm of all gradients is supported"
    )


def _loss(key: str, switch: str, weight: str) -> Rule:
    return lambda file, _: (f"method.dsig.{key}", file.weight(switch, weight))


def hardness(file: D2File) -> float:
    """Minimum cross-entropy of a mined background node; 0 takes all."""
    used = file.given.get("KD.USE_BG_FEATURE_MINING_THRS", False)
    return float(file.given.get("KD.BG_MINING_THRS", 0.5)) if used else 0.0


def _hard(file: D2File, _: Any) -> tuple[str, Any]:
    return "method.dsig.hard_background", hardness(file)


def _only(expected: Any, why: str) -> Rule:
    return lambda _, value: why if value == expected else f"{why}; {value!r} is not supported"


PYRAMID = _ignored("the pyramid is built on all stages, and all of its levels are used")
MASKS = _ignored("masks are not supported")
TERMS = {
    "maps": ("FEATURE_ON", "FEATURE_LOSS_WEIGHT"),
    "edge": ("REGION_CORRELATION_LOSS_ON", "REGION_CORRELATION_LOSS_WEIGHT_POOL"),
    "foreground": ("FEATURE_ROIPOOL_FG_LOSS_ON", "FEATURE_ROIPOOL_FG_LOSS_WEIGHT"),
    "background": ("FEATURE_ROIPOOL_BG_LOSS_ON", "FEATURE_ROIPOOL_BG_LOSS_WEIGHT"),
    "logits": ("ROI_CLS_ON", "ROI_CLS_LOSS_WEIGHT"),
    "boxes": ("ROI_REG_ON", "ROI_REG_LOSS_WEIGHT"),
}
RULES: dict[str, Rule] = {
    "MODEL.META_ARCHITECTURE": _architecture,
    "MODEL.BACKBONE.NAME": _backbone,
    "MODEL.BACKBONE.FREEZE_AT": _ignored("no stage is frozen; detector.norm sets the normalisation"),
    "MODEL.RESNETS.DEPTH": _depth,
    "MODEL.RESNETS.NORM": _norm("resnet"),
    "MODEL.EFFICIENTNET.NORM": _norm("efficientnet"),
    "MODEL.MOBILENETV2.NORM": _norm("mobilenetv2"),
    "MODEL.RESNETS.STRIDE_IN_1X1": _only(False, "the stride is in the 3 x 3 convolution, as in torchvision"),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": _ignored("follows from the depth"),
    "MODEL.PIXEL_MEAN": _rgb("detector.pixel_mean"),
    "MODEL.PIXEL_STD": _rgb("detector.pixel_std"),
    "MODEL.WEIGHTS": _ignored("a checkpoint; set detector.weights for a backbone, run.init for a whole model"),
    "MODEL.MASK_ON": MASKS,
    "MODEL.PROPOSAL_GENERATOR.NAME": _ignored("follows from the architecture"),
    "MODEL.ROI_HEADS.NAME": _ignored("follows from the architecture"),
    "MODEL.ROI_BOX_HEAD.NAME": _ignored("follows from the architecture"),
    "MODEL.FPN.OUT_CHANNELS": _to("detector.fpn_channels"),
    "MODEL.ANCHOR_GENERATOR.SIZES": _edges,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _ratios,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": _to("detector.rpn_proposals_before_nms"),
    "MODEL.RPN.PRE_NMS_TOPK_TEST": _ignored("outside training, half of rpn_proposals_before_nms"),
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": _to("detector.rpn_proposals"),
    "MODEL.RPN.POST_NMS_TOPK_TEST": _ignored("outside training the same, rpn_proposals"),
    "MODEL.RPN.NMS_THRESH": _to("detector.rpn_nms_iou"),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _to("detector.rpn_batch"),
    "MODEL.ROI_HEADS.NUM_CLASSES": _to("data.num_classes"),
    "MODEL.RETINANET.NUM_CLASSES": _to("data.num_classes"),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _to("detector.roi_batch"),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _to("detector.roi_positive_fraction"),
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _to("detector.score_threshold"),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _to("detector.nms_iou"),
    "MODEL.ROI_BOX_HEAD.NUM_FC": _only(2, "the region head has two layers"),
    "MODEL.ROI_BOX_HEAD.FC_DIM": _to("detector.head_width"),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": _to("detector.pooled_side"),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _to("detector.roi_aligned", lambda value: value == "ROIAlignV2"),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": _to("detector.roi_samples"),
    "MODEL.RETINANET.IOU_THRESHOLDS": _only([0.4, 0.5], "anchors are matched at IoU .4 and .5"),
    "MODEL.RETINANET.IOU_LABELS": _only([0, -1, 1], "anchors between both are ignored"),
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": _only(0.0, "RetinaNet's box error is absolute"),
    "MODEL.VIT.ARCH": _ignored("set by detector.backbone"),
    "MODEL.VIT.DROP_PATH": _ignored("as the timm model has it"),
    "MODEL.VIT.IMG_SIZE": _ignored("set by the canvas"),
    "MODEL.VIT.PATCH_SIZE": _ignored("set by detector.backbone"),
    "DATASETS.TRAIN": _dataset("data.train"),
    "DATASETS.TEST": _dataset("data.val"),
    "DATALOADER.NUM_WORKERS": _to("data.loader_workers"),
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": _ignored("pages without regions are trained on"),
    "SOLVER.IMS_PER_BATCH": _to("schedule.batch"),
    "SOLVER.BASE_LR": _to("schedule.lr"),
    "SOLVER.MAX_ITER": _to("schedule.steps"),
    "SOLVER.STEPS": _to("schedule.milestones", _steps),
    "SOLVER.GAMMA": _to("schedule.gamma"),
    "SOLVER.MOMENTUM": _to("schedule.momentum"),
    "SOLVER.WEIGHT_DECAY": _to("schedule.weight_decay"),
    "SOLVER.WARMUP_ITERS": _to("schedule.warmup_steps"),
    "SOLVER.WARMUP_FACTOR": _ignored("the warm-up starts at one step's share of the rate"),
    "SOLVER.CLIP_GRADIENTS.ENABLED": _ignored("set by schedule.clip_norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": _ignored("set by schedule.clip_norm"),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": _only(2.0, "gradients are clipped by their Euclidean norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _clip,
    "SOLVER.AMP.ENABLED": _amp,
    "INPUT.MIN_SIZE_TRAIN": _shortest_edge,
    "INPUT.FORMAT": _ignored("images are RGB here; pixel_mean and pixel_std are reversed if it is BGR"),
    "TEST.EVAL_PERIOD": _to("run.eval_every"),
    "OUTPUT_DIR": _ignored("runs go to runs/NAME; give run.folder for another"),
    "VERSION": _ignored("version of detectron2's config format"),
    "KD.USE_BG_FEATURE_MINING_THRS": _hard,
    "KD.BG_MINING_THRS": _hard,
    "KD.BG_FEATURE_MINING_ON": _only(True, "dsig mines background"),
    "KD.USE_BG_WEIGHT_SCALE": _only(True, "dsig weighs background by N_fg / (7.5 N_bg)"),
    "KD.BG_WEIGHT_ALPHA": _only(7.5, "dsig weighs background by N_fg / (7.5 N_bg)"),
    "KD.REGION_CORRELATION_LOSS_USE_BG_FEATURE": _only(True, "dsig's edges join background nodes too"),
    "KD.REGION_CORRELATION_POOL_LOSS": _only(True, "dsig's edges are between pooled features"),
    "KD.REGION_CORRELATION_HEAD_LOSS": _only(False, "dsig's edges are between pooled features"),
    "KD.REGION_CORRELATION_LOSS_WEIGHT": _ignored("never read by the project, which reads ..._WEIGHT_POOL"),
    "KD.TEMPERATURE": _only(1.0, "dsig's class term has temperature 1"),
}
for _term, _names in TERMS.items():
    RULES |= {f"KD.{name}": _loss(_term, *_names) for name in _names}
for _part in ("RESNETS", "MOBILENETV2", "EFFICIENTNET", "VIT"):
    RULES[f"MODEL.{_part}.OUT_FEATURES"] = PYRAMID
for _part in ("FPN", "RPN", "ROI_HEADS"):
    RULES[f"MODEL.{_part}.IN_FEATURES"] = PYRAMID
