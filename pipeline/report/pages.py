"""A page with its regions, once as annotated and once as each run found them, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.report.drawing import TagPlacer, dashed_rectangle, rectangle, write_heading
from pipeline.report.palette import class_colour

MIN_WIDTH = 420
"""px that a page is drawn at, at least."""
MAX_WIDTHS = {1: 560, 2: 560, 3: 440}
"""px that a page is drawn at, at most, by how many stand in a row; a sheet is read at some 1050 px."""
MAX_HEIGHT = 1100
"""px; only pages much longer than wide reach it."""
MARGIN = 14
HEADER = 52
PAGE_EDGE = "#d0d7de"
MATCH_IOU = 0.5


@dataclass(frozen=True, slots=True)
class Regions:
    """Regions of one page, annotated or found."""

    boxes: NDArray[np.float32]
    """[n, 4]: x, y, width, height, image px."""
    classes: NDArray[np.int64]
    """[n], 0-based."""
    scores: NDArray[np.float32] | None = None
    """[n], 0 to 1; None for ground truth."""

    def above(self, threshold: float) -> Regions:
        """Those with a score of at least ``threshold``, best first; all of them where there are no scores."""
        if self.scores is None:
            return self
        order = np.argsort(-self.scores, kind="stable")
        order = order[self.scores[order] >= threshold]
        return Regions(self.boxes[order], self.classes[order], self.scores[order])


def draw_page(
    image: Image.Image,
    truth: Regions,
    columns: Sequence[tuple[str, Regions]],
    class_names: Sequence[str],
    score_threshold: float = 0.5,
) -> Image.Image:
    """Draw the ground truth, then each run's regions, side by side; a region found right has a full line.

    Args:
        image: the page.
        truth: its ground truth.
        columns: heading and predictions of each run.
        class_names: names in class order.
        score_threshold: predictions below it are left out.

    Returns:
        RGB image, up to three pages in a row (:func:`in_a_row`); small pages are enlarged, large ones reduced, so that
        names stay legible.
    """
    count = 1 + len(columns)
    across = in_a_row(count)
    width, height = _column_size(*image.size, MAX_WIDTHS[across])
    scale = (width / image.width, height / image.height)
    page = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    down = -(-count // across)
    sheet = Image.new("RGB", (MARGIN + across * (width + MARGIN), down * (HEADER + height + MARGIN)), "white")
    found = [(label, regions.above(score_threshold)) for label, regions in columns]
    headings = [("Ground truth", f"{len(truth.boxes)} regions annotated"), *_headings(found, truth)]
    correct = [np.ones(len(truth.boxes), dtype=bool), *(matched(regions, truth) for _, regions in found)]
    drawn = [truth, *(regions for _, regions in found)]
    for place, (heading, regions, right) in enumerate(zip(headings, drawn, correct, strict=True)):
        left, top = MARGIN + place % across * (width + MARGIN), place // across * (HEADER + height + MARGIN)
        sheet.paste(_column(page, regions, right, class_names, scale), (left, top + HEADER))
        write_heading(sheet, (left, top + 8), width, *heading)
    return sheet


def in_a_row(count: int) -> int:
    """How many of ``count`` pages stand side by side: up to three, but four as two by two."""
    return 2 if count == 4 else min(count, 3)


def matched(found: Regions, truth: Regions) -> NDArray[np.bool_]:
    """Which found regions, best first, lie on an annotated one of their class with IoU of at least .5: bool [n].

    Each annotated region is given to one found region at most, as in COCO's AP50.
    """
    overlap = _iou(found.boxes, truth.boxes) * (found.classes[:, None] == truth.classes[None, :])
    right = np.zeros(len(found.boxes), dtype=bool)
    if not overlap.size:
        return right
    for place, row in enumerate(overlap):
        best = int(row.argmax())
        if row[best] >= MATCH_IOU:
            right[place] = True
            overlap[:, best] = 0
    return right


def _iou(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum((first[:, :2] + first[:, 2:])[:, None], (second[:, :2] + second[:, 2:])[None])
    common = (high - low).clip(min=0).prod(axis=-1)
    areas = first[:, 2:].prod(axis=-1)[:, None] + second[:, 2:].prod(axis=-1)[None] - common
    overlap: NDArray[np.float32] = common / np.maximum(areas, 1e-6)
    return overlap


def _column_size(width: int, height: int, max_width: int) -> tuple[int, int]:
    drawn = min(max(width, MIN_WIDTH), max_width)
    scale = min(drawn / width, MAX_HEIGHT / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _headings(found: Sequence[tuple[str, Regions]], truth: Regions) -> list[tuple[str, str]]:
    headings = []
    for label, regions in found:
        right = int(matched(regions, truth).sum())
        wrong = len(regions.boxes) - right
        headings.append((label, f"{right} of {len(truth.boxes)} found, {wrong} wrong"))
    return headings


def _column(
    page: Image.Image,
    regions: Regions,
    right: NDArray[np.bool_],
    class_names: Sequence[str],
    scale: tuple[float, float],
) -> Image.Image:
    tinted = page.copy()
    draw = ImageDraw.Draw(tinted, "RGBA")
    corners = regions.boxes * np.array([*scale, *scale], dtype=np.float32)
    corners[:, 2:] = corners[:, :2] + corners[:, 2:].clip(min=0)
    corners = np.clip(corners, 0, [tinted.width - 1, tinted.height - 1] * 2)
    order = np.argsort(-(corners[:, 2:] - corners[:, :2]).prod(axis=1), kind="stable")
    for place in order:
        colour = class_colour(int(regions.classes[place]))
        draw.rectangle(corners[place].tolist(), fill=colour + "2A")
        (rectangle if right[place] else dashed_rectangle)(draw, corners[place], colour)
    tags = TagPlacer(draw, tinted.size)
    for place in order:
        name = class_names[regions.classes[place]]
        score = "" if regions.scores is None else f" {regions.scores[place]:.2f}"
        tags.write(corners[place], name + score, class_colour(int(regions.classes[place])))
    draw.rectangle((0, 0, tinted.width - 1, tinted.height - 1), outline=PAGE_EDGE)
    return tinted
