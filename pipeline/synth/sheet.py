"""A page to draw on: fonts, lines of text, and recorded regions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.synth.words import words

FAMILIES = ("DejaVuSans", "DejaVuSerif")
Colour = tuple[int, int, int]
SUPERSAMPLING_BELOW_PX = 512  # small pages are drawn at twice their size, so that text is scaled down as in a scan


@lru_cache(maxsize=256)
def font(family: str, style: str, size: int) -> ImageFont.FreeTypeFont:
    """A DejaVu font of matplotlib; ``style`` is empty, Bold or Oblique (Italic for serifs)."""
    if family == "DejaVuSerif" and style == "Oblique":
        style = "Italic"
    name = f"{family}-{style}.ttf" if style else f"{family}.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


@dataclass(kw_only=True)
class Sheet:
    """A page being drawn; lengths are in units of 1/256 of its height."""

    width: int
    """Final px."""
    height: int
    """Final px."""
    rng: np.random.Generator
    family: str
    body: float
    """Font size of running text, units."""
    leading: float
    """Line distance over font size."""
    justified: bool
    ink: int
    """Grey value of text, 0 to 255."""
    areas: list[tuple[str, tuple[float, float, float, float]]] = field(default_factory=list)
    """Class and nominal area of each region, units."""

    def __post_init__(self) -> None:
        self.supersampling = 2 if self.height < SUPERSAMPLING_BELOW_PX else 1
        self.px_per_unit = self.height * self.supersampling / 256
        self.image = Image.new("RGB", (self.width * self.supersampling, self.height * self.supersampling), "white")
        self.draw = ImageDraw.Draw(self.image)

    @property
    def page_width(self) -> float:
        """Width in units."""
        return 256 * self.width / self.height

    def font(self, size: float, style: str = "") -> ImageFont.FreeTypeFont:
        """A font of the page's family, ``size`` in units."""
        return font(self.family, style, max(6, round(size * self.px_per_unit)))

    def line(self, x: float, y: float, text: str, size: float, style: str = "", anchor: str = "la") -> float:
        """Write one line at (x, y) and return its width, units."""
        face = self.font(size, style)
        self.draw.text(
            (x * self.px_per_unit, y * self.px_per_unit), text, font=face, fill=(self.ink,) * 3, anchor=anchor
        )
        return face.getlength(text) / self.px_per_unit

    def block(
        self, x: float, y: float, width: float, lines: int, size: float, style: str = "", lead: str = ""
    ) -> float:
        """Write ``lines`` lines of sentences into a column and return the y below them; the last line is shorter."""
        face = self.font(size, style)
        pitch = size * self.leading
        source = iter(words(self.rng, 20 * lines))
        for number in range(lines):
            share = 1.0 if number < lines - 1 or lines == 1 else float(self.rng.uniform(0.35, 0.9))
            row = fitting(source, face, width * self.px_per_unit * share, lead if number == 0 else "")
            if self.justified and share == 1.0 and len(row) > 3:
                self._justify(row, x, y, width, face)
            else:
                self.line(x, y, " ".join(row), size, style)
            y += pitch
        return y

    def _justify(self, row: list[str], x: float, y: float, width: float, face: ImageFont.FreeTypeFont) -> None:
        lengths = [face.getlength(word) for word in row]
        space = (width * self.px_per_unit - sum(lengths)) / (len(row) - 1)
        place = x * self.px_per_unit
        for word, length in zip(row, lengths, strict=True):
            self.draw.text((place, y * self.px_per_unit), word, font=face, fill=(self.ink,) * 3)
            place += length + space

    def rectangle(
        self, box: tuple[float, float, float, float], fill: Colour | None = None, outline: Colour | None = None
    ) -> None:
        """Draw a rectangle given in units."""
        self.draw.rectangle([value * self.px_per_unit for value in box], fill=fill, outline=outline)

    def region(self, category: str, box: tuple[float, float, float, float]) -> None:
        """Record that the ink inside ``box`` (units) is a region of ``category``."""
        self.areas.append((category, box))


def fitting(source: Iterator[str], face: ImageFont.FreeTypeFont, width_px: float, lead: str) -> list[str]:
    """Take words from ``source`` until a line of ``width_px`` is full; at least one."""
    row = [lead] if lead else []
    used = face.getlength(lead) if lead else 0.0
    space = face.getlength(" ")
    for word in source:
        length = face.getlength(word)
        if row and used + space + length > width_px:
            break
        row.append(word)
        used += space + length
    return row
