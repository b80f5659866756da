"""Running a detector over a dataset, every page once, and scoring what it finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphkd.batch import Detections
from graphkd.detectors import DetectorModule
from pipeline.data.format.dataset import PackedDataset, Sample
from pipeline.data.loading.augmentation import AugmentationConfig
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
    """COCO results (boxes in image px, the dataset's category ids) of every page, in dataset order.

    With several ``ranks``, of the share of pages that falls to ``rank``: each page falls to one of them.
    """
    detector.eval()
    items = PageDataset(dataset, view, seed=0, views=-1)
    loader = page_loader(items, FinitePassBatches(range(len(dataset)), batch, rank, ranks), workers=0)
    results: list[dict[str, Any]] = []
    for pages in loader:
        features = detector.features(pages.images.to(device), pages.image_sizes())
        found = detector.detect(features)
        for place, detections in enumerate(found):
            sample = int(pages.samples[place])
            results += coco_results(detections, dataset, dataset.sample(sample), pages.views[place].tolist())
        if progress is not None:
            progress(int(pages.samples[-1]) + 1, len(dataset))
    return results


def coco_results(
    detections: Detections, dataset: PackedDataset, record: Sample, view: list[float]
) -> list[dict[str, Any]]:
    """Detections of one page on its canvas as COCO results in image px; ``view`` is its row of ``PageBatch.views``."""
    scale_x, scale_y, shift_x, shift_y = view
    width, height = record.size
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
            "image_id": record.image_id,
            "category_id": categories[place].id,
            "bbox": [round(value, 3) for value in box],
            "score": round(confidence, 6),
        }
        for box, confidence, place in rows
    ]


def ground_truth(dataset: PackedDataset) -> dict[str, Any]:
    """A packed dataset's annotations as the content of a COCO file."""
    categories = dataset.description.categories
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for sample in range(len(dataset)):
        record = dataset.sample(sample)
        images.append({"id": record.image_id, "width": record.size[0], "height": record.size[1]})
        for box, place, crowd in zip(record.boxes.tolist(), record.classes, record.crowd, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.image_id,
                    "category_id": categories[place].id,
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
