"""COCO average precision with pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.data.format.classes import unique_names
from pipeline.data.format.schema import DatasetCategory
from pipeline.evaluate.coco_files import check_ids, read_ground_truth, read_results

DETECTION_LIMIT = 100
"""COCO's ``maxDets``: detections of a page and class that count, best first."""
ALL, SMALL, MEDIUM, LARGE = range(4)  # areas, in COCO's order
IOU_50, IOU_75 = 0, 5  # of 0.5, 0.55, ..., 0.95
METRICS = {
    "ap": ("precision", slice(None), ALL, 2),
    "ap50": ("precision", IOU_50, ALL, 2),
    "ap75": ("precision", IOU_75, ALL, 2),
    "ap_small": ("precision", slice(None), SMALL, 2),
    "ap_medium": ("precision", slice(None), MEDIUM, 2),
    "ap_large": ("precision", slice(None), LARGE, 2),
    "ar_1": ("recall", slice(None), ALL, 0),
    "ar_10": ("recall", slice(None), ALL, 1),
    "ar_100": ("recall", slice(None), ALL, 2),
    "ar_small": ("recall", slice(None), SMALL, 2),
    "ar_medium": ("recall", slice(None), MEDIUM, 2),
    "ar_large": ("recall", slice(None), LARGE, 2),
}
"""COCO's twelve metrics in its order: table, IoU, area, and limit of detections (1, 10, or the limit that is set)."""


def score_files(predictions: Path, annotations: Path, limit: int = DETECTION_LIMIT) -> dict[str, Any]:
    """Score a COCO results file against a COCO annotation file; see :func:`score`.

    Raises:
        DataError: if one of them is missing or malformed, or results name what the annotations do not have.
    """
    return score(read_ground_truth(annotations), read_results(predictions), str(predictions), limit)


def score(
    ground_truth: Mapping[str, Any],
    predictions: list[dict[str, Any]],
    source: str = "predictions",
    limit: int = DETECTION_LIMIT,
) -> dict[str, Any]:
    """Return COCO's metrics (:data:`METRICS`) as fractions, -1 if undefined, and what they were computed from.

    That is ``per_class`` AP by name, the number of ``pages``, the ``detection_limit``, and ``pages_over_limit``: pages
    with more regions of a class than that, all of which can never be found.

    Args:
        ground_truth: content of a COCO annotation file, with ``area``.
        predictions: COCO results: image_id, category_id, bbox (x, y, width, height in image px), score.
        source: name of the predictions in errors.
        limit: detections of a page and class that count, at least 10; also for ``ar_100``.

    Raises:
        DataError: if predictions name images or categories that the annotations do not have.
    """
    truth = dict(ground_truth)
    check_ids(truth, predictions, source)
    evaluation = _evaluate(_renumbered(truth), predictions, limit)
    metrics = {
        name: _mean(evaluation.eval[table][..., area, top][iou]) for name, (table, iou, area, top) in METRICS.items()
    }
    categories = [DatasetCategory(id=each["id"], name=each["name"], text=False) for each in truth["categories"]]
    ids = [category.id for category in categories]
    counts = Counter((region["image_id"], region["category_id"]) for region in truth["annotations"])
    return {
        **metrics,
        "per_class": _per_class(evaluation, dict(zip(ids, unique_names(categories), strict=True))),
        "pages": len(truth["images"]),
        "detection_limit": limit,
        "pages_over_limit": len({image for (image, _), count in counts.items() if count > limit}),
    }


def _mean(values: NDArray[np.float64]) -> float:
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else -1.0


def _renumbered(ground_truth: Mapping[str, Any]) -> dict[str, Any]:
    # pycocotools marks unmatched detections with annotation id 0, so a region with that id could never be found.
    regions = ground_truth["annotations"]
    return {**ground_truth, "annotations": [region | {"id": number} for number, region in enumerate(regions, start=1)]}


def _evaluate(ground_truth: dict[str, Any], predictions: list[dict[str, Any]], limit: int) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports by printing
        truth = COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        results = truth.loadRes(predictions) if predictions else COCO()
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.params.maxDets = [1, 10, limit]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _per_class(evaluation: COCOeval, names: Mapping[int, str]) -> dict[str, float]:
    precision = evaluation.eval["precision"]  # IoU, recall, class, area, limit
    classes = enumerate(evaluation.params.catIds)
    return {names[category]: _mean(precision[:, :, index, ALL, 2]) for index, category in classes}
