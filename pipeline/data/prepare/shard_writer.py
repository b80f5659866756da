"""Writing one tar of pages."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import webdataset as wds
from PIL import Image as PillowImage

from pipeline.core.errors import DataError
from pipeline.core.files import atomic_path, sha256_file, write_json
from pipeline.data.format.images import DECODING_ERRORS
from pipeline.data.format.index import build_index
from pipeline.data.format.schema import Shard
from pipeline.data.prepare.coco import Page


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One tar to write."""

    path: Path
    pages: list[Page]
    images: Path
    """Folder of the page images."""
    first: int
    """Number of the first page."""

    @property
    def entry_path(self) -> Path:
        """File with the tar's entry for ``dataset.json``, written after the tar."""
        return self.path.with_suffix(".json")


def write_shard(task: ShardTask) -> Shard:
    """Write one tar, its index and its entry, unless a previous run did."""
    if task.entry_path.exists():
        return Shard.model_validate_json(task.entry_path.read_text())
    with (
        atomic_path(task.path) as temporary,
        temporary.open("wb") as stream,
        wds.TarWriter(stream, mtime=0, user="graphkd", group="graphkd") as writer,
    ):
        for number, page in enumerate(task.pages, start=task.first):
            writer.write(_sample(f"{number:09d}", page, task.images))
    build_index(task.path)
    shard = shard_entry(task.path, len(task.pages))
    write_json(task.entry_path, shard.model_dump())
    return shard


def shard_entry(path: Path, samples: int, excluded: tuple[str, ...] = ()) -> Shard:
    """Entry of a tar in ``dataset.json``."""
    return Shard(
        name=path.name, samples=samples, bytes=path.stat().st_size, sha256=sha256_file(path), excluded=excluded
    )


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
    """Bytes and extension of an image: JPEG and PNG files unchanged, others re-encoded as PNG."""
    content = path.read_bytes()
    try:
        with PillowImage.open(io.BytesIO(content)) as image:
            kind, size = image.format, image.size
            image.load()
            if kind not in ("JPEG", "PNG"):
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "PNG")
                content, kind = buffer.getvalue(), "PNG"
    except DECODING_ERRORS as error:
        raise DataError(
            f"image {path} cannot be read ({error}); replace it or remove it from the annotations"
        ) from error
    if size != (page.image.width, page.image.height):
        raise DataError(
            f"image {path} is {size[0]} x {size[1]} px, but its annotation says {page.image.width} x "
            f"{page.image.height}; correct the annotation, whose boxes would not fit"
        )
    return content, "jpg" if kind == "JPEG" else "png"
