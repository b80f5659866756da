"""Writing one tar of pages."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import webdataset as wds
import xxhash
from PIL import Image as PillowImage

from pipeline.core.errors import DataError
from pipeline.core.files import atomic_path, fingerprint, sha256_file, write_json
from pipeline.core.parallel import prefetch
from pipeline.data.format.images import DECODING_ERRORS, SOURCE_FORMATS, decode_rgb, open_image, thumbnail, upright_size
from pipeline.data.format.index import map_file
from pipeline.data.format.scan import build_index
from pipeline.data.format.schema import Shard, index_path
from pipeline.data.prepare.coco import Page

STORED_AS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}
"""Formats whose files are stored unchanged, and their extension; others are re-encoded as PNG."""
READ_THREADS = 8  # of headers and digests, which wait for storage


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

    @property
    def pages_hash(self) -> str:
        """Fingerprint of the annotations of these pages."""
        return fingerprint([self.first, *(_annotation(page) for page in self.pages)])


def write_shard(task: ShardTask) -> Shard:
    """Write one tar, its index and its entry, unless an earlier run did so from the same pages."""
    written = _written_before(task)
    if written is not None:
        return written
    task.entry_path.unlink(missing_ok=True)
    with (
        atomic_path(task.path) as temporary,
        temporary.open("wb") as stream,
        wds.TarWriter(stream, mtime=0, user="graphkd", group="graphkd") as writer,
    ):
        for number, page in enumerate(task.pages, start=task.first):
            writer.write(_sample(f"{number:09d}", page, task.images))
    build_index(task.path)
    shard = shard_entry(task.path, len(task.pages))
    write_json(task.entry_path, {"pages": task.pages_hash, "shard": shard.model_dump()})
    return shard


def _written_before(task: ShardTask) -> Shard | None:
    try:
        entry = json.loads(task.entry_path.read_text())
        current = entry["pages"] == task.pages_hash and not changed_images(task.path, task.images)
        return Shard.model_validate(entry["shard"]) if current else None
    except (OSError, ValueError, KeyError, TypeError):  # of a killed run, or of an earlier release
        return None


def changed_images(tar: Path, images: Path) -> list[str]:
    """Names of the tar's images that differ in ``images`` from what was packed; missing ones do not count."""
    table = pa.ipc.open_file(map_file(index_path(tar))).read_all()
    if "source_digest" not in table.column_names:
        return []
    names, digests = (table.column(name).to_pylist() for name in ("file_name", "source_digest"))
    paths = [find_image_file(images, name) for name in names]
    found = prefetch(_file_digest, paths, READ_THREADS, 2 * READ_THREADS)
    return [name for name, old, new in zip(names, digests, found, strict=True) if new not in (None, old)]


def _file_digest(path: Path | None) -> int | None:
    return None if path is None else xxhash.xxh3_64_intdigest(path.read_bytes())


def shard_entry(path: Path, samples: int, excluded: tuple[str, ...] = ()) -> Shard:
    """Entry of a tar in ``dataset.json``."""
    return Shard(
        name=path.name,
        samples=samples,
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
        index_sha256=sha256_file(index_path(path)),
        excluded=excluded,
    )


def find_image_file(images: Path, name: str) -> Path | None:
    """The file of a COCO ``file_name``, also if it has backslashes or is percent-encoded; None if there is none."""
    names = dict.fromkeys((name, name.replace("\\", "/"), unquote(name), unquote(name).replace("\\", "/")))
    return next((path for path in (images / candidate for candidate in names) if path.is_file()), None)


def header_problems(pages: Iterable[Page], images: Path) -> list[str]:
    """What is wrong with images as far as their headers show it: missing, unreadable, of another size."""
    checked = prefetch(lambda page: _header_problem(page, images), pages, READ_THREADS, 4 * READ_THREADS)
    return [problem for problem in checked if problem is not None]


def _header_problem(page: Page, images: Path) -> str | None:
    path = find_image_file(images, page.image.file_name)
    if path is None:
        return f"image {page.image.file_name!r} is missing"
    try:
        with path.open("rb") as file:
            image = open_image(file, SOURCE_FORMATS)
            if image.format == "PNG":  # its orientation may come after the pixels
                turned = image.size[::-1] == (page.image.width, page.image.height)
                return None if turned else _size_problem(path, image.size, page)
            return _size_problem(path, upright_size(image), page)
    except DECODING_ERRORS as error:
        return _unreadable(path, error)


def _unreadable(path: Path, error: BaseException) -> str:
    return f"image {path} cannot be read ({error})"


def _size_problem(path: Path, size: tuple[int, int], page: Page) -> str | None:
    stated = page.image.width, page.image.height
    if size == stated:
        return None
    return f"image {path} is {size[0]} x {size[1]} px as shown, but its annotation says {stated[0]} x {stated[1]}"


def _annotation(page: Page) -> dict[str, object]:
    return {
        "file_name": page.image.file_name,
        "width": page.image.width,
        "height": page.image.height,
        "image_id": page.image.id,
        "boxes": [list(region.bbox) for region in page.annotations],
        "category_ids": [region.category_id for region in page.annotations],
        "iscrowd": [region.iscrowd for region in page.annotations],
        "areas": [region.extent for region in page.annotations],
    }


def _sample(key: str, page: Page, images: Path) -> dict[str, object]:
    path = find_image_file(images, page.image.file_name)
    if path is None:
        raise DataError(f"image {page.image.file_name!r} is not in {images}; put it there or remove its annotations")
    source = path.read_bytes()
    try:
        image = open_image(source, SOURCE_FORMATS)
        kind = str(image.format)
        shown = decode_rgb(image)
    except DECODING_ERRORS as error:
        raise DataError(f"{_unreadable(path, error)}; replace it or remove it from the annotations") from error
    problem = _size_problem(path, shown.size, page)
    if problem is not None:
        raise DataError(f"{problem}; correct the annotation, whose boxes would not fit")
    seen = {"source_digest": xxhash.xxh3_64_intdigest(source), "thumbnail": thumbnail(shown).tobytes().hex()}
    content = source if kind in STORED_AS else _png(shown)
    return {"__key__": key, STORED_AS.get(kind, "png"): content, "json": {**_annotation(page), **seen}}


def _png(page: PillowImage.Image) -> bytes:
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()
