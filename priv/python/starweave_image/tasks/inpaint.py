"""Inpainting: image to image where a mask is white, and the picture as it was elsewhere."""

from __future__ import annotations

from typing import Any

from PIL.Image import Image

from . import image_to_image, text_to_image
from .text_to_image import Call


def prepare(pipeline: Any, text: text_to_image.Text, image: Image, mask: Image, strength: float) -> Call:
    """As for image to image. `mask` is gray and of the size of `image`."""
    call = image_to_image.prepare(pipeline, text, image, strength)
    return Call(call.arguments | {"mask_image": mask}, call.notices)
