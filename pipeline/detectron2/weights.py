"""Detectors that were trained elsewhere as finished runs here, and runs of ours as files for detectron2."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from graphkd.detectors import DetectorModule
from graphkd.detectors.detectron2.names import TensorMatch, detectron2_name, match_tensors, to_detectron2_tensors
from graphkd.distill import TrainingStep
from graphkd.method.config import MethodConfig
from pipeline.config import RunConfig
from pipeline.core.errors import CheckpointError
from pipeline.core.files import write_atomic
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.state import DataState
from pipeline.detectron2.checkpoint import Part, read_foreign
from pipeline.models import (
    CHECKPOINTS,
    best_checkpoint,
    check_num_classes,
    load_detector,
    load_run_config,
    new_detector,
)
from pipeline.runs.checkpoint import newest_checkpoint
from pipeline.runs.checkpoint_writer import take_snapshot, write_checkpoint
from pipeline.runs.folder import create_run_folder, store_config
from pipeline.train.schedule import build_optimizer

MODEL_PREFIX = "model."


def import_weights(path: Path, config: RunConfig, part: Part = "student") -> TensorMatch:
    """Make the run of ``config`` a finished one with the weights in ``path``; gives what fitted.

    Such a run teaches, is evaluated, and others start from it (``run.init``). What the file has nothing for keeps its
    first weights.

    Raises CheckpointError where fewer than half of the detector's tensors fit, or the run has checkpoints already.
    """
    dataset = PackedDataset(config.data.train, config.data.storage)
    detector = new_detector(config, check_num_classes(config, dataset))
    own = detector.state_dict()
    found = match_tensors(own, read_foreign(path, part), same_framework=config.detector.framework == "detectron2")
    if len(found.matched) < len(own) / 2:
        raise CheckpointError(
            f"only {len(found.matched)} of the detector's {len(own)} tensors are in {path} "
            f"(shapes differ in {len(found.shape_mismatch)}); give the config of the network that it was made with"
        )
    root = config.folder / CHECKPOINTS
    if newest_checkpoint(root) is not None:
        raise CheckpointError(f"{config.folder} has checkpoints already; give another run.folder")
    detector.load_state_dict(found.matched, strict=False)
    create_run_folder(config)
    store_config(config)
    module, schedule = TrainingStep(detector, MethodConfig()), config.schedule.scaled()
    position = schedule.steps * schedule.batch
    state = DataState(dataset=dataset.identity, seed=config.run.seed, batch=schedule.batch, position=position)
    optimizer = build_optimizer(module, schedule)
    write_checkpoint(root, take_snapshot(schedule.steps, module, optimizer, {"data": state.model_dump()}))
    return found


def export_weights(folder: Path, path: Path) -> int:
    """Write the detector of the run in ``folder`` as a ``.pth`` of detectron2's; gives the number of tensors.

    Raises CheckpointError where detectron2 has no such model, naming a tensor that has no name there.
    """
    config = load_run_config(folder)
    num_classes = config.data.num_classes or PackedDataset(config.data.train, config.data.storage).num_classes
    detector = load_detector(config, num_classes, best_checkpoint(folder), torch.device("cpu"))
    tensors = _detectron2_tensors(detector)
    buffer = io.BytesIO()
    torch.save({"model": tensors, "__author__": "graphkd"}, buffer)
    write_atomic(path, buffer.getvalue())
    return len(tensors)


def _detectron2_tensors(detector: DetectorModule) -> dict[str, Tensor]:
    own = detector.state_dict()
    if detector.spec.framework == "detectron2":
        return {name.removeprefix(MODEL_PREFIX): values for name, values in own.items()}
    for name in own:
        if detectron2_name(name.removeprefix(MODEL_PREFIX)) is None:
            raise CheckpointError(f"{name} has no place in a model of detectron2's; only ResNets in Faster R-CNN have")
    return {name: values.contiguous() for name, values in to_detectron2_tensors(own, MODEL_PREFIX).items()}
