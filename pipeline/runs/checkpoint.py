"""Checkpoints: one folder per step, complete only with a manifest whose hashes all match.

``model.safetensors`` holds the weights, ``average.safetensors`` their moving average if there is one, ``optimizer.pt``
the optimizer, ``state.json`` the rest. ``manifest.json``, written last, has the SHA-256 of the others. A folder gets
its final name once it is complete.

A checkpoint that cannot be used is not an absent one: damaged ones are skipped for older ones, but none is ignored.
"""

from __future__ import annotations

import json
import logging
import pickle
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.core.errors import CheckpointError, DamagedCheckpointError
from pipeline.core.files import check_regular, sha256_file, shown
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

    @property
    def class_names(self) -> list[str] | None:
        """Classes of its detector; None if it was saved by an earlier release."""
        classes = self.state.get("classes")
        return None if classes is None else [each["name"] for each in classes]


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint below ``root``, or None if there are none. Logs which ones are damaged.

    Raises:
        CheckpointError: if all of them are damaged, or the newest cannot be read or is of another release.
    """
    damaged: list[DamagedCheckpointError] = []
    for folder in reversed(_step_folders(root)):
        try:
            return open_checkpoint(folder)
        except DamagedCheckpointError as error:  # noqa: PERF203 - any of them may be
            logger.warning("skipped %s", error)
            damaged.append(error)
    if damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {root} can be used ({damaged[0]}); restore one, or delete the "
            "folder to start anew"
        )
    return None


def _step_folders(root: Path) -> list[Path]:
    try:
        return list(step_folders(root).values())
    except OSError as error:
        raise _unreadable(root, error) from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify one checkpoint folder. Each file is hashed once per process.

    Raises:
        DamagedCheckpointError: naming the file that is missing, or whose hash differs from the manifest.
        CheckpointError: if it is of another release, or cannot be read, which says nothing about its content.
    """
    try:
        return _open(folder)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{folder} is no complete checkpoint ({error}); give another") from error
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({error.strerror}); check its file system and access rights, then run again"
    )


def _open(folder: Path) -> Checkpoint:
    hashes = json.loads((folder / MANIFEST).read_text())["files"]
    content = (folder / STATE).read_text()
    average = [AVERAGE] if AVERAGE in hashes else []
    for name in (MODEL, OPTIMIZER, STATE, *average):
        if _sha256(folder / name) != hashes.get(name):
            raise DamagedCheckpointError(f"{folder} is damaged: {name} does not match its manifest; give another")
    state = json.loads(content)
    if state.get("version") != STATE_VERSION:
        raise CheckpointError(
            f"{folder} has version {state.get('version')}, but this release reads {STATE_VERSION}; install one that "
            "reads it"
        )
    weights = AVERAGE if average else MODEL
    return Checkpoint(
        folder=folder, step=int(state["step"]), state=state, weights=folder / weights, weights_sha256=hashes[weights]
    )


def _sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_of_version(path, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=256)
def _sha256_of_version(path: Path, *_: int) -> str:
    return sha256_file(path)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a .safetensors or .pth file without unpickling code.

    Raises:
        CheckpointError: if the file does not exist or holds anything but a mapping of names to tensors.
    """
    try:
        check_regular(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"weights {shown(path)} do not exist; give a .safetensors or .pth file") from error
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
    wrong = [
        f"{name} missing"
        for name in own
        if name not in tensors and not name.endswith("num_batches_tracked")  # which older exports lack
    ]
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
    module.load_state_dict(tensors, strict=False)


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
