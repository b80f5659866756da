"""Checkpoints of detectron2's in and out: whatever the names, never by running what a pickle holds."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphkd.detectors.detectron2.names import detectron2_name, to_detectron2
from pipeline.config import RunConfig, resolve
from pipeline.context import RunContext
from pipeline.core.errors import CheckpointError
from pipeline.detectron2.checkpoint import read_checkpoint
from pipeline.detectron2.weights import export_weights, import_weights
from pipeline.models import best_checkpoint, new_detector
from tests.support.runs import small_run

pytestmark = pytest.mark.e2e


def configured(folder: Path, packed: Path, name: str, **detector: Any) -> RunConfig:
    return resolve(small_run(folder, packed, name, detector={"norm": "frozen", **detector}), name)


def theirs(config: RunConfig) -> dict[str, torch.Tensor]:
    """Random weights as detectron2 would name and lay them out."""
    tensors = {}
    for name, values in new_detector(config.detector, 3, config.data.view.canvas, 0).state_dict().items():
        known = detectron2_name(name.removeprefix("model."))
        assert known is not None
        tensors[known] = to_detectron2(known, values).contiguous()
    return tensors


def pickled(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    content = {"model": {name: values.numpy() for name, values in tensors.items()}, "__author__": "somebody"}
    path.write_bytes(pickle.dumps(content))
    return path


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_a_checkpoint_becomes_a_finished_run(dataset_folder: Path, tmp_path: Path, suffix: str) -> None:
    config, path = configured(tmp_path, dataset_folder, "imported"), tmp_path / f"model.{suffix}"
    tensors = theirs(config)
    if suffix == "pkl":
        pickled(path, tensors)
    else:
        torch.save({"model": tensors, "iteration": 3}, path)
    found = import_weights(path, RunContext(config))
    assert not found.missing and not found.shape_mismatch and not found.unused
    assert best_checkpoint(config.folder).step == config.schedule.steps
    written = tmp_path / "again.pth"
    assert export_weights(config.folder, written) == len(tensors)
    again = torch.load(written, weights_only=True)["model"]
    assert all(torch.equal(again[name], values) for name, values in tensors.items())
    with pytest.raises(CheckpointError, match="has checkpoints already"):
        import_weights(path, RunContext(config))


def test_student_and_teacher_of_one_file_are_distinguished(dataset_folder: Path, tmp_path: Path) -> None:
    small, big = (
        configured(tmp_path, dataset_folder, name, fpn_channels=width) for name, width in (("s", 16), ("b", 24))
    )
    path = tmp_path / "merged.pth"
    torch.save(theirs(small) | {f"teacher.{name}": values for name, values in theirs(big).items()}, path)
    assert not import_weights(path, RunContext(small)).missing
    assert not import_weights(path, RunContext(big), "teacher").missing
    torch.save(theirs(small), path)
    with pytest.raises(CheckpointError, match="holds nothing of a teacher"):
        read_checkpoint(path, "teacher")


def test_names_of_caffe2_are_known(tmp_path: Path) -> None:
    arrays = {
        "conv1_w": np.ones((4, 3, 7, 7), np.float32),
        "res_conv1_bn_s": np.ones(4, np.float32),
        "res2_0_branch1_w": np.ones((8, 4, 1, 1), np.float32),
        "res3_1_branch2b_bn_b": np.ones(4, np.float32),
        "fpn_inner_res5_2_sum_w": np.ones((8, 8, 1, 1), np.float32),
        "conv_rpn_fpn2_b": np.ones(8, np.float32),
        "cls_score_b": np.arange(3, dtype=np.float32),
        "bbox_pred_b": np.arange(12, dtype=np.float32),
    }
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": arrays}))
    found = read_checkpoint(tmp_path / "R-50.pkl")
    assert set(found) == {
        "backbone.bottom_up.stem.conv1.weight",
        "backbone.bottom_up.stem.conv1.norm.weight",
        "backbone.bottom_up.res2.0.shortcut.weight",
        "backbone.bottom_up.res3.1.conv2.norm.bias",
        "backbone.fpn_lateral5.weight",
        "proposal_generator.rpn_head.conv.bias",
        "roi_heads.box_predictor.cls_score.bias",
        "roi_heads.box_predictor.bbox_pred.bias",
    }
    assert found["roi_heads.box_predictor.cls_score.bias"].tolist() == [1, 2, 0], "background last"
    assert found["roi_heads.box_predictor.bbox_pred.bias"].tolist() == list(range(4, 12))


def test_a_backbone_alone_leaves_the_heads_as_they_are(dataset_folder: Path, tmp_path: Path) -> None:
    config = configured(tmp_path, dataset_folder, "backbone")
    prefix = "backbone.bottom_up."
    bare = {name.removeprefix(prefix): own for name, own in theirs(config).items() if name.startswith(prefix)}
    found = import_weights(pickled(tmp_path / "R-18.pkl", bare), RunContext(config))
    assert len(found.matched) == len(bare) and all("body" not in name for name in found.missing)


def test_another_network_is_refused(dataset_folder: Path, tmp_path: Path) -> None:
    config = configured(tmp_path, dataset_folder, "other", backbone="resnet50")
    path = pickled(tmp_path / "model.pkl", theirs(configured(tmp_path, dataset_folder, "small")))
    with pytest.raises(CheckpointError, match=r"only \d+ of the detector's \d+ tensors"):
        import_weights(path, RunContext(config))
    assert not config.folder.exists()


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, suffix: str) -> None:
    mark, path = tmp_path / "ran", tmp_path / f"hostile.{suffix}"
    content = {"model": {"a": np.zeros(3), "b": Hostile(mark)}}
    if suffix == "pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"is no (pickle of arrays|file of plain tensors)"):
        read_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04K", b"not a pickle", pickle.dumps([1]), pickle.dumps({"model": {}})]
)
def test_damaged_files_are_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.pkl"):
        read_checkpoint(tmp_path / "model.pkl")


class Kind:
    """A type of array that only a hostile file has."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def crafted(kind: Kind) -> bytes:
    build = np.zeros(1).__reduce__()[0]
    array = Kind(build, (np.ndarray, (0,), b"b"), (1, (4,), kind, False, b"\0" * 32))
    return pickle.dumps({"model": {"a": array}})


@pytest.mark.parametrize("kind", ["V8", "O", "U4", "S3", "M8[s]", "c16", "f8,f8", "?", "V99999999999"])
def test_arrays_of_anything_but_numbers_are_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(crafted(Kind(np.dtype, (kind, False, True))))
    with pytest.raises(CheckpointError, match="only numbers are loaded"):
        read_checkpoint(tmp_path / "model.pkl")


def test_a_type_with_fields_in_its_state_is_refused(tmp_path: Path) -> None:
    fields = ("<", None, ("a",), {"a": (np.dtype("f8"), 10**9)}, 8, 1, 0)

    kind = Kind(np.dtype, ("f8", False, True), (3, *fields))
    (tmp_path / "model.pkl").write_bytes(crafted(kind))
    with pytest.raises(CheckpointError, match="array with fields"):
        read_checkpoint(tmp_path / "model.pkl")


def test_ordered_dicts_and_other_objects_are_refused(tmp_path: Path) -> None:
    from collections import OrderedDict

    (tmp_path / "model.pkl").write_bytes(pickle.dumps(OrderedDict(a=np.zeros(3))))
    with pytest.raises(CheckpointError, match=r"asks for collections\.OrderedDict"):
        read_checkpoint(tmp_path / "model.pkl")


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", "<i8", "|u1", "<f2"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_arrays_of_numbers_come_back_as_they_were(kind: str, protocol: int, tmp_path: Path) -> None:
    values = np.asfortranarray(np.arange(12).reshape(3, 4).astype(kind))
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": {"a": values, "n": 3}}, protocol=protocol))
    found = read_checkpoint(tmp_path / "model.pkl")["a"]
    assert np.array_equal(found.numpy(), values)
