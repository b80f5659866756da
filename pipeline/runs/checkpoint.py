"""Checkpoints: a folder per step that counts only when its manifest is there and every hash fits.

``model.safetensors`` holds the weights, ``average.safetensors`` their moving average where there is one,
``optimizer.pt`` the optimiser, ``state.json`` the rest, and ``manifest.json``, written last, the SHA-256 of the
others. A folder gets its name only when it is whole.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.core.errors import CheckpointError
from pipeline.core.files import sha256_file

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
    """What it was saved with besides tensors."""
    weights: Path
    """File of the weights that the run is judged by: their average where there is one."""
    weights_sha256: str


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint below ``root``, or None; says in the log which it passed over and why."""
    for folder in sorted(step_folders(root), reverse=True):
        try:
            return open_checkpoint(folder)
        except CheckpointError as error:  # noqa: PERF203 - any of them may be damaged
            logger.warning("passed over %s", error)
    return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check one checkpoint folder; raises CheckpointError naming what is missing or does not fit its hash."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text())["files"]
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no complete checkpoint ({error}); give another") from error
    average = [AVERAGE] if AVERAGE in hashes else []
    for name in (MODEL, OPTIMIZER, STATE, *average):
        path = folder / name
        if not path.is_file() or sha256_file(path) != hashes.get(name):
            raise CheckpointError(f"{folder} is damaged: {name} does not fit its manifest; give another")
    if state.get("version") != STATE_VERSION:
        raise CheckpointError(f"{folder} has version {state.get('version')}, but this release reads {STATE_VERSION}")
    judged = AVERAGE if average else MODEL
    return Checkpoint(
        folder=folder,
        step=int(state["step"]),
        state=state,
        weights=folder / judged,
        weights_sha256=hashes[judged],
    )


def load_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or .pth file, never unpickling code; raises CheckpointError where it is neither."""
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
    """Load weights, all of them; raises CheckpointError naming the first that differ in name or shape."""
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
    """Load the optimiser's state; plain tensors and numbers only."""
    path = checkpoint.folder / OPTIMIZER
    try:
        optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} does not fit the optimiser ({str(error).splitlines()[0][:120]})") from error


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return root / f"step-{step:08d}"


def step_folders(root: Path) -> list[Path]:
    """Folders of checkpoints below ``root``, whole or not."""
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if re.fullmatch(r"step-\d{8}", path.name)]
