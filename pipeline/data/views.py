"""Views of a page: how it is resized and mirrored onto the fixed canvas, a pure function of (seed, sample, v)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator


class ViewConfig(BaseModel):
    """The canvas and what varies from view to view."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    canvas: tuple[int, int] = (1184, 832)
    """Height and width in px of the canvas that every page is padded to; multiples of 32."""
    shortest_edge: tuple[int, int] = (640, 800)
    """Range in px of the page's shortest edge in training; evaluation takes the upper end. Pages that would not fit
    the canvas are made smaller."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Share of training views mirrored left to right; 0 suits pages, whose text reads one way."""

    @model_validator(mode="after")
    def _check(self) -> ViewConfig:
        if any(side <= 0 or side % 32 for side in self.canvas):
            raise ValueError(f"canvas {list(self.canvas)} must be positive multiples of 32, such as [1184, 832]")
        if not 0 < self.shortest_edge[0] <= self.shortest_edge[1]:
            raise ValueError(f"shortest_edge {list(self.shortest_edge)} must be two sizes in px, the smaller first")
        return self


@dataclass(frozen=True, slots=True)
class View:
    """What is done to one page."""

    shortest_edge: int
    """px, before the page is made to fit the canvas."""
    flip: bool


def training_view(config: ViewConfig, seed: int, sample: int, v: int) -> View:
    """View number ``v`` of ``sample``: the same under any topology, rank and restart."""
    random = np.random.default_rng([seed, sample, v])
    low, high = config.shortest_edge
    return View(int(random.integers(low, high + 1)), bool(random.random() < config.flip))


def evaluation_view(config: ViewConfig) -> View:
    """The view that evaluation, statistics and unaugmented caches use."""
    return View(config.shortest_edge[1], False)


def page_size(width: int, height: int, view: View, canvas: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in px of a page of ``width`` x ``height`` image px on the canvas."""
    scale = min(view.shortest_edge / min(width, height), canvas[0] / height, canvas[1] / width)
    return max(1, min(canvas[1], round(width * scale))), max(1, min(canvas[0], round(height * scale)))


def apply_view(image: Image.Image, view: View, canvas: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize and mirror a page and lay it at the top left of a black canvas: uint8 [3, H, W]."""
    size = page_size(*image.size, view, canvas)
    image.draft("RGB", size)  # lets libjpeg decode at a fraction of the size; a no-op for other formats
    resized = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    if view.flip:
        resized = resized[:, ::-1]
    page = np.zeros((3, *canvas), dtype=np.uint8)
    page[:, : size[1], : size[0]] = resized.transpose(2, 0, 1)
    return page


def boxes_to_canvas(
    boxes: NDArray[np.float32], image_size: tuple[int, int], view: View, canvas: tuple[int, int]
) -> NDArray[np.float32]:
    """x, y, width, height in image px [n, 4] -> xyxy in canvas px [n, 4]."""
    width, height = page_size(*image_size, view, canvas)
    scale = np.array([width / image_size[0], height / image_size[1]], dtype=np.float32)
    low = boxes[:, :2] * scale
    high = (boxes[:, :2] + boxes[:, 2:]) * scale
    if view.flip:
        low[:, 0], high[:, 0] = width - high[:, 0], width - low[:, 0]
    return np.concatenate([low, high], axis=1).astype(np.float32)
