"""Detectors behind one interface, built from a config."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graphkd.detectors.backbones import build_backbone
from graphkd.detectors.config import DetectorConfig
from graphkd.detectors.protocol import Detector, DetectorModule, DetectorSpec
from graphkd.detectors.torchvision.faster_rcnn import FasterRCNNDetector
from graphkd.detectors.torchvision.retinanet import RetinaNetDetector
from graphkd.errors import ConfigError

__all__ = ["INSTALL", "Detector", "DetectorConfig", "DetectorModule", "DetectorSpec", "build_detector"]

INSTALL = "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
ARCHITECTURES = {"faster_rcnn": FasterRCNNDetector, "retinanet": RetinaNetDetector}


def build_detector(
    config: DetectorConfig,
    num_classes: int,
    canvas: tuple[int, int],
    backbone_weights: Mapping[str, Tensor] | None = None,
) -> DetectorModule:
    """Build the detector of ``config`` for K classes and canvases of (height, width) px.

    Weights other than ``backbone_weights``, the state dict of a timm model, are random, from torch's global generator.

    Raises:
        ConfigError: if the backbone cannot be built, or the framework is not installed.
        WeightsError: if the weights do not fit the backbone.
    """
    if config.framework == "detectron2":
        return _build_detectron2(config, num_classes, canvas, backbone_weights)
    if config.framework == "transformers":
        return _build_transformers(config, num_classes, canvas, backbone_weights)
    backbone = build_backbone(config, canvas, backbone_weights)
    return ARCHITECTURES[config.architecture](backbone, config, num_classes)


def _build_transformers(
    config: DetectorConfig, num_classes: int, canvas: tuple[int, int], weights: Mapping[str, Tensor] | None
) -> DetectorModule:
    try:
        from graphkd.detectors.transformers.detr import DetrDetector
    except ImportError as error:
        raise ConfigError(
            f"detector.framework is transformers, which cannot be imported ({error}); pip install "
            "'graphkd[transformers]'"
        ) from error
    return DetrDetector(config, num_classes, canvas, weights)


def _build_detectron2(
    config: DetectorConfig, num_classes: int, canvas: tuple[int, int], weights: Mapping[str, Tensor] | None
) -> DetectorModule:
    try:
        from graphkd.detectors.detectron2.model import build_pyramid
        from graphkd.detectors.detectron2.rcnn import Detectron2FasterRCNN
        from graphkd.detectors.detectron2.retinanet import Detectron2RetinaNet
    except ImportError as error:
        raise ConfigError(f"detector.framework is detectron2, which cannot be imported ({error}); {INSTALL}") from error
    kind = Detectron2RetinaNet if config.architecture == "retinanet" else Detectron2FasterRCNN
    return kind(config, num_classes, build_pyramid(config, canvas, weights))
