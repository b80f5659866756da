"""Every published row and its teacher loads, fits together, carries the published recipe and builds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from graphkd.detectors import build_detector
from pipeline.config import RunConfig, load_config

ROOT = Path(__file__).parents[3]
STUDENTS = sorted((ROOT / "configs" / "published").glob("*.yaml"))
TEACHERS = sorted((ROOT / "configs" / "teachers").glob("*.yaml"))
EVERY = STUDENTS + TEACHERS

CLASSES = {"publaynet": 5, "prima": 6, "hj": 7, "doclaynet": 11}
BACKBONES = {
    "r18": "resnet18",
    "r50": "resnet50",
    "r101": "resnet101",
    "r152": "resnet152",
    "eb0": "efficientnet_b0",
    "mnv2": "mobilenetv2_100",
    "vit-b16": "vit_base_patch16_224",
}
PAIRS = ("r50-r18", "r101-r50", "r152-r101", "r101-eb0", "r50-mnv2")
EXTRA_ROWS = ("vit-b16-r101", "retinanet-r50-r18", "retinanet-r101-eb0", "retinanet-r50-mnv2")
ROWS = {f"{dataset}-{pair}" for dataset in CLASSES for pair in PAIRS} | {f"doclaynet-{row}" for row in EXTRA_ROWS}


@cache
def loaded(path: Path) -> RunConfig:
    return load_config(path)


def named(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=lambda path: f"{path.parent.name}/{path.stem}")


def teachers_of(student: RunConfig) -> list[RunConfig]:
    assert student.teacher is not None
    return [loaded(path) for path in TEACHERS if loaded(path).folder == student.teacher.run]


def test_every_published_row_is_there_and_every_teacher_has_a_student() -> None:
    assert {path.stem for path in STUDENTS} == ROWS
    used = {loaded(path).teacher.run for path in STUDENTS}  # type: ignore[union-attr]
    assert {loaded(path).folder for path in TEACHERS} == used


@named(EVERY)
def test_the_head_gives_the_launch_commands(path: Path) -> None:
    own, dataset = path.relative_to(ROOT), path.stem.partition("-")[0]
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    train = f"# graphkd train {own}"
    assert head[:2] == [f"# graphkd cache build {own}", train] if path in STUDENTS else head[0] == train
    assert f"data/{dataset} (docs/datasets.md)" in head[-1]
    if path in STUDENTS:
        needed = path.stem.rpartition("-")[0]
        assert f"configs/teachers/{needed}.yaml" in head[-1]
        assert (ROOT / "configs" / "teachers" / f"{needed}.yaml") in TEACHERS


@named(EVERY)
def test_names_describe_the_config(path: Path) -> None:
    config, (dataset, _, rest) = loaded(path), path.stem.partition("-")
    assert config.name == (path.stem if path in STUDENTS else f"teacher-{path.stem}")
    assert config.folder == Path("runs") / config.name
    assert config.data.train == f"data/{dataset}/train"
    assert config.data.val == f"data/{dataset}/val"
    assert config.data.num_classes == CLASSES[dataset]
    last = rest.removeprefix("retinanet-").removeprefix("vit-b16-" if path in STUDENTS else "").rpartition("-")[2]
    assert config.detector.backbone == BACKBONES["vit-b16" if rest == "vit-b16" else last]
    assert config.detector.architecture == ("retinanet" if "retinanet" in rest else "faster_rcnn")


@named(EVERY)
def test_the_published_recipe_arrives(path: Path) -> None:
    config = loaded(path)
    schedule, detector = config.schedule.scaled(), config.detector
    assert (schedule.batch, schedule.steps, schedule.milestones) == (8, 180_000, (120_000, 160_000))
    assert (schedule.policy, schedule.gamma) == ("multistep", 0.1)
    if path.stem == "doclaynet-vit-b16":
        assert (schedule.optimizer, schedule.lr) == ("adamw", 1e-4)
    else:
        assert (schedule.optimizer, schedule.momentum, schedule.weight_decay) == ("sgd", 0.9, 1e-4)
        assert schedule.lr == (0.005 if detector.architecture == "retinanet" else 0.01)
    assert config.data.view.canvas == (1184, 832) and config.data.view.shortest_edge == (640, 800)
    assert detector.anchor_sizes == (32, 64, 128, 256, 512) and detector.aspect_ratios == (0.5, 1.0, 2.0)
    assert (detector.rpn_proposals_before_nms, detector.rpn_proposals) == (2000, 1000)
    assert (detector.roi_batch, detector.roi_positive_fraction) == (512, 0.25)
    assert (detector.weights, detector.norm) == ("imagenet", "frozen")


@named(TEACHERS)
def test_teachers_train_alone(path: Path) -> None:
    assert loaded(path).method.name == "none" and loaded(path).teacher is None


@named(STUDENTS)
def test_a_student_and_its_one_teacher_fit(path: Path) -> None:
    student = loaded(path)
    assert student.method.name == "graphkd"
    (teacher,) = teachers_of(student)
    assert teacher.data.train == student.data.train and teacher.data.num_classes == student.data.num_classes
    assert teacher.data.view == student.data.view
    assert teacher.detector.pooled_side == student.detector.pooled_side
    assert teacher.name == f"teacher-{student.name.rpartition('-')[0]}"


@named(STUDENTS)
def test_published_loss_weights_arrive(path: Path) -> None:
    weights = loaded(path).method.weights
    small = path.stem.endswith(("-r18", "-eb0", "-mnv2")) and "retinanet" not in path.stem
    assert (weights.node, weights.temperature) == (0.5, 1.0)
    logits = 3 / (CLASSES[path.stem.partition("-")[0]] + 1)  # published for a mean over classes and background
    expected = (2.0, pytest.approx(logits, rel=1e-3), 1.0) if small else (1.0, 0.0, 0.0)
    assert (weights.edge, weights.logits, weights.boxes) == expected


def test_students_of_one_teacher_share_one_cache() -> None:
    settings: dict[Path, set[tuple[Any, ...]]] = {}
    for path in STUDENTS:
        teacher = loaded(path).teacher
        assert teacher is not None and teacher.signals == "cache"
        assert loaded(path).cache_folder == Path("caches") / teacher.run.name.removeprefix("teacher-")
        made_with = (teacher.run, teacher.views, teacher.cache_dtype, teacher.nodes, teacher.statistics_pages)
        settings.setdefault(loaded(path).cache_folder, set()).add(made_with)
    assert all(len(variants) == 1 for variants in settings.values())


@named(STUDENTS)
def test_text_is_distinguished_by_something_the_teacher_provides(path: Path) -> None:
    student = loaded(path)
    (teacher,) = teachers_of(student)
    if teacher.detector.architecture == "retinanet":
        assert student.method.graph.categorizer != "teacher_class"


@pytest.mark.e2e
def test_every_distinct_detector_builds() -> None:
    distinct = {(config.detector, config.data.num_classes, config.data.view.canvas) for config in map(loaded, EVERY)}
    assert len(distinct) == 4 * 6 + 1 + 5
    for detector, classes, canvas in distinct:
        assert classes is not None
        # On the meta device only shapes exist, so that thirty detectors cost seconds and nothing is downloaded.
        with torch.device("meta"):
            built = build_detector(detector.model_copy(update={"weights": "none"}), classes, canvas)
        assert built.spec.num_classes == classes and built.spec.channels == detector.fpn_channels
        assert built.spec.classifies_regions == (detector.architecture == "faster_rcnn")
