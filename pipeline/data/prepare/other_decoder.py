"""A second decoder of page images, which shares no code with the first, for ``graphkd data verify`` to compare."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.io import ImageReadMode, decode_image

from pipeline.data.format.images import field_means

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601-2
CMYK_CHANNELS, JPEG_START = 4, b"\xff\xd8"
PNG_START, COLOUR_TYPE, PALETTE = b"\x89PNG", 25, 3  # byte of a PNG that says how colours are stored


def other_thumbnail(content: bytes) -> NDArray[np.float32] | None:
    """Mean luminance in 8 x 8 fields, 0 to 255; None for what torchvision decodes otherwise, such as CMYK."""
    is_png = content.startswith(PNG_START)
    if is_png and b"tRNS" in content[: content.find(b"IDAT")]:  # a colour that stands for transparency
        return None
    mode = ImageReadMode.RGB if is_png and content[COLOUR_TYPE] == PALETTE else ImageReadMode.UNCHANGED
    try:
        file = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        pixels = decode_image(file, mode, apply_exif_orientation=True)
    except RuntimeError:
        return None
    if content.startswith(JPEG_START) and len(pixels) == CMYK_CHANNELS:
        return None
    values = pixels.to(torch.float32) / torch.iinfo(pixels.dtype).max
    alpha = values[-1] if len(values) in (2, 4) else torch.ones_like(values[0])
    colours = values[:-1] if len(values) in (2, 4) else values
    grey = colours[0] if len(colours) == 1 else torch.einsum("chw,c->hw", colours, values.new_tensor(LUMINANCE))
    return field_means((255 * (grey * alpha + 1 - alpha)).numpy())
