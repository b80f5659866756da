"""Checkpoints: one folder per step, complete only with a manifest whose hashes all match.

``model.safetensors`` holds the weights, ``average.safetensors`` their moving average if there is one, ``optimizer.pt``
the optimizer, ``state.json`` the rest. ``manifest.json``, written last, has the SHA-256 of the others. A folder gets
its final name once it is complete.
"""

from __future__ import annotations

import json
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.core.errors import CheckpointError
from pipeline.core.files import sha256_file
from pipeline.core.run_paths import step_folders

logger = logging.getLogger(__name__)

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.pt", "state.json", "manifest.json"
AVERAGE = "average.safetensors"
STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    state: dict[str, Any]
    """Everything saved besides tensors."""
    weights: Path
    """Weights file for evaluation and teaching: the moving average if there is one."""
    weights_sha256: str


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint below ``root``, or None. Logs which ones were skipped and why."""
    for folder in reversed(step_folders(root).values()):
        try:
            return open_checkpoint(folder)
        except CheckpointError as error:  # noqa: PERF203 - any of them may be damaged
            logger.warning("skipped %s", error)
    return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify one checkpoint folder.

    Raises:
        CheckpointError: naming the file that is missing, or whose hash differs from the manifest.
    """
    try:
        hashes = json.loads((folder / MANIFEST).read_text())["files"]
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no complete checkpoint ({error}); give another") from error
    average = [AVERAGE] if AVERAGE in hashes else []
    for name in (MODEL, OPTIMIZER, STATE, *average):
        path = folder / name
        if not path.is_file() or sha256_file(path) != hashes.get(name):
            raise CheckpointError(f"{folder} is damaged: {name} does not match its manifest; give another")
    if state.get("version") != STATE_VERSION:
        raise CheckpointError(f"{folder} has version {state.get('version')}, but this release reads {STATE_VERSION}")
    weights = AVERAGE if average else MODEL
    return Checkpoint(
        folder=folder, step=int(state["step"]), state=state, weights=folder / weights, weights_sha256=hashes[weights]
    )


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a .safetensors or .pth file without unpickling code.

    Raises:
        CheckpointError: if the file does not exist or holds anything but a mapping of names to tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"weights {path} do not exist; give a .safetensors or .pth file") from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is no file of plain tensors ({first[:120]}); nothing else is loaded") from error
    tensors = content.get("model", content.get("state_dict", content)) if isinstance(content, dict) else None
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path} holds no mapping of names to tensors; give a state dict")
    return tensors


def restore_module(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Load all of a module's weights.

    Raises:
        CheckpointError: naming the first tensors that differ in name or shape.
    """
    own = module.state_dict()
    wrong = [f"{name} missing" for name in own if name not in tensors]
    wrong += [f"{name} unknown" for name in tensors if name not in own]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if wrong:
        raise CheckpointError(
            f"{source} is of another architecture: {len(wrong)} tensors differ ({'; '.join(wrong[:2])}); "
            "use the config it was trained with"
        )
    module.load_state_dict(tensors)


def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Load the optimizer's state; plain tensors and numbers only.

    Raises:
        CheckpointError: if it does not fit the optimizer.
    """
    path = checkpoint.folder / OPTIMIZER
    try:
        optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} does not fit the optimizer ({str(error).splitlines()[0][:120]})") from error
