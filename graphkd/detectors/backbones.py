"""timm backbones with a feature pyramid, for torchvision's detectors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from graphkd.detectors.config import DetectorConfig
from graphkd.detectors.norm import with_norm
from graphkd.errors import ConfigError, WeightsError


class PyramidBackbone(nn.Module):
    """A timm feature extractor, a selection of its levels, and an FPN (Lin et al., CVPR 2017) on them."""

    def __init__(self, body: nn.Module, levels: nn.Module, fpn: FeaturePyramidNetwork, channels: int) -> None:
        super().__init__()
        self.body = body
        self.levels = levels
        self.fpn = fpn
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return feature maps [B, C, H/stride, W/stride] by level name, finest first."""
        maps = self.levels(self.body(images))
        return self.fpn(OrderedDict((str(level), level_map) for level, level_map in enumerate(maps)))


class SelectLevels(nn.Module):
    """Selects maps of a hierarchical backbone by index."""

    def __init__(self, indices: list[int]) -> None:
        super().__init__()
        self.indices = indices

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """[B, C_i, H_i, W_i] for each kept level."""
        return [maps[index] for index in self.indices]


class SimplePyramid(nn.Module):
    """Strides 4 to 32 from the last map of a plain transformer (Li et al., ECCV 2022, ViTDet)."""

    def __init__(self, channels: int, strides: list[int]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(_rescale(channels, stride) for stride in strides)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """[B, C, H/stride, W/stride] for each stride, from the last map at stride 16."""
        return [scale(maps[-1]) for scale in self.scales]


def _rescale(channels: int, stride: int) -> nn.Module:
    def double() -> nn.Module:
        return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)

    return {
        4: nn.Sequential(double(), nn.GELU(), double()),
        8: double(),
        16: nn.Identity(),
        32: nn.MaxPool2d(kernel_size=2, stride=2),
    }[stride]


def build_backbone(
    config: DetectorConfig, canvas: tuple[int, int], weights: Mapping[str, Tensor] | None = None
) -> PyramidBackbone:
    """Build the backbone of ``config`` with its pyramid, for canvases of (height, width) px.

    Faster R-CNN has levels P2-P6, RetinaNet P3-P7. ``weights`` is the state dict of the timm model, if any.

    Raises:
        ConfigError: if timm does not have the backbone, or it lacks a level.
        WeightsError: if the weights do not fit it.
    """
    body, levels, in_channels, _ = build_bottom_up(config, canvas, weights)
    retina = config.architecture == "retinanet"
    top: ExtraFPNBlock = LastLevelP6P7(config.fpn_channels, config.fpn_channels) if retina else LastLevelMaxPool()
    fpn = FeaturePyramidNetwork(in_channels, config.fpn_channels, extra_blocks=top)
    return PyramidBackbone(body, levels, fpn, config.fpn_channels)


def build_bottom_up(
    config: DetectorConfig,
    canvas: tuple[int, int],
    weights: Mapping[str, Tensor] | None = None,
) -> tuple[nn.Module, nn.Module, list[int], list[int]]:
    """Return timm's backbone without the pyramid, the selection of its levels, and their channels and strides, px.

    Arguments and errors as :func:`build_backbone`.
    """
    strides = [4, 8, 16, 32] if config.architecture == "faster_rcnn" else [8, 16, 32]
    body = _build_body(config, canvas)
    info: Any = body.feature_info
    if weights is not None:
        _load_weights(body, weights, config.backbone)
    levels, channels = _levels(info.channels(), info.reduction(), strides, config.backbone)
    return with_norm(body, config.norm), levels, channels, strides


def _build_body(config: DetectorConfig, canvas: tuple[int, int]) -> nn.Module:
    pretrained = config.weights == "imagenet"
    sized: dict[str, Any] = {"img_size": canvas} if config.backbone.startswith(("vit_", "deit")) else {}
    try:
        return timm.create_model(config.backbone, features_only=True, pretrained=pretrained, **sized)
    except RuntimeError as error:
        close = ", ".join(timm.list_models(f"*{config.backbone.split('_')[0]}*")[:5]) or "timm.list_models() lists them"
        raise ConfigError(
            f"detector.backbone {config.backbone!r} cannot be built by timm ({error}); try {close}"
        ) from error


def _levels(channels: list[int], reductions: list[int], strides: list[int], name: str) -> tuple[nn.Module, list[int]]:
    if set(reductions) == {16}:
        return SimplePyramid(channels[-1], strides), [channels[-1]] * len(strides)
    missing = sorted(set(strides) - set(reductions))
    if missing:
        raise ConfigError(
            f"detector.backbone {name!r} has no maps at strides {missing} (it has {reductions}); use another"
        )
    indices = [reductions.index(stride) for stride in strides]
    return SelectLevels(indices), [channels[index] for index in indices]


def _load_weights(body: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    # Counts of batches are missing from older exports, and only matter for a cumulative moving average.
    own = {key: value for key, value in body.state_dict().items() if not key.endswith("num_batches_tracked")}
    fitting = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    if len(fitting) < 0.9 * len(own):
        raise WeightsError(
            f"only {len(fitting)} of {len(own)} tensors of backbone {name!r} are in the weights file; "
            "give the state dict of that timm model"
        )
    body.load_state_dict(fitting, strict=False)
