"""transformers' DETRs: detections as transformers' own post-processing gives them, training, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from graphkd.detectors import DetectorConfig, build_detector
from graphkd.errors import ConfigError
from pipeline.config import resolve
from pipeline.context import RunContext
from pipeline.runs.checkpoint import load_weights, newest_checkpoint
from pipeline.train.run import train_run
from tests.support.runs import build_here, small_run

pytestmark = pytest.mark.transformers
CANVAS = (128, 96)
DETR: dict[str, Any] = {
    "framework": "transformers",
    "architecture": "rt_detr_v2",
    "backbone": "resnet18",
    "norm": "group",
    "fpn_channels": 32,
    "head_width": 32,
    "rpn_proposals": 30,
    "settings": {"decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
}


@pytest.mark.parametrize("architecture", ["rt_detr", "rt_detr_v2", "d_fine"])
def test_detections_are_those_of_transformers_post_processing(architecture: str) -> None:
    from transformers import RTDetrImageProcessor

    torch.manual_seed(0)
    config = DetectorConfig(**{**DETR, "architecture": architecture, "score_threshold": 0.0})
    detector: Any = build_detector(config, 4, CANVAS).eval()
    images = torch.randint(0, 256, (2, 3, *CANVAS), dtype=torch.uint8)
    sizes = torch.tensor([CANVAS, CANVAS])
    with torch.no_grad():
        found = detector.detect(detector.features(images, sizes))
        outputs = detector.model(pixel_values=images / 255)
    expected = RTDetrImageProcessor().post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours.boxes) == 30 and torch.equal(ours.classes, theirs["labels"])
        torch.testing.assert_close(ours.scores, theirs["scores"], rtol=0, atol=1e-6)
        width, height = float(CANVAS[1]), float(CANVAS[0])
        limit = torch.tensor([width, height, width, height])
        torch.testing.assert_close(ours.boxes, theirs["boxes"].clamp(min=0).minimum(limit), rtol=0, atol=1e-4)


def trained(folder: Path, packed: Path, name: str, **changes: Any) -> Any:
    content = small_run(folder, packed, name, **changes)
    config = resolve(content, name)
    train_run(RunContext(config))
    return config


@pytest.mark.e2e
def test_a_faster_rcnn_learns_from_a_detr_live_and_from_its_cache(dataset_folder: Path, tmp_path: Path) -> None:
    view = {"view": {"canvas": list(CANVAS), "shortest_edge": [96, 96]}, "loader_workers": 0}
    teacher = trained(tmp_path, dataset_folder, "teacher", detector=DETR, data=view)
    kd = {"run": str(teacher.folder), "statistics_pages": 4, "nodes": {"count": 8}}
    for method in ("graphkd", "dsig", "pkd"):
        for signals in ("live", "cache") if method != "pkd" else ("live",):
            own = {"name": method, **({"graph": {"categorizer": "moments"}} if method == "graphkd" else {})}
            changes = {"method": own, "teacher": {**kd, "signals": signals}, "data": view}
            config = resolve(small_run(tmp_path, dataset_folder, f"{method}-{signals}", **changes), "student")
            if signals == "cache":
                build_here(config)
            train_run(RunContext(config))
            weights = load_weights(newest_checkpoint(config.folder / "checkpoints").weights)  # type: ignore[union-attr]
            assert all(torch.isfinite(values).all() for values in weights.values())


@pytest.mark.e2e
def test_a_detr_resumes_to_the_bit(dataset_folder: Path, tmp_path: Path) -> None:
    whole = trained(tmp_path, dataset_folder, "whole", detector=DETR)
    shutil.copytree(whole.folder, tmp_path / "killed" / "whole")
    shutil.rmtree(tmp_path / "killed" / "whole" / "checkpoints" / "step-00000004")  # as if it had been killed before
    train_run(RunContext(resolve(small_run(tmp_path / "killed", dataset_folder, "whole", detector=DETR), "whole")))
    first, second = (
        load_weights(newest_checkpoint(folder / "checkpoints").weights)  # type: ignore[union-attr]
        for folder in (whole.folder, tmp_path / "killed" / "whole")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_what_transformers_cannot_build_is_one_line() -> None:
    with pytest.raises(ConfigError, match="no multiple of 32"):
        build_detector(DetectorConfig(**DETR), 4, (100, 96))
    with pytest.raises(ConfigError, match=r"transformers refuses detector\.settings"):
        build_detector(DetectorConfig(**{**DETR, "settings": {"decoder_layers": "many"}}), 4, CANVAS)
    for wrong, message in (
        ({"framework": "torchvision"}, "is no architecture of torchvision"),
        ({"architecture": "faster_rcnn"}, "is no architecture of transformers"),
    ):
        with pytest.raises(ValueError, match=message):
            DetectorConfig(**{**DETR, **wrong})
