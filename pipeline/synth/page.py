"""One synthetic page: a pure function of (seed, index)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from pipeline.synth.blocks import BLOCKS, paragraph
from pipeline.synth.categories import CATEGORIES
from pipeline.synth.defects import with_defects
from pipeline.synth.sheet import FAMILIES, Sheet
from pipeline.synth.words import heading

GAP = 5.0  # units between two blocks
MIN_SIDE_PX = 3.0
MIN_INK = 24  # minimum grey levels below white of ink


@dataclass(frozen=True, slots=True)
class Region:
    """One annotated region."""

    category: int
    """0-based, into ``CATEGORIES``."""
    box: tuple[float, float, float, float]
    """xyxy, px."""


def draw_page(seed: int, index: int, *, width: int = 192, height: int = 256) -> tuple[Image.Image, list[Region]]:
    """Draw page ``index`` of the collection ``seed``: an RGB image of ``width`` x ``height`` px and its regions."""
    random = np.random.default_rng([seed, index])
    sheet = _new_sheet(random, width, height)
    _compose(sheet)
    boxes = [_inked(sheet, area) for _, area in sheet.areas]
    image = sheet.image.resize((width, height), Image.Resampling.BOX) if sheet.sampling > 1 else sheet.image
    known = [(name, box) for (name, _), box in zip(sheet.areas, boxes, strict=True) if box is not None]
    image, placed = with_defects(image, [box for _, box in known], random)
    regions = [Region(CATEGORIES.index(name), box) for (name, _), box in zip(known, placed, strict=True)]
    return image, [region for region in regions if _large_enough(region.box)]


def _new_sheet(random: np.random.Generator, width: int, height: int) -> Sheet:
    return Sheet(
        width=width,
        height=height,
        random=random,
        family=FAMILIES[int(random.integers(len(FAMILIES)))],
        body=float(random.uniform(4.6, 5.6)),
        leading=float(random.uniform(1.2, 1.4)),
        justified=bool(random.random() < 0.6),
        ink=int(random.integers(0, 60)),
    )


def _compose(sheet: Sheet) -> None:
    random = sheet.random
    margin = float(random.uniform(11, 19))
    width = sheet.page_width - 2 * margin
    top, bottom = 18.0, 238.0
    if random.random() < 0.6:
        _running_line(sheet, margin, width, 7.0, "Page-header")
    if random.random() < 0.75:
        _running_line(sheet, margin, width, 245.0, "Page-footer")
    if random.random() < 0.4:
        top = _title(sheet, margin, width, top)
    columns = 2 if random.random() < 0.5 else 1
    gap = float(random.uniform(8, 12))
    column = (width - gap * (columns - 1)) / columns
    for number in range(columns):
        x = margin + number * (column + gap)
        end = _footnote(sheet, x, column, bottom) if random.random() < 0.35 else bottom
        _fill(sheet, x, top, column, end)


def _running_line(sheet: Sheet, x: float, width: float, y: float, category: str) -> None:
    size = sheet.body * 0.85
    number = str(sheet.random.integers(1, 400))
    if category == "Page-footer" and sheet.random.random() < 0.5:
        sheet.line(x + width / 2, y, f"Page {number}", size, "", "ma")
    else:
        sheet.line(x, y, heading(sheet.random, 3, 4 if width < 150 else 5), size)
        sheet.line(x + width, y, number, size, "", "ra")
    sheet.region(category, (x, y - 1, x + width + 1, y + size * 1.5))


def _title(sheet: Sheet, x: float, width: float, y: float) -> float:
    size = sheet.body * float(sheet.random.uniform(1.9, 2.4))
    centred = sheet.random.random() < 0.6
    start = y
    for _ in range(int(sheet.random.integers(1, 3))):
        text = heading(sheet.random, 3, 5)
        while sheet.face(size, "Bold").getlength(text) > width * sheet.unit and " " in text:
            text = text.rsplit(" ", 1)[0]
        sheet.line(x + width / 2 if centred else x, y, text, size, "Bold", "ma" if centred else "la")
        y += size * 1.3
    sheet.region("Title", (x, start, x + width, y))
    return y + 5


def _footnote(sheet: Sheet, x: float, width: float, bottom: float) -> float:
    size = sheet.body * 0.75
    lines = int(sheet.random.integers(1, 4))
    y = bottom - lines * size * sheet.leading - 1
    sheet.rectangle((x, y - 3, x + width * 0.4, y - 3), fill=(90, 90, 90))
    end = sheet.block(x, y, width, lines, size, "", f"{sheet.random.integers(1, 30)}")
    sheet.region("Footnote", (x, y, x + width, end))
    return y - 6


def _fill(sheet: Sheet, x: float, y: float, width: float, bottom: float) -> None:
    blocks, weights = zip(*BLOCKS, strict=True)
    misses = 0
    while bottom - y > 2.5 * sheet.body * sheet.leading and misses < 3:
        block = blocks[int(sheet.random.choice(len(blocks), p=weights))]
        end = block(sheet, x, y, width, bottom)
        if end <= y:
            misses += 1
            end = paragraph(sheet, x, y, width, bottom) if misses == 3 else y
        y = end + GAP if end > y else y


def _inked(sheet: Sheet, area: tuple[float, float, float, float]) -> tuple[float, float, float, float] | None:
    """Bounds of the ink inside an area (units), final px; None if there is no ink."""
    corner = [round(value * sheet.unit) for value in area]
    part = ImageOps.invert(sheet.image.crop(tuple(corner)).convert("L"))  # type: ignore[arg-type]
    bounds = part.point(lambda value: 255 if value >= MIN_INK else 0).getbbox()
    if bounds is None:
        return None
    left, top, right, bottom = (value / sheet.sampling for value in bounds)
    x, y = corner[0] / sheet.sampling, corner[1] / sheet.sampling
    return (
        max(0.0, x + left),
        max(0.0, y + top),
        min(float(sheet.width), x + right),
        min(float(sheet.height), y + bottom),
    )


def _large_enough(box: tuple[float, float, float, float]) -> bool:
    return box[2] - box[0] >= MIN_SIDE_PX and box[3] - box[1] >= MIN_SIDE_PX
