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
from pipeline.evaluate.coco_ap import score


@torch.no_grad()
def predict(
    detector: DetectorModule,
    dataset: PackedDataset,
    view: AugmentationConfig,
    *,
    batch: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> list[dict[str, Any]]:
    """Detect regions on every page, in dataset order, as COCO results in image px with the dataset's category ids.

    With several ``ranks``, each page is processed by one of them; returns the results of ``rank``.
    """
    detector.eval()
    pages = PageDataset(dataset, view, seed=0, views=EVALUATION_VIEW)
    loader = page_loader(pages, FinitePassBatches(range(len(dataset)), batch, rank, ranks), workers=0)
    results: list[dict[str, Any]] = []
    for page_batch in loader:
        features = detector.features(page_batch.images.to(device), page_batch.image_sizes())
        for index, detections in enumerate(detector.detect(features)):
            sample = dataset.sample(int(page_batch.samples[index]))
            results += coco_results(detections, dataset, sample, page_batch.affine[index].tolist())
        if progress is not None:
            progress(int(page_batch.samples[-1]) + 1, len(dataset))
    return results


def coco_results(
    detections: Detections, dataset: PackedDataset, sample: Sample, affine: list[float]
) -> list[dict[str, Any]]:
    """Convert detections on the canvas to COCO results in image px; ``affine`` is the page's ``PageBatch.affine``."""
    scale_x, scale_y, shift_x, shift_y = affine
    width, height = sample.size
    shift = torch.tensor([shift_x, shift_y] * 2, dtype=torch.float64)
    boxes = (detections.boxes.cpu().double() - shift) / torch.tensor([scale_x, scale_y] * 2, dtype=torch.float64)
    left, top, right, bottom = boxes.unbind(dim=1)
    if scale_x < 0:
        left, right = right, left
    left, right = left.clamp(0, width), right.clamp(0, width)
    top, bottom = top.clamp(0, height), bottom.clamp(0, height)
    sides = torch.stack([left, top, right - left, bottom - top], dim=1)
    categories = dataset.description.categories
    rows = zip(sides.tolist(), detections.scores.tolist(), detections.classes.tolist(), strict=True)
    return [
        {
            "image_id": sample.image_id,
            "category_id": categories[number].id,
            "bbox": [round(value, 3) for value in box],
            "score": round(confidence, 6),
        }
        for box, confidence, number in rows
    ]


def ground_truth(dataset: PackedDataset) -> dict[str, Any]:
    """Annotations of a packed dataset as the content of a COCO file."""
    categories = dataset.description.categories
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        images.append({"id": sample.image_id, "width": sample.size[0], "height": sample.size[1]})
        for box, number, crowd in zip(sample.boxes.tolist(), sample.classes, sample.crowd, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": sample.image_id,
                    "category_id": categories[number].id,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(crowd),
                }
            )
    named = [{"id": category.id, "name": category.name} for category in categories]
    return {"images": images, "annotations": annotations, "categories": named}


def evaluate(
    detector: DetectorModule,
    dataset: PackedDataset,
    view: AugmentationConfig,
    *,
    batch: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures (see :func:`pipeline.evaluate.coco_ap.score`) and COCO results of a detector on every page."""
    results = predict(detector, dataset, view, batch=batch, device=device, progress=progress)
    return score(ground_truth(dataset), results), results
