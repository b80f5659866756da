"""Small pages, datasets and configs that many tests share; everything is drawn here, nothing is downloaded."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from graphkd.detectors import INSTALL

CATEGORIES = [
    {"id": 3, "name": "Text", "supercategory": ""},
    {"id": 5, "name": "Picture", "supercategory": ""},
    {"id": 9, "name": "Title", "supercategory": ""},
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU or detectron2 where there is none, also when another marker picks it."""
    missing = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device",
        "detectron2": None if find_spec("detectron2") else f"detectron2 is not installed; {INSTALL}",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def use_two_threads() -> None:
    """Unless OMP_NUM_THREADS says otherwise; sums depend on it to the last bit."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Fixtures of modules and sessions are set up before those of a test, on what the test before has left."""
    use_two_threads()


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    use_two_threads()  # a module's fixture may have set another number


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


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten drawn pages, two of them without regions."""
    return write_coco(tmp_path_factory.mktemp("coco") / "pages", 10, empty=2)


@pytest.fixture(scope="session")
def dataset_folder(coco_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those ten pages packed into shards of four."""
    from pipeline.data.prepare.pack import pack

    out = tmp_path_factory.mktemp("data") / "packed"
    pack(coco_folder / "annotations.json", coco_folder / "images", out, samples_per_shard=4)
    return out
