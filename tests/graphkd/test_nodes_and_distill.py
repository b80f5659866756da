"""Choosing nodes, asking a live teacher, and the step that joins student and teacher."""

from __future__ import annotations

import pytest
import torch

from graphkd.batch import PageBatch, Targets
from graphkd.detectors import DetectorConfig, DetectorModule, build_detector
from graphkd.distill import TrainingStep
from graphkd.errors import ConfigError
from graphkd.method import StatisticsAccumulator, TeacherStatistics
from graphkd.method.config import MethodConfig
from graphkd.nodes import NodePolicy, live_signals, teacher_pass
from graphkd.signals import TeacherSignals
from graphkd.weight_inheritance import inherit

CANVAS, CLASSES, COUNT = (128, 96), 3, 12


def detector(architecture: str = "faster_rcnn", channels: int = 16, seed: int = 0, **changes: object) -> DetectorModule:
    torch.manual_seed(seed)
    settings = {
        "architecture": architecture,
        "backbone": "resnet18",
        "norm": "group",
        "fpn_channels": channels,
        "head_width": 16,
        "anchor_sizes": (8, 16, 32, 64, 128),
        "rpn_proposals_before_nms": 60,
        "rpn_proposals": 30,
        "rpn_batch": 16,
        "roi_batch": 8,
    }
    return build_detector(DetectorConfig(**{**settings, **changes}), CLASSES, CANVAS)


@pytest.fixture
def batch() -> PageBatch:
    generator = torch.Generator().manual_seed(0)
    return PageBatch(
        images=torch.randint(0, 256, (2, 3, *CANVAS), generator=generator, dtype=torch.uint8),
        sizes=torch.tensor([[128, 96], [120, 90]]),
        boxes=torch.tensor([[5.0, 5, 60, 20], [5.0, 30, 80, 60], [10.0, 70, 70, 110]]),
        classes=torch.tensor([0, 2, 1]),
        counts=torch.tensor([3, 0]),
        samples=torch.tensor([0, 1]),
        seeds=torch.tensor([0, 1]),
        view_index=torch.tensor([0, 0]),
        affine=torch.ones(2, 4),
        replaced_sample=torch.full((2,), -1),
    )


def signals_of(batch: PageBatch, architecture: str = "faster_rcnn") -> TeacherSignals:
    teacher = detector(architecture).eval()
    return live_signals(teacher, batch, NodePolicy(count=COUNT, min_score=0.0))


@pytest.mark.parametrize("architecture", ["faster_rcnn", "retinanet"])
def test_ground_truth_comes_first_and_complete(batch: PageBatch, architecture: str) -> None:
    signals = signals_of(batch, architecture)
    assert torch.equal(signals.boxes[0, :3], batch.boxes)
    assert torch.equal(signals.classes[0, :3], batch.classes)
    assert signals.valid[0, :3].all()
    assert (signals.logits is None) == (architecture == "retinanet")


def test_nodes_are_no_near_duplicates(batch: PageBatch) -> None:
    from torchvision.ops import box_iou

    teacher = detector().eval()
    signals = live_signals(teacher, batch, NodePolicy(count=COUNT, min_score=0.0, nms_iou=0.4))
    boxes = signals.boxes[0][signals.valid[0]]
    overlap = box_iou(boxes, boxes).fill_diagonal_(0)
    assert len(boxes) > 3 and float(overlap[3:].max()) <= 0.4


def test_overlapping_ground_truth_is_kept(batch: PageBatch) -> None:
    from dataclasses import replace

    doubled = replace(batch, boxes=batch.boxes[:1].repeat(3, 1))
    assert int(signals_of(doubled).valid[0, :3].sum()) == 3


def test_unlikely_proposals_are_no_nodes(batch: PageBatch) -> None:
    signals = live_signals(detector().eval(), batch, NodePolicy(count=COUNT, min_score=0.999))
    assert signals.valid.sum(dim=1).tolist() == [3, 0]


def fitted(signals: TeacherSignals) -> TeacherStatistics:
    accumulator = StatisticsAccumulator(text_classes=torch.tensor([True, True, False]))
    accumulator.add(signals, signals.valid)
    return accumulator.finish()


@pytest.mark.parametrize("architecture", ["faster_rcnn", "retinanet"])
@pytest.mark.parametrize("channels", [16, 24])
def test_a_step_reaches_every_student_parameter(batch: PageBatch, architecture: str, channels: int) -> None:
    signals = signals_of(batch)
    student = detector(architecture, channels)
    step = TrainingStep(student, MethodConfig(name="graphkd"), fitted(signals))
    terms = step(batch, signals)
    assert {"kd_node", "kd_edge"} <= set(terms)
    assert ("kd_logits" in terms) == (architecture == "faster_rcnn")
    assert all(values.shape == (2,) for values in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in step.parameters() if parameter.requires_grad)


def test_the_student_alone_needs_no_teacher(batch: PageBatch) -> None:
    terms = TrainingStep(detector(), MethodConfig())(batch, None)
    assert not [name for name in terms if name.startswith("kd_")]


def test_another_pooled_side_is_refused_by_name(batch: PageBatch) -> None:
    signals = signals_of(batch)
    step = TrainingStep(detector(pooled_side=5), MethodConfig(name="graphkd"), fitted(signals))
    with pytest.raises(ConfigError, match="teacher pools 7 x 7 and the student 5 x 5"):
        step(batch, signals)


def test_statistics_need_two_nodes() -> None:
    with pytest.raises(ValueError, match="at least 2 nodes, got 0"):
        StatisticsAccumulator(text_classes=torch.tensor([True])).finish()


@pytest.mark.parametrize("channels", [16, 24])
@pytest.mark.parametrize("method", ["dsig", "pkd", "graphkd"])
def test_methods_differ_in_their_terms_only(batch: PageBatch, method: str, channels: int) -> None:
    teacher = detector().eval()
    signals = live_signals(teacher, batch, NodePolicy(count=COUNT, min_score=0.0), maps=True)
    torch.manual_seed(1)
    step = TrainingStep(detector(channels=channels), MethodConfig(name=method), fitted(signals))
    terms = step(batch, signals)
    own = {
        "dsig": {"kd_node", "kd_edge", "kd_logits", "kd_boxes", "kd_maps"},
        "pkd": {"kd_maps"},
        "graphkd": {"kd_node", "kd_edge", "kd_logits", "kd_boxes"},
    }
    assert {name for name in terms if name.startswith("kd_")} == own[method]
    alone = TrainingStep(detector(channels=channels), MethodConfig())(batch, None)
    assert all(torch.equal(terms[name], values) for name, values in alone.items())
    torch.stack(list(terms.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in step.parameters() if parameter.requires_grad)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("method", ["dsig", "graphkd"])
def test_student_nodes_are_its_proposals(batch: PageBatch, method: str) -> None:
    policy = NodePolicy(count=COUNT, min_score=0.0, nms_iou=1.0)
    teacher, student = detector().eval(), detector(seed=7)
    statistics = fitted(live_signals(teacher, batch, policy))
    teacher_output = teacher_pass(teacher, batch, policy, maps=True)
    terms = TrainingStep(student, MethodConfig(name=method, nodes="student"), statistics)(batch, teacher_output)
    assert {"kd_node", "kd_edge"} <= set(terms)
    features = student.features(batch.images, batch.sizes)
    proposals, _ = student.propose_and_losses(features, batch.targets())
    chosen = teacher_output.signals(proposals, batch.targets())
    own = proposals.boxes[1].detach()
    assert all((own == box).all(dim=1).any() for box in chosen.boxes[1][chosen.valid[1]])
    fixed = live_signals(teacher, batch, policy)
    assert not torch.equal(chosen.boxes[1], fixed.boxes[1])


def test_a_student_inherits_all_that_reads_the_pyramid(batch: PageBatch) -> None:
    teacher, student = detector(), detector(seed=7)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    taken = inherit(student, teacher, MethodConfig(name="graphkd"))
    assert any("rpn" in name for name in taken) and any("box_predictor" in name for name in taken)
    assert any("fpn.layer_blocks" in name for name in taken)
    theirs = teacher.state_dict()
    for name, value in student.state_dict().items():
        assert torch.equal(value, theirs[name] if name in taken else before[name]), name
    assert not any("body" in name or "inner_blocks" in name for name in taken)


def test_inheriting_from_another_width_is_skipped_or_refused_naming_both() -> None:
    assert inherit(detector(channels=16), detector(channels=24), MethodConfig(name="graphkd")) == []
    with pytest.raises(ConfigError, match=r"is \(.*24.*\) in the teacher and \(.*16.*\) in the student"):
        inherit(detector(channels=16), detector(channels=24), MethodConfig(name="graphkd", inherit=True))


@pytest.mark.parametrize(("method", "inherits"), [("none", False), ("dsig", False), ("pkd", False), ("graphkd", True)])
def test_only_graphkd_inherits_unasked(method: str, inherits: bool) -> None:
    assert bool(inherit(detector(), detector(), MethodConfig(name=method))) == inherits
    if method == "none":
        with pytest.raises(ValueError, match="none has no teacher"):
            MethodConfig(name=method, inherit=True)
    else:
        assert inherit(detector(), detector(), MethodConfig(name=method, inherit=True))
    assert not inherit(detector(), detector(), MethodConfig(name=method, inherit=False))


def test_a_cache_of_another_width_than_the_statistics_names_both(batch: PageBatch) -> None:
    step = TrainingStep(detector(), MethodConfig(name="graphkd"), fitted(signals_of(batch)))
    wide = live_signals(detector(channels=24).eval(), batch, NodePolicy(count=COUNT, min_score=0.0))
    with pytest.raises(ConfigError, match="nodes have 24 channels and its statistics 16"):
        step(batch, wide)


def test_overlap_is_with_ground_truth_of_the_same_page_only(batch: PageBatch) -> None:
    boxes = torch.stack([batch.boxes[:2], batch.boxes[:2]])
    assert batch.targets().overlap(boxes).tolist() == [[True, True], [False, False]]


def test_ground_truth_beyond_the_nodes_is_chosen_by_rarity_then_size() -> None:
    from graphkd.nodes import _first_regions

    sides, classes = torch.tensor([9.0, 8, 7, 2, 3, 1]), torch.tensor([0, 0, 0, 1, 1, 2])
    boxes = torch.stack([torch.zeros(6), torch.zeros(6), sides, sides], dim=1)
    few = boxes[:2], classes[:2]
    # The second page has another order; the third has fewer regions than nodes.
    targets = Targets.from_lists([boxes, boxes.flip(0), few[0]], [classes, classes.flip(0), few[1]], [0, 0, 0])
    four, two = _first_regions(targets, 4), _first_regions(targets, 2)
    assert four.boxes[..., 2].tolist() == [[9, 2, 3, 1], [1, 3, 2, 9], [9, 8, 0, 0]]
    assert four.classes.tolist() == [[0, 1, 1, 2], [2, 1, 1, 0], [0, 0, 0, 0]]
    assert four.valid.tolist() == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert two.boxes[..., 2].tolist() == [[3, 1], [1, 3], [9, 8]]
