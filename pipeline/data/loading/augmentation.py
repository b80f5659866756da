"""Views of a page: how it is cropped, resized, mirrored and made noisy onto the fixed canvas.

``view(seed, sample, v)`` is a pure function, the same under any topology, rank and restart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.data.loading.rng import hash_key, random_uint64, random_uniform

# What Pillow raises for images that are broken, or too large to be pages.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

# Scan noise at strength 1: a bad photocopy that can still be read.
NOISE_LEVELS = 40.0  # of 255, largest deviation of a pixel
NOISE_CONTRAST = 0.4  # largest loss of contrast
NOISE_BLUR_PX = 1.0  # largest radius, canvas px


class AugmentationConfig(BaseModel):
    """The canvas and what varies from view to view."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    canvas: tuple[int, int] = (1184, 832)
    """Height and width in px of the canvas that every page is padded to; multiples of 32."""
    shortest_edge: tuple[int, int] = (640, 800)
    """Range in px of the page's shortest edge in training; evaluation takes the upper end. Pages that would not fit
    the canvas are made smaller."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Share of training views mirrored left to right; 0 suits pages, whose text reads one way."""
    crop: float = Field(default=1.0, gt=0, le=1)
    """Least share of the page's width, and of its height, that a training view keeps; 1 never crops."""
    noise: float = Field(default=0.0, ge=0, le=1)
    """Largest strength of a training view's scan noise (grain, loss of contrast, blur); 0 adds none."""

    @model_validator(mode="after")
    def _check(self) -> AugmentationConfig:
        if any(side <= 0 or side % 32 for side in self.canvas):
            raise ValueError(f"canvas {list(self.canvas)} must be positive multiples of 32, such as [1184, 832]")
        if not 0 < self.shortest_edge[0] <= self.shortest_edge[1]:
            raise ValueError(f"shortest_edge {list(self.shortest_edge)} must be two sizes in px, the smaller first")
        return self


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is done to one page."""

    shortest_edge: int
    """px, before the page is made to fit the canvas."""
    flip: bool = False
    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """Left, top, right and bottom of what is kept, in shares of width and height."""
    noise: float = 0.0
    """Strength of scan noise, 0 to 1."""
    noise_key: int = 0

    @property
    def whole(self) -> bool:
        """Whether nothing is cropped."""
        return self.crop == (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Transform:
    """Where a view puts a page of a certain size."""

    crop: tuple[int, int, int, int]
    """Left, top, right, bottom of what is kept, image px."""
    width: int
    """Of what is kept, canvas px."""
    height: int
    flip: bool

    @property
    def scale(self) -> tuple[float, float]:
        """Canvas px per image px, in x and in y."""
        left, top, right, bottom = self.crop
        return self.width / (right - left), self.height / (bottom - top)

    @property
    def affine(self) -> tuple[float, float, float, float]:
        """(a, b, c, d) with ``x_canvas = a x_image + c`` and ``y_canvas = b y_image + d``, px: ``PageBatch.views``."""
        scale_x, scale_y = self.scale
        left, top = self.crop[:2]
        down = -top * scale_y
        return (
            (-scale_x, scale_y, self.width + left * scale_x, down)
            if self.flip
            else (scale_x, scale_y, -left * scale_x, down)
        )


def training_augmentation(config: AugmentationConfig, seed: int, sample: int, v: int) -> Augmentation:
    """View number ``v`` of ``sample``."""
    key = hash_key(seed, sample, v, "view")
    edge, flip, wide, tall, left, top, noise = random_uniform(key, 7).tolist()
    low, high = config.shortest_edge
    width, height = (config.crop + (1 - config.crop) * share for share in (wide, tall))
    left, top = left * (1 - width), top * (1 - height)
    return Augmentation(
        shortest_edge=low + int(edge * (high - low + 1)),
        flip=flip < config.flip,
        crop=(left, top, left + width, top + height),
        noise=noise * config.noise,
        noise_key=key,
    )


def evaluation_augmentation(config: AugmentationConfig) -> Augmentation:
    """The view that evaluation, statistics and unaugmented caches use."""
    return Augmentation(config.shortest_edge[1])


def compute_transform(width: int, height: int, view: Augmentation, canvas: tuple[int, int]) -> Transform:
    """Where ``view`` puts a page of ``width`` x ``height`` image px."""
    left, right = _span(view.crop[0], view.crop[2], width)
    top, bottom = _span(view.crop[1], view.crop[3], height)
    kept_width, kept_height = right - left, bottom - top
    # Of the whole page, so that a crop shows regions in the size that they have without it.
    scale = min(view.shortest_edge / min(width, height), canvas[0] / kept_height, canvas[1] / kept_width)
    return Transform(
        crop=(left, top, right, bottom),
        width=max(1, min(canvas[1], round(kept_width * scale))),
        height=max(1, min(canvas[0], round(kept_height * scale))),
        flip=view.flip,
    )


def _span(low: float, high: float, size: int) -> tuple[int, int]:
    start = min(int(low * size), size - 1)
    return start, max(start + 1, min(size, round(high * size)))


def render_page(image: Image.Image, view: Augmentation, canvas: tuple[int, int]) -> NDArray[np.uint8]:
    """Lay a view of a page at the top left of a black canvas: uint8 [3, H, W]."""
    placed = compute_transform(*image.size, view, canvas)
    return render(decode_image(image, view, placed), placed, view, canvas)


def decode_image(image: Image.Image, view: Augmentation, placed: Transform) -> Image.Image:
    """Decode an opened image to RGB, at a fraction of its size where that is enough; raises ``DECODING_ERRORS``."""
    if view.whole:
        image.draft("RGB", (placed.width, placed.height))  # what libjpeg can do; a no-op for other formats
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def render(page: Image.Image, placed: Transform, view: Augmentation, canvas: tuple[int, int]) -> NDArray[np.uint8]:
    """:func:`render_page` of a decoded page."""
    size = (placed.width, placed.height)
    # A page that was decoded at a fraction is shown whole.
    resized = page.resize(size, Image.Resampling.BILINEAR, box=None if view.whole else placed.crop)
    pixels = _add_scan_noise(resized, view) if view.noise else np.asarray(resized)
    laid = np.zeros((3, *canvas), dtype=np.uint8)
    laid[:, : size[1], : size[0]] = (pixels[:, ::-1] if view.flip else pixels).transpose(2, 0, 1)
    return laid


def _add_scan_noise(page: Image.Image, view: Augmentation) -> NDArray[np.uint8]:
    """The page as a bad scan shows it: blurred, of less contrast, with grain; uint8 [h, w, 3]."""
    blur, fade = random_uniform(view.noise_key ^ 1, 2) * view.noise
    soft = np.asarray(page.filter(ImageFilter.GaussianBlur(float(NOISE_BLUR_PX * blur))), dtype=np.float32)
    height, width = soft.shape[:2]
    grain = random_uint64(view.noise_key ^ 2, -(-height * width // 8)).view(np.int8)[: height * width]
    deviation = grain.reshape(height, width, 1).astype(np.float32) * (NOISE_LEVELS * view.noise / 128)
    faded = (soft - 128) * (1 - NOISE_CONTRAST * fade) + 128 + deviation
    return np.clip(np.rint(faded), 0, 255).astype(np.uint8)


def boxes_to_canvas(boxes: NDArray[np.float32], placed: Transform) -> NDArray[np.float32]:
    """x, y, width, height in image px [n, 4] -> xyxy in canvas px [n, 4], cut off at the view's edges."""
    scale = np.array(placed.scale, dtype=np.float32)
    limit = np.array([placed.width, placed.height], dtype=np.float32)
    corner = np.array(placed.crop[:2], dtype=np.float32)
    low = np.clip((boxes[:, :2] - corner) * scale, 0, limit)
    high = np.clip((boxes[:, :2] + boxes[:, 2:] - corner) * scale, 0, limit)
    if placed.flip:
        low[:, 0], high[:, 0] = placed.width - high[:, 0], placed.width - low[:, 0]
    return np.concatenate([low, high], axis=1).astype(np.float32)
