"""Exported bundles agree with the trained model, refuse to be written where they do not, and load without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphkd
from graphkd.detectors.torchvision.common import TorchvisionDetector
from pipeline.config import load_config
from pipeline.core.errors import CheckpointError, OutputError
from pipeline.data.format.dataset import PackedDataset
from pipeline.export import bundle as bundle_module
from pipeline.export.bundle import ParityError
from pipeline.export.gate import COMPARED_SCORE, compare
from pipeline.export.onnx_model import write_onnx
from pipeline.models import new_detector
from pipeline.predict.bench import bench
from pipeline.predict.bundle import BundleModel, model_inputs
from pipeline.predict.inputs import find_documents, read_pages
from pipeline.predict.model import Found
from pipeline.predict.page import PageSource
from tests.support.exports import export, train

pytestmark = pytest.mark.export
GFLOPS = 0.9  # of the small detector on 128 x 96 px
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def test_a_bundle_gives_what_the_trained_model_gives(trained: Path, exported: Path, dataset_folder: Path) -> None:
    native, bundled = graphkd.load(trained, threshold=0.05), graphkd.load(exported, threshold=0.05)
    regions = 0
    for first, second in zip(native.predict(dataset_folder), bundled.predict(dataset_folder), strict=True):
        regions += len(first)
        assert abs(len(first) - len(second)) <= 1  # one at the threshold
        if len(first) == len(second):
            np.testing.assert_allclose(first.scores, second.scores, atol=1e-3)
    assert regions > 20
    parity = json.loads((exported / "parity.json").read_text())
    assert parity["faults"] == [] and parity["unmatched"] == 0 and parity["regions"] > 20
    assert parity["box_difference"] < 1e-3 and parity["score_difference"] < 1e-3
    assert parity["ap_exported"] == pytest.approx(parity["ap_native"], abs=1e-3) and parity["ap_native"] > 0.2


def test_boxes_are_those_of_pages_of_any_size(exported: Path, trained: Path, dataset_folder: Path) -> None:
    (document,) = find_documents([dataset_folder])
    page = next(iter(read_pages(document, 72)))
    wide = page.image.resize((700, 260))  # type: ignore[union-attr]
    first, second = (next(graphkd.load(path, threshold=0.06).predict(wide)) for path in (trained, exported))
    np.testing.assert_allclose(first.boxes, second.boxes, atol=0.7)
    assert first.labels == second.labels


def test_a_bundle_describes_itself(exported: Path) -> None:
    names = {"model.onnx", "bundle.json", "config.json", "preprocessor_config.json", "parity.json", "README.md"}
    assert {path.name for path in exported.iterdir()} == names
    config = json.loads((exported / "config.json").read_text())
    assert config["id2label"] == {"0": "text", "1": "picture", "2": "title"}
    assert config["model_type"] == "rt_detr_v2"  # without one that transformers knows, docling does not read the labels
    assert config["original_labels"] == ["Text", "Picture", "Title"]
    card = (exported / "README.md").read_text()
    assert "Text, Picture, Title" in card and "resnet18" in card and "Warning" not in card


def test_the_graph_has_the_inputs_that_docling_feeds(exported: Path, dataset_folder: Path) -> None:
    """With sizes of pages only, as docling gives them, the page is the largest of its shape on the canvas."""
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["images", "orig_target_sizes"]
    assert [each.name for each in session.get_overridable_initializers()] == ["page_sizes"]
    assert [each.name for each in session.get_outputs()] == ["labels", "boxes", "scores"]
    (document,) = find_documents([dataset_folder])
    page = next(iter(read_pages(document, 72))).image  # type: ignore[union-attr]
    images = np.asarray(page).transpose(2, 0, 1)[None].astype(np.float32) / 255  # 96 x 128 px, as the canvas
    sizes = np.array([[96, 128]])
    given = {"images": np.repeat(images, 3, axis=0), "orig_target_sizes": np.repeat(sizes, 3, axis=0)}
    _, boxes, scores = session.run(None, given)
    np.testing.assert_allclose(boxes[2], boxes[0], atol=1e-3)
    expected = next(graphkd.load(exported, threshold=0.05).predict(page))
    np.testing.assert_allclose(boxes[0][scores[0] >= 0.05], expected.boxes, atol=1e-3)


LOADING = """
import sys, time

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "ray", "timm", "pyarrow"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Missing())
begin = time.perf_counter()
import graphkd
model = graphkd.load(sys.argv[1], threshold=0.05)
seconds = time.perf_counter() - begin
page = next(model.predict(sys.argv[2]))
print(len(page), round(seconds, 2))
"""


def test_a_bundle_loads_and_predicts_without_torch(exported: Path, coco_folder: Path) -> None:
    image = sorted((coco_folder / "images").iterdir())[0]
    command = [sys.executable, "-c", LOADING, str(exported), str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout.split()[0]) == len(next(graphkd.load(exported, threshold=0.05).predict(image)))


def test_what_differs_from_the_trained_model_is_not_written_unless_forced(
    trained: Path, dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(detector: TorchvisionDetector, canvas: tuple[int, int], path: Path) -> None:
        with torch.no_grad():
            for name, values in detector.named_parameters():
                if "fpn" in name:
                    values += 0.02
        write_onnx(detector, canvas, path)
        with torch.no_grad():
            for name, values in detector.named_parameters():
                if "fpn" in name:
                    values -= 0.02

    monkeypatch.setattr(bundle_module, "write_onnx", damaged)
    out = tmp_path / "bundle"
    with pytest.raises(ParityError, match=r"differs from the trained model.*--force"):
        export(trained, out, dataset_folder)
    assert list(tmp_path.iterdir()) == []
    assert export(trained, out, dataset_folder, force=True)["faults"]
    assert "**Warning:**" in (out / "README.md").read_text()
    with pytest.raises(OutputError, match="exists; give another --out"):
        export(trained, out, dataset_folder)


def test_a_model_that_finds_nothing_proves_nothing(exported: Path, dataset_folder: Path) -> None:
    model = BundleModel(exported)
    nothing = Found(boxes=np.zeros((0, 4), np.float32), classes=np.zeros(0, np.int64), scores=np.zeros(0, np.float32))
    model.detect = lambda images, _: [nothing] * len(images)  # type: ignore[method-assign]
    parity = compare(model, model, PackedDataset(dataset_folder), "fp32", 3, 0.5)
    assert "finds nothing" in parity.faults[0] and COMPARED_SCORE > 0.05


def test_a_region_at_the_limit_of_suppression_may_be_missing(exported: Path, dataset_folder: Path) -> None:
    """Of two boxes with an IoU of exactly .5, rounding decides whether the worse is kept; at .4 it does not."""

    def finding(count: int, right: float) -> BundleModel:
        boxes = np.array([[0, 0, 40, 40], [0, 0, right, 40]], dtype=np.float32)[:count]
        found = Found(boxes=boxes, classes=np.zeros(count, np.int64), scores=np.array([0.9, 0.5], np.float32)[:count])
        model = BundleModel(exported)
        model.detect = lambda images, _: [found] * len(images)  # type: ignore[method-assign]
        return model

    dataset = PackedDataset(dataset_folder)
    parity = compare(finding(2, 20.0), finding(1, 20.0), dataset, "fp32", 3, 0.5)
    assert (parity.ties, parity.unmatched, parity.faults) == (3, 0, [])
    parity = compare(finding(1, 16.0), finding(2, 16.0), dataset, "fp32", 3, 0.5)
    assert (parity.ties, parity.unmatched) == (0, 3) and "3 of 3 regions differ" in parity.faults[0]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_smaller_models_are_smaller_and_measured(
    precision: str, trained: Path, exported: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    """Whether a model this small keeps its AP in 8 bits is not the point; that it is measured is."""
    parity = export(trained, tmp_path / "small", dataset_folder, precision=precision, force=True)
    sizes = [(folder / "model.onnx").stat().st_size for folder in (tmp_path / "small", exported)]
    assert sizes[0] < {"fp16": 0.6, "int8": 0.5}[precision] * sizes[1]
    assert parity["ap_exported"] > parity["ap_native"] - 0.1 and parity["precision"] == precision
    convolutions = [node for node in nodes(tmp_path / "small") if node.op_type == "Conv"]
    quantised = [node for node in convolutions if node.input[1].endswith("DequantizeLinear_Output")]
    assert (0 < len(quantised) < len(convolutions)) == (precision == "int8")
    assert not any("rpn" in node.input[1] for node in quantised), "heads stay in float"


def nodes(folder: Path) -> list[Any]:
    import onnx

    return list(onnx.load(folder / "model.onnx").graph.node)


def test_a_damaged_or_incomplete_bundle_is_refused(exported: Path, tmp_path: Path) -> None:
    for damage, message in (
        ("flip", "differs from its checksum"),
        ("remove", "lacks config"),
        ("version", "version 9"),
    ):
        copy = tmp_path / damage
        shutil.copytree(exported, copy)
        if damage == "flip":
            content = bytearray((copy / "model.onnx").read_bytes())
            content[len(content) // 2] ^= 1
            (copy / "model.onnx").write_bytes(content)
        elif damage == "remove":
            (copy / "config.json").unlink()
        else:
            description = json.loads((copy / "bundle.json").read_text())
            (copy / "bundle.json").write_text(json.dumps(description | {"version": 9}))
        with pytest.raises(CheckpointError, match=message):
            graphkd.load(copy)
    description = json.loads((exported / "bundle.json").read_text())
    copy = tmp_path / "outside"
    shutil.copytree(exported, copy)
    files = description["files"] | {"../secret": "0"}
    (copy / "bundle.json").write_text(json.dumps(description | {"files": files}))
    with pytest.raises(CheckpointError, match="lacks"):
        graphkd.load(copy)


def test_models_are_timed_side_by_side(trained: Path, exported: Path, dataset_folder: Path) -> None:
    (document,) = find_documents([dataset_folder])
    pages = [page.image for page in islice(read_pages(document, 72), 2) if isinstance(page, PageSource)]
    found = bench([trained, exported], pages, threads=[1, 2], rounds=2)
    kinds = [("torch", 1), ("torch", 2), ("ONNX fp32", 1), ("ONNX fp32", 2)]
    assert [(row["kind"], row["threads"]) for row in found if "OpenVINO" not in row["kind"]] == kinds
    for row in found:
        assert row["total_ms"] >= row["network_ms"] > 0 and row["p90_ms"] >= row["total_ms"] * 0.5
        assert row["preparing_ms"] > 0 and row["finishing_ms"] > 0 and row["gflops"] == pytest.approx(GFLOPS, rel=0.5)
        assert row["peak_mb"] > 50 and row["mb"] > 1 and row["ap"] > 0.2 and row["parameters"] > 1e6
    assert found[2]["peak_mb"] < found[0]["peak_mb"], "a bundle needs no torch"
    for folder in (trained, exported):  # of the same weights
        assert json.loads((folder / "latency.json").read_text())["rows"] == found


@pytest.mark.slow
def test_a_retinanet_is_exported_likewise(dataset_folder: Path, tmp_path: Path) -> None:
    folder, ap = train(tmp_path, dataset_folder, 400, architecture="retinanet")
    assert ap > 0.05
    parity = export(folder, tmp_path / "bundle", dataset_folder)
    assert parity["regions"] > 20 and parity["unmatched"] == 0 and not parity["faults"]
    assert export(folder, tmp_path / "small", dataset_folder, precision="int8", force=True)["ap_exported"] > 0.02


def published_students() -> list[str]:
    """A config for each detector and backbone that a published pair has as its student."""
    found: dict[tuple[str, str], str] = {}
    for path in sorted((Path(__file__).parents[3] / "configs" / "published").glob("*.yaml")):
        detector = load_config(path).detector
        found.setdefault((detector.architecture, detector.backbone), path.stem)
    return sorted(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", published_students())
def test_every_published_student_is_exported(name: str, tmp_path: Path) -> None:
    """On small pages, with heads whose random weights are not all alike, for every class and place."""
    path = Path(__file__).parents[3] / "configs" / "published" / f"{name}.yaml"
    smaller = ["rpn_proposals=50", "rpn_proposals_before_nms=200", "score_threshold=0.01", "weights=none"]
    config = load_config(path, [f"detector.{each}" for each in smaller]).detector
    canvas, generator = (128, 96), torch.Generator().manual_seed(0)
    detector = new_detector(config, 5, canvas, 0).eval()
    assert isinstance(detector, TorchvisionDetector)
    with torch.no_grad():
        for part, values in detector.named_parameters():
            if ".head." in part or "roi_heads" in part:
                values += 0.02 * torch.randn(values.shape, generator=generator)
        write_onnx(detector, canvas, tmp_path / "model.onnx")
        images = torch.randint(0, 256, (2, 3, *canvas), generator=generator, dtype=torch.uint8)
        sizes = torch.tensor([canvas, (100, 80)])
        expected = detector.detect(detector.features(images, sizes))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    labels, boxes, scores = session.run(None, model_inputs(images.numpy(), sizes.numpy()))
    for page, other in enumerate(expected):
        kept = scores[page] > 0
        assert kept.sum() == len(other.boxes) > 3
        np.testing.assert_allclose(scores[page][kept], other.scores, atol=1e-3)  # the limit of the gate
        apart = np.abs(boxes[page][kept][:, None] - other.boxes.numpy()).max(axis=2)
        apart += 1000 * (labels[page][kept][:, None] != other.classes.numpy())
        assert (apart.min(axis=1) < 0.05).mean() > 0.97, "all but ties"


@pytest.mark.slow
@pytest.mark.detectron2
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("architecture", "steps"), [("faster_rcnn", 200), ("retinanet", 500)])
def test_a_student_of_detectron2_is_exported(
    architecture: str, steps: int, dataset_folder: Path, tmp_path: Path
) -> None:
    kind = {"framework": "detectron2", "architecture": architecture, "anchors_rounded": False}
    folder, ap = train(tmp_path, dataset_folder, steps, **kind)
    assert ap > 0, "the gate needs a model that finds something"
    parity = export(folder, tmp_path / "bundle", dataset_folder)
    assert parity["regions"] > 20 and parity["unmatched"] == 0 and not parity["faults"]
