"""An exported bundle as a model of pages, on onnxruntime. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.core.errors import CheckpointError, DataError, first_line
from pipeline.core.files import read_text, sha256_file
from pipeline.core.parallel import available_cores
from pipeline.data.loading.augmentation import AugmentationConfig
from pipeline.predict.model import BUNDLE_FILE, Found, Runtime

DESCRIPTION = "bundle.json"
VERSION = 1
MAX_DESCRIPTION_BYTES = 1 << 20
OUTPUTS = ["labels", "boxes", "scores"]
Run = Callable[[dict[str, NDArray[Any]]], list[NDArray[Any]]]
"""From the inputs of the graph to its outputs."""


class BundleJson(BaseModel):
    """``bundle.json``: what a bundle holds."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int
    class_names: list[str] = Field(min_length=1)
    canvas: tuple[int, int]
    """Height and width, px."""
    shortest_edge: int
    """At which pages are shown, px."""
    precision: str
    weights_sha256: str
    """Of the checkpoint that was exported."""
    parameters: int | None = None
    gflops: float | None = None
    """Of convolutions and matrix products on a page; bundles of version 0.1 do not tell."""
    files: dict[str, str]
    """SHA-256 of each file."""


class BundleModel:
    """A bundle of ``graphkd export``.

    Args:
        folder: with ``model.onnx`` and ``bundle.json``.
        threads: of the runtime; None for all cores.
        runtime: that runs the graph.

    Raises:
        CheckpointError: if a file is missing or differs from its checksum.
        DataError: if the runtime is not installed.
    """

    def __init__(self, folder: Path, threads: int | None = None, runtime: Runtime = "onnxruntime") -> None:
        description = read_bundle(folder)
        self.class_names = description.class_names
        edge = description.shortest_edge
        self.view = AugmentationConfig(canvas=description.canvas, shortest_edge=(edge, edge))
        self.identity = description.files[BUNDLE_FILE]
        self.description = description
        start = _openvino if runtime == "openvino" else _onnxruntime
        self._run = start(folder / BUNDLE_FILE, threads or available_cores())

    def detect(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> list[Found]:
        """Detect on canvases [B, 3, H, W] of pages of ``sizes`` [B, 2]."""
        pages = zip(*self._run(model_inputs(images, sizes)), strict=True)
        return [
            Found(boxes=boxes[scores > 0], classes=labels[scores > 0], scores=scores[scores > 0])  # the rest is padding
            for labels, boxes, scores in pages
        ]


def model_inputs(images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Inputs of the graph for canvases [B, 3, H, W] of pages of ``sizes`` [B, 2], with boxes in canvas px."""
    return {
        "images": images.astype(np.float32) / np.float32(255),
        "orig_target_sizes": sizes[:, ::-1].copy(),
        "page_sizes": sizes,
    }


def read_bundle(folder: Path) -> BundleJson:
    """Read ``bundle.json`` and verify every file. Raises CheckpointError."""
    path = folder / DESCRIPTION
    try:
        found = BundleJson.model_validate(json.loads(read_text(path, MAX_DESCRIPTION_BYTES)))
    except (OSError, ValueError, ValidationError) as error:
        raise CheckpointError(f"{path} is no description of a bundle ({first_line(error)}); export it again") from error
    if found.version > VERSION:
        raise CheckpointError(f"{path} has version {found.version}, this release reads {VERSION}; install a newer one")
    for name, digest in found.files.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{folder} lacks {name}; export it again")
        if sha256_file(file) != digest:
            raise CheckpointError(f"{file} differs from its checksum in {DESCRIPTION}; export it again")
    if BUNDLE_FILE not in found.files:
        raise CheckpointError(f"{path} has no checksum of {BUNDLE_FILE}; export it again")
    return found


def _onnxruntime(path: Path, threads: int) -> Run:
    try:
        import onnxruntime
    except ImportError as error:
        raise DataError(f"{path} needs onnxruntime: pip install 'graphkd[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(OUTPUTS, inputs)


def _openvino(path: Path, threads: int) -> Run:
    try:
        import openvino
    except ImportError as error:
        raise DataError(f"{path} needs openvino: pip install openvino") from error
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(str(path), "CPU", settings)
    known = {name for given in model.inputs for name in given.names}

    def run(inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        found = model({name: values for name, values in inputs.items() if name in known})
        return [found[name] for name in OUTPUTS]

    return run
