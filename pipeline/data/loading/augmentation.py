"""Augmentation of a page and its rendering onto the fixed canvas: crop, resize, flip, scan noise.

View number ``v`` of a sample is a pure function of (seed, sample, v), the same for every topology, rank and restart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.data.format.images import decode_rgb
from pipeline.data.loading.rng import hash_key, random_uint64, random_uniform

# Scan noise at strength 1: a bad photocopy that is still legible.
NOISE_LEVELS = 40.0  # largest deviation of a pixel, of 255
NOISE_CONTRAST = 0.4  # largest loss of contrast
NOISE_BLUR_PX = 1.0  # largest radius, canvas px


class AugmentationConfig(BaseModel):
    """The canvas, and what varies between views of a page."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    canvas: tuple[int, int] = (1184, 832)
    """Height and width in px of the canvas that every page is padded to; multiples of 32."""
    shortest_edge: tuple[int, int] = (640, 800)
    """Range in px of the page's shortest edge in training; evaluation uses the upper end. Pages that do not fit the
    canvas are scaled down."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Share of training views flipped horizontally; 0 suits pages, whose text has one direction."""
    crop: float = Field(default=1.0, gt=0, le=1)
    """Minimum share of the page's width, and of its height, that a training view keeps; 1 never crops."""
    noise: float = Field(default=0.0, ge=0, le=1)
    """Maximum strength of a training view's scan noise (grain, loss of contrast, blur); 0 adds none."""

    @model_validator(mode="after")
    def _check(self) -> AugmentationConfig:
        if any(side <= 0 or side % 32 for side in self.canvas):
            raise ValueError(f"canvas {list(self.canvas)} must be positive multiples of 32, such as [1184, 832]")
        if not 0 < self.shortest_edge[0] <= self.shortest_edge[1]:
            raise ValueError(f"shortest_edge {list(self.shortest_edge)} must be two sizes in px, the smaller first")
        return self


@dataclass(frozen=True, slots=True)
class Views:
    """How many different views of a page training cycles through."""

    count: int | None
    """None for a new view every epoch."""
    augmented: bool = True
    """False for the evaluation view."""

    def index(self, epoch: int) -> int:
        """Number of the view that is shown in ``epoch``."""
        return epoch if self.count is None else epoch % self.count


NEW_VIEW_EVERY_EPOCH = Views(count=None)
EVALUATION_VIEW = Views(count=1, augmented=False)


def cached_views(count: int) -> Views:
    """Views that a teacher cache with ``count`` of them holds: augmented ones, or the evaluation view if one."""
    return Views(count=count) if count > 1 else EVALUATION_VIEW


@dataclass(frozen=True, slots=True)
class Augmentation:
    """One view of a page."""

    shortest_edge: int
    """px, before the page is scaled down to fit the canvas."""
    flip: bool = False
    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """Left, top, right and bottom of the kept part, in shares of width and height."""
    noise: float = 0.0
    """Strength of scan noise, 0 to 1."""
    noise_key: int = 0

    @property
    def whole(self) -> bool:
        """Whether nothing is cropped."""
        return self.crop == (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Transform:
    """Geometry of an augmentation for a page of a certain size."""

    crop: tuple[int, int, int, int]
    """Left, top, right, bottom of the kept part, image px."""
    width: int
    """Of the kept part, canvas px."""
    height: int
    flip: bool

    @property
    def scale(self) -> tuple[float, float]:
        """Canvas px per image px, in x and in y."""
        left, top, right, bottom = self.crop
        return self.width / (right - left), self.height / (bottom - top)

    @property
    def affine(self) -> tuple[float, float, float, float]:
        """(a, b, c, d) with ``x_canvas = a x_image + c`` and ``y_canvas = b y_image + d``, px."""
        scale_x, scale_y = self.scale
        left, top = self.crop[:2]
        shift_y = -top * scale_y
        if self.flip:
            return -scale_x, scale_y, self.width + left * scale_x, shift_y
        return scale_x, scale_y, -left * scale_x, shift_y


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
    """View of evaluation, statistics and caches with one view."""
    return Augmentation(config.shortest_edge[1])


def compute_transform(width: int, height: int, view: Augmentation, canvas: tuple[int, int]) -> Transform:
    """Geometry of ``view`` for a page of ``width`` x ``height`` image px."""
    left, right = _span(view.crop[0], view.crop[2], width)
    top, bottom = _span(view.crop[1], view.crop[3], height)
    kept_width, kept_height = right - left, bottom - top
    # By the whole page, so that regions have the same size with and without a crop.
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
    """Decode a page and render a view of it at the top left of a black canvas: uint8 [3, H, W]."""
    transform = compute_transform(*image.size, view, canvas)
    return render(decode_image(image, view, transform), transform, view, canvas)


def decode_image(image: Image.Image, view: Augmentation, transform: Transform) -> Image.Image:
    """Decode an opened image to RGB, at a fraction of its size if that suffices. Raises ``DECODING_ERRORS``."""
    return decode_rgb(image, (transform.width, transform.height) if view.whole else None)


def render(page: Image.Image, transform: Transform, view: Augmentation, canvas: tuple[int, int]) -> NDArray[np.uint8]:
    """:func:`render_page` of a decoded page."""
    size = (transform.width, transform.height)
    # A page decoded at a fraction of its size is never cropped.
    resized = page.resize(size, Image.Resampling.BILINEAR, box=None if view.whole else transform.crop)
    pixels = _add_scan_noise(resized, view) if view.noise else np.asarray(resized)
    rendered = np.zeros((3, *canvas), dtype=np.uint8)
    rendered[:, : size[1], : size[0]] = (pixels[:, ::-1] if view.flip else pixels).transpose(2, 0, 1)
    return rendered


def _add_scan_noise(page: Image.Image, view: Augmentation) -> NDArray[np.uint8]:
    """Blur a page, reduce its contrast and add grain: uint8 [h, w, 3]."""
    blur, fade = random_uniform(view.noise_key ^ 1, 2) * view.noise
    soft = np.asarray(page.filter(ImageFilter.GaussianBlur(float(NOISE_BLUR_PX * blur))), dtype=np.float32)
    height, width = soft.shape[:2]
    grain = random_uint64(view.noise_key ^ 2, -(-height * width // 8)).view(np.int8)[: height * width]
    deviation = grain.reshape(height, width, 1).astype(np.float32) * (NOISE_LEVELS * view.noise / 128)
    faded = (soft - 128) * (1 - NOISE_CONTRAST * fade) + 128 + deviation
    return np.clip(np.rint(faded), 0, 255).astype(np.uint8)


def boxes_to_canvas(boxes: NDArray[np.float32], transform: Transform) -> NDArray[np.float32]:
    """x, y, width, height in image px [n, 4] -> xyxy in canvas px [n, 4], clipped to the view."""
    scale = np.array(transform.scale, dtype=np.float32)
    limit = np.array([transform.width, transform.height], dtype=np.float32)
    corner = np.array(transform.crop[:2], dtype=np.float32)
    low = np.clip((boxes[:, :2] - corner) * scale, 0, limit)
    high = np.clip((boxes[:, :2] + boxes[:, 2:] - corner) * scale, 0, limit)
    if transform.flip:
        low[:, 0], high[:, 0] = transform.width - high[:, 0], transform.width - low[:, 0]
    return np.concatenate([low, high], axis=1).astype(np.float32)


def regions_on_canvas(
    boxes: NDArray[np.float32], transform: Transform
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Boxes as :func:`boxes_to_canvas`, [n, 4], and two masks [n]: which the view shows, and which it widened.

    Regions below 1 px break the encoding of boxes. What is that thin as a whole, such as a separator, is widened to 1
    px if the view shows at least half of it; of larger regions at least 1 px must be in the view.
    """
    corners = boxes_to_canvas(boxes, transform)
    sides, whole = corners[:, 2:] - corners[:, :2], boxes[:, 2:] * np.array(transform.scale, dtype=np.float32)
    shown: NDArray[np.bool_] = np.all((sides >= np.where(whole >= 1, 1, whole / 2)) & (sides > 0), axis=1)
    thin: NDArray[np.bool_] = shown[:, None] & (sides < 1)
    limit = np.array([transform.width, transform.height], dtype=np.float32)
    low = np.clip((corners[:, :2] + corners[:, 2:] - 1) / 2, 0, limit - 1)
    corners = np.where(np.tile(thin, 2), np.concatenate([low, low + 1], axis=1), corners)
    return corners.astype(np.float32), shown, np.any(thin, axis=1)
