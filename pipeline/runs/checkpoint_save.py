"""Saving checkpoints beside training: a copy is taken between two steps, and a thread writes it while they go on."""

from __future__ import annotations

import io
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.files import sha256_file, sync_folder, write_atomic, write_json
from pipeline.runs.checkpoint import MANIFEST, MODEL, OPTIMIZER, STATE, STATE_VERSION, step_folders


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A copy of a run's state on the CPU, which later steps do not change."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    """What is kept besides tensors; must be JSON."""


def snapshot(step: int, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Snapshot:
    """Copy what a checkpoint holds."""
    return Snapshot(
        step=step, model=_copied(module.state_dict()), optimizer=_copied(optimizer.state_dict()), state=state
    )


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list) else value


def write_checkpoint(root: Path, taken: Snapshot) -> Path:
    """Write ``root/step-XXXXXXXX`` whole: files, their hashes in a manifest, then its name.

    Raises OutputError on a full disk, or where the folder cannot be written.
    """
    final = root / f"step-{taken.step:08d}"
    building = root / f".step-{taken.step:08d}.building"
    _remove_leftovers(root)
    try:
        # By way of bytes, since neither library says that a disk is full in a way that can be told from damage.
        write_atomic(building / MODEL, save(taken.model))
        write_atomic(building / OPTIMIZER, _saved(taken.optimizer))
        write_json(building / STATE, {"version": STATE_VERSION, "step": taken.step, **taken.state})
        hashes = {name: sha256_file(building / name) for name in (MODEL, OPTIMIZER, STATE)}
        write_json(building / MANIFEST, {"files": hashes})
        # Only a damaged one can stand there: a run goes on from the newest that is whole.
        shutil.rmtree(final, ignore_errors=True)
        building.rename(final)
        sync_folder(root)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def prune(root: Path, keep: int, keep_every: int = 0) -> None:
    """Drop all checkpoints but the newest ``keep`` and those of every ``keep_every`` steps (0: none of those)."""
    for folder in sorted(step_folders(root))[:-keep]:
        if not keep_every or int(folder.name.removeprefix("step-")) % keep_every:
            # Its manifest goes first, so that what a kill leaves of it counts as nothing.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(root: Path) -> None:
    for folder in root.glob(".step-*.building"):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in step_folders(root):
        if not (folder / MANIFEST).exists():
            shutil.rmtree(folder, ignore_errors=True)


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread; a disk that is slower than their rhythm holds training up."""

    def __init__(self, root: Path, keep: int, keep_every: int = 0) -> None:
        self.root = root
        self.keep = keep
        self.keep_every = keep_every
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, taken: Snapshot) -> None:
        """Hand over a snapshot; raises the OutputError of the one before, if that failed."""
        self.wait()
        self._pending = self._pool.submit(self._write, taken)

    def wait(self) -> None:
        """Return when what was handed over is written; raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _write(self, taken: Snapshot) -> None:
        write_checkpoint(self.root, taken)
        prune(self.root, self.keep, self.keep_every)
