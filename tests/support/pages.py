"""Small annotated pages, drawn here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CATEGORIES = [
    {"id": 3, "name": "Text", "supercategory": ""},
    {"id": 5, "name": "Picture", "supercategory": ""},
    {"id": 9, "name": "Title", "supercategory": ""},
]


def draw_regions(index: int, width: int, height: int) -> tuple[Image.Image, list[tuple[int, list[float]]]]:
    """A page with a title bar, two blocks of lines and a grey picture, at places that depend on ``index``."""
    random = np.random.default_rng(index)
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    regions: list[tuple[int, list[float]]] = []
    top = 8
    for category, tall in ((9, 10), (3, 24), (5, 30), (3, 20)):
        left, wide = int(random.integers(4, 16)), int(random.integers(width // 2, width - 24))
        if top + tall > height - 4:
            break
        shade = {9: 0, 5: 128, 3: 60}[category]
        step = 4 if category == 3 else 1
        for line in range(top, top + tall, step):
            draw.line((left, line, left + wide, line), fill=(shade,) * 3)
        regions.append((category, [left, top, wide, tall]))
        top += tall + 6
    return page, regions


def write_coco(folder: Path, count: int, width: int = 96, height: int = 128, empty: int = 0) -> Path:
    """``count`` drawn pages, of which the last ``empty`` have no annotation, as images/ and annotations.json."""
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        page, regions = draw_regions(index, width, height)
        name = f"page-{index:03d}.png"
        page.save(folder / "images" / name)
        images.append({"id": index + 100, "file_name": name, "width": width, "height": height})
        for category, box in regions if index < count - empty else []:
            entry = {"id": len(annotations), "image_id": index + 100, "category_id": category, "bbox": box}
            annotations.append(entry | {"area": box[2] * box[3], "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder
