"""The one decoder of page images: packing, verification, training, evaluation and prediction use no other.

Pages come out upright, opaque and in 8-bit RGB: EXIF orientation is applied, transparency is laid on white paper, and
16-bit and float images are scaled. What cannot be shown that way is refused.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

DECODING_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What opening and decoding raise for images that are broken, too large, or cannot be shown."""
STORED_FORMATS = ("JPEG", "PNG")
"""Formats of images in tars. Pillow tries no other, so that no external program is started."""
SOURCE_FORMATS = (*STORED_FORMATS, "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
"""Formats that packing takes."""

THUMBNAIL_SIDE = 8
SHOWN_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV")
TURNED = (5, 6, 7, 8)  # EXIF orientations by a quarter
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags


def open_image(content: bytes | BinaryIO, formats: tuple[str, ...] = STORED_FORMATS) -> Image.Image:
    """Open an image file without decoding it. Raises ``DECODING_ERRORS``, also for several pages in one file."""
    image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=formats)
    pages = getattr(image, "n_frames", 1)
    if pages > 1 and image.format != "MPO":  # MPO: a photograph in JPEG, followed by its depth or a preview
        raise ValueError(f"it holds {pages} pages or frames; save each to its own file")
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height in px of an opened image, as it is shown."""
    if image.format != "TIFF" and _orientation(image) in TURNED:  # Pillow turns TIFF itself
        return image.size[1], image.size[0]
    return image.size


def decode_rgb(image: Image.Image, shown: tuple[int, int] | None = None) -> Image.Image:
    """Decode an opened image to 8-bit RGB, upright and on white. Raises ``DECODING_ERRORS``.

    With ``shown``, width and height in px that the page will be resized to, JPEG files are decoded at a fraction of
    their size if that suffices.
    """
    if shown is not None:
        turned = _orientation(image) in TURNED
        image.draft("RGB", (shown[1], shown[0]) if turned else shown)  # a no-op for other formats
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image if image.mode == "RGB" and "transparency" not in image.info else _to_rgb(image)


def thumbnail(page: Image.Image) -> NDArray[np.uint8]:
    """Mean luminance of a page in 8 x 8 fields, uint8 [8, 8], by which two decodings are compared."""
    return np.rint(field_means(np.asarray(page.convert("L"), dtype=np.float32))).astype(np.uint8)


def field_means(luminance: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means of 8 x 8 equal fields of [H, W]; a px on the border of two fields counts in both by its shares."""
    rows, columns = (_field_weights(size) for size in luminance.shape)
    means: NDArray[np.float32] = rows @ luminance @ columns.T
    return means


def _field_weights(size: int) -> NDArray[np.float32]:
    """Weight of each of ``size`` px in the mean of each field, [8, size]."""
    edges, px = np.linspace(0, size, THUMBNAIL_SIDE + 1), np.arange(size)
    overlap = np.minimum(edges[1:, None], px + 1) - np.maximum(edges[:-1, None], px)
    return (overlap.clip(0) * (THUMBNAIL_SIDE / size)).astype(np.float32)


def _orientation(image: Image.Image) -> int:
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_integers(image)
    if image.mode == "F":
        return _from_floats(image)
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    if image.mode not in SHOWN_MODES:
        raise ValueError(f"its pixels have the mode {image.mode}, which cannot be shown; save it as 8-bit RGB")
    return image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    """Scale integers by their number of bits: 16, or what a TIFF says."""
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # Pillow's mode for 32 bits; 16 in these two
        raise ValueError("its pixels are 32-bit integers, whose range is unknown; save it with 8 or 16 bits")
    tags: Any = getattr(image, "tag_v2", {})
    bits = int(tags.get(BITS_PER_SAMPLE, (16,))[0])
    levels = np.asarray(image).astype(np.int64).clip(0, (1 << bits) - 1) >> (bits - 8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = 255 - levels
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def _from_floats(image: Image.Image) -> Image.Image:
    """Floats from 0 to 1 or from 0 to 255."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # also for NaN
        raise ValueError(f"its pixels are floats from {low:g} to {high:g}; save it with 8 bits")
    return Image.fromarray(np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)).convert("RGB")
