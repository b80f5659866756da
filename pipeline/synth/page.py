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

# In units of 1/256 of the page's height.
GAP = 5.0
TOP, BOTTOM = 18.0, 238.0
HEADER_Y, FOOTER_Y = 7.0, 245.0
MIN_SIDE_PX = 3.0
MIN_INK_CONTRAST = 24  # grey levels below white

Box = tuple[float, float, float, float]
"""xyxy."""


@dataclass(frozen=True, slots=True)
class Region:
    """One annotated region."""

    category: int
    """0-based, into ``CATEGORIES``."""
    box: Box
    """px."""


def draw_page(seed: int, index: int, *, width: int = 192, height: int = 256) -> tuple[Image.Image, list[Region]]:
    """Draw page ``index`` of the dataset of ``seed``: an RGB image of ``width`` x ``height`` px, and its regions."""
    rng = np.random.default_rng([seed, index])
    sheet = _new_sheet(rng, width, height)
    _lay_out(sheet)
    boxes = [_ink_bounds(sheet, box) for _, box in sheet.areas]
    image = sheet.image.resize((width, height), Image.Resampling.BOX) if sheet.supersampling > 1 else sheet.image
    regions_with_ink = [(name, box) for (name, _), box in zip(sheet.areas, boxes, strict=True) if box is not None]
    image, moved = with_defects(image, [box for _, box in regions_with_ink], rng)
    regions = [Region(CATEGORIES.index(name), box) for (name, _), box in zip(regions_with_ink, moved, strict=True)]
    return image, [region for region in regions if _large_enough(region.box)]


def _new_sheet(rng: np.random.Generator, width: int, height: int) -> Sheet:
    return Sheet(
        width=width,
        height=height,
        rng=rng,
        family=FAMILIES[int(rng.integers(len(FAMILIES)))],
        body=float(rng.uniform(4.6, 5.6)),
        leading=float(rng.uniform(1.2, 1.4)),
        justified=bool(rng.random() < 0.6),
        ink=int(rng.integers(0, 60)),
    )


def _lay_out(sheet: Sheet) -> None:
    rng = sheet.rng
    margin = float(rng.uniform(11, 19))
    width = sheet.page_width - 2 * margin
    top = TOP
    if rng.random() < 0.6:
        _page_header(sheet, margin, width)
    if rng.random() < 0.75:
        _page_footer(sheet, margin, width)
    if rng.random() < 0.4:
        top = _title(sheet, margin, width, top)
    columns = 2 if rng.random() < 0.5 else 1
    gap = float(rng.uniform(8, 12))
    column_width = (width - gap * (columns - 1)) / columns
    for index in range(columns):
        x = margin + index * (column_width + gap)
        end = _footnote(sheet, x, column_width, BOTTOM) if rng.random() < 0.35 else BOTTOM
        _fill(sheet, x, top, column_width, end)


def _page_header(sheet: Sheet, x: float, width: float) -> None:
    size, number = sheet.body * 0.85, str(sheet.rng.integers(1, 400))
    _heading_and_number(sheet, x, HEADER_Y, width, size, number)
    sheet.region("Page-header", (x, HEADER_Y - 1, x + width + 1, HEADER_Y + size * 1.5))


def _page_footer(sheet: Sheet, x: float, width: float) -> None:
    size, number = sheet.body * 0.85, str(sheet.rng.integers(1, 400))
    if sheet.rng.random() < 0.5:
        sheet.line(x + width / 2, FOOTER_Y, f"Page {number}", size, anchor="ma")
    else:
        _heading_and_number(sheet, x, FOOTER_Y, width, size, number)
    sheet.region("Page-footer", (x, FOOTER_Y - 1, x + width + 1, FOOTER_Y + size * 1.5))


def _heading_and_number(sheet: Sheet, x: float, y: float, width: float, size: float, number: str) -> None:
    sheet.line(x, y, heading(sheet.rng, 3, 4 if width < 150 else 5), size)
    sheet.line(x + width, y, number, size, anchor="ra")


def _title(sheet: Sheet, x: float, width: float, y: float) -> float:
    size = sheet.body * float(sheet.rng.uniform(1.9, 2.4))
    centred = sheet.rng.random() < 0.6
    start = y
    for _ in range(int(sheet.rng.integers(1, 3))):
        text = heading(sheet.rng, 3, 5)
        while sheet.font(size, "Bold").getlength(text) > width * sheet.px_per_unit and " " in text:
            text = text.rsplit(" ", 1)[0]
        sheet.line(x + width / 2 if centred else x, y, text, size, "Bold", "ma" if centred else "la")
        y += size * 1.3
    sheet.region("Title", (x, start, x + width, y))
    return y + 5


def _footnote(sheet: Sheet, x: float, width: float, bottom: float) -> float:
    size = sheet.body * 0.75
    lines = int(sheet.rng.integers(1, 4))
    y = bottom - lines * size * sheet.leading - 1
    sheet.rectangle((x, y - 3, x + width * 0.4, y - 3), fill=(90, 90, 90))
    end = sheet.block(x, y, width, lines, size, "", f"{sheet.rng.integers(1, 30)}")
    sheet.region("Footnote", (x, y, x + width, end))
    return y - 6


def _fill(sheet: Sheet, x: float, y: float, width: float, bottom: float) -> None:
    blocks, weights = zip(*BLOCKS, strict=True)
    failures = 0
    while bottom - y > 2.5 * sheet.body * sheet.leading and failures < 3:
        block = blocks[int(sheet.rng.choice(len(blocks), p=weights))]
        end = block(sheet, x, y, width, bottom)
        if end <= y:
            failures += 1
            end = paragraph(sheet, x, y, width, bottom) if failures == 3 else y
        y = end + GAP if end > y else y


def _ink_bounds(sheet: Sheet, box: Box) -> Box | None:
    """Bounds of the ink inside ``box`` (units), px of the final image; None if there is no ink."""
    crop_box = [round(value * sheet.px_per_unit) for value in box]
    crop = ImageOps.invert(sheet.image.crop(tuple(crop_box)).convert("L"))  # type: ignore[arg-type]
    bounds = crop.point(lambda value: 255 if value >= MIN_INK_CONTRAST else 0).getbbox()
    if bounds is None:
        return None
    left, top, right, bottom = (value / sheet.supersampling for value in bounds)
    x, y = crop_box[0] / sheet.supersampling, crop_box[1] / sheet.supersampling
    return (
        max(0.0, x + left),
        max(0.0, y + top),
        min(float(sheet.width), x + right),
        min(float(sheet.height), y + bottom),
    )


def _large_enough(box: Box) -> bool:
    return box[2] - box[0] >= MIN_SIDE_PX and box[3] - box[1] >= MIN_SIDE_PX
