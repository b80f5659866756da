"""Starting a run folder, or going on with the same run in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from graphkd.errors import OutputError
from pipeline.config import RunConfig, load_config
from pipeline.files import claim_folder, leftovers, write_atomic
from pipeline.runs.trained import CONFIG_FILE

# What may change between two starts of one run: where and how it runs, not what it computes.
FREE = (
    "engine",
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
)


def open_run_folder(config: RunConfig) -> None:
    """Make the run folder and store the resolved config in it, or check that the run there is this one.

    Raises OutputError where the folder holds something else, or a run with another config, naming the difference.
    """
    path = config.folder / CONFIG_FILE
    claim_folder(config.folder, CONFIG_FILE, "run")
    for left in leftovers(config.folder):
        left.unlink(missing_ok=True)
    content = config.model_dump(mode="json")
    if path.exists():
        changes = list(_changes(load_config(path).model_dump(mode="json"), content))
        if changes:
            raise OutputError(
                f"{config.folder} holds a run with another config: {'; '.join(changes[:4])}; "
                "give another name or run.folder, or delete it"
            )
    write_atomic(path, yaml.safe_dump(content, sort_keys=False))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in {**old, **new}:
        dotted = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if before == after or dotted in FREE:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changes(before, after, f"{dotted}.")
        else:
            yield f"{dotted} was {before!r}, is {after!r}"
