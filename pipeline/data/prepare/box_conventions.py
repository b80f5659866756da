"""The ways in which exporters write boxes: recognised, refused with the option that converts them, never guessed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.core.errors import DataError

if TYPE_CHECKING:
    from pipeline.data.prepare.coco import Annotation

Box = tuple[float, float, float, float]
Size = tuple[int, int]
"""Width and height of a page, image px."""
BoxFormat = Literal["auto", "xywh", "xyxy", "relative"]
ROUNDING = 1.01  # shares of the page may exceed 1 by rounding
SLACK_PX = 2.0


@dataclass(frozen=True, slots=True)
class BoxOptions:
    """How the boxes of a file are written, as far as its user says so."""

    boxes: BoxFormat = "auto"
    """auto: x, y, width, height in px, and refused if they look otherwise; relative: the same in shares of the page."""
    rotated: bool = False
    """Replace rotated boxes by those that enclose them."""
    crowd_as_regions: bool = False
    """Take ``iscrowd`` 1, which CVAT writes for masks, for ordinary regions."""


def box_converter(
    regions: Sequence[tuple[Annotation, Size]], source: Path, options: BoxOptions
) -> Callable[[Annotation, Size], Annotation]:
    """Function that brings an annotation of the file into COCO's form.

    Raises:
        DataError: if boxes look as if they were written in another way than ``options`` says.
    """
    if options.boxes == "auto":
        _check_px(regions, source)
        _check_xywh(regions, source)
    rotated = [entry for entry, _ in regions if entry.rotation]
    if rotated and not options.rotated:
        raise DataError(
            f"{source}: {len(rotated)} of {len(regions)} boxes are rotated (attributes.rotation), such as annotation "
            f"{rotated[0].id} by {rotated[0].rotation:g} degrees; give --rotated to take the boxes that enclose them"
        )
    if regions and all(entry.iscrowd for entry, _ in regions) and not options.crowd_as_regions:
        raise DataError(
            f"{source}: all {len(regions)} regions have iscrowd 1, which training and AP ignore; give "
            "--crowd-as-regions if they are ordinary regions, as in CVAT's export of masks"
        )
    return lambda annotation, size: _converted(annotation, size, options)


def _check_px(regions: Sequence[tuple[Annotation, Size]], source: Path) -> None:
    corners = [(min(x, y), max(x + w, y + h)) for (x, y, w, h) in (entry.bbox for entry, _ in regions)]
    if regions and all(low >= 1 - ROUNDING and high <= ROUNDING for low, high in corners):
        raise DataError(
            f"{source}: all {len(regions)} boxes lie within one px, so they seem to be shares of the page; give "
            "--boxes relative to convert them, or --boxes xywh if they are px"
        )


def _check_xywh(regions: Sequence[tuple[Annotation, Size]], source: Path) -> None:
    outside = sum(not _fits(entry.bbox, size) for entry, size in regions)
    if outside and all(_fits(_from_corners(entry.bbox), size) for entry, size in regions):
        raise DataError(
            f"{source}: {outside} of {len(regions)} boxes leave their page as x, y, width, height, and all fit as "
            "x1, y1, x2, y2; give --boxes xyxy to convert them, or --boxes xywh if they are right"
        )


def _fits(box: Box, size: Size) -> bool:
    x, y, w, h = box
    inside = min(x, y) >= -SLACK_PX and x + w <= size[0] + SLACK_PX and y + h <= size[1] + SLACK_PX
    return inside and w > 0 and h > 0


def _from_corners(box: Box) -> Box:
    left, top, right, bottom = box
    return left, top, right - left, bottom - top


def _converted(annotation: Annotation, size: Size, options: BoxOptions) -> Annotation:
    x, y, w, h = annotation.bbox
    if options.boxes == "xyxy":
        x, y, w, h = _from_corners(annotation.bbox)
    elif options.boxes == "relative":
        x, y, w, h = x * size[0], y * size[1], w * size[0], h * size[1]
    if annotation.rotation:
        x, y, w, h = _clip_to(_enclosing((x, y, w, h), annotation.rotation), size)
    changed = (x, y, w, h) != annotation.bbox
    crowd = 0 if options.crowd_as_regions else annotation.iscrowd
    if not changed and crowd == annotation.iscrowd:
        return annotation
    return annotation.model_copy(update={"bbox": (x, y, w, h), "iscrowd": crowd})


def _enclosing(box: Box, degrees: float) -> Box:
    """The upright box around a box that is rotated around its centre."""
    x, y, w, h = box
    cosine, sine = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    wide, tall = w * cosine + h * sine, w * sine + h * cosine
    return x + (w - wide) / 2, y + (h - tall) / 2, wide, tall


def _clip_to(box: Box, size: Size) -> Box:
    left, top = max(box[0], 0.0), max(box[1], 0.0)
    right, bottom = min(box[0] + box[2], float(size[0])), min(box[1] + box[3], float(size[1]))
    return left, top, right - left, bottom - top
