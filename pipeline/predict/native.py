"""A trained run or checkpoint as a model of pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from graphkd.detectors import DetectorModule
from pipeline.config import RunConfig
from pipeline.core.distributed import resolve_device
from pipeline.core.errors import CheckpointError
from pipeline.core.run_paths import CHECKPOINTS, CONFIG
from pipeline.data.format.dataset import PackedDataset
from pipeline.models import best_checkpoint, find_checkpoint, load_detector, load_run_config
from pipeline.predict.model import Found
from pipeline.runs.checkpoint import MANIFEST, Checkpoint


class NativeModel:
    """A detector on torch.

    Args:
        detector: in evaluation mode.
        config: of its run.
        checkpoint: that it was loaded from.
        class_names: of its classes.
        device: that it runs on.
    """

    def __init__(
        self,
        detector: DetectorModule,
        config: RunConfig,
        checkpoint: Checkpoint,
        class_names: list[str],
        device: torch.device,
    ) -> None:
        self.detector, self.config, self.checkpoint = detector, config, checkpoint
        self.class_names, self.device = class_names, device
        self.view = config.data.view
        self.identity = checkpoint.weights_sha256

    def parameters(self) -> int:
        """Number of parameters."""
        return sum(values.numel() for values in self.detector.parameters())

    def gflops(self) -> float:
        """Billions of multiplications and additions in convolutions and matrix products for a blank page."""
        page = np.full((1, 3, *self.view.canvas), 255, dtype=np.uint8)
        with FlopCounterMode(display=False) as counter:
            self.detect(page, np.array([self.view.canvas], dtype=np.int64))
        return counter.get_total_flops() / 1e9

    @torch.inference_mode()
    def detect(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> list[Found]:
        """Detect on canvases [B, 3, H, W] of pages of ``sizes`` [B, 2]."""
        features = self.detector.features(torch.from_numpy(images).to(self.device), torch.from_numpy(sizes))
        return [
            Found(
                boxes=page.boxes.float().cpu().numpy(),
                classes=page.classes.cpu().numpy(),
                scores=page.scores.float().cpu().numpy(),
            )
            for page in self.detector.detect(features)
        ]


def open_native(path: Path, device: str = "auto") -> NativeModel:
    """Open the best checkpoint of a run folder, or a checkpoint folder.

    Raises:
        UserError: if there is none, or its class names are unknown.
    """
    if (path / MANIFEST).exists():
        checkpoint, run = find_checkpoint(path), path.parent.parent
    else:
        checkpoint, run = best_checkpoint(path), path
    if not (run / CONFIG).exists():
        raise CheckpointError(
            f"{path} is outside a run folder: {run / CONFIG} is missing; keep checkpoints in RUN/{CHECKPOINTS}"
        )
    config = load_run_config(run)
    names = checkpoint.class_names or PackedDataset(config.data.train, config.data.storage).class_names
    on = resolve_device(device)
    detector = load_detector(config.detector, len(names), config.data.view.canvas, checkpoint, on)
    return NativeModel(detector, config, checkpoint, list(names), on)
