from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageDraw

from pipeline.data.format.dataset import PackedDataset
from pipeline.data.prepare.pack import pack

CLASSES = {3: "paragraph", 7: "table", 9: "figure"}
BOXES = [[20, 20, 150, 40], [20, 80, 150, 60], [20, 160, 70, 60]]
MakeRun = Callable[..., Path]


@pytest.fixture
def dataset(tmp_path: Path) -> PackedDataset:
    """Six small pages; the first has no regions."""
    images = tmp_path / "images"
    images.mkdir()
    entries, regions = [], []
    for number in range(6):
        page = Image.new("RGB", (192, 256), "white")
        for left, top, width, height in BOXES:
            ImageDraw.Draw(page).rectangle((left, top, left + width, top + height), fill="#b0b8c0")
        page.save(images / f"page-{number}.png")
        entries.append({"id": 100 + number, "file_name": f"page-{number}.png", "width": 192, "height": 256})
        if number:
            regions += [
                {"id": len(regions) + place, "image_id": 100 + number, "category_id": category, "bbox": box}
                | {"area": box[2] * box[3], "iscrowd": 0}
                for place, (box, category) in enumerate(zip(BOXES, CLASSES, strict=True), start=1)
            ]
    categories = [{"id": number, "name": name} for number, name in CLASSES.items()]
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps({"images": entries, "annotations": regions, "categories": categories}))
    pack(annotations, images, tmp_path / "dataset")
    return PackedDataset(tmp_path / "dataset")


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run folder: ``make_run(name, ap=None, teacher=None, **config)``; without ``ap`` it is not evaluated."""

    def make(name: str, ap: float | None = None, teacher: str | None = None, **config: Any) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        method = {"name": "graphkd" if teacher else "none"}
        content = {"name": name, "method": method, "teacher": {"run": f"runs/{teacher}"} if teacher else None}
        content |= {"detector": {"architecture": "faster_rcnn", "backbone": "resnet18"}} | config
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
        lines = [json.dumps(logged(step, bool(teacher))) for step in range(10, 110, 10)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        if ap is not None:
            (folder / "eval.json").write_text(json.dumps(evaluation(ap)))
            found = [
                {"image_id": 100 + number, "category_id": category, "bbox": box, "score": 0.9}
                for number in range(1, 6)
                for box, category in zip(BOXES, CLASSES, strict=True)
            ]
            (folder / "predictions.json").write_text(json.dumps(found))
        return folder

    return make


def logged(step: int, distilled: bool) -> dict[str, Any]:
    terms = {"loss_class": 10 / step, "loss_box": 5 / step} | ({"kd_node": 4 / step} if distilled else {})
    speed = {"pages_per_s": 12.0, "data_wait": 0.25, "seconds": 36.7 * step}
    return {"step": step, "loss": sum(terms.values()), "lr": 0.01, "terms": terms} | speed


def evaluation(ap: float) -> dict[str, Any]:
    names = ("ap", "ap50", "ap75", "ap_medium", "ap_large", "ar_1", "ar_10", "ar_100", "ar_medium", "ar_large")
    figures: dict[str, Any] = dict.fromkeys(names, ap) | {"ap_small": -1, "ar_small": -1}
    per_class = {"paragraph": ap, "table": ap / 2, "figure": -1}
    return figures | {"per_class": per_class, "pages": 6, "step": 100, "parameters": 28_400_000}
