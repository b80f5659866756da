"""Saving checkpoints beside training: a copy is taken between two steps, and a thread writes it while they go on."""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.core.files import sha256_file, sync_folder, write_atomic, write_json
from pipeline.runs.checkpoint import (
    AVERAGE,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    STATE_VERSION,
    step_folder,
    step_folders,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A copy of a run's state on the CPU, which later steps do not change."""

    step: int
    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    """Moving average of the model, where there is one."""
    optimizer: dict[str, Any]
    state: dict[str, Any]
    """What is kept besides tensors; must be JSON."""

    def first_nonfinite(self) -> str | None:
        """The name of the first of its weights that is not finite."""
        return next((name for name, value in self.model.items() if not torch.isfinite(value).all()), None)


def take_snapshot(
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    average: nn.Module | None = None,
) -> Snapshot:
    """Copy what a checkpoint holds."""
    return Snapshot(
        step=step,
        model=_copied(module.state_dict()),
        average=None if average is None else _copied(average.state_dict()),
        optimizer=_copied(optimizer.state_dict()),
        state=state,
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
    final = step_folder(root, taken.step)
    building = root / f".step-{taken.step:08d}.building"
    _remove_leftovers(root)
    try:
        # By way of bytes, since neither library says that a disk is full in a way that can be told from damage.
        write_atomic(building / MODEL, save(taken.model))
        if taken.average is not None:
            write_atomic(building / AVERAGE, save(taken.average))
        write_atomic(building / OPTIMIZER, _saved(taken.optimizer))
        write_json(building / STATE, {"version": STATE_VERSION, "step": taken.step, **taken.state})
        names = sorted(path.name for path in building.iterdir())
        hashes = {name: sha256_file(building / name) for name in names}
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


def prune(root: Path, keep: int, keep_every: int = 0, best: int | None = None) -> None:
    """Drop all checkpoints but the newest ``keep``, those of every ``keep_every`` steps (0: none) and of ``best``.

    One with a :func:`in_use_marker` stays too.
    """
    for folder in sorted(step_folders(root))[:-keep]:
        step = int(folder.name.removeprefix("step-"))
        if step != best and not in_use_marker(root, step).exists() and (not keep_every or step % keep_every):
            # Its manifest goes first, so that what a kill leaves of it counts as nothing.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def in_use_marker(root: Path, step: int) -> Path:
    """The file that keeps the checkpoint of ``step`` from being dropped, for another process that reads it."""
    return root / f".in-use-{step:08d}"


def _remove_leftovers(root: Path) -> None:
    for folder in root.glob(".step-*.building"):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in step_folders(root):
        if not (folder / MANIFEST).exists():
            shutil.rmtree(folder, ignore_errors=True)


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread; a disk that is slower than their rhythm holds training up.

    Args:
        root: folder of checkpoints.
        keep: how many of the newest are kept.
        keep_every: of every so many steps one is kept; 0 keeps none of them.
        best: asked for the step whose checkpoint is kept as the best.
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
        damaged = taken.first_nonfinite()
        if damaged is not None:
            log.error("the checkpoint of step %d is not kept: %s is not finite", taken.step, damaged)
            return
        write_checkpoint(self.root, taken)
        prune(self.root, self.keep, self.keep_every, self.best())
