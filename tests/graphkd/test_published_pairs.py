"""Every published pair builds from its names and takes one finite step."""

from __future__ import annotations

import pytest
import torch

from graphkd.batch import PageBatch
from graphkd.detectors import DetectorConfig, DetectorModule, build_detector
from graphkd.distill import TrainingStep
from graphkd.method import GraphConfig, StatisticsAccumulator
from graphkd.method.config import MethodConfig
from graphkd.nodes import NodePolicy, live_signals

CANVAS, CLASSES = (96, 64), 3
PAIRS = [
    ("faster_rcnn", "resnet50", "resnet18"),
    ("faster_rcnn", "resnet101", "resnet50"),
    ("faster_rcnn", "resnet152", "resnet101"),
    ("faster_rcnn", "resnet101", "efficientnet_b0"),
    ("faster_rcnn", "resnet50", "mobilenetv2_100"),
    ("faster_rcnn", "vit_base_patch16_224", "resnet101"),
    ("retinanet", "resnet50", "resnet18"),
    ("retinanet", "resnet101", "efficientnet_b0"),
    ("retinanet", "resnet50", "mobilenetv2_100"),
]


def detector(architecture: str, backbone: str) -> DetectorModule:
    torch.manual_seed(0)
    config = DetectorConfig(
        architecture=architecture,  # type: ignore[arg-type]
        backbone=backbone,
        norm="group",  # frozen statistics of random weights let activations grow without bound
        head_width=32,
        rpn_proposals_before_nms=60,
        rpn_proposals=20,
        rpn_batch=16,
        roi_batch=8,
    )
    return build_detector(config, CLASSES, CANVAS)


def one_page() -> PageBatch:
    generator = torch.Generator().manual_seed(0)
    return PageBatch(
        images=torch.randint(0, 256, (1, 3, *CANVAS), generator=generator, dtype=torch.uint8),
        sizes=torch.tensor([CANVAS]),
        boxes=torch.tensor([[4.0, 4, 60, 20], [4.0, 30, 30, 60], [34.0, 30, 60, 60]]),
        classes=torch.tensor([0, 1, 2]),
        counts=torch.tensor([3]),
        samples=torch.tensor([0]),
        seeds=torch.tensor([0]),
        view_index=torch.tensor([0]),
        affine=torch.ones(1, 4),
        replaced_sample=torch.full((1,), -1),
    )


@pytest.mark.e2e
@pytest.mark.parametrize(("architecture", "teacher", "student"), PAIRS)
def test_a_published_pair_takes_a_finite_step(architecture: str, teacher: str, student: str) -> None:
    batch = one_page()
    signals = live_signals(detector(architecture, teacher).eval(), batch, NodePolicy(count=6, min_score=0.0))
    accumulator = StatisticsAccumulator(text_classes=torch.tensor([True, True, False]))
    accumulator.add(signals, signals.valid)
    categorizer = "moments" if architecture == "retinanet" else "teacher_class"
    method = MethodConfig(name="graphkd", graph=GraphConfig(categorizer=categorizer))
    step = TrainingStep(detector(architecture, student), method, accumulator.finish())
    terms = step(batch, signals)
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    assert "kd_node" in terms and torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in step.parameters() if p.grad is not None)
