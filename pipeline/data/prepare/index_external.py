"""Indexing existing tars in place: made by other tools, or replaced since they were packed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pipeline.core.errors import DataError
from pipeline.core.parallel import map_unordered
from pipeline.data.format.scan import build_index
from pipeline.data.format.schema import (
    DATASET_FILE,
    FORMAT_VERSION,
    DatasetJson,
    Shard,
    read_dataset_json,
    write_dataset_json,
)
from pipeline.data.prepare.coco import Category
from pipeline.data.prepare.shard_writer import shard_entry
from pipeline.data.prepare.text_classes import categories_with_text


@dataclass(frozen=True, slots=True)
class _Task:
    path: Path
    excluded: tuple[str, ...]


def index_dataset(
    folder: Path,
    *,
    categories: Path | None = None,
    text: Iterable[str] | None = None,
    workers: int = 0,
    on_ray: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DatasetJson:
    """Index every tar of ``folder`` and update its ``dataset.json``, or write one for tars made by other tools.

    Args:
        folder: folder of the tars. Only indexes and ``dataset.json`` are written.
        categories: JSON file with the classes, a list of {id, name} or a COCO file; required without ``dataset.json``.
        text: names of the text classes, or only ``none``; by default told from the words of each name.
        workers: processes; 0 picks a number by the amount of work.
        on_ray: index on a Ray cluster, which must see the same folder.
        progress: called with (tars done, tars in total).

    Raises:
        DataError: naming the tar and the sample at fault, or if the classes are missing.
    """
    known = read_dataset_json(folder, changed=True) if (folder / DATASET_FILE).exists() else None
    if known is None:
        classes = categories_with_text(_read_categories(folder, categories), text)
        tasks = [_Task(path, ()) for path in sorted(folder.glob("*.tar"))]
    else:
        classes = known.categories
        tasks = [_Task(folder / shard.name, shard.excluded) for shard in known.shards]
    if not tasks:
        raise DataError(f"{folder} holds no .tar; give the folder of the tars")
    shards: list[Shard] = []
    for shard in map_unordered(_index, tasks, workers, on_ray):
        shards.append(shard)
        if progress is not None:
            progress(len(shards), len(tasks))
    shards.sort(key=lambda shard: shard.name)
    unchanged = known is not None and [shard.sha256 for shard in known.shards] == [shard.sha256 for shard in shards]
    source = known.source if known is not None and unchanged else ""
    dataset = DatasetJson(version=FORMAT_VERSION, categories=classes, shards=shards, source=source)
    write_dataset_json(folder, dataset)
    return dataset


def _index(task: _Task) -> Shard:
    samples = build_index(task.path, task.excluded).num_rows
    if not samples:
        raise DataError(f"{task.path} holds no samples; remove it from the folder")
    return shard_entry(task.path, samples, task.excluded)


def _read_categories(folder: Path, path: Path | None) -> list[Category]:
    if path is None:
        raise DataError(
            f"{folder} has no {DATASET_FILE}, so its classes are unknown; give --categories FILE, a JSON list of id "
            "and name or a COCO file"
        )
    try:
        content = json.loads(path.read_text(encoding="utf8"))
        listed = content.get("categories") if isinstance(content, dict) else content
        found = TypeAdapter(list[Category]).validate_python(listed)
    except (OSError, ValueError, ValidationError) as error:
        raise DataError(f"{path} lists no classes ({str(error).splitlines()[0]}); give [{{id, name}}, ...]") from error
    if not found:
        raise DataError(f"{path} lists no classes; give [{{id, name}}, ...]")
    return found
