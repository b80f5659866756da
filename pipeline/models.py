"""Building the detector of a run, and opening the one that a finished run trained."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from graphkd.detectors import DetectorModule, build_detector
from graphkd.errors import ConfigError
from pipeline.config import RunConfig, load_config
from pipeline.core.errors import CheckpointError
from pipeline.core.files import fingerprint
from pipeline.data.format.dataset import PackedDataset
from pipeline.runs.checkpoint import (
    Checkpoint,
    load_weights,
    newest_checkpoint,
    open_checkpoint,
    restore_module,
    step_folder,
)
from pipeline.runs.evaluations import best_step, read_evaluations

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
DETECTOR_PREFIX = "detector."


def new_detector(config: RunConfig, num_classes: int) -> DetectorModule:
    """The detector of ``config`` with its first weights, keyed by the run's seed."""
    weights = config.detector.weights
    tensors = None if weights in ("none", "imagenet") else load_weights(Path(weights))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return build_detector(config.detector, num_classes, config.data.view.canvas, tensors)


def load_initial_weights(detector: DetectorModule, folder: Path) -> list[str]:
    """Give ``detector`` the weights of the run in ``folder`` where name and shape fit; gives the names that did not.

    Raises CheckpointError where the run has no complete checkpoint, or fewer than half of the tensors fit.
    """
    checkpoint, own = best_checkpoint(folder), detector.state_dict()
    tensors = _detector_tensors(checkpoint)
    fitting = {name: value for name, value in tensors.items() if name in own and own[name].shape == value.shape}
    if len(fitting) < len(own) / 2:
        raise CheckpointError(
            f"only {len(fitting)} of the detector's {len(own)} tensors fit those of {checkpoint.folder}; "
            "run.init wants a run with the same backbone and widths"
        )
    detector.load_state_dict(fitting, strict=False)
    return [name for name in own if name not in fitting]


def check_num_classes(config: RunConfig, dataset: PackedDataset) -> int:
    """K of ``dataset``; raises ConfigError where the config says otherwise."""
    stated = config.data.num_classes
    if stated is not None and stated != dataset.num_classes:
        raise ConfigError(
            f"data.num_classes is {stated}, but {dataset.location} has {dataset.num_classes} classes; "
            "mend one of them, or leave num_classes out"
        )
    return dataset.num_classes


def load_run_config(folder: Path) -> RunConfig:
    """The resolved config of a run folder; raises CheckpointError where there is none."""
    path = folder / CONFIG_FILE
    if not path.exists():
        raise CheckpointError(
            f"{folder} is no run: {CONFIG_FILE} is missing; give the folder of a run that was trained"
        )
    return load_config(path)


def best_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint that a run is judged by and teaches with: of its best evaluation in training, else the newest.

    Raises CheckpointError where there is none that is complete.
    """
    best = best_step(read_evaluations(folder))
    try:
        checkpoint = None if best is None else open_checkpoint(step_folder(folder / CHECKPOINTS, best))
    except CheckpointError as error:
        log.warning("the newest checkpoint stands in for the best: %s", error)
        checkpoint = None
    checkpoint = checkpoint or newest_checkpoint(folder / CHECKPOINTS)
    if checkpoint is None:
        raise CheckpointError(
            f"{folder} has no complete checkpoint; train it first: graphkd train {folder / CONFIG_FILE}"
        )
    return checkpoint


def load_detector(config: RunConfig, num_classes: int, checkpoint: Checkpoint, device: torch.device) -> DetectorModule:
    """The detector with a checkpoint's weights, in evaluation mode and without gradients.

    Raises CheckpointError where the checkpoint is of another architecture.
    """
    bare = config.model_copy(update={"detector": config.detector.model_copy(update={"weights": "none"})})
    detector = new_detector(bare, num_classes)
    restore_module(detector, _detector_tensors(checkpoint), checkpoint.folder)
    return detector.to(device).eval().requires_grad_(False)


def _detector_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    tensors = load_weights(checkpoint.weights)
    return {
        name.removeprefix(DETECTOR_PREFIX): value for name, value in tensors.items() if name.startswith(DETECTOR_PREFIX)
    }


def find_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint given as its own folder, as ``checkpoints/`` or as a run folder."""
    if (path / "manifest.json").exists():
        return open_checkpoint(path)
    for root in (path, path / CHECKPOINTS):
        found = newest_checkpoint(root)
        if found is not None:
            return found
    raise CheckpointError(f"{path} holds no complete checkpoint; give a step folder or a run folder")


def detector_identity(config: RunConfig, checkpoint: Checkpoint) -> dict[str, str]:
    """What a teacher's signals depend on, by name: its weights and its detector config."""
    return {
        "teacher weights": checkpoint.weights_sha256,
        "detector config": fingerprint(config.detector.model_dump(mode="json", exclude={"weights"})),
    }
