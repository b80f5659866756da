"""Reading COCO annotation files, with every mistake named before anything is written."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.core.errors import DataError

EDGE_TOLERANCE_PX = 2.0  # rounding in published annotations; such boxes are clipped to the page without a word


class Image(BaseModel):
    """One page of a COCO file."""

    model_config = ConfigDict(frozen=True)

    id: int
    file_name: str = Field(min_length=1)
    width: int = Field(gt=0)
    height: int = Field(gt=0)


class Annotation(BaseModel):
    """One region of a COCO file; ``bbox`` is x, y, width, height in image px."""

    model_config = ConfigDict(frozen=True)

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int = 0
    area: float | None = None

    @property
    def extent(self) -> float:
        """The stated area, which may be that of a mask, or else that of the box; px squared."""
        return self.bbox[2] * self.bbox[3] if self.area is None else self.area


class Category(BaseModel):
    """One class of a COCO file."""

    model_config = ConfigDict(frozen=True)

    id: int
    name: str
    supercategory: str = ""


class CocoFile(BaseModel):
    """A COCO annotation file as far as detection needs it."""

    model_config = ConfigDict(frozen=True)

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A page with its regions; pages without any are background and stay."""

    image: Image
    annotations: list[Annotation]


def load_coco(path: Path) -> CocoFile:
    """Read and check the structure of a COCO file; raises DataError naming the file and the first mistakes."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise DataError(f"annotation file {path} does not exist; give a COCO .json file") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"annotation file {path} is not readable JSON ({error}); give a COCO .json file") from error
    try:
        return CocoFile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{path} is no COCO file: {error.error_count()} mistakes, the first at {where or 'the top'}: {first['msg']}"
        ) from error


def group_pages(coco: CocoFile, source: Path, *, repair: bool = False) -> tuple[list[Page], int]:
    """Group regions by page, in file-name order, and give how many regions were mended.

    With ``repair``, boxes are clipped to their page and those without area dropped; otherwise any such box is an error.

    Raises:
        DataError: for duplicate ids, unknown categories or images, and boxes off the page or without area.
    """
    problems = _id_problems(coco)
    sizes = {image.id: (image.width, image.height) for image in coco.images}
    by_image: dict[int, list[Annotation]] = defaultdict(list)
    repaired = 0
    for annotation in coco.annotations:
        if annotation.image_id not in sizes:
            continue
        kept, problem = _clip(annotation, *sizes[annotation.image_id])
        repaired += problem is not None
        if problem is not None and not repair:
            problems.append(problem)
        if kept is not None:
            by_image[annotation.image_id].append(kept)
    _raise_problems(problems, source)
    images = sorted(coco.images, key=lambda image: (image.file_name, image.id))
    return [Page(image=image, annotations=by_image[image.id]) for image in images], repaired


def _id_problems(coco: CocoFile) -> list[str]:
    problems = []
    for name, ids in (
        ("image", [image.id for image in coco.images]),
        ("annotation", [annotation.id for annotation in coco.annotations]),
        ("category", [category.id for category in coco.categories]),
    ):
        problems += [f"{name} id {key} stands {count} times" for key, count in Counter(ids).items() if count > 1]
    files = Counter(image.file_name for image in coco.images)
    problems += [f"file {name!r} stands for {count} images" for name, count in files.items() if count > 1]
    images, categories = {image.id for image in coco.images}, {category.id for category in coco.categories}
    for annotation in coco.annotations:
        if annotation.image_id not in images:
            problems.append(f"annotation {annotation.id} names image id {annotation.image_id}, which is not there")
        if annotation.category_id not in categories:
            problems.append(
                f"annotation {annotation.id} names category id {annotation.category_id}, which is not there"
            )
    return problems


def _clip(annotation: Annotation, width: int, height: int) -> tuple[Annotation | None, str | None]:
    x, y, w, h = annotation.bbox
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if not (right > left and bottom > top):  # also true for NaN
        return (
            None,
            f"annotation {annotation.id} has no area on its page: {list(annotation.bbox)} on {width} x {height}",
        )
    overshoot = max(left - x, top - y, x + w - right, y + h - bottom)
    clipped = (
        annotation.model_copy(update={"bbox": (left, top, right - left, bottom - top)}) if overshoot else annotation
    )
    if overshoot > EDGE_TOLERANCE_PX:
        return clipped, f"annotation {annotation.id} lies off its page: {list(annotation.bbox)} on {width} x {height}"
    return clipped, None


def _raise_problems(problems: list[str], source: Path) -> None:
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise DataError(
            f"{source}: {'; '.join(problems[:3])}{more}; "
            "mend the file, or give --repair to clip boxes and drop empty ones"
        )
