"""COCO average precision with pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.core.errors import DataError
from pipeline.data.prepare.coco import load_coco

METRICS = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar_1",
    "ar_10",
    "ar_100",
    "ar_small",
    "ar_medium",
    "ar_large",
)
"""pycocotools' twelve metrics in its order: fractions, -1 if undefined."""


def score_files(predictions: Path, annotations: Path) -> dict[str, Any]:
    """Score a COCO results file against a COCO annotation file; see :func:`score`.

    Raises:
        DataError: if one of them is missing or malformed, or predictions name images without annotations.
    """
    coco = load_coco(annotations)
    ground_truth = {
        "images": [image.model_dump() for image in coco.images],
        "annotations": [
            annotation.model_dump() | {"bbox": list(annotation.bbox), "area": annotation.extent}
            for annotation in coco.annotations
        ],
        "categories": [category.model_dump() for category in coco.categories],
    }
    return score(ground_truth, _load_predictions(predictions), source=str(predictions))


def score(
    ground_truth: Mapping[str, Any], predictions: list[dict[str, Any]], source: str = "predictions"
) -> dict[str, Any]:
    """Return the twelve COCO metrics (:data:`METRICS`), ``per_class`` AP by name, as fractions, and ``pages``.

    Args:
        ground_truth: content of a COCO annotation file, with ``area``.
        predictions: COCO results: image_id, category_id, bbox (x, y, width, height in image px), score.
        source: name of the predictions in errors.
    """
    known = {image["id"] for image in ground_truth["images"]}
    unknown = {prediction["image_id"] for prediction in predictions} - known
    if unknown:
        raise DataError(
            f"{source} names {len(unknown)} images that the annotations do not have, such as {min(unknown)}; "
            "give the annotations they were made for"
        )
    evaluation = _evaluate(_renumbered(ground_truth), predictions)
    metrics = dict(zip(METRICS, (float(value) for value in evaluation.stats), strict=True))
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    return {**metrics, "per_class": _per_class(evaluation, names), "pages": len(known)}


def _renumbered(ground_truth: Mapping[str, Any]) -> dict[str, Any]:
    # pycocotools marks unmatched detections with annotation id 0, so a region with that id could never be found.
    regions = ground_truth["annotations"]
    return {**ground_truth, "annotations": [region | {"id": number} for number, region in enumerate(regions, start=1)]}


def _evaluate(ground_truth: dict[str, Any], predictions: list[dict[str, Any]]) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports by printing
        truth = COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        results = truth.loadRes(predictions) if predictions else COCO()
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _per_class(evaluation: COCOeval, names: Mapping[int, str]) -> dict[str, float]:
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # IoU, recall, class; all areas, 100 detections
    per_class = {}
    for index, category in enumerate(evaluation.params.catIds):
        defined = precision[:, :, index][precision[:, :, index] > -1]
        per_class[names[category]] = float(np.mean(defined)) if defined.size else -1.0
    return per_class


def _load_predictions(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise DataError(f"predictions {path} do not exist; give a COCO results .json file") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"predictions {path} are not readable JSON ({error}); give a COCO results file") from error
    if not isinstance(content, list) or not all(map(_is_result, content)):
        raise DataError(
            f"{path} is no COCO results file: it must be a list of objects with image_id, category_id, bbox "
            "[x, y, width, height] and score"
        )
    return content


def _is_result(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("image_id"), int)
        and isinstance(entry.get("category_id"), int)
        and isinstance(entry.get("score"), (int, float))
        and isinstance(entry.get("bbox"), list)
        and len(entry["bbox"]) == 4
        and all(isinstance(value, (int, float)) for value in entry["bbox"])
    )
