"""COCO figures: a perfect result, a hand-computed one, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graphkd.batch import Detections
from pipeline.core.errors import DataError
from pipeline.data.format.dataset import PackedDataset
from pipeline.evaluate.coco_ap import METRICS, score, score_files
from pipeline.evaluate.inference import coco_results, ground_truth


def results(coco: dict[str, Any]) -> list[dict[str, Any]]:
    names = ("image_id", "category_id", "bbox")
    return [{name: entry[name] for name in names} | {"score": 0.9} for entry in coco["annotations"]]


@pytest.fixture
def coco(coco_folder: Path) -> dict[str, Any]:
    return json.loads((coco_folder / "annotations.json").read_text())


def test_perfect_predictions_score_one(coco_folder: Path, coco: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results(coco)))
    figures = score_files(path, coco_folder / "annotations.json")
    assert set(METRICS) < set(figures)
    assert figures["ap"] == pytest.approx(1.0)
    assert figures["per_class"] == pytest.approx({"Text": 1.0, "Picture": 1.0, "Title": 1.0})
    assert figures["pages"] == 10


def test_half_the_classes_found_score_that_share(coco: dict[str, Any]) -> None:
    found = [entry for entry in results(coco) if entry["category_id"] == 3]
    assert score(coco, found)["ap"] == pytest.approx(1 / 3)


def test_the_region_with_annotation_id_0_counts(coco: dict[str, Any]) -> None:
    # pycocotools alone never matches it, since it marks an unmatched detection with 0.
    only = {**coco, "annotations": coco["annotations"][:1]}
    assert only["annotations"][0]["id"] == 0
    assert score(only, results(only))["ap"] == pytest.approx(1.0)


def test_an_iou_of_seventy_counts_for_four_of_ten_thresholds() -> None:
    truth = {
        "images": [{"id": 1}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 100], "area": 1e4, "iscrowd": 0}
        ],
        "categories": [{"id": 1, "name": "a"}],
    }
    found = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 72], "score": 0.5}]
    figures = score(truth, found)
    assert figures["ap"] == pytest.approx(0.5)  # .50 .55 .60 .65 .70
    assert (figures["ap50"], figures["ap75"]) == (pytest.approx(1.0), pytest.approx(0.0))


def test_no_predictions_score_nothing(coco: dict[str, Any]) -> None:
    assert score(coco, [])["ap"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    "content", ["{}", "[1]", '[{"image_id": 1}]', "nonsense", '[{"image_id":1,"category_id":1,"bbox":[1],"score":1}]']
)
def test_files_that_hold_no_results_are_named(coco_folder: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"results\.json"):
        score_files(path, coco_folder / "annotations.json")


def test_predictions_for_other_pages_are_refused(coco: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"names 1 images that the annotations do not have \(image_id 5\)"):
        score(coco, [{"image_id": 5, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1.0}])


def test_detections_return_to_image_pixels(dataset_folder: Path) -> None:
    dataset = PackedDataset(dataset_folder)
    record = dataset.sample(0)
    found = Detections(
        boxes=torch.tensor([[10.0, 20.0, 30.0, 60.0]]), scores=torch.tensor([0.5]), classes=torch.tensor([1])
    )
    plain = coco_results(found, dataset, record, [0.5, 0.5, 0.0, 0.0])[0]
    assert plain == {"image_id": 100, "category_id": 5, "bbox": [20.0, 40.0, 40.0, 80.0], "score": 0.5}
    mirrored = coco_results(found, dataset, record, [-0.5, 0.5, 48.0, 0.0])[0]
    assert mirrored["bbox"] == [96 - 60.0, 40.0, 40.0, 80.0]
    cropped = coco_results(found, dataset, record, [0.5, 0.5, -2.0, -4.0])[0]
    assert cropped["bbox"] == [24.0, 48.0, 40.0, 80.0]


def test_ground_truth_of_a_dataset_is_that_of_its_coco_file(dataset_folder: Path, coco: dict[str, Any]) -> None:
    truth = ground_truth(PackedDataset(dataset_folder))
    assert len(truth["images"]) == len(coco["images"])
    assert [entry["bbox"] for entry in truth["annotations"]] == [entry["bbox"] for entry in coco["annotations"]]
    assert score(truth, results(coco))["ap"] == pytest.approx(1.0)
