"""Writing synthetic pages as images and a COCO file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.core.errors import OutputError
from pipeline.core.files import ensure_owned_dir, write_json
from pipeline.synth.categories import CATEGORIES, TEXT_CATEGORIES
from pipeline.synth.page import Region, draw_page

GENERATOR_VERSION = 1
JPEG_QUALITY = 90
ANNOTATIONS_FILE = "annotations.json"


def write_pages(
    out: Path,
    *,
    count: int,
    seed: int,
    width: int = 192,
    height: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Draw ``count`` pages of ``width`` x ``height`` px into ``out/images`` and annotate them in ``annotations.json``.

    The same arguments give the same bytes. A folder that already contains these pages is left unchanged.

    Raises:
        OutputError: if ``out`` contains something else or cannot be written.
    """
    info = {"generator": GENERATOR_VERSION, "seed": seed, "count": count, "width": width, "height": height}
    path = out / ANNOTATIONS_FILE
    ensure_owned_dir(out, "images", "folder of drawn pages")
    if path.exists():
        if json.loads(path.read_text(encoding="utf8")).get("info") != info:
            raise OutputError(f"{out} holds other pages than seed {seed}, {count} of {width} x {height}; give another")
        return path
    (out / "images").mkdir(exist_ok=True)
    content: dict[str, Any] = {"info": info, "images": [], "annotations": [], "categories": _categories()}
    for index in range(count):
        image, regions = draw_page(seed, index, width=width, height=height)
        name = f"page-{index:06d}.jpg"
        _save(image, out / "images" / name)
        content["images"].append({"id": index + 1, "file_name": name, "width": width, "height": height})
        content["annotations"] += _annotations(regions, index + 1, len(content["annotations"]) + 1)
        if progress is not None:
            progress(index + 1)
    return write_json(path, content)


def _categories() -> list[dict[str, Any]]:
    return [
        {"id": place, "name": name, "supercategory": "text" if name in TEXT_CATEGORIES else "non-text"}
        for place, name in enumerate(CATEGORIES, start=1)
    ]


def _save(image: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    path.write_bytes(buffer.getvalue())


def _annotations(regions: list[Region], image_id: int, first_id: int) -> list[dict[str, Any]]:
    entries = []
    for number, region in enumerate(regions, start=first_id):
        left, top, right, bottom = (round(value, 2) for value in region.box)
        wide, tall = round(right - left, 2), round(bottom - top, 2)
        entries.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": region.category + 1,
                "bbox": [left, top, wide, tall],
                "area": round(wide * tall, 2),
                "iscrowd": 0,
            }
        )
    return entries
