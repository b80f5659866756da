"""Starting a run folder, or going on with the same run in it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import RunConfig, load_config
from pipeline.core.errors import OutputError
from pipeline.core.files import append_line, ensure_owned_dir, stale_temp_files, write_atomic
from pipeline.models import CONFIG_FILE

log = logging.getLogger(__name__)

CHANGES_FILE = "changes.jsonl"
SHOWN = 4
JOB_FILES = ("cluster", "jobs.jsonl", "lives.jsonl")
"""What is in the folder of a run that was submitted before it began."""
# What may change between two starts of one run: where and how it runs, not what it computes.
RUNTIME_KEYS = (
    "engine",
    "compute.channels_last",
    "compute.compile",
    "schedule.accumulate",
    "data.train",  # it may move; checkpoints name its identity
    "data.loader_workers",
    "data.storage",
    "data.bad_samples",
    "teacher.cache",  # likewise
    "teacher.compression",
    "run.folder",
    "run.checkpoint_every",
    "run.keep",
    "run.keep_every",
    "run.log_every",
    "run.ledger",
    "run.eval_batch",
    "run.eval_every",
    "run.eval_on",
    "run.patience",
)


def create_run_folder(config: RunConfig) -> Path:
    """Make the run folder; raises OutputError where it holds something that is no run, or cannot be written."""
    ensure_owned_dir(config.folder, CONFIG_FILE, "run", also=JOB_FILES)
    return config.folder


def store_config(config: RunConfig, allow_changes: bool = False) -> None:
    """Store the resolved config in the run folder, or check that the run there is this one.

    Raises OutputError where it is a run with another config, naming the difference, unless that is allowed.
    """
    path = config.folder / CONFIG_FILE
    for left in stale_temp_files(config.folder):
        left.unlink(missing_ok=True)
    content = config.model_dump(mode="json")
    if path.exists():
        changes = list(_config_diff(load_config(path).model_dump(mode="json"), content))
        if changes and not allow_changes:
            raise OutputError(
                f"{config.folder} holds a run with another config: {'; '.join(changes[:SHOWN])}; "
                "give another name or run.folder, delete it, or go on under the new one with --allow-changes"
            )
        if changes:
            log.warning("%s goes on under another config: %s", config.folder, "; ".join(changes))
            append_line(config.folder / CHANGES_FILE, json.dumps({"time": time.time(), "changes": changes}))
    write_atomic(path, yaml.safe_dump(content, sort_keys=False))


def _config_diff(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in {**old, **new}:
        dotted = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if before == after or dotted in RUNTIME_KEYS:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _config_diff(before, after, f"{dotted}.")
        else:
            yield f"{dotted} was {before!r}, is {after!r}"
