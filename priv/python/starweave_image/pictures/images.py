"""Pictures in and out of files: what the engine asks of `decode`, `encode` and `parameters`."""

from __future__ import annotations

from PIL import Image, ImageOps

from .decode import decode, decode_mask
from .encode import encode, read
from .parameters import parameters_text

__all__ = ["decode", "decode_mask", "encode", "parameters_text", "read", "resize"]


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image at another size; if the shape differs, both sides are cropped evenly."""
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
