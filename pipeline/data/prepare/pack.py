"""Packing COCO-annotated pages into webdataset tars."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import DataError, OutputError
from pipeline.core.files import ensure_owned_dir, fingerprint, sha256_file, sync_folder, write_json
from pipeline.core.locks import file_lock
from pipeline.core.parallel import map_unordered
from pipeline.data.format.schema import (
    DATASET_FILE,
    FORMAT_VERSION,
    DatasetCategory,
    DatasetJson,
    Shard,
    index_path,
    read_dataset_json,
)
from pipeline.data.prepare.coco import Category, Page, group_pages, load_coco
from pipeline.data.prepare.shard_writer import ShardTask, write_shard

STAGING, PLAN, LOCK = ".building", "plan.json", ".packing.lock"

# Lower case; names of DocLayNet, PubLayNet, PRImA and HJDataset among them.
NON_TEXT_NAMES = frozenset(
    name
    for line in (
        "picture figure image imageregion illustration photo chart graphic graphicregion chartregion drawing stamp",
        "4_illustration 5_stamp table tableregion formula equation maths mathsregion separator separatorregion",
        "otherregion background",
    )
    for name in line.split()
)


def pack(
    annotations: Path,
    images: Path,
    out: Path,
    *,
    samples_per_shard: int = 256,
    text: Iterable[str] | None = None,
    repair: bool = False,
    workers: int = 0,
    on_ray: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DatasetJson:
    """Pack the pages of a COCO file into ``out``. The output is deterministic to the byte.

    Shards get their final names once all are written; ``dataset.json`` comes last. If interrupted, rerunning writes the
    missing shards only. A folder that already contains the same dataset is left unchanged.

    Args:
        annotations: COCO file.
        images: folder that the COCO ``file_name`` values are relative to.
        out: dataset folder.
        samples_per_shard: pages per tar.
        text: names of text classes; by default all except pictures, tables, formulas and the like.
        repair: clip boxes to the page and drop empty ones instead of raising.
        workers: number of processes; 0 chooses it by the amount of work.
        on_ray: pack on a Ray cluster, which must see the same folders.
        progress: called with (pages done, pages in total).

    Raises:
        DataError: if annotations are invalid, or images are missing or unreadable.
        OutputError: if ``out`` contains something else, cannot be written, or is being packed by another process.
    """
    coco = load_coco(annotations)
    pages = group_pages(coco, annotations, repair=repair)
    if not pages:
        raise DataError(f"{annotations} contains no images; give a COCO file with pages")
    categories = dataset_categories(coco.categories, text)
    source_hash = fingerprint(
        [sha256_file(annotations), samples_per_shard, repair, [category.model_dump() for category in categories]]
    )
    staging = out / STAGING
    if not _is_resumable(staging, source_hash):
        ensure_owned_dir(out, DATASET_FILE, "dataset")
    if (out / DATASET_FILE).exists():
        return _read_existing(out, source_hash)
    _check_images(pages, images)
    try:
        with _packing_lock(out):
            _prepare_staging(staging, source_hash)
            tasks = _shard_tasks(pages, images, staging, samples_per_shard)
            shards = _collect(map_unordered(write_shard, tasks, workers, on_ray), len(pages), progress)
            return _publish(tasks, shards, out, categories, source_hash)
    except DataError:  # invalid input cannot be resumed
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def _packing_lock(out: Path) -> Iterator[None]:
    with file_lock(out / LOCK, wait=False) as acquired:
        if not acquired:
            raise OutputError(f"{out} is being packed by another process; wait for it, or give another --out")
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)


def _read_existing(out: Path, source_hash: str) -> DatasetJson:
    existing = read_dataset_json(out)
    if existing.source != source_hash:
        raise OutputError(f"{out} already holds another dataset; give another --out, or delete it first")
    return existing


def dataset_categories(categories: Sequence[Category], text: Iterable[str] | None) -> list[DatasetCategory]:
    """Classes of a dataset in the order of their ids, each flagged as text or not.

    Raises:
        DataError: if ``text`` names a class that does not exist.
    """
    names = [category.name for category in categories]
    chosen = None if text is None else set(text)
    unknown = sorted((chosen or set()) - set(names))
    if unknown:
        raise DataError(f"--text: unknown classes {', '.join(unknown)}; the classes are {', '.join(names)}")
    return [
        DatasetCategory(
            id=category.id,
            name=category.name,
            text=category.name in chosen if chosen is not None else category.name.lower() not in NON_TEXT_NAMES,
        )
        for category in sorted(categories, key=lambda category: category.id)
    ]


def _check_images(pages: list[Page], images: Path) -> None:
    missing = [page.image.file_name for page in pages if not (images / page.image.file_name).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(pages)} images are not in {images}, such as {missing[0]!r}; "
            "--images must be the folder that file names are relative to"
        )


def _is_resumable(staging: Path, source_hash: str) -> bool:
    """Whether ``staging`` holds an unfinished packing of the same source."""
    try:
        return bool(json.loads((staging / PLAN).read_text())["source"] == source_hash)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _prepare_staging(staging: Path, source_hash: str) -> None:
    if not _is_resumable(staging, source_hash):
        shutil.rmtree(staging, ignore_errors=True)
        write_json(staging / PLAN, {"source": source_hash})


def _shard_tasks(pages: list[Page], images: Path, staging: Path, samples_per_shard: int) -> list[ShardTask]:
    return [
        ShardTask(
            path=staging / f"shard-{first // samples_per_shard:06d}.tar",
            pages=pages[first : first + samples_per_shard],
            images=images,
            first=first,
        )
        for first in range(0, len(pages), samples_per_shard)
    ]


def _collect(shards: Iterable[Shard], num_pages: int, progress: Callable[[int, int], None] | None) -> list[Shard]:
    """Shards by name, once all are written."""
    collected: list[Shard] = []
    for shard in shards:
        collected.append(shard)
        if progress is not None:
            progress(sum(entry.samples for entry in collected), num_pages)
    return sorted(collected, key=lambda shard: shard.name)


def _publish(
    tasks: list[ShardTask], shards: list[Shard], out: Path, categories: list[DatasetCategory], source_hash: str
) -> DatasetJson:
    """Move the shards to their final names and write ``dataset.json``."""
    for task in tasks:
        for path in (task.path, index_path(task.path)):
            if path.exists():  # otherwise an interrupted run moved it
                path.rename(out / path.name)
    sync_folder(out)
    dataset = DatasetJson(version=FORMAT_VERSION, categories=categories, shards=shards, source=source_hash)
    write_json(out / DATASET_FILE, dataset.model_dump())
    shutil.rmtree(out / STAGING, ignore_errors=True)
    return dataset
