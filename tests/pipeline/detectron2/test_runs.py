"""Runs with detectron2's detectors, mixed with torchvision's: trained, cached, distilled, evaluated, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import RunConfig, resolve
from pipeline.context import RunContext
from pipeline.detectron2.weights import export_weights, import_weights
from pipeline.runs.checkpoint import load_weights, newest_checkpoint
from pipeline.train.run import evaluate_run, train_run
from tests.support.runs import build_here, small_run

pytestmark = pytest.mark.detectron2

THEIRS: dict[str, Any] = {"framework": "detectron2"}
OURS: dict[str, Any] = {"anchors_rounded": False}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(folder: Path, packed: Path, name: str, detector: dict[str, Any], **changes: Any) -> RunConfig:
    return resolve(small_run(folder, packed, name, detector=detector, **changes), name)


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(config.folder / "checkpoints")
    assert checkpoint is not None and checkpoint.step == config.schedule.steps
    return load_weights(checkpoint.weights)


@pytest.mark.parametrize(
    ("teacher", "student", "changes"),
    [
        (THEIRS, OURS, {"method": {"name": "graphkd"}}),
        (OURS, {**THEIRS, "backbone": "mobilenetv2_050"}, {"method": {"name": "graphkd"}}),
        (THEIRS, THEIRS, {"method": {"name": "dsig", "nodes": "student"}, "teacher": {"signals": "live"}}),
        (
            {**THEIRS, "architecture": "retinanet"},
            {**OURS, "architecture": "retinanet"},
            {"method": {"name": "dsig", "nodes": "student"}, "teacher": {"signals": "live"}},
        ),
    ],
    ids=["cache-to-torchvision", "cache-to-detectron2", "live-both", "live-retinanet"],
)
def test_pairs_of_both_frameworks_distil(
    dataset_folder: Path, tmp_path: Path, teacher: dict[str, Any], student: dict[str, Any], changes: dict[str, Any]
) -> None:
    first = run(tmp_path, dataset_folder, "teacher", teacher)
    train_run(RunContext(first))
    taught = {"run": str(first.folder), "statistics_pages": 4, "nodes": {"count": 8, "min_score": 0.0}}
    config = run(
        tmp_path, dataset_folder, "student", student, **{**changes, "teacher": {**taught, **changes.get("teacher", {})}}
    )
    if config.teacher is not None:
        build_here(config)
    train_run(RunContext(config))
    assert all(torch.isfinite(values).all() for values in weights(config).values())
    assert evaluate_run(RunContext(config))["pages"] == 10
    assert "kd_" in (config.folder / "metrics.jsonl").read_text()


def test_a_run_resumes_to_the_bit(dataset_folder: Path, tmp_path: Path) -> None:
    whole = run(tmp_path, dataset_folder, "whole", THEIRS)
    train_run(RunContext(whole))
    parts = run(tmp_path, dataset_folder, "parts", THEIRS)
    train_run(RunContext(parts))
    newest = newest_checkpoint(parts.folder / "checkpoints")
    assert newest is not None
    newest.folder.rename(tmp_path / "gone")  # as if it had been killed after step 2
    train_run(RunContext(parts))
    first, second = weights(whole), weights(parts)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpoints_go_out_of_one_framework_and_into_the_other(dataset_folder: Path, tmp_path: Path) -> None:
    first = run(tmp_path, dataset_folder, "first", {**THEIRS, "norm": "frozen"})
    train_run(RunContext(first))
    path = tmp_path / "model.pth"
    export_weights(first.folder, path)
    second = run(tmp_path, dataset_folder, "second", {**OURS, "norm": "frozen"})
    found = import_weights(path, RunContext(second))
    assert not found.missing and not found.shape_mismatch and not found.unused
    third = run(tmp_path, dataset_folder, "third", {**THEIRS, "norm": "frozen"})
    assert not import_weights(path, RunContext(third)).missing
    first_weights, third_weights = weights(first), weights(third)
    assert all(torch.equal(values, third_weights[name]) for name, values in first_weights.items())
