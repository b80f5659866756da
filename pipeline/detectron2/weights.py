"""Importing checkpoints trained elsewhere as finished runs, and exporting runs as files for detectron2."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from graphkd.detectors import DetectorModule
from graphkd.detectors.detectron2.names import TensorMatch, detectron2_name, match_tensors, to_detectron2_tensors
from graphkd.distill import TrainingStep
from graphkd.method.config import MethodConfig
from pipeline.context import RunContext
from pipeline.core.errors import CheckpointError
from pipeline.core.files import write_atomic
from pipeline.core.run_paths import CHECKPOINTS
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.resume_state import DataState
from pipeline.detectron2.checkpoint import Part, read_checkpoint
from pipeline.models import best_checkpoint, load_detector, load_run_config, new_detector
from pipeline.runs.checkpoint import newest_checkpoint
from pipeline.runs.checkpoint_writer import take_snapshot, write_checkpoint
from pipeline.runs.run_folder import open_run_folder
from pipeline.train.schedule import build_optimizer

MODEL_PREFIX = "model."


def import_weights(path: Path, context: RunContext, part: Part = "student") -> TensorMatch:
    """Make the run of ``context`` a finished one with the weights in ``path``. Return which tensors matched.

    Such a run can teach, be evaluated, and be the start of others (``run.init``). Tensors that the file lacks keep
    their initial weights.

    Raises:
        CheckpointError: if fewer than half of the detector's tensors match, or the run has checkpoints already.
    """
    config, dataset = context.config, context.dataset
    detector = new_detector(config.detector, dataset.num_classes, config.data.view.canvas, config.run.seed)
    own = detector.state_dict()
    found = match_tensors(own, read_checkpoint(path, part), same_framework=config.detector.framework == "detectron2")
    if len(found.matched) < len(own) / 2:
        raise CheckpointError(
            f"only {len(found.matched)} of the detector's {len(own)} tensors are in {path} "
            f"(shapes differ in {len(found.shape_mismatch)}); give the config of the network that it was made with"
        )
    root = config.folder / CHECKPOINTS
    if newest_checkpoint(root) is not None:
        raise CheckpointError(f"{config.folder} has checkpoints already; give another run.folder")
    detector.load_state_dict(found.matched, strict=False)
    open_run_folder(config)
    module, schedule = TrainingStep(detector, MethodConfig()), config.schedule.scaled()
    position = schedule.steps * schedule.batch
    state = DataState(dataset=dataset.identity, seed=config.run.seed, batch=schedule.batch, position=position)
    optimizer = build_optimizer(module, schedule)
    content = {"data": state.model_dump(), "classes": [entry.model_dump() for entry in dataset.class_entries]}
    write_checkpoint(root, take_snapshot(schedule.steps, module, optimizer, content))
    return found


def export_weights(folder: Path, path: Path) -> int:
    """Write the detector of the run in ``folder`` as a ``.pth`` for detectron2. Return the number of tensors.

    Raises:
        CheckpointError: if detectron2 has no such model, naming a tensor without a counterpart.
    """
    config = load_run_config(folder)
    checkpoint, canvas = best_checkpoint(folder), config.data.view.canvas
    names = checkpoint.class_names or PackedDataset(config.data.train, config.data.storage).class_names
    detector = load_detector(config.detector, len(names), canvas, checkpoint, torch.device("cpu"))
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
            raise CheckpointError(
                f"{name} has no counterpart in detectron2; only ResNets in Faster R-CNN can be exported"
            )
    return {name: values.contiguous() for name, values in to_detectron2_tensors(own, MODEL_PREFIX).items()}
