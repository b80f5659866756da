"""Packing COCO-annotated pages into webdataset tars."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from pipeline.core.errors import DataError, OutputError
from pipeline.core.files import ensure_owned_dir, fingerprint, sha256_file, sync_folder
from pipeline.core.locks import checked_lock, file_lock
from pipeline.core.parallel import map_unordered
from pipeline.data.format.schema import (
    DATASET_FILE,
    FORMAT_VERSION,
    DatasetCategory,
    DatasetJson,
    Shard,
    index_path,
    read_dataset_json,
    write_dataset_json,
)
from pipeline.data.prepare.box_conventions import BoxOptions
from pipeline.data.prepare.coco import Page, check_coco, list_some, load_coco
from pipeline.data.prepare.shard_writer import ShardTask, changed_images, header_problems, write_shard
from pipeline.data.prepare.text_classes import categories_with_text

LISTED_IMAGES = 10  # in an error
STAGING, LOCK = ".building", ".packing.lock"


def pack(
    annotations: Path,
    images: Path,
    out: Path,
    *,
    samples_per_shard: int = 256,
    text: Iterable[str] | None = None,
    repair: bool = False,
    boxes: BoxOptions | None = None,
    workers: int = 0,
    on_ray: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DatasetJson:
    """Pack the pages of a COCO file into ``out``. The output is deterministic to the byte.

    Shards get their final names once all are written; ``dataset.json`` comes last. If interrupted, or if a page was
    bad, packing again writes only the shards that are missing or whose pages changed. A folder that already contains
    the same dataset is left unchanged.

    Args:
        annotations: COCO file.
        images: folder that the COCO ``file_name`` values are relative to.
        out: dataset folder.
        samples_per_shard: pages per tar.
        text: names of the text classes, or only ``none``; by default told from the words of each name.
        repair: clip boxes to the page and drop empty ones instead of raising.
        boxes: how boxes are written; by default as COCO has them.
        workers: number of processes; 0 chooses it by the amount of work.
        on_ray: pack on a Ray cluster, which must see the same folders.
        progress: called with (pages done, pages in total).

    Raises:
        DataError: if annotations are invalid, images are missing or unreadable, or the images of a packed dataset have
            changed.
        OutputError: if ``out`` contains something else, cannot be written, or is being packed by another process.
    """
    coco, options = load_coco(annotations), boxes or BoxOptions()
    checked = check_coco(coco, annotations, options, repair=repair)
    if not checked.pages:
        raise DataError(f"{annotations} contains no images; give a COCO file with pages")
    categories = categories_with_text(coco.categories, text)
    source_hash = _source_hash(annotations, samples_per_shard, repair, options, categories)
    if (existing := _finished(out, source_hash, images, workers, on_ray)) is not None:
        return existing
    _raise_bad_images(header_problems(checked.pages, images), len(checked.pages), images)
    with checked_lock(lambda: _check_owned(out), _packing_lock(out)):
        if (existing := _finished(out, source_hash, images, workers, on_ray)) is not None:  # in the meantime
            return existing
        _unpublish(out)
        tasks = _shard_tasks(checked.pages, images, out / STAGING, samples_per_shard)
        shards = _collect(map_unordered(write_shard, tasks, workers, on_ray), len(checked.pages), progress)
        dataset = DatasetJson(
            version=FORMAT_VERSION,
            categories=categories,
            shards=shards,
            source=source_hash,
            repairs=checked.repairs,
        )
        _publish(tasks, dataset, out)
    return dataset


def _source_hash(
    annotations: Path, samples_per_shard: int, repair: bool, options: BoxOptions, categories: list[DatasetCategory]
) -> str:
    content = [sha256_file(annotations), samples_per_shard, repair, [category.model_dump() for category in categories]]
    return fingerprint(content if options == BoxOptions() else [*content, asdict(options)])


@contextmanager
def _packing_lock(out: Path) -> Iterator[None]:
    with file_lock(out / LOCK, wait=False) as acquired:
        if not acquired:
            raise OutputError(f"{out} is being packed by another process; wait for it, or give another --out")
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)


def _finished(out: Path, source_hash: str, images: Path, workers: int, on_ray: bool) -> DatasetJson | None:
    """The dataset in ``out`` if it is finished. Raises unless it was packed from the same source."""
    if not (out / DATASET_FILE).exists():
        return None
    existing = read_dataset_json(out)
    if existing.source != source_hash:
        raise OutputError(f"{out} already holds another dataset; give another --out, or delete it first")
    tars = [(out / shard.name, images) for shard in existing.shards if index_path(out / shard.name).exists()]
    changed = [name for names in map_unordered(_changed, tars, workers, on_ray) for name in names]
    if changed:
        raise DataError(
            f"{len(changed)} images in {images} have changed since {out} was packed: {list_some(sorted(changed))}; "
            "give another --out, or delete it first"
        )
    shutil.rmtree(out / STAGING, ignore_errors=True)  # of a run that was killed at its end
    return existing


def _changed(task: tuple[Path, Path]) -> list[str]:
    return changed_images(*task)


def _check_owned(out: Path) -> None:
    """Raise OutputError if ``out`` holds something else than a dataset, finished or not."""
    if not (out / STAGING).is_dir():
        ensure_owned_dir(out, DATASET_FILE, "dataset")


def _raise_bad_images(problems: list[str], total: int, images: Path) -> None:
    if problems:
        raise DataError(
            f"{len(problems)} of {total} images in {images} cannot be packed: {list_some(problems, LISTED_IMAGES)}; "
            "replace them or remove them from the annotations; --images must be the folder that file names are "
            "relative to"
        )


def _unpublish(out: Path) -> None:
    """Move shards back that a run had moved to their final names before it was killed."""
    staging = out / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    for path in [*out.glob("shard-*.tar"), *out.glob("shard-*.index.arrow")]:
        path.rename(staging / path.name)


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


def _publish(tasks: list[ShardTask], dataset: DatasetJson, out: Path) -> None:
    """Move the shards to their final names and write ``dataset.json``."""
    for task in tasks:
        for path in (task.path, index_path(task.path)):
            path.rename(out / path.name)
    sync_folder(out)
    write_dataset_json(out, dataset)
    shutil.rmtree(out / STAGING, ignore_errors=True)
