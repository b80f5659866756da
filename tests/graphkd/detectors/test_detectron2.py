"""The same weights in both adapters give the same features, regions, logits and detections."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphkd.batch import Detections, Targets
from graphkd.detectors import DetectorConfig, DetectorModule, build_detector
from graphkd.detectors.detectron2.names import convert_framework, match_tensors, to_detectron2_tensors
from graphkd.errors import ConfigError
from graphkd.method.config import MethodConfig
from graphkd.weight_inheritance import inherit

CANVAS, CLASSES = (128, 96), 4
# As detectron2's models are by default: aligned regions, as many samples as pixels, anchors that are not rounded.
SAME: dict[str, Any] = {"roi_aligned": True, "roi_samples": 0, "anchors_rounded": False}
SMALL: dict[str, Any] = {
    "fpn_channels": 32,
    "head_width": 64,
    "anchor_sizes": (8, 16, 32, 64, 128),
    "rpn_proposals_before_nms": 200,
    "rpn_proposals": 100,
    "score_threshold": 0.0,
}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def built(framework: str, backbone: str, **changes: Any) -> DetectorModule:
    torch.manual_seed(0)
    config = DetectorConfig(framework=framework, backbone=backbone, **{**SMALL, **SAME, **changes})
    return build_detector(config, CLASSES, CANVAS).eval()


def varied(detector: DetectorModule) -> DetectorModule:
    """With norms and heads whose random first weights are not all alike."""
    generator = torch.Generator().manual_seed(3)
    for name, values in detector.state_dict().items():
        if name.endswith(("running_mean", "bias")) or "predictor" in name or "rpn.head" in name:
            values += 0.02 * torch.randn(values.shape, generator=generator)
    return detector


def shared(one: Detections, other: Detections) -> int:
    """How many detections both have, in whatever order ties are: class, and corners within .01 px."""
    apart = (one.boxes[:, None] - other.boxes).abs().amax(dim=-1) + 1e3 * (one.classes[:, None] != other.classes)
    return int((apart.amin(dim=1) < 0.01).sum())


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_weights_go_to_detectron2s_names_and_back(backbone: str) -> None:
    ours = varied(built("torchvision", backbone))
    found = match_tensors(ours.state_dict(), to_detectron2_tensors(ours.state_dict()), same_framework=False)
    assert not found.missing and not found.shape_mismatch and not found.unused
    for name, values in ours.state_dict().items():
        expected = values.clone()
        if "bbox_pred" in name and "roi_heads" in name:
            expected[:4] = 0  # detectron2 has no deltas for background
        assert torch.equal(found.matched[name], expected), name


def test_what_does_not_fit_is_named() -> None:
    ours, other = built("torchvision", "resnet18"), built("torchvision", "resnet18", head_width=32)
    theirs = to_detectron2_tensors(ours.state_dict())
    del theirs["backbone.fpn_lateral2.weight"]
    theirs["head.of.another"] = torch.zeros(1)
    found = match_tensors(other.state_dict(), theirs, same_framework=False)
    assert found.missing == ["model.backbone.fpn.inner_blocks.0.0.weight"] and found.unused == ["head.of.another"]
    assert found.shape_mismatch["model.roi_heads.box_head.fc7.weight"] == ((64, 64), (32, 32))


@pytest.mark.detectron2
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_both_frameworks_see_the_same(backbone: str) -> None:
    ours, theirs = varied(built("torchvision", backbone)), built("detectron2", backbone)
    loaded = theirs.load_state_dict(convert_framework("detectron2", (), ours.state_dict()))
    assert not loaded.missing_keys
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, *CANVAS), generator=generator, dtype=torch.uint8)
    sizes = torch.tensor([(128, 96), (100, 80)])
    boxes = torch.tensor([[[3.0, 4, 60, 40], [10, 10, 20, 90]], [[1.0, 1, 70, 99], [0, 0, 80, 100]]])
    with torch.no_grad():
        first, second = (detector.features(images, sizes) for detector in (ours, theirs))
        torch.testing.assert_close(first.maps, second.maps, **TOLERANCE)
        pooled = ours.pool(first, boxes), theirs.pool(second, boxes)
        torch.testing.assert_close(*pooled, **TOLERANCE)
        regions = ours.classify(pooled[0]), theirs.classify(pooled[1])
        assert regions[0] is not None and regions[1] is not None
        torch.testing.assert_close(regions[0].logits, regions[1].logits, **TOLERANCE)
        torch.testing.assert_close(regions[0].deltas, regions[1].deltas, **TOLERANCE)
        torch.testing.assert_close(ours.propose(first).boxes, theirs.propose(second).boxes, **TOLERANCE)
        for one, other in zip(ours.detect(first), theirs.detect(second), strict=True):
            torch.testing.assert_close(one.scores, other.scores, **TOLERANCE)
            assert len(one.boxes) == 100 and shared(one, other) >= 98, "all but ties at the last places"


@pytest.mark.detectron2
@pytest.mark.parametrize("backbone", ["efficientnet_b0", "mobilenetv2_100", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("architecture", ["faster_rcnn", "retinanet"])
def test_backbones_of_timm_are_backbones_of_detectron2(backbone: str, architecture: str) -> None:
    detector = built("detectron2", backbone, architecture=architecture)
    with torch.no_grad():
        features = detector.features(torch.zeros(1, 3, *CANVAS, dtype=torch.uint8), torch.tensor([CANVAS]))
        pooled = detector.pool(features, torch.tensor([[[3.0, 4, 60, 40]]]))
    names = {"faster_rcnn": ["0", "1", "2", "3", "pool"], "retinanet": ["0", "1", "2", "p6", "p7"]}
    assert list(features.maps) == names[architecture]
    assert [CANVAS[0] // level.shape[-2] for level in features.maps.values()][:3] == (
        [4, 8, 16] if architecture == "faster_rcnn" else [8, 16, 32]
    )
    assert pooled.shape == (1, 1, 32, 7, 7) and torch.isfinite(pooled).all()


@pytest.mark.detectron2
def test_detectron2_configs_can_use_timm_backbones() -> None:
    from detectron2.config import CfgNode
    from detectron2.modeling import build_model

    from graphkd.detectors.detectron2.model import build_cfg

    cfg = build_cfg(DetectorConfig(backbone="mobilenetv2_050", anchors_rounded=False, framework="detectron2"), 3)
    cfg.MODEL.TIMM = CfgNode({"NAME": "mobilenetv2_050", "CANVAS": list(CANVAS)})
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DEVICE = "build_graphkd_timm_fpn_backbone", "cpu"
    model = build_model(cfg).eval()
    with torch.no_grad():
        (found,) = model([{"image": torch.zeros(3, *CANVAS)}])
    assert found["instances"].has("pred_boxes")


@pytest.mark.detectron2
def test_both_frameworks_sample_the_same_regions_of_a_page() -> None:
    ours, theirs = varied(built("torchvision", "resnet18")), built("detectron2", "resnet18")
    theirs.load_state_dict(convert_framework("detectron2", (), ours.state_dict()))
    images = torch.randint(0, 256, (1, 3, *CANVAS), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    goal = Targets.from_lists([torch.tensor([[10.0, 10, 60, 30]])], [torch.tensor([3])], [11])
    losses = [
        detector.train().propose_and_losses(detector.features(images, torch.tensor([CANVAS])), goal)[1]
        for detector in (ours, theirs)
    ]
    assert set(losses[0]) == set(losses[1])
    # Box losses differ: detectron2's are absolute, torchvision's squared near 0.
    torch.testing.assert_close(losses[0]["loss_class"], losses[1]["loss_class"], **TOLERANCE)


@pytest.mark.detectron2
@pytest.mark.parametrize(("framework", "other"), [("torchvision", "detectron2"), ("detectron2", "torchvision")])
def test_a_student_inherits_from_the_other_framework(framework: str, other: str) -> None:
    teacher, student = varied(built(framework, "resnet50")), built(other, "resnet18")
    taken = inherit(student, teacher, MethodConfig(name="graphkd", inherit=True))
    assert set(taken) == set(student.inheritable_parameters())
    pooled = torch.randn(6, SMALL["fpn_channels"], 7, 7, generator=torch.Generator().manual_seed(2))
    expected, actual = teacher.classify(pooled), student.classify(pooled)
    assert expected is not None and actual is not None
    torch.testing.assert_close(actual.logits, expected.logits, **TOLERANCE)
    torch.testing.assert_close(actual.deltas, expected.deltas, **TOLERANCE)


def test_without_detectron2_one_line_explains_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "detectron2", None)
    for part in ("common", "model", "rcnn", "retinanet"):
        monkeypatch.delitem(sys.modules, f"graphkd.detectors.detectron2_{part}", raising=False)
    with pytest.raises(ConfigError, match=r"pip install .*facebookresearch/detectron2"):
        built("detectron2", "resnet18")


@pytest.mark.detectron2
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv2_100"])
@pytest.mark.parametrize("architecture", ["faster_rcnn", "retinanet"])
def test_a_detector_of_detectron2_becomes_one_of_torchvision_with_the_same_detections(
    backbone: str, architecture: str
) -> None:
    """Exports have fixed shapes, and are made of torchvision's adapters."""
    from graphkd.detectors.detectron2.as_torchvision import as_torchvision
    from graphkd.detectors.torchvision.fixed import fixed_detections

    config = DetectorConfig(
        framework="detectron2", backbone=backbone, architecture=architecture, **{**SMALL, "score_threshold": 0.01}
    )
    torch.manual_seed(0)
    theirs = build_detector(config, CLASSES, CANVAS).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, values in theirs.named_parameters():
            if "predictor" in name or "rpn_head" in name or name.startswith("model.head."):
                values += 0.02 * torch.randn(values.shape, generator=generator)
        ours = as_torchvision(theirs, config)
        images = torch.randint(0, 256, (2, 3, *CANVAS), generator=generator, dtype=torch.uint8)
        sizes = torch.tensor([(128, 96), (100, 80)])
        expected = theirs.detect(theirs.features(images, sizes))
        boxes, classes, scores = fixed_detections(ours, ours.features(images, sizes))
    for page, other in enumerate(expected):
        kept = scores[page] > 0
        found = Detections(boxes=boxes[page][kept], scores=scores[page][kept], classes=classes[page][kept])
        assert len(other.boxes) > 20 and len(found.boxes) == len(other.boxes)
        torch.testing.assert_close(found.scores, other.scores, **TOLERANCE)
        assert shared(found, other) >= len(other.boxes) - 2, "all but ties at the last places"
