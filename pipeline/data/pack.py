"""Packing COCO-annotated pages into webdataset tars."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import webdataset as wds
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError

from graphkd.errors import DataError, OutputError
from pipeline.data.coco import CocoFile, Page, load_coco, pages
from pipeline.data.format import DATASET_FILE, FORMAT_VERSION, DatasetCategory, DatasetJson, Shard, read_dataset_json
from pipeline.data.index import build_index
from pipeline.files import claim_folder, fingerprint, replaced, sha256_file, sync_folder, write_json

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
    progress: Callable[[int, int], None] | None = None,
) -> DatasetJson:
    """Pack the pages of a COCO file into ``out``; the same input gives the same bytes.

    Shards are written beside each other under final names only when whole, ``dataset.json`` last. A folder that holds
    this very dataset already is left as it is.

    Args:
        annotations: COCO file.
        images: folder that its file names are relative to.
        out: dataset folder.
        samples_per_shard: pages of one tar.
        text: names of the classes of text; by default all but pictures, tables, formulas and the like.
        repair: clip boxes to the page and drop empty ones instead of refusing them.
        progress: called with (pages done, pages in all).

    Raises:
        DataError: for mistakes in the annotations and for missing or unreadable images.
        OutputError: where ``out`` holds something else or cannot be written.
    """
    coco = load_coco(annotations)
    all_pages, _ = pages(coco, annotations, repair=repair)
    if not all_pages:
        raise DataError(f"{annotations} names no images; give a COCO file with pages")
    categories = _categories(coco, text)
    source = fingerprint(
        [sha256_file(annotations), samples_per_shard, repair, [category.model_dump() for category in categories]]
    )
    claim_folder(out, DATASET_FILE, "dataset")
    if (out / DATASET_FILE).exists():
        return _already_packed(out, source)
    _check_images(all_pages, images)
    return _write(all_pages, images, out, categories, source, samples_per_shard, progress)


def _already_packed(out: Path, source: str) -> DatasetJson:
    existing = read_dataset_json(out)
    if existing.source != source:
        raise OutputError(f"{out} already holds another dataset; give another --out, or delete it first")
    return existing


def _categories(coco: CocoFile, text: Iterable[str] | None) -> list[DatasetCategory]:
    names = [category.name for category in coco.categories]
    chosen = None if text is None else set(text)
    unknown = sorted((chosen or set()) - set(names))
    if unknown:
        raise DataError(f"--text names {', '.join(unknown)}, but the classes are {', '.join(names)}")
    return [
        DatasetCategory(
            id=category.id,
            name=category.name,
            text=category.name in chosen if chosen is not None else category.name.lower() not in NON_TEXT_NAMES,
        )
        for category in sorted(coco.categories, key=lambda category: category.id)
    ]


def _check_images(all_pages: list[Page], images: Path) -> None:
    missing = [page.image.file_name for page in all_pages if not (images / page.image.file_name).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(all_pages)} images are not in {images}, such as {missing[0]!r}; "
            "give the folder that file names are relative to"
        )


def _write(
    all_pages: list[Page],
    images: Path,
    out: Path,
    categories: list[DatasetCategory],
    source: str,
    samples_per_shard: int,
    progress: Callable[[int, int], None] | None,
) -> DatasetJson:
    building = out / ".building"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        shards = []
        for start in range(0, len(all_pages), samples_per_shard):
            path = building / f"shard-{start // samples_per_shard:06d}.tar"
            chunk = all_pages[start : start + samples_per_shard]
            shards.append(_write_shard(path, chunk, images, start))
            if progress is not None:
                progress(start + len(chunk), len(all_pages))
        for path in sorted(building.iterdir()):
            path.rename(out / path.name)
        sync_folder(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    dataset = DatasetJson(version=FORMAT_VERSION, categories=categories, shards=shards, source=source)
    write_json(out / DATASET_FILE, dataset.model_dump())
    return dataset


def _write_shard(path: Path, chunk: list[Page], images: Path, first: int) -> Shard:
    with (
        replaced(path) as temporary,
        temporary.open("wb") as stream,
        wds.TarWriter(stream, mtime=0, user="graphkd", group="graphkd") as writer,
    ):
        for number, page in enumerate(chunk, start=first):
            writer.write(_sample(f"{number:09d}", page, images))
    build_index(path)
    return Shard(name=path.name, samples=len(chunk), bytes=path.stat().st_size, sha256=sha256_file(path))


def _sample(key: str, page: Page, images: Path) -> dict[str, object]:
    content, extension = _image_bytes(images / page.image.file_name, page)
    annotation = {
        "file_name": page.image.file_name,
        "width": page.image.width,
        "height": page.image.height,
        "image_id": page.image.id,
        "boxes": [list(region.bbox) for region in page.annotations],
        "category_ids": [region.category_id for region in page.annotations],
        "iscrowd": [region.iscrowd for region in page.annotations],
    }
    return {"__key__": key, extension: content, "json": annotation}


def _image_bytes(path: Path, page: Page) -> tuple[bytes, str]:
    """The file as it is where it is a JPEG or PNG, otherwise the same pixels as PNG."""
    content = path.read_bytes()
    try:
        with PillowImage.open(io.BytesIO(content)) as image:
            kind, size = image.format, image.size
            image.load()
            if kind not in ("JPEG", "PNG"):
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "PNG")
                content, kind = buffer.getvalue(), "PNG"
    except (UnidentifiedImageError, OSError, SyntaxError, PillowImage.DecompressionBombError) as error:
        raise DataError(
            f"image {path} cannot be read ({error}); replace it or take it out of the annotations"
        ) from error
    if size != (page.image.width, page.image.height):
        raise DataError(
            f"image {path} is {size[0]} x {size[1]} px, but its annotation says {page.image.width} x "
            f"{page.image.height}; mend the annotation, whose boxes would not fit"
        )
    return content, "jpg" if kind == "JPEG" else "png"
