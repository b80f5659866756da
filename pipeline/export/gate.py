"""Comparing an exported model with the trained one, page by page and in AP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou

from pipeline.data.format.dataset import PackedDataset
from pipeline.evaluate.coco_ap import score
from pipeline.evaluate.inference import ground_truth
from pipeline.predict.inputs import dataset_pages
from pipeline.predict.model import PageModel
from pipeline.predict.page import PagePrediction, PageSource
from pipeline.predict.predictor import Predictor

MAX_DIFFERENCE = 1e-3
"""Largest difference of a box, in shares of the page's longest side, and of a score, of an fp32 export."""
MAX_AP_LOSS = {"fp32": 0.001, "fp16": 0.001, "int8": 0.01}
"""Largest loss of AP, as a fraction."""
COMPARED_SCORE = 0.06  # just above the detectors' own threshold, at which rounding decides


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How an exported model compares with the trained one."""

    pages: int
    regions: int
    """Of the trained model, with a score of at least ``COMPARED_SCORE``."""
    unmatched: int
    """Regions of one model that the other has not, of the same class and within twice the limits."""
    ties: int
    """Regions beside these that overlap a better one by the very limit, and that one model suppressed."""
    box_difference: float
    """Largest of a matched region, in shares of the page's longest side."""
    score_difference: float
    ap_native: float | None
    """On all pages of the dataset, as a fraction; None without ground truth."""
    ap_exported: float | None
    precision: str
    faults: list[str]
    """Limits that are broken; empty for a model that may be used."""

    def to_dict(self) -> dict[str, Any]:
        """For ``parity.json``."""
        return asdict(self)


def compare(
    native: PageModel,
    exported: PageModel,
    dataset: PackedDataset,
    precision: str,
    pages: int,
    suppression_iou: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Parity:
    """Predict up to ``pages`` pages of a dataset with both models and compare them.

    Regions that overlap a better one of their class by ``suppression_iou``, within ``MAX_DIFFERENCE``, may be missing:
    rounding decides whether they are suppressed.
    """
    first, second = (Predictor(model, threshold=0.0) for model in (native, exported))
    sums, results = _Sums(suppression_iou), ([], [])  # type: tuple[_Sums, tuple[list[dict[str, Any]], list[dict[str, Any]]]]
    total = min(pages, len(dataset))
    for number, page in enumerate(dataset_pages(dataset, 0, total), start=1):
        if isinstance(page, PageSource):
            pair = [next(predictor.stream([page])) for predictor in (first, second)]
            assert isinstance(pair[0], PagePrediction) and isinstance(pair[1], PagePrediction)
            sums.add(pair[0], pair[1])
            for rows, found in zip(results, (pair[0], pair[1]), strict=True):
                rows += _coco(found, dataset.category_ids)
        progress(number, total)
    truth = _only(ground_truth(dataset), total)
    scored = bool(truth["annotations"])
    aps = [float(score(truth, rows)["ap"]) if scored else None for rows in results]
    return sums.parity(aps[0], aps[1], precision, total)


def _coco(found: PagePrediction, ids: dict[str, int]) -> list[dict[str, Any]]:
    assert found.image_id is not None, "pages of a dataset have one"
    rows = zip(found.to_coco(found.image_id), found.labels, strict=True)
    return [row | {"category_id": ids[label]} for row, label in rows]


def _only(truth: dict[str, Any], pages: int) -> dict[str, Any]:
    images = truth["images"][:pages]
    kept = {image["id"] for image in images}
    annotations = [each for each in truth["annotations"] if each["image_id"] in kept]
    return {**truth, "images": images, "annotations": annotations}


@dataclass(slots=True)
class _Sums:
    suppression_iou: float
    regions: int = 0
    unmatched: int = 0
    ties: int = 0
    box: float = 0.0
    score: float = 0.0

    def add(self, native: PagePrediction, exported: PagePrediction) -> None:
        self.regions += int((native.scores >= COMPARED_SCORE).sum())
        for one, other in ((native, exported), (exported, native)):
            for index in np.flatnonzero(one.scores >= COMPARED_SCORE):
                self._find(one, int(index), other)

    def _find(self, one: PagePrediction, index: int, other: PagePrediction) -> None:
        alike = other.classes == one.classes[index]
        boxes = np.abs(other.boxes[alike] - one.boxes[index]).max(axis=1) / max(one.width, one.height)
        scores = np.abs(other.scores[alike] - one.scores[index])
        best = int((boxes + scores).argmin()) if alike.any() else None
        if best is not None and max(boxes[best], scores[best]) <= 2 * MAX_DIFFERENCE:
            self.box, self.score = max(self.box, float(boxes[best])), max(self.score, float(scores[best]))
        elif self._at_limit(one.boxes[index], other.boxes[alike & (other.scores >= one.scores[index])]):
            self.ties += 1
        else:
            self.unmatched += 1

    def _at_limit(self, box: NDArray[np.float32], better: NDArray[np.float32]) -> bool:
        overlaps = box_iou(torch.from_numpy(box[None]), torch.from_numpy(better))
        return bool(((overlaps - self.suppression_iou).abs() < MAX_DIFFERENCE).any())

    def parity(self, native: float | None, exported: float | None, precision: str, pages: int) -> Parity:
        faults = []
        if precision == "fp32" and self.unmatched:
            faults.append(f"{self.unmatched} of {self.regions} regions differ in class, box or score")
        if precision == "fp32" and max(self.box, self.score) > MAX_DIFFERENCE:
            faults.append(f"boxes differ by {self.box:.2g} of the page and scores by {self.score:.2g}")
        if not self.regions:
            faults.append("the model finds nothing on the compared pages, so nothing is compared; give other --data")
        if native is not None and exported is not None and native - exported > MAX_AP_LOSS[precision]:
            faults.append(f"AP falls from {100 * native:.2f} to {100 * exported:.2f}")
        return Parity(
            pages=pages,
            regions=self.regions,
            unmatched=self.unmatched,
            ties=self.ties,
            box_difference=self.box,
            score_difference=self.score,
            ap_native=native,
            ap_exported=exported,
            precision=precision,
            faults=faults,
        )
