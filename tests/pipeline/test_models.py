"""Backbone weights from a file, and one line where they are something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from graphkd.detectors import DetectorModule
from graphkd.errors import WeightsError
from pipeline.config import RunConfig, resolve
from pipeline.core.errors import CheckpointError
from pipeline.models import find_checkpoint, load_detector, new_detector
from pipeline.runs.checkpoint import Checkpoint
from tests.support.runs import small_run


def config(folder: Path, weights: Path, backbone: str = "resnet18") -> RunConfig:
    detector = {"weights": str(weights), "backbone": backbone, "norm": "frozen"}
    return resolve(small_run(folder, folder, "run", detector=detector), "test")


def detector_of(config: RunConfig) -> DetectorModule:
    return new_detector(config.detector, 3, config.data.view.canvas, config.run.seed)


def test_backbone_weights_load_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(3)
    backbone = timm.create_model("resnet18", pretrained=False)
    save_file(backbone.state_dict(), tmp_path / "r18.safetensors")
    detector = detector_of(config(tmp_path, tmp_path / "r18.safetensors"))
    loaded = detector.state_dict()["model.backbone.body.layer4.1.conv2.weight"]
    assert torch.equal(loaded, backbone.state_dict()["layer4.1.conv2.weight"])


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    save_file(timm.create_model("resnet18", pretrained=False).state_dict(), tmp_path / "r18.safetensors")
    with pytest.raises(WeightsError, match="tensors of backbone 'mobilenetv3_small_100' are in the weights file"):
        detector_of(config(tmp_path, tmp_path / "r18.safetensors", "mobilenetv3_small_100"))


@pytest.mark.parametrize("framework", ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)])
def test_a_trained_detector_is_built_as_it_was(framework: str, tmp_path: Path) -> None:
    """Also where the file with its first weights is gone: detectron2's ResNets are timm's if they had weights."""
    file = tmp_path / "r18.safetensors"
    save_file(timm.create_model("resnet18", pretrained=False).state_dict(), file)
    given = config(tmp_path, file).detector.model_copy(update={"framework": framework, "anchors_rounded": False})
    detector = new_detector(given, 3, (128, 96), seed=0)
    save_file(
        {f"detector.{name}": values for name, values in detector.state_dict().items()}, tmp_path / "w.safetensors"
    )
    file.unlink()
    checkpoint = Checkpoint(folder=tmp_path, step=1, state={}, weights=tmp_path / "w.safetensors", weights_sha256="")
    restored = load_detector(given, 3, (128, 96), checkpoint, torch.device("cpu")).state_dict()
    assert all(torch.equal(values, restored[name]) for name, values in detector.state_dict().items())


def test_initial_weights_depend_on_the_seed(tmp_path: Path) -> None:
    plain = resolve(small_run(tmp_path, tmp_path, "run"), "test")
    other = resolve(small_run(tmp_path, tmp_path, "run", run={"seed": 1}), "test")
    first, again, second = (detector_of(each).state_dict() for each in (plain, plain, other))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path)
