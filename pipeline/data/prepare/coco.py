"""Reading and checking COCO annotation files."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.core.errors import DataError

EDGE_TOLERANCE_PX = 2.0  # rounding in published annotations; such boxes are clipped without a warning


class Image(BaseModel):
    """One page of a COCO file."""

    model_config = ConfigDict(frozen=True)

    id: int
    file_name: str = Field(min_length=1)
    width: int = Field(gt=0)
    height: int = Field(gt=0)


class Annotation(BaseModel):
    """One region of a COCO file. ``bbox`` is x, y, width, height in image px."""

    model_config = ConfigDict(frozen=True)

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int = 0
    area: float | None = None

    @property
    def extent(self) -> float:
        """Given area, which may be that of a mask, else the box's; px squared."""
        return self.bbox[2] * self.bbox[3] if self.area is None else self.area


class Category(BaseModel):
    """One class of a COCO file."""

    model_config = ConfigDict(frozen=True)

    id: int
    name: str
    supercategory: str = ""


class CocoFile(BaseModel):
    """The parts of a COCO annotation file that detection needs."""

    model_config = ConfigDict(frozen=True)

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A page with its regions. Pages without regions are kept as background."""

    image: Image
    annotations: list[Annotation]


def load_coco(path: Path) -> CocoFile:
    """Read a COCO file and check its structure.

    Raises:
        DataError: naming the file and its first mistake.
    """
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


def group_pages(coco: CocoFile, source: Path, *, repair: bool = False) -> list[Page]:
    """Group regions by page, in the order of file names.

    With ``repair``, boxes are clipped to their page and those without area are dropped.

    Raises:
        DataError: for duplicate ids, unknown categories or images, and, without ``repair``, boxes that are off their
            page or have no area.
    """
    problems = _id_problems(coco)
    sizes = {image.id: (image.width, image.height) for image in coco.images}
    by_image: dict[int, list[Annotation]] = defaultdict(list)
    for annotation in coco.annotations:
        if annotation.image_id not in sizes:
            continue
        clipped, problem = _clip(annotation, *sizes[annotation.image_id])
        if problem is not None and not repair:
            problems.append(problem)
        if clipped is not None:
            by_image[annotation.image_id].append(clipped)
    _raise_problems(problems, source)
    images = sorted(coco.images, key=lambda image: (image.file_name, image.id))
    return [Page(image=image, annotations=by_image[image.id]) for image in images]


def _id_problems(coco: CocoFile) -> list[str]:
    problems = []
    for name, ids in (
        ("image", [image.id for image in coco.images]),
        ("annotation", [annotation.id for annotation in coco.annotations]),
        ("category", [category.id for category in coco.categories]),
    ):
        problems += [f"{name} id {key} is used {count} times" for key, count in Counter(ids).items() if count > 1]
    files = Counter(image.file_name for image in coco.images)
    problems += [f"file {name!r} is used by {count} images" for name, count in files.items() if count > 1]
    images, categories = {image.id for image in coco.images}, {category.id for category in coco.categories}
    for annotation in coco.annotations:
        if annotation.image_id not in images:
            problems.append(f"annotation {annotation.id} names image id {annotation.image_id}, which does not exist")
        if annotation.category_id not in categories:
            problems.append(
                f"annotation {annotation.id} names category id {annotation.category_id}, which does not exist"
            )
    return problems


def _clip(annotation: Annotation, width: int, height: int) -> tuple[Annotation | None, str | None]:
    """The annotation clipped to its page, None without area, and what is wrong with it."""
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
        return clipped, f"annotation {annotation.id} is off its page: {list(annotation.bbox)} on {width} x {height}"
    return clipped, None


def _raise_problems(problems: list[str], source: Path) -> None:
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise DataError(
            f"{source}: {'; '.join(problems[:3])}{more}; "
            "fix the file, or give --repair to clip boxes and drop empty ones"
        )
