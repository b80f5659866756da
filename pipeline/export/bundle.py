"""Writing a bundle: the model, what docling and we need to use it, the proof that it agrees, and a card."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from graphkd import __version__
from graphkd.detectors.torchvision.common import TorchvisionDetector
from graphkd.errors import UserError
from pipeline.core.errors import OutputError
from pipeline.core.files import output_errors, sha256_file, write_atomic, write_json
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.augmentation import EVALUATION_VIEW
from pipeline.data.loading.loader import PageDataset
from pipeline.data.loading.order import SampleRef
from pipeline.export.card import model_card
from pipeline.export.gate import Parity, compare
from pipeline.export.onnx_model import OPSET, write_onnx
from pipeline.export.quantise import half, int8
from pipeline.predict.bundle import DESCRIPTION, VERSION, BundleModel
from pipeline.predict.model import BUNDLE_FILE
from pipeline.predict.native import NativeModel
from pipeline.predict.writers import docling_label

log = logging.getLogger(__name__)

Precision = Literal["fp32", "fp16", "int8"]
CALIBRATION_PAGES = 64
Progress = Callable[[str, int, int], None]


class ParityError(UserError):
    """An exported model differs from the trained one by more than the limits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSettings:
    """How a model is exported."""

    precision: Precision = "fp32"
    pages: int = 64
    """Pages on which the export is compared with the trained model."""
    reduce_range: bool = True
    """7-bit weights of int8, for CPUs without VNNI."""
    force: bool = False
    """Write what differs, too."""


def export_bundle(
    model: NativeModel,
    out: Path,
    data: PackedDataset,
    calibration: PackedDataset,
    settings: ExportSettings,
    progress: Progress = lambda phase, done, total: None,
) -> Parity:
    """Export ``model`` to the folder ``out``, which appears when it is complete.

    Args:
        model: trained, on the CPU.
        out: folder of the bundle; must not exist.
        data: pages on which the export is compared with the trained model.
        calibration: pages on which the activations of int8 are measured; of the training set.
        settings: of the export.
        progress: called with phase, done and total.

    Raises:
        ParityError: if the export differs by more than the limits and ``settings.force`` is False; nothing is written.
        OutputError: if ``out`` exists or cannot be written, or the detector is transformers'.
    """
    if out.exists():
        raise OutputError(f"{out} exists; give another --out, or delete it")
    with output_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            parity = _fill(model, Path(folder) / "bundle", data, calibration, settings, progress)
            if parity.faults and not settings.force:
                raise ParityError(
                    f"the {settings.precision} export differs from the trained model: {'; '.join(parity.faults)} "
                    f"({parity.pages} pages); --force writes it nevertheless"
                )
            (Path(folder) / "bundle").rename(out)
    return parity


def _fill(
    model: NativeModel,
    folder: Path,
    data: PackedDataset,
    calibration: PackedDataset,
    settings: ExportSettings,
    progress: Progress,
) -> Parity:
    folder.mkdir()
    _write_model(model, folder / BUNDLE_FILE, calibration, settings, progress)
    canvas, names = model.view.canvas, model.class_names
    write_json(folder / "config.json", _hugging_face_config(names))
    write_json(folder / "preprocessor_config.json", _preprocessor_config(canvas))
    description: dict[str, Any] = {
        "version": VERSION,
        "class_names": names,
        "canvas": list(canvas),
        "shortest_edge": model.view.shortest_edge[1],
        "precision": settings.precision,
        "weights_sha256": model.identity,
        "parameters": model.parameters(),
        "gflops": round(model.gflops(), 3),
        "opset": OPSET,
        "graphkd": __version__,
    }
    _describe(folder, description)
    exported = BundleModel(folder)
    parity = compare(
        model,
        exported,
        data,
        settings.precision,
        settings.pages,
        model.config.detector.nms_iou,
        lambda done, total: progress("parity", done, total),
    )
    write_json(folder / "parity.json", parity.to_dict())
    write_atomic(folder / "README.md", model_card(model, parity, str(data.location), folder))
    _describe(folder, description)
    return parity


def _describe(folder: Path, description: dict[str, Any]) -> None:
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.name != DESCRIPTION}
    write_json(folder / DESCRIPTION, description | {"files": files})


def _write_model(
    model: NativeModel, target: Path, calibration: PackedDataset, settings: ExportSettings, progress: Progress
) -> None:
    progress("graph", 0, 1)
    plain = target.with_name("fp32.onnx")
    write_onnx(_as_torchvision(model), model.view.canvas, plain)
    progress("graph", 1, 1)
    if settings.precision == "fp16":
        half(plain, target)
    elif settings.precision == "int8":
        int8(plain, target, _calibration_pages(model, calibration, progress), settings.reduce_range)
    else:
        shutil.copyfile(plain, target)
    plain.unlink()


def _as_torchvision(model: NativeModel) -> TorchvisionDetector:
    if isinstance(model.detector, TorchvisionDetector):
        return model.detector
    if model.config.detector.framework != "detectron2":
        raise OutputError(
            f"{model.config.detector.architecture} is not exported yet; torchvision's and detectron2's are"
        )
    from graphkd.detectors.detectron2.as_torchvision import as_torchvision
    from graphkd.detectors.detectron2.common import Detectron2Detector

    assert isinstance(model.detector, Detectron2Detector)
    return as_torchvision(model.detector, model.config.detector)


def _calibration_pages(
    model: NativeModel, dataset: PackedDataset, progress: Progress
) -> list[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    pages = PageDataset(dataset, model.view, seed=0, views=EVALUATION_VIEW)
    count = min(CALIBRATION_PAGES, len(dataset))
    found = []
    for number in range(count):
        page = pages[SampleRef(0, number * len(dataset) // count)]
        found.append((page.image, np.array(page.size, dtype=np.int64)))
        progress("calibration", number + 1, count)
    return found


def _hugging_face_config(names: list[str]) -> dict[str, Any]:
    """``config.json`` as docling reads it, which refuses labels that it does not know: text for those."""
    labels = [docling_label(name) or "text" for name in names]
    unmapped = [name for name in names if docling_label(name) is None]
    if unmapped:
        log.warning("docling has no label for %s, which its engine reads as text", ", ".join(unmapped))
    return {
        "model_type": "rt_detr_v2",  # transformers, which docling reads this with, must know it; nothing else is used
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        "original_labels": names,
    }


def _preprocessor_config(canvas: tuple[int, int]) -> dict[str, Any]:
    """For transformers' RTDetrImageProcessor: the largest page of its shape on the canvas, at the top left."""
    height, width = canvas
    return {
        "image_processor_type": "RTDetrImageProcessor",
        "do_resize": True,
        "size": {"max_height": height, "max_width": width},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "do_pad": True,
        "pad_size": {"height": height, "width": width},
    }
