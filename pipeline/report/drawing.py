"""Small drawing tools on top of Pillow: fonts, outlines, and name tags that keep out of each other's way."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.report.palette import ink_on

Box = tuple[float, float, float, float]
"""xyxy, px."""
LINE = 2
DASH = (7, 5)
"""px drawn and px left out."""
TAG_SIZE = 11
"""px."""


@lru_cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans in ``size`` px: it comes with matplotlib, and knows Latin, Greek and Cyrillic letters."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def rectangle(draw: ImageDraw.ImageDraw, corners: NDArray[np.float32], colour: str) -> None:
    """Outline of ``corners`` [4], xyxy in px."""
    draw.rectangle(corners.tolist(), outline=colour, width=LINE)


def dashed_rectangle(draw: ImageDraw.ImageDraw, corners: NDArray[np.float32], colour: str) -> None:
    """Dashed outline of ``corners`` [4], xyxy in px."""
    left, top, right, bottom = corners.tolist()
    on, off = DASH
    for start in np.arange(left, right, on + off):
        for y in (top, bottom):
            draw.line((start, y, min(start + on, right), y), fill=colour, width=LINE)
    for start in np.arange(top, bottom, on + off):
        for x in (left, right):
            draw.line((x, start, x, min(start + on, bottom)), fill=colour, width=LINE)


class TagPlacer:
    """Writes name tags at the corners of boxes, choosing the corner where it covers the least of other tags."""

    def __init__(self, draw: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
        self._draw = draw
        self._size = size
        self._taken: list[Box] = []

    def write(self, corners: NDArray[np.float32], text: str, colour: str) -> None:
        """Write ``text`` by the box ``corners`` [4], xyxy in px, on a ground of ``colour``."""
        width = self._draw.textlength(text, font=font(TAG_SIZE)) + 5
        height = TAG_SIZE + 4
        left, top, right, bottom = corners.tolist()
        corners_tried = [
            *((left, top - height), (left, top), (right - width, top), (left, bottom - height)),
            *((right - width, bottom - height), (left, bottom), (right - width, top - height)),
        ]
        places = [self._inside(x, y, width, height) for x, y in corners_tried]
        place = min(places, key=lambda box: sum(_common(box, other) for other in self._taken))
        self._taken.append(place)
        self._draw.rectangle(place, fill=colour)
        self._draw.text((place[0] + 3, place[1] + 1), text, font=font(TAG_SIZE), fill=ink_on(colour))

    def _inside(self, x: float, y: float, width: float, height: float) -> Box:
        x = max(0.0, min(x, self._size[0] - width))
        y = max(0.0, min(y, self._size[1] - height))
        return x, y, x + width, y + height


def _common(first: Box, second: Box) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)


def write_heading(sheet: Image.Image, at: tuple[int, int], width: int, title: str, note: str) -> None:
    """Write a bold title and a line below it, both cut to ``width`` px, with the upper left corner ``at``."""
    draw = ImageDraw.Draw(sheet)
    draw.text(at, _cut(draw, title, font(15, bold=True), width), font=font(15, bold=True), fill="#24292f")
    draw.text((at[0], at[1] + 21), _cut(draw, note, font(12), width), font=font(12), fill="#57606a")


def _cut(draw: ImageDraw.ImageDraw, text: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    if draw.textlength(text, font=face) <= width:
        return text
    while text and draw.textlength(text + "…", font=face) > width:
        text = text[:-1]
    return text + "…"
