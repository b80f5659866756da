"""Reading and checking COCO annotation files, for packing and for evaluation alike."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from pipeline.core.errors import DataError
from pipeline.core.files import read_text, shown
from pipeline.data.format.schema import MAX_REGIONS
from pipeline.data.prepare.box_conventions import Box, BoxOptions, box_converter

EDGE_TOLERANCE_PX = 2.0  # rounding in published annotations; such boxes are clipped without a warning
MAX_REPAIRED = 0.3  # share of a file's regions; more are no slips
LISTED = 3  # problems in an error


def _encodable(text: str) -> str:
    text.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return text


def _cvat_attributes(value: Any) -> Any:
    """Attributes with a rotation; other exporters keep other things under that key."""
    known = isinstance(value, dict) and isinstance(value.get("rotation"), (int, float))
    return {"rotation": value["rotation"]} if known else None


Id = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Name = Annotated[str, AfterValidator(_encodable)]
Flag = Annotated[int, BeforeValidator(lambda value: 0 if value is None else value)]


class Image(BaseModel):
    """One page of a COCO file."""

    model_config = ConfigDict(frozen=True)

    id: Id
    file_name: Name = Field(min_length=1)
    width: int = Field(gt=0, lt=2**31)
    height: int = Field(gt=0, lt=2**31)


class Attributes(BaseModel):
    """CVAT's attributes of a region."""

    rotation: FiniteFloat = 0.0
    """Degrees, clockwise around the centre of ``bbox``."""


class Annotation(BaseModel):
    """One region of a COCO file. ``bbox`` is x, y, width, height in image px."""

    model_config = ConfigDict(frozen=True)

    id: Id
    image_id: Id
    category_id: Id
    bbox: Box
    iscrowd: Flag = 0
    area: FiniteFloat | None = None
    attributes: Annotated[Attributes | None, BeforeValidator(_cvat_attributes)] = None

    @property
    def extent(self) -> float:
        """Given area, which may be that of a mask, else the box's; px squared."""
        return self.bbox[2] * self.bbox[3] if self.area is None else self.area

    @property
    def rotation(self) -> float:
        """Degrees, clockwise."""
        return 0.0 if self.attributes is None else self.attributes.rotation


class Category(BaseModel):
    """One class of a COCO file."""

    model_config = ConfigDict(frozen=True)

    id: Id
    name: Name


class CocoFile(BaseModel):
    """The parts of a COCO annotation file that detection needs."""

    model_config = ConfigDict(frozen=True)

    images: list[Image]
    annotations: list[Annotation]
    categories: Annotated[list[Category], AfterValidator(lambda found: list(dict.fromkeys(found)))] = Field(
        min_length=1
    )
    """Repetitions of the same id and name are one class, as VIA writes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A page with its regions. Pages without regions are kept as background."""

    image: Image
    annotations: list[Annotation]


@dataclass(frozen=True, slots=True)
class CheckedCoco:
    """Pages in the order of file names, and how many regions were changed to get there."""

    pages: list[Page]
    repairs: dict[str, int] = field(default_factory=dict)
    """Number of regions by what was done to them."""


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file. Raises DataError naming ``what`` is missing or malformed."""
    try:
        return json.loads(read_text(path))
    except FileNotFoundError as error:
        raise DataError(f"{what} {shown(path)} does not exist; give a COCO .json file") from error
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{what} {path} is not readable JSON ({error}); give a COCO .json file") from error


def load_coco(path: Path) -> CocoFile:
    """Read a COCO file and check its structure.

    Raises:
        DataError: naming the file and its first mistake.
    """
    content = read_json(path, "annotation file")
    try:
        return CocoFile.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{path} is no COCO file: {first_mistake(error)}") from error


def first_mistake(error: ValidationError) -> str:
    """Number of mistakes, and the first with its place."""
    first, count = error.errors()[0], error.error_count()
    where = ".".join(str(part) for part in first["loc"]) or "the top"
    return f"{count} mistake{'s' * (count > 1)}, the first at {where}: {first['msg']}"


def check_coco(
    coco: CocoFile, source: Path, options: BoxOptions | None = None, *, repair: bool = False, off_page: bool = False
) -> CheckedCoco:
    """Convert boxes to x, y, width, height in image px, clip them to their page, and group them by page.

    Args:
        coco: content of the file.
        source: its path, for messages.
        options: how its boxes are written.
        repair: clip boxes that leave their page and drop those without area, instead of raising.
        off_page: keep boxes that leave their page as they are, as pycocotools does.

    Raises:
        DataError: for duplicate ids, unknown categories or images, boxes that seem to be written in another way, and,
            without ``repair``, boxes that leave their page or have no area.
    """
    problems = _id_problems(coco)
    sizes = {image.id: (image.width, image.height) for image in coco.images}
    known = [annotation for annotation in coco.annotations if annotation.image_id in sizes]
    convert = box_converter([(entry, sizes[entry.image_id]) for entry in known], source, options or BoxOptions())
    by_image: dict[int, list[Annotation]] = defaultdict(list)
    faults: Counter[str] = Counter()
    for annotation in known:
        converted = convert(annotation, sizes[annotation.image_id])
        clipped, fault = _clip(converted, *sizes[annotation.image_id])
        if fault is not None and not (off_page and clipped is not None):
            faults[fault] += 1
            if not repair:
                problems.append(_fault_text(converted, fault, *sizes[annotation.image_id]))
        if clipped is not None:
            by_image[annotation.image_id].append(converted if off_page else clipped)
    _raise_problems(problems, source, repairable=bool(faults))
    if faults.total() > MAX_REPAIRED * len(known):
        raise DataError(
            f"{source}: --repair would change {faults.total()} of {len(known)} regions ({describe_counts(faults)}), "
            f"more than {MAX_REPAIRED:.0%}; these are no slips: check sizes of images and --boxes"
        )
    images = sorted(coco.images, key=lambda image: (image.file_name, image.id))
    return CheckedCoco([Page(image=image, annotations=by_image[image.id]) for image in images], dict(faults))


def describe_counts(counts: dict[str, int]) -> str:
    """``3 clipped, 1 dropped``."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())


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
    regions = Counter(annotation.image_id for annotation in coco.annotations)
    problems += [
        f"image id {key} has {count} regions, more than {MAX_REGIONS}"
        for key, count in regions.items()
        if count > MAX_REGIONS
    ]
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
    """The annotation clipped to its page, None without area, and what was done if it was wrong."""
    x, y, w, h = annotation.bbox
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if not (right > left and bottom > top):  # also true for NaN
        return None, "dropped"
    overshoot = max(left - x, top - y, x + w - right, y + h - bottom)
    if not overshoot:
        return annotation, None
    clipped = annotation.model_copy(update={"bbox": (left, top, right - left, bottom - top)})
    return clipped, "clipped" if overshoot > EDGE_TOLERANCE_PX else None


def _fault_text(annotation: Annotation, fault: str, width: int, height: int) -> str:
    what = "has no area on" if fault == "dropped" else "is off"
    return f"annotation {annotation.id} {what} its page: {list(annotation.bbox)} on {width} x {height}"


def _raise_problems(problems: list[str], source: Path, repairable: bool) -> None:
    if problems:
        remedy = ", or give --repair to clip boxes and drop empty ones" if repairable else ""
        raise DataError(f"{source}: {list_some(problems)}; fix the file{remedy}")


def list_some(problems: Iterable[str], limit: int = LISTED) -> str:
    """The first problems, and the number of the others."""
    listed = list(problems)
    more = f" (and {len(listed) - limit} more)" if len(listed) > limit else ""
    return f"{'; '.join(listed[:limit])}{more}"
