"""Evaluating files: what packing refuses is refused, and what COCO counts is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import DataError
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.prepare.pack import pack
from pipeline.evaluate.coco_ap import score, score_files
from pipeline.evaluate.inference import ground_truth
from tests.support.pages import write_coco

BOXES = {1: [20.0, 20.0, 150.0, 40.0], 2: [20.0, 80.0, 150.0, 60.0], 3: [20.0, 160.0, 100.0, 60.0]}


def truth(pages: int = 3) -> dict[str, Any]:
    regions = [(page, category) for page in range(1, pages + 1) for category in BOXES]
    return {
        "images": [
            {"id": page, "file_name": f"p{page}.png", "width": 192, "height": 256} for page in range(1, pages + 1)
        ],
        "annotations": [
            {"id": number, "image_id": page, "category_id": category, "bbox": BOXES[category], "area": 6000.0}
            for number, (page, category) in enumerate(regions, start=1)
        ],
        "categories": [{"id": number, "name": name} for number, name in ((1, "text"), (2, "table"), (3, "figure"))],
    }


def found(coco: dict[str, Any]) -> list[dict[str, Any]]:
    keys = ("image_id", "category_id", "bbox")
    return [{key: region[key] for key in keys} | {"score": 0.9} for region in coco["annotations"]]


def scored(folder: Path, coco: Any, results: Any, **options: Any) -> dict[str, Any]:
    (folder / "a.json").write_text(json.dumps(coco))
    (folder / "p.json").write_text(json.dumps(results))
    return score_files(folder / "p.json", folder / "a.json", **options)


def test_perfect_results_score_one_also_with_string_ids(tmp_path: Path) -> None:
    coco = truth()
    assert scored(tmp_path, coco, found(coco))["ap"] == 1
    for region in coco["annotations"]:
        region["image_id"] = str(region["image_id"])
    assert scored(tmp_path, coco, found(coco))["ap"] == 1


BROKEN_RESULTS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    r"category_id 0\); theirs are 1; 2; 3.*count as they do": lambda results: [
        each | {"category_id": each["category_id"] - 1} for each in results
    ],
    "the first at 0.bbox.0: Input should be a finite number": lambda results: [
        results[0] | {"bbox": [float("nan")] * 4},
        *results[1:],
    ],
    "the first at 0.score: Input should be a finite number": lambda results: [results[0] | {"score": float("inf")}],
    "the first at 0.bbox.2: Input should be greater than or equal to 0": lambda results: [
        results[0] | {"bbox": [1, 1, -5, 5]}
    ],
    r"names 1 images that the annotations do not have \(image_id 99\)": lambda results: [results[0] | {"image_id": 99}],
    "the first at the top": lambda results: {"annotations": results},
}


@pytest.mark.parametrize("message", BROKEN_RESULTS)
def test_broken_results_are_refused(message: str, tmp_path: Path) -> None:
    coco = truth()
    with pytest.raises(DataError, match=message) as caught:
        scored(tmp_path, coco, BROKEN_RESULTS[message](found(coco)))
    assert "\n" not in str(caught.value)


BROKEN_TRUTH: dict[str, Callable[[dict[str, Any]], Any]] = {
    "annotation 1 names category id 77": lambda coco: coco["annotations"][0].update(category_id=77),
    "annotation 1 names image id 99": lambda coco: coco["annotations"][0].update(image_id=99),
    "annotation 1 has no area": lambda coco: coco["annotations"][0].update(bbox=[20, 20, 0, 40]),
    "all 9 boxes lie within one px": lambda coco: [
        each.update(bbox=[0.1, 0.1, 0.5, 0.5]) for each in coco["annotations"]
    ],
}


@pytest.mark.parametrize("message", BROKEN_TRUTH)
def test_broken_ground_truth_is_refused_as_by_pack(message: str, tmp_path: Path) -> None:
    coco = truth()
    results = found(coco)
    BROKEN_TRUTH[message](coco)
    with pytest.raises(DataError, match=message):
        scored(tmp_path, coco, results)


def test_boxes_off_their_page_are_scored_as_they_are(tmp_path: Path) -> None:
    coco = truth()
    coco["annotations"][0]["bbox"] = [150.0, 20.0, 60.0, 40.0]
    assert scored(tmp_path, coco, found(coco))["ap"] == 1


def test_the_limit_of_detections_binds_is_said_and_can_be_set(tmp_path: Path) -> None:
    coco = truth(pages=1)
    coco["images"][0].update(width=4000, height=4000)
    coco["annotations"] = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": [200 * (number % 20), 200 * (number // 20), 150, 150]}
        for number in range(300)
    ]
    coco["categories"] = coco["categories"][:1]
    limited = scored(tmp_path, coco, found(coco))
    assert round(limited["ap"], 3) == 0.337
    assert (limited["detection_limit"], limited["pages_over_limit"]) == (100, 1)
    free = scored(tmp_path, coco, found(coco), limit=300)
    assert (free["ap"], free["ar_100"], free["pages_over_limit"]) == (1, 1, 0)


def test_area_is_cocos_own_in_both_ways_of_evaluating(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "pages", 3)
    path = folder / "annotations.json"
    coco = json.loads(path.read_text())
    for region in coco["annotations"]:
        region["area"] = 900.0  # of the mask; every box is larger than 32 x 32 px
        region["bbox"] = [4.0, 4.0, 80.0, 60.0]
        region["category_id"] = 3
    coco["annotations"] = coco["annotations"][::4]
    path.write_text(json.dumps(coco))
    pack(path, folder / "images", tmp_path / "out")
    files, packed = (
        scored(tmp_path, coco, found(coco)),
        score(ground_truth(PackedDataset(tmp_path / "out")), found(coco)),
    )
    for metrics in (files, packed):
        assert (metrics["ap_small"], metrics["ap_medium"]) == (1, -1)
    assert {name: value for name, value in files.items() if name != "pages"} == {
        name: value for name, value in packed.items() if name != "pages"
    }


def test_two_classes_of_one_name_stay_two_rows(tmp_path: Path) -> None:
    coco = truth()
    coco["categories"][2]["name"] = "table"
    results = [each for each in found(coco) if each["category_id"] != 3]
    assert scored(tmp_path, coco, results)["per_class"] == {"text": 1, "table (id 2)": 1, "table (id 3)": 0}
