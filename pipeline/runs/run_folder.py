"""Creating a run folder, checking that it belongs to a config, and its exclusive lock."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from graphkd.errors import UserError
from pipeline.config import RunConfig, load_config
from pipeline.core.errors import NoLocksError, OutputError
from pipeline.core.files import ensure_owned_dir, stale_temp_files, write_atomic
from pipeline.core.jsonl import append_jsonl
from pipeline.core.locks import checked_lock, file_lock
from pipeline.core.run_paths import CHECKPOINTS, CONFIG, CONFIG_CHANGES, LOCK, METRICS, WRITTEN_BY_JOBS, step_folders

log = logging.getLogger(__name__)

LOCK_WAIT_S = 60.0  # a killed start's processes need some time to end
POLL_S = 0.2
MAX_CHANGES = 4  # listed in an error
# Keys that may change between two starts of a run: where and how it runs, not what it computes.
RUNTIME_KEYS = (
    "engine",
    "compute.channels_last",
    "compute.compile",
    "schedule.accumulate",
    "data.train",  # it may move; checkpoints store the dataset's identity
    "data.loader_workers",
    "data.storage",
    "data.bad_samples",
    "teacher.cache",  # it may move too
    "teacher.compression",
    "run.folder",
    "run.checkpoint_every",
    "run.keep",
    "run.keep_every",
    "run.log_every",
    "run.ledger",
    "run.eval_batch",
    "run.detection_limit",
    "run.eval_every",
    "run.eval_on",
    "run.patience",
)


def open_run_folder(config: RunConfig, allow_changes: bool = False) -> None:
    """Create the run folder with the resolved config, or check that an existing one belongs to the same run.

    Raises:
        OutputError: if the folder holds something else, cannot be written, is being trained, or belongs to a run with
            another config, naming the differences; ``allow_changes`` accepts those and records them.
    """
    with checked_lock(
        lambda: ensure_owned_dir(config.folder, CONFIG, "run", also=WRITTEN_BY_JOBS), run_lock(config.folder)
    ):
        _store_config(config, allow_changes)


def _store_config(config: RunConfig, allow_changes: bool) -> None:
    path = config.folder / CONFIG
    for temporary in stale_temp_files(config.folder):
        temporary.unlink(missing_ok=True)
    content = config.model_dump(mode="json")
    if path.exists() and _has_trained(config.folder):
        changes = list(_differences(load_config(path).model_dump(mode="json"), content))
        if changes and not allow_changes:
            raise OutputError(
                f"{config.folder} holds a run with another config: {'; '.join(changes[:MAX_CHANGES])}; "
                "give another name or run.folder, delete it, or continue under the new config with --allow-changes"
            )
        if changes:
            log.warning("%s continues under another config: %s", config.folder, "; ".join(changes))
            append_jsonl(config.folder / CONFIG_CHANGES, {"time": time.time(), "changes": changes})
    write_atomic(path, yaml.safe_dump(content, sort_keys=False))


def _has_trained(folder: Path) -> bool:
    """Whether something would be lost under another config: a start that failed before its first step binds nothing."""
    return bool(step_folders(folder / CHECKPOINTS)) or (folder / METRICS).exists()


@contextmanager
def discarded_on_error(folder: Path) -> Iterator[None]:
    """Remove a run folder that is created within, if the run is refused before its workers start."""
    is_new = not folder.exists()
    try:
        yield
    except UserError:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in {**old, **new}:
        dotted = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if before == after or dotted in RUNTIME_KEYS:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{dotted}.")
        else:
            yield f"{dotted} was {before!r}, is {after!r}"


@contextmanager
def run_lock(folder: Path, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
    """Exclusive lock of a run folder, after waiting up to ``wait_s`` for processes of a killed start.

    Raises:
        OutputError: if another process is training the run.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            with file_lock(folder / LOCK, wait=False) as held:
                if held:
                    yield
                    return
        except NoLocksError as error:
            log.warning("nothing prevents a second process from training the same run: %s", error)
            yield
            return
        if time.monotonic() > deadline:
            raise OutputError(
                f"{folder} is being trained by another process; wait for it to end, end it, or give another run.folder"
            )
        time.sleep(POLL_S)
