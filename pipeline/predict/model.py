"""What predicts: a trained run or checkpoint on torch, or an exported bundle on onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import CheckpointError
from pipeline.data.loading.augmentation import AugmentationConfig

BUNDLE_FILE = "model.onnx"
Runtime = Literal["onnxruntime", "openvino"]
"""What runs a bundle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Detections of one page on its canvas, best first."""

    boxes: NDArray[np.float32]
    """[n, 4], xyxy in canvas px."""
    classes: NDArray[np.int64]
    scores: NDArray[np.float32]


class PageModel(Protocol):
    """A detector of pages on a fixed canvas."""

    class_names: list[str]
    view: AugmentationConfig
    """Canvas and size at which pages are shown."""
    identity: str
    """SHA-256 of its weights."""

    def detect(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> list[Found]:
        """Detect on canvases [B, 3, H, W], RGB, whose pages have ``sizes`` [B, 2]: height and width in px."""
        ...


def open_model(
    path: str | Path, device: str = "auto", threads: int | None = None, runtime: Runtime = "onnxruntime"
) -> PageModel:
    """Open a run folder, a checkpoint, or a bundle.

    Args:
        path: folder.
        device: auto, cpu or cuda; bundles run on the CPU.
        threads: of a bundle on the CPU; None for all cores.
        runtime: of a bundle.

    Raises:
        UserError: if it is none of these, damaged, or incomplete.
    """
    folder = Path(path)
    if (folder / BUNDLE_FILE).exists():
        from pipeline.predict.bundle import BundleModel

        return BundleModel(folder, threads, runtime)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give a run, a checkpoint, or a bundle of `graphkd export`")
    from pipeline.predict.native import open_native

    return open_native(folder, device)
