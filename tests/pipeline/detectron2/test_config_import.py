"""Configs of detectron2's in our terms: what is taken, what is ignored and why, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from graphkd.errors import ConfigError
from pipeline.cli.main import app
from pipeline.detectron2.config_import import Imported, check_valid, import_detectron2
from pipeline.detectron2.yaml_reader import leaves, read_detectron2_yaml

BASE = """
MODEL:
  META_ARCHITECTURE: Distillation
  BACKBONE: {NAME: build_resnet_fpn_backbone_kd}
  RESNETS: {DEPTH: 18, OUT_FEATURES: [res2, res3, res4, res5]}
  PIXEL_STD: [57.375, 57.120, 58.395]
  RPN: {POST_NMS_TOPK_TRAIN: 1000}
  ROI_HEADS: {NUM_CLASSES: 7}
  ROI_BOX_HEAD: {POOLER_RESOLUTION: 7, NUM_FC: 2}
  ROI_MASK_HEAD: {NUM_CONV: 4}
DATASETS:
  TRAIN: ("press_train",)
  TEST: ("press_val",)
SOLVER:
  IMS_PER_BATCH: 4
  BASE_LR: 0.02
  STEPS: (60, 80)
  MAX_ITER: 90
INPUT:
  MIN_SIZE_TRAIN: (640, 800)
TEACHER:
  MODEL:
    META_ARCHITECTURE: GeneralizedRCNN
    WEIGHTS: somewhere/R50.pkl
    BACKBONE: {NAME: build_resnet_fpn_backbone}
    RESNETS: {DEPTH: 101}
    ROI_HEADS: {NUM_CLASSES: 7}
    ROI_BOX_HEAD: {POOLER_RESOLUTION: 7}
"""
CHILD = """
_BASE_: base.yaml
SOLVER: {BASE_LR: 0.01}
KD:
  REGION_CORRELATION_LOSS_ON: True
  REGION_CORRELATION_LOSS_WEIGHT_POOL: 2.0
  ROI_CLS_ON: False
  ROI_CLS_LOSS_WEIGHT: 3.0
  USE_BG_FEATURE_MINING_THRS: True
  BG_MINING_THRS: 0.6
  SOMETHING_NEW: 3
"""
OCTAVES = '!!python/object/apply:eval ["[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"]'


def imported(folder: Path, text: str = CHILD, base: str = BASE) -> Imported:
    (folder / "base.yaml").write_text(base)
    (folder / "Pair.yaml").write_text(text)
    return import_detectron2(folder / "Pair.yaml")


def test_student_and_teacher_are_written_in_our_terms(tmp_path: Path) -> None:
    found = imported(tmp_path)
    check_valid(found)
    teacher, student = found.configs["pair-teacher"], found.configs["pair"]
    assert student["detector"]["backbone"] == "resnet18" and teacher["detector"]["backbone"] == "resnet101"
    assert student["detector"]["pixel_std"] == [58.395, 57.12, 57.375], "BGR in the file, RGB here"
    assert teacher["detector"]["pixel_std"] == [1.0, 1.0, 1.0], "detectron2's default, which is not ours"
    regions = {name: student["detector"][name] for name in ("roi_aligned", "roi_samples", "anchors_rounded")}
    assert regions == {"roi_aligned": True, "roi_samples": 0, "anchors_rounded": False}
    assert student["schedule"]["lr"] == 0.01 and student["schedule"]["milestones"] == [60, 80]
    assert student["schedule"]["batch"] == student["schedule"]["reference_batch"] == 4
    assert student["data"]["train"] == teacher["data"]["train"] == "data/press/train"
    assert student["data"]["view"] == {"shortest_edge": [640, 800], "canvas": [1152, 800]} == teacher["data"]["view"]
    assert student["teacher"] == {"run": "runs/pair-teacher", "signals": "live"}


def test_losses_that_are_switched_off_weigh_nothing(tmp_path: Path) -> None:
    method = imported(tmp_path).configs["pair"]["method"]
    assert method["name"] == "dsig" and method["nodes"] == "student"
    expected = {"edge": 2.0, "logits": 0.0, "boxes": 0.0, "hard_background": 0.6}
    assert {name: method["dsig"][name] for name in expected} == expected


def test_every_key_is_listed_with_what_became_of_it(tmp_path: Path) -> None:
    lines = {line.key: line for line in imported(tmp_path).lines}
    assert (lines["SOLVER.BASE_LR"].verdict, lines["SOLVER.BASE_LR"].why) == ("taken", "schedule.lr: 0.01")
    assert lines["MODEL.PIXEL_STD"].verdict == "renamed" and lines["MODEL.RESNETS.DEPTH"].why.endswith("resnet18")
    assert lines["MODEL.ROI_MASK_HEAD.NUM_CONV"].why == "masks are not supported"
    assert lines["KD.SOMETHING_NEW"].verdict == "ignored" and lines["KD.SOMETHING_NEW"].why
    assert lines["TEACHER.MODEL.WEIGHTS"].verdict == "ignored"
    assert set(lines) == {key for key, _ in leaves(read_detectron2_yaml(tmp_path / "Pair.yaml"))}


def test_anchors_of_the_known_expression_are_recognised_and_nothing_is_run(tmp_path: Path) -> None:
    retinanet = f"MODEL: {{META_ARCHITECTURE: RetinaNetKD, ANCHOR_GENERATOR: {{SIZES: {OCTAVES}}}}}\n"
    detector = imported(tmp_path, f"_BASE_: base.yaml\n{retinanet}").configs["pair"]["detector"]
    assert detector["architecture"] == "retinanet" and detector["anchor_sizes"] == [32, 64, 128, 256, 512]


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:eval [\"open('{mark}', 'w')\"]",
        '!!python/object/apply:os.system ["touch {mark}"]',
        '!!python/object/new:os.system ["touch {mark}"]',
        "!!python/name:os.system",
        "!!python/object/apply:eval [\"[[x] for x in [__import__('os').system('touch {mark}')]]\"]",
    ],
)
def test_other_tags_are_refused_and_never_run(tmp_path: Path, tag: str) -> None:
    mark = tmp_path / "ran"
    with pytest.raises(ConfigError, match=r"line 3: !!python tag .* would execute code"):
        imported(tmp_path, f"_BASE_: base.yaml\nMODEL:\n  SIZES: {tag.format(mark=mark)}\n")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_BASE_: Pair.yaml\n", "is its own _BASE_"),
        ("_BASE_: https://example.org/base.yaml\n", "download it"),
        ("_BASE_: base.yaml\nMODEL: {BACKBONE: {NAME: build_swin}}\n", "MODEL.BACKBONE.NAME build_swin is not known"),
        ("_BASE_: base.yaml\nMODEL: {META_ARCHITECTURE: Panoptic}\n", "META_ARCHITECTURE Panoptic is not known"),
        ("_BASE_: base.yaml\nSOLVER: {STEPS: soon}\n", "SOLVER.STEPS is 'soon'"),
        ("- 1\n", "contains a list"),
        ("a: [\n", "is not readable YAML"),
    ],
)
def test_what_cannot_be_taken_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        imported(tmp_path, text)


def test_the_command_writes_what_can_be_read_again(tmp_path: Path) -> None:
    imported(tmp_path)
    done = CliRunner().invoke(app, ["config", "import", str(tmp_path / "Pair.yaml"), "--out", str(tmp_path / "ours")])
    assert done.exit_code == 0, done.output
    student: dict[str, Any] = yaml.safe_load((tmp_path / "ours" / "pair.yaml").read_text())
    assert student["name"] == "pair" and (tmp_path / "ours" / "pair-teacher.yaml").exists()
    assert "SOLVER.BASE_LR" in done.output
