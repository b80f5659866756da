"""Running a detector over a dataset, every page once, and scoring its detections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphkd.batch import Detections
from graphkd.detectors import DetectorModule
from pipeline.data.format.dataset import PackedDataset, Sample
from pipeline.data.loading.augmentation import EVALUATION_VIEW, AugmentationConfig
from pipeline.data.loading.batches import FinitePassBatches
from pipeline.data.loading.loader import PageDataset, page_loader
from pipeline.evaluate.coco_ap import DETECTION_LIMIT, score


@torch.no_grad()
def predict(
    detector: DetectorModule,
    dataset: PackedDataset,
    view: AugmentationConfig,
    *,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> list[dict[str, Any]]:
    """Run the detector on every page and return COCO results: ``bbox`` as x, y, width, height in image px.

    With several ranks, only the pages of ``rank``. Puts the detector in evaluation mode. ``progress`` is called with
    (position in the dataset, pages in total).
    """
    detector.eval()
    pages = PageDataset(dataset, view, seed=0, views=EVALUATION_VIEW)
    loader = page_loader(pages, FinitePassBatches(range(len(dataset)), batch_size, rank, world_size), workers=0)
    results: list[dict[str, Any]] = []
    for page_batch in loader:
        features = detector.features(page_batch.images.to(device), page_batch.sizes)
        for index, detections in enumerate(detector.detect(features)):
            sample = dataset.sample(int(page_batch.samples[index]))
            results += coco_results(detections, dataset, sample, page_batch.affine[index].tolist())
        if progress is not None:
            progress(int(page_batch.samples[-1]) + 1, len(dataset))
    return results


def coco_results(
    detections: Detections, dataset: PackedDataset, sample: Sample, affine: list[float]
) -> list[dict[str, Any]]:
    """Convert detections on the canvas to COCO results in image px; ``affine`` is one row of ``PageBatch.affine``."""
    scale_x, scale_y, shift_x, shift_y = affine  # canvas = scale * image + shift
    width, height = sample.size
    shift = torch.tensor([shift_x, shift_y] * 2, dtype=torch.float64)
    boxes = (detections.boxes.cpu().double() - shift) / torch.tensor([scale_x, scale_y] * 2, dtype=torch.float64)
    left, top, right, bottom = boxes.unbind(dim=1)
    if scale_x < 0:  # mirrored
        left, right = right, left
    left, right = left.clamp(0, width), right.clamp(0, width)
    top, bottom = top.clamp(0, height), bottom.clamp(0, height)
    boxes_xywh = torch.stack([left, top, right - left, bottom - top], dim=1)
    categories = dataset.categories
    rows = zip(boxes_xywh.tolist(), detections.scores.tolist(), detections.classes.tolist(), strict=True)
    return [
        {
            "image_id": sample.image_id,
            "category_id": categories[class_index].id,
            "bbox": [round(value, 3) for value in box],
            "score": round(confidence, 6),
        }
        for box, confidence, class_index in rows
    ]


def ground_truth(dataset: PackedDataset) -> dict[str, Any]:
    """Annotations of a packed dataset in COCO format."""
    categories = dataset.categories
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        images.append({"id": sample.image_id, "width": sample.size[0], "height": sample.size[1]})
        regions = zip(sample.boxes.tolist(), sample.areas.tolist(), sample.classes, sample.crowd, strict=True)
        for box, area, class_index, crowd in regions:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": sample.image_id,
                    "category_id": categories[class_index].id,
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                }
            )
    names = zip(categories, dataset.class_names, strict=True)
    coco_categories = [{"id": category.id, "name": name} for category, name in names]
    return {"images": images, "annotations": annotations, "categories": coco_categories}


def evaluate(
    detector: DetectorModule,
    dataset: PackedDataset,
    view: AugmentationConfig,
    *,
    batch_size: int,
    device: torch.device,
    limit: int = DETECTION_LIMIT,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run :func:`predict`, and return COCO metrics (see :func:`pipeline.evaluate.coco_ap.score`) and results."""
    results = predict(detector, dataset, view, batch_size=batch_size, device=device, progress=progress)
    return score(ground_truth(dataset), results, limit=limit), results
