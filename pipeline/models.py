"""Building detectors from configs, and loading those that runs have trained."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from graphkd.detectors import DetectorConfig, DetectorModule, build_detector
from graphkd.errors import ConfigError
from pipeline.config import RunConfig, load_config
from pipeline.core.errors import CheckpointError
from pipeline.core.files import fingerprint, shown
from pipeline.core.run_paths import CHECKPOINTS, CONFIG, step_folder
from pipeline.data.format.dataset import PackedDataset
from pipeline.pretrained import imagenet_download, packaged_weights
from pipeline.runs.checkpoint import (
    MANIFEST,
    Checkpoint,
    load_weights,
    newest_checkpoint,
    open_checkpoint,
    restore_module,
)
from pipeline.runs.evaluations import best_step, read_evaluations

log = logging.getLogger(__name__)

Canvas = tuple[int, int]
"""Height and width, px."""
DETECTOR_PREFIX = "detector."
RESTORED = "restored"  # in place of detector.weights where a checkpoint's follow


def new_detector(config: DetectorConfig, num_classes: int, canvas: Canvas, seed: int) -> DetectorModule:
    """Build a detector with initial weights: the backbone's from ``config.weights``, the others random by ``seed``."""
    tensors = _backbone_weights(config)
    download = imagenet_download(config.backbone) if config.weights == "imagenet" else nullcontext()
    with download, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_detector(config, num_classes, canvas, tensors)


def _backbone_weights(config: DetectorConfig) -> dict[str, Tensor] | None:
    """Weights for the backbone; None if it starts at random, or timm downloads them."""
    if config.weights in ("none", "imagenet", RESTORED):
        return None
    return packaged_weights(config.backbone) if config.weights == "package" else load_weights(Path(config.weights))


def load_detector(
    config: DetectorConfig, num_classes: int, canvas: Canvas, checkpoint: Checkpoint, device: torch.device
) -> DetectorModule:
    """Build a detector with a checkpoint's weights, in evaluation mode and without gradients.

    Raises:
        CheckpointError: if the checkpoint is of another architecture.
    """
    # With other weights than none, detectron2's ResNets are timm's, whose weights the checkpoint has.
    bare = config if config.weights == "none" else config.model_copy(update={"weights": RESTORED})
    detector = new_detector(bare, num_classes, canvas, seed=0)
    restore_module(detector, _detector_tensors(checkpoint), checkpoint.folder)
    return detector.to(device).eval().requires_grad_(False)


def load_initial_weights(detector: DetectorModule, checkpoint: Checkpoint, class_names: list[str]) -> list[str]:
    """Copy another run's weights where name and shape match. Return the names that keep their initial weights.

    Layers with entries for each class are copied only if the run had the same classes in the same order.

    Raises:
        CheckpointError: if fewer than half of the detector's tensors match.
    """
    own, tensors = detector.state_dict(), _detector_tensors(checkpoint)
    if checkpoint.class_names not in (None, class_names):
        tensors = {name: value for name, value in tensors.items() if not name.startswith(detector.CLASS_LAYERS)}
    fitting = {name: value for name, value in tensors.items() if name in own and own[name].shape == value.shape}
    if len(fitting) < len(own) / 2:
        raise CheckpointError(
            f"only {len(fitting)} of the detector's {len(own)} tensors fit those of {checkpoint.folder}; "
            "run.init needs a run with the same backbone and widths"
        )
    detector.load_state_dict(fitting, strict=False)
    return [name for name in own if name not in fitting]


def _detector_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    tensors = load_weights(checkpoint.weights)
    return {
        name.removeprefix(DETECTOR_PREFIX): value for name, value in tensors.items() if name.startswith(DETECTOR_PREFIX)
    }


def check_num_classes(stated: int | None, dataset: PackedDataset) -> None:
    """Raise ConfigError if ``stated``, from ``data.num_classes``, differs from the dataset's number of classes."""
    if stated is not None and stated != dataset.num_classes:
        raise ConfigError(
            f"data.num_classes is {stated}, but {dataset.location} has {dataset.num_classes} classes; "
            "change one of them, or leave num_classes out"
        )


def load_run_config(folder: Path) -> RunConfig:
    """Load the resolved config of a run folder.

    Raises:
        CheckpointError: if the folder is no run.
    """
    path = folder / CONFIG
    if not path.exists():
        raise CheckpointError(
            f"{shown(folder)} is no run: {CONFIG} is missing; give the folder of a run that was trained"
        )
    return load_config(path)


def best_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint that a run is evaluated and teaches with: of its highest AP in training, else the newest.

    Raises:
        CheckpointError: if there is no complete checkpoint.
    """
    best = best_step(read_evaluations(folder))
    try:
        checkpoint = None if best is None else open_checkpoint(step_folder(folder / CHECKPOINTS, best))
    except CheckpointError as error:
        log.warning("using the newest checkpoint instead of the best: %s", error)
        checkpoint = None
    checkpoint = checkpoint or newest_checkpoint(folder / CHECKPOINTS)
    if checkpoint is None:
        raise CheckpointError(f"{folder} has no complete checkpoint; train it first: graphkd train {folder / CONFIG}")
    return checkpoint


def find_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint given as its own folder, as ``checkpoints/``, or as a run folder.

    Raises:
        CheckpointError: if there is none that is complete.
    """
    if (path / MANIFEST).exists():
        return open_checkpoint(path)
    for root in (path, path / CHECKPOINTS):
        found = newest_checkpoint(root)
        if found is not None:
            return found
    raise CheckpointError(f"{path} holds no complete checkpoint; give a step folder or a run folder")


def detector_identity(config: DetectorConfig, checkpoint: Checkpoint) -> dict[str, str]:
    """Everything that a detector's outputs depend on, by name: its weights and its config."""
    left_out = {"weights"} if config.settings else {"weights", "settings"}  # which version 0.1 did not have
    return {
        "teacher weights": checkpoint.weights_sha256,
        "detector config": fingerprint(config.model_dump(mode="json", exclude=left_out)),
    }
