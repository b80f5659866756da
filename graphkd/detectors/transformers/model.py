"""Building transformers' RT-DETR, RT-DETRv2 and D-FINE from a detector config, with timm's backbones or their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    DFineConfig,
    DFineForObjectDetection,
    PretrainedConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)

from graphkd.detectors.backbones import build_bottom_up
from graphkd.detectors.config import DetectorConfig
from graphkd.detectors.norm import with_norm
from graphkd.errors import ConfigError

STRIDES = [8, 16, 32]
ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], Any]] = {
    "rt_detr": (RTDetrConfig, RTDetrForObjectDetection),
    "rt_detr_v2": (RTDetrV2Config, RTDetrV2ForObjectDetection),
    "d_fine": (DFineConfig, DFineForObjectDetection),
}
# Denoising queries are as many as the batch's largest page needs, so that a page's loss would depend on its neighbours.
FIXED: dict[str, Any] = {"num_denoising": 0, "auxiliary_loss": True, "anchor_image_size": None, "eval_size": None}


class _BottomUp(nn.Module):
    """A timm backbone in place of transformers' own."""

    def __init__(self, body: nn.Module, levels: nn.Module) -> None:
        super().__init__()
        self.body, self.levels = body, levels

    def forward(self, pixels: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[B, 3, H, W] -> maps [B, C_i, H / stride, W / stride], each with a mask that nothing uses."""
        return [(level, mask) for level in self.levels(self.body(pixels))]


def build_detr(
    config: DetectorConfig, num_classes: int, canvas: tuple[int, int], weights: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Build the model of ``config`` for K classes and canvases of (height, width) px.

    With ``backbone_config`` in ``config.settings``, as in a published model's ``config.json``, the backbone is
    transformers' own; else it is timm's ``config.backbone``.

    Raises:
        ConfigError: if transformers does not accept the settings, or the canvas is no multiple of the largest stride.
    """
    if any(side % STRIDES[-1] for side in canvas):
        raise ConfigError(
            f"data.view.canvas {list(canvas)} is no multiple of {STRIDES[-1]}, the largest stride of "
            f"{config.architecture}; round it up"
        )
    if "backbone_config" in config.settings:
        model = _build(config, num_classes, {})
        return with_norm(model, config.norm)
    body, levels, channels, _ = build_bottom_up(config, canvas, weights)
    shape: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, *channels], "depths": [1] * 4}
    shape["out_indices"] = [2, 3, 4]
    placeholder = RTDetrResNetConfig(**shape, layer_type="basic")
    model = _build(config, num_classes, {"backbone_config": placeholder, "encoder_in_channels": channels})
    inner: Any = model.model
    inner.backbone = nn.Identity()
    with_norm(model, "group" if config.norm == "frozen" else config.norm)  # there is nothing to freeze in random ones
    inner.backbone = _BottomUp(body, levels)
    return model


def _build(config: DetectorConfig, num_classes: int, own: dict[str, Any]) -> nn.Module:
    kind, architecture = ARCHITECTURES[config.architecture]
    width = config.fpn_channels
    settings: dict[str, Any] = {
        "d_model": width,
        "encoder_hidden_dim": width,
        "decoder_in_channels": [width] * len(STRIDES),
        "encoder_ffn_dim": config.head_width,
        "decoder_ffn_dim": config.head_width,
        "num_queries": config.rpn_proposals,
        **own,
        **config.settings,
        **FIXED,
        "num_labels": num_classes,
    }
    try:
        model: nn.Module = architecture(kind(**settings))
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"transformers refuses detector.settings of {config.architecture}: {reason}") from error
    return model
