"""Decoding page images."""

from __future__ import annotations

from PIL import Image

DECODING_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for images that are broken, or too large to be pages."""
