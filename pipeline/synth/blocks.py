"""Blocks of a column. Each draws itself at the top of the free space and returns the y below it."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.synth.pictures import draw_picture
from pipeline.synth.sheet import Sheet
from pipeline.synth.words import formula, heading, words

Block = Callable[[Sheet, float, float, float, float], float]
"""(sheet, x, y, width, bottom) in units -> y below the block; y if it does not fit."""


def paragraph(sheet: Sheet, x: float, y: float, width: float, bottom: float) -> float:
    """Running text of two to nine lines."""
    pitch = sheet.body * sheet.leading
    lines = min(int(sheet.rng.integers(2, 10)), int((bottom - y) / pitch))
    if lines < 2:
        return y
    end = sheet.block(x, y, width, lines, sheet.body)
    sheet.region("Text", (x, y, x + width, end))
    return end


def section(sheet: Sheet, x: float, y: float, width: float, bottom: float) -> float:
    """A bold one-line header and a paragraph."""
    size = sheet.body * float(sheet.rng.uniform(1.25, 1.5))
    if bottom - y < size * 1.6 + 3 * sheet.body * sheet.leading:
        return y
    number = f"{sheet.rng.integers(1, 9)}. " if sheet.rng.random() < 0.5 else ""
    text = number + heading(sheet.rng, 2, 3)
    while sheet.font(size, "Bold").getlength(text) > width * sheet.px_per_unit and " " in text:
        text = text.rsplit(" ", 1)[0]
    sheet.line(x, y, text, size, "Bold")
    sheet.region("Section-header", (x, y, x + width, y + size * 1.4))
    return paragraph(sheet, x, y + size * 1.4 + 2, width, bottom)


def items(sheet: Sheet, x: float, y: float, width: float, bottom: float) -> float:
    """Two to four list items, each of them a region."""
    pitch, indent = sheet.body * sheet.leading, 7.0
    bullet = ("•", "–", "◦", "1")[int(sheet.rng.integers(4))]
    for number in range(int(sheet.rng.integers(2, 5))):
        lines = int(sheet.rng.integers(1, 4))
        if y + lines * pitch > bottom:
            break
        sheet.line(x + 2, y, f"{number + 1}." if bullet == "1" else bullet, sheet.body)
        end = sheet.block(x + indent, y, width - indent, lines, sheet.body)
        sheet.region("List-item", (x, y, x + width, end))
        y = end + 1.5
    return y


def table(sheet: Sheet, x: float, y: float, width: float, bottom: float) -> float:
    """A ruled, striped or plain table with a bold header row, usually with a caption above it."""
    if sheet.rng.random() < 0.65:
        y = caption(sheet, x, y, width, bottom - 25, "Table")
    pitch = sheet.body * 1.5
    rows = min(int(sheet.rng.integers(4, 9)), int((bottom - y) / pitch))
    if rows < 3:
        return y
    columns = int(sheet.rng.integers(3, 6 if width > 100 else 4))
    style = ("ruled", "striped", "plain")[int(sheet.rng.integers(3))]
    end = y + rows * pitch
    for row in range(rows):
        top = y + row * pitch
        if style == "striped" and row % 2:
            sheet.rectangle((x, top, x + width, top + pitch), fill=(226, 230, 236))
        if style == "ruled" or row < 2:
            sheet.rectangle((x, top, x + width, top), outline=(90, 90, 90))
        for column in range(columns):
            text = str(sheet.rng.integers(1, 9999)) if row and column else words(sheet.rng, 1)[0][:7]
            sheet.line(x + 2 + column * width / columns, top + 1, text, sheet.body * 0.9, "" if row else "Bold")
    sheet.rectangle((x, end, x + width, end), outline=(90, 90, 90))
    if style == "ruled":
        for column in range(columns + 1):
            place = x + column * width / columns
            sheet.rectangle((place, y, place, end), outline=(90, 90, 90))
    sheet.region("Table", (x - 0.5, y - 0.5, x + width + 1, end + 1))
    return end + 1


def picture(sheet: Sheet, x: float, y: float, width: float, bottom: float) -> float:
    """A photograph or chart, usually with a caption below it."""
    tall = min(float(sheet.rng.uniform(28, 62)), bottom - y - 14)
    if tall < 22:
        return y
    wide = width * float(sheet.rng.uniform(0.7, 1.0))
    left = x + (width - wide) / 2
    draw_picture(sheet, (left, y, left + wide, y + tall))
    sheet.region("Picture", (left - 0.5, y - 0.5, left + wide + 1, y + tall + 1))
    y += tall + 3
    return caption(sheet, x, y, width, bottom, "Figure") if sheet.rng.random() < 0.8 else y


def caption(sheet: Sheet, x: float, y: float, width: float, bottom: float, kind: str) -> float:
    """One or two italic lines that start with a label and a number."""
    size = sheet.body * 0.86
    lines = int(sheet.rng.integers(1, 3))
    if y + lines * size * sheet.leading > bottom:
        return y
    inset = width * 0.06
    lead = f"{kind} {sheet.rng.integers(1, 20)}:"
    end = sheet.block(x + inset, y, width - 2 * inset, lines, size, "Oblique", lead)
    sheet.region("Caption", (x + inset, y, x + width - inset, end))
    return end + 1


def equation(sheet: Sheet, x: float, y: float, width: float, bottom: float) -> float:
    """A displayed formula, sometimes with a fraction or a number in the margin."""
    size = sheet.body * float(sheet.rng.uniform(1.2, 1.6))
    fraction = sheet.rng.random() < 0.5
    tall = size * (2.9 if fraction else 1.5)
    if y + tall + 4 > bottom:
        return y
    y += 2
    top = y + size * 0.8 if fraction else y
    right = x + width * 0.08
    right += sheet.line(right, top, formula(sheet.rng, 2 if width < 100 else 4), size, "Oblique")
    if fraction:
        wide = sheet.line(right + 3, y, formula(sheet.rng, 2), size * 0.8, "Oblique")
        sheet.rectangle((right + 2, y + size * 1.4, right + 4 + wide, y + size * 1.4), fill=(sheet.ink,) * 3)
        sheet.line(right + 3 + wide / 2, y + size * 1.5, formula(sheet.rng, 1), size * 0.8, "Oblique", "ma")
        right += wide + 4
    if right < x + width - 16 and sheet.rng.random() < 0.7:
        sheet.line(x + width, top, f"({sheet.rng.integers(1, 40)})", sheet.body, "", "ra")
    sheet.region("Formula", (x, y - 1, x + width + 1, y + tall + 1))
    return y + tall + 2


BLOCKS: tuple[tuple[Block, float], ...] = (
    (paragraph, 0.26),
    (section, 0.18),
    (items, 0.15),
    (table, 0.14),
    (picture, 0.15),
    (equation, 0.12),
)
