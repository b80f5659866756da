"""Scanning defects: tint, shadow, blur, noise, specks and a slight rotation, which moves the boxes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

DEFECTIVE_SHARE = 0.35
MAX_TURN_DEG = 0.6
Box = tuple[float, float, float, float]


def with_defects(image: Image.Image, boxes: list[Box], rng: np.random.Generator) -> tuple[Image.Image, list[Box]]:
    """Apply defects to about a third of the pages; boxes (xyxy, px) are rotated with the page."""
    if rng.random() >= DEFECTIVE_SHARE:
        return image, boxes
    if rng.random() < 0.5:
        image, boxes = turned(image, boxes, float(rng.uniform(-MAX_TURN_DEG, MAX_TURN_DEG)))
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 0.6)) * image.height / 256))
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels * np.sort(rng.uniform(0.82, 1.0, 3))[::-1].astype(
        np.float32
    )  # yellowed paper: blue fades most, red least
    pixels = pixels * _shadow(image.size, rng)
    pixels = pixels + rng.normal(0, rng.uniform(2, 9), (*pixels.shape[:2], 1)).astype(np.float32)
    return _specked(np.clip(pixels, 0, 255).astype(np.uint8), rng), boxes


def turned(image: Image.Image, boxes: list[Box], degrees: float) -> tuple[Image.Image, list[Box]]:
    """Rotate the page about its centre; each box becomes the bounds of its rotated corners, clipped to the page."""
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    middle_x, middle_y = image.width / 2, image.height / 2

    def turn(x: float, y: float) -> tuple[float, float]:
        x, y = x - middle_x, y - middle_y
        return middle_x + cos * x + sin * y, middle_y - sin * x + cos * y

    moved = []
    for left, top, right, bottom in boxes:
        corners = [turn(x, y) for x in (left, right) for y in (top, bottom)]
        xs, ys = [x for x, _ in corners], [y for _, y in corners]
        moved.append((max(0.0, min(xs)), max(0.0, min(ys)), min(image.width, max(xs)), min(image.height, max(ys))))
    white = (255, 255, 255)
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=white), moved


def _shadow(size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float32]:
    """Brightness that falls to one side, sometimes with a dark edge: [H, W, 1]."""
    across = np.linspace(0, 1, size[0], dtype=np.float32)[None, :, None]
    down = np.linspace(0, 1, size[1], dtype=np.float32)[:, None, None]
    slope_x, slope_y = rng.uniform(-0.12, 0.12, 2)
    light = 1 + slope_x * (across - 0.5) + slope_y * (down - 0.5)
    if rng.random() < 0.3:
        light = light * (1 - 0.5 * np.exp(-across * size[0] / 3))
    return light.astype(np.float32)


def _specked(pixels: NDArray[np.uint8], rng: np.random.Generator) -> Image.Image:
    count = int(rng.integers(0, 30))
    rows, columns = rng.integers(0, pixels.shape[0], count), rng.integers(0, pixels.shape[1], count)
    pixels[rows, columns] = rng.integers(0, 120, (count, 1), dtype=np.uint8)
    return Image.fromarray(pixels)
