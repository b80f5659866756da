"""Pictures on synthetic pages: photographs and charts."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipeline.synth.sheet import Sheet

Area = tuple[float, float, float, float]
INKS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (90, 90, 90), (148, 103, 189))


def draw_picture(sheet: Sheet, area: Area) -> None:
    """Fill ``area`` (units) with a photograph, bars, or curves."""
    kind = int(sheet.rng.integers(3))
    (photograph, bars, curves)[kind](sheet, area)


def photograph(sheet: Sheet, area: Area) -> None:
    """Smooth patches of colour with some grain."""
    left, top, right, bottom = (round(value * sheet.px_per_unit) for value in area)
    size = (max(1, right - left), max(1, bottom - top))
    patches = sheet.rng.integers(20, 235, (5, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    grain = sheet.rng.integers(-14, 15, smooth.shape[:2], dtype=np.int16)[..., None]
    sheet.image.paste(Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)), (left, top))


def bars(sheet: Sheet, area: Area) -> None:
    """A bar chart on two axes."""
    left, top, right, bottom = _axes(sheet, area)
    count = int(sheet.rng.integers(4, 9))
    ink = INKS[int(sheet.rng.integers(len(INKS)))]
    step = (right - left) / count
    for number, share in enumerate(sheet.rng.uniform(0.15, 0.95, count)):
        place = left + (number + 0.2) * step
        sheet.rectangle((place, bottom - share * (bottom - top), place + 0.6 * step, bottom), fill=ink)


def curves(sheet: Sheet, area: Area) -> None:
    """Two or three noisy curves on two axes."""
    left, top, right, bottom = _axes(sheet, area)
    for ink in INKS[: int(sheet.rng.integers(2, 4))]:
        walk = np.cumsum(sheet.rng.normal(0, 1, 24))
        walk = (walk - walk.min()) / max(1e-6, float(np.ptp(walk)))
        across = np.linspace(left + 1, right - 1, len(walk)) * sheet.px_per_unit
        up = (bottom - 1 - walk * (bottom - top - 2)) * sheet.px_per_unit
        points = [(float(x), float(y)) for x, y in zip(across, up, strict=True)]
        sheet.draw.line(points, fill=ink, width=max(1, round(sheet.px_per_unit)))


def _axes(sheet: Sheet, area: Area) -> Area:
    sheet.rectangle(area, fill=(246, 247, 249), outline=(120, 120, 120))
    left, top, right, bottom = area[0] + 6, area[1] + 3, area[2] - 3, area[3] - 6
    sheet.rectangle((left, bottom, right, bottom), fill=(40, 40, 40))
    sheet.rectangle((left, top, left, bottom), fill=(40, 40, 40))
    return left, top, right, bottom
