"""Asynchronous checkpoints: a CPU copy is taken between two steps, and a thread writes it while training continues."""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.core.errors import CheckpointError
from pipeline.core.files import sha256_file, sync_folder, write_atomic, write_json
from pipeline.core.run_paths import step_folder, step_folders
from pipeline.runs.checkpoint import AVERAGE, MANIFEST, MODEL, OPTIMIZER, STATE, STATE_VERSION, open_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A copy of a run's state on the CPU, which later steps do not change."""

    step: int
    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    """Moving average of the weights, if there is one."""
    optimizer: dict[str, Any]
    state: dict[str, Any]
    """Everything besides tensors; must be JSON-serialisable."""

    def first_nonfinite(self) -> str | None:
        """Name of the first weight that is not finite."""
        return next((name for name, value in self.model.items() if not torch.isfinite(value).all()), None)


def take_snapshot(
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    average: nn.Module | None = None,
) -> Snapshot:
    """Copy everything that a checkpoint holds to the CPU."""
    return Snapshot(
        step=step,
        model=_copy(module.state_dict()),
        average=None if average is None else _copy(average.state_dict()),
        optimizer=_copy(optimizer.state_dict()),
        state=state,
    )


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        return {name: _copy(part) for name, part in value.items()}
    return [_copy(part) for part in value] if isinstance(value, list) else value


def write_checkpoint(root: Path, snapshot: Snapshot) -> Path:
    """Write ``root/step-XXXXXXXX``: files, a manifest of their hashes, then the folder's final name.

    Raises:
        OutputError: if the disk is full or the folder cannot be written.
    """
    final = step_folder(root, snapshot.step)
    building = root / f".step-{snapshot.step:08d}.building"
    _remove_incomplete(root)
    try:
        # Serialised in memory first: neither library reports a full disk in a way that differs from damage.
        write_atomic(building / MODEL, save(snapshot.model))
        if snapshot.average is not None:
            write_atomic(building / AVERAGE, save(snapshot.average))
        write_atomic(building / OPTIMIZER, _serialize(snapshot.optimizer))
        write_json(building / STATE, {"version": STATE_VERSION, "step": snapshot.step, **snapshot.state})
        names = sorted(path.name for path in building.iterdir())
        hashes = {name: sha256_file(building / name) for name in names}
        write_json(building / MANIFEST, {"files": hashes})
        # Only a damaged checkpoint can be there: training resumes from the newest complete one.
        shutil.rmtree(final, ignore_errors=True)
        building.rename(final)
        sync_folder(root)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


def _serialize(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def prune(root: Path, keep: int, keep_every: int = 0, best: int | None = None) -> None:
    """Delete all checkpoints but the newest ``keep``, every ``keep_every`` steps (0: none), ``best``, and those in use.

    Only those that can be used count as kept; nothing is deleted while there are none. A checkpoint is in use while its
    :func:`in_use_marker` exists.
    """
    folders = step_folders(root)
    usable = islice((step for step, folder in reversed(folders.items()) if _is_usable(folder)), keep)
    oldest = min(usable, default=0)
    for step, folder in folders.items():
        spared = step == best or in_use_marker(root, step).exists() or (keep_every and step % keep_every == 0)
        if step < oldest and not spared:
            # The manifest first, so that a deletion cut off by a kill leaves no complete checkpoint.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def _is_usable(folder: Path) -> bool:
    try:
        open_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def in_use_marker(root: Path, step: int) -> Path:
    """File by which another process keeps the checkpoint of ``step`` while it reads it."""
    return root / f".in-use-{step:08d}"


def _remove_incomplete(root: Path) -> None:
    for folder in root.glob(".step-*.building"):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in step_folders(root).values():
        if not (folder / MANIFEST).exists():
            shutil.rmtree(folder, ignore_errors=True)


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread. A disk too slow for the cadence holds training up.

    Args:
        root: folder of checkpoints.
        keep: number of newest checkpoints to keep.
        keep_every: also keep one every so many steps; 0 keeps none.
        best: returns the step whose checkpoint is kept as the best.
    """

    def __init__(
        self, root: Path, keep: int, keep_every: int = 0, best: Callable[[], int | None] = lambda: None
    ) -> None:
        self.root = root
        self.keep = keep
        self.keep_every = keep_every
        self.best = best
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Queue a snapshot once the previous one is written. Raises the previous one's OutputError."""
        self.wait()
        self._pending = self._pool.submit(self._write, snapshot)

    def wait(self) -> None:
        """Wait for the queued snapshot to be written. Raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish writing and stop the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _write(self, snapshot: Snapshot) -> None:
        nonfinite = snapshot.first_nonfinite()
        if nonfinite is not None:
            log.error("the checkpoint of step %d is not kept: %s is not finite", snapshot.step, nonfinite)
            return
        write_checkpoint(self.root, snapshot)
        prune(self.root, self.keep, self.keep_every, self.best())
