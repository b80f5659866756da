"""Decoding pages: what every viewer shows is what training sees, or the file is refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.format.images import (
    DECODING_ERRORS,
    SOURCE_FORMATS,
    decode_rgb,
    open_image,
    thumbnail,
    upright_size,
)
from pipeline.data.prepare.other_decoder import other_thumbnail

PAPER, INK = 234, 58
SIZE = (60, 40)


def page() -> NDArray[np.uint8]:
    """Paper with a dark block at the top left."""
    pixels = np.full((SIZE[1], SIZE[0]), PAPER, np.uint8)
    pixels[4:14, 4:24] = INK
    return pixels


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content: bytes) -> NDArray[np.uint8]:
    return np.asarray(decode_rgb(open_image(content, SOURCE_FORMATS)))


def shows_the_page(content: bytes, paper: int = PAPER, ink: int = INK, tolerance: int = 4) -> None:
    pixels = decoded(content).astype(int)
    assert pixels.shape == (SIZE[1], SIZE[0], 3)
    assert abs(pixels[30, 50] - paper).max() <= tolerance
    assert abs(pixels[9, 14] - ink).max() <= tolerance


STORED = {
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}
"""How a camera stores an upright page under each EXIF orientation."""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = STORED[orientation](Image.fromarray(page()).convert("RGB"))
    content = encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert upright_size(open_image(content, SOURCE_FORMATS)) == SIZE
    shows_the_page(content)


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_turned_jpeg_is_also_upright_when_decoded_at_a_fraction(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = Image.fromarray(page()).convert("RGB").resize((1200, 800), Image.Resampling.NEAREST)
    image = open_image(encoded(STORED[orientation](large), "JPEG", exif=exif))
    small = decode_rgb(image, shown=(150, 100))
    assert small.size == (150, 100)
    assert np.asarray(small)[24, 36].max() < 80 < np.asarray(small)[75, 120].min()


def transparent(mode: str) -> Image.Image:
    image = Image.new("RGBA", SIZE, (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (4, 4, 24, 14))
    return image if mode == "RGBA" else image.convert("LA") if mode == "LA" else image.quantize(8)


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "TIFF")])
def test_transparency_is_laid_on_white(mode: str, kind: str) -> None:
    shows_the_page(encoded(transparent(mode), kind), paper=255, ink=0)


def test_a_transparent_colour_is_laid_on_white() -> None:
    image = Image.fromarray(page()).convert("RGB")
    shows_the_page(encoded(image, "PNG", transparency=(PAPER,) * 3), paper=255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_are_scaled_to_8(kind: str) -> None:
    shows_the_page(encoded(Image.fromarray(page().astype(np.uint16) * 256 + 200), kind), tolerance=0)


@pytest.mark.parametrize("top", [1, 255])
def test_floats_are_scaled_to_8_bits(top: int) -> None:
    shows_the_page(encoded(Image.fromarray(page().astype(np.float32) * top / 255), "TIFF"), tolerance=0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_look_the_same(mode: str) -> None:
    black = Image.fromarray(np.where(page() == INK, 0, 255).astype(np.uint8))
    shows_the_page(encoded(black.convert("RGB").convert(mode), "TIFF"), paper=255, ink=0)


def saved(*frames: Image.Image, kind: str) -> bytes:
    return encoded(frames[0], kind, save_all=True, append_images=list(frames[1:]))


def test_what_cannot_be_shown_is_refused() -> None:
    first = Image.fromarray(page()).convert("RGB")
    for kind in ("TIFF", "GIF", "WEBP", "PNG"):
        with pytest.raises(ValueError, match="holds 2 pages or frames; save each to its own file"):
            open_image(saved(first, first.rotate(180), kind=kind), SOURCE_FORMATS)
    with pytest.raises(DECODING_ERRORS, match="32-bit integers, whose range is unknown"):
        decoded(encoded(Image.fromarray(page().astype(np.int32)), "TIFF"))
    for values in (page() * 300.0, page() - 100.0, page() * np.nan):
        with pytest.raises(DECODING_ERRORS, match="floats from"):
            decoded(encoded(Image.fromarray(values.astype(np.float32)), "TIFF"))


def test_a_photograph_with_a_preview_is_its_first_picture() -> None:
    first = Image.fromarray(page()).convert("RGB")
    content = saved(first, first.rotate(180), kind="MPO")
    assert open_image(content).format == "MPO"
    shows_the_page(content)


def test_no_other_program_is_started_for_a_disguised_file() -> None:
    content = encoded(Image.fromarray(page()).convert("RGB"), "EPS")
    with pytest.raises(DECODING_ERRORS, match="cannot identify image file"):
        open_image(content, SOURCE_FORMATS)


CASES = {
    "grey": Image.fromarray(page()),
    "16 bits": Image.fromarray(page().astype(np.uint16) * 257),
    "transparent": transparent("RGBA"),
    "palette": Image.fromarray(page()).convert("RGB").quantize(4),
    "black and white": Image.fromarray(page()).convert("1"),
}


@pytest.mark.parametrize("name", CASES)
def test_two_decoders_agree(name: str) -> None:
    content = encoded(CASES[name], "PNG")
    other = other_thumbnail(content)
    assert other is not None
    assert abs(other - thumbnail(decode_rgb(open_image(content)))).max() <= 2
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(STORED[6](Image.fromarray(page())), "JPEG", exif=exif)
    other = other_thumbnail(content)
    assert other is not None
    assert abs(other - thumbnail(decode_rgb(open_image(content)))).max() <= 2
