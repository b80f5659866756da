"""Reading COCO files for evaluation: annotations as packing reads them, and results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat, NonNegativeFloat, TypeAdapter, ValidationError

from pipeline.core.errors import DataError
from pipeline.data.prepare.coco import Id, check_coco, first_mistake, list_some, load_coco, read_json


class Result(BaseModel):
    """One detection of a COCO results file."""

    image_id: Id
    category_id: Id
    bbox: tuple[FiniteFloat, FiniteFloat, NonNegativeFloat, NonNegativeFloat]
    """x, y, width, height in image px."""
    score: FiniteFloat


_RESULTS = TypeAdapter(list[Result])


def read_ground_truth(path: Path) -> dict[str, Any]:
    """Read annotations. Boxes that leave their page stay as they are.

    Raises:
        DataError: for what ``graphkd data pack`` refuses: unknown ids, boxes without area or written in another way.
    """
    coco = load_coco(path)
    pages = check_coco(coco, path, off_page=True).pages
    return {
        "images": [page.image.model_dump() for page in pages],
        "annotations": [
            {**region.model_dump(exclude={"attributes"}), "bbox": list(region.bbox), "area": region.extent}
            for page in pages
            for region in page.annotations
        ],
        "categories": [category.model_dump() for category in coco.categories],
    }


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read a COCO results file. Raises DataError naming its first mistake."""
    try:
        found = _RESULTS.validate_python(read_json(path, "results file"))
    except ValidationError as error:
        raise DataError(
            f"{path} is no COCO results file, a list of objects with image_id, category_id, bbox [x, y, width, height] "
            f"and score, all finite: {first_mistake(error)}"
        ) from error
    return [{**result.model_dump(), "bbox": list(result.bbox)} for result in found]


def check_ids(truth: dict[str, Any], results: list[dict[str, Any]], source: str) -> None:
    """Raise DataError if results name images or categories that the annotations do not have."""
    for key, kind in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in truth[kind]}
        unknown = sorted({result[key] for result in results} - known)
        if unknown:
            raise DataError(
                f"{source} names {len(unknown)} {kind} that the annotations do not have ({key} "
                f"{list_some(map(str, unknown))}); theirs are {list_some(map(str, sorted(known)))}: give the "
                f"annotations that the results were made for{', or count as they do' if key == 'category_id' else ''}"
            )
