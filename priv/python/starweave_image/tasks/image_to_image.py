"""Image to image: a picture is taken part of the way to noise, and from there as the prompt says."""

from __future__ import annotations

from typing import Any

from PIL.Image import Image

from . import text_to_image
from .text_to_image import Call


def prepare(pipeline: Any, text: text_to_image.Text, image: Image, strength: float) -> Call:
    """The call for one picture made from `image`, which has the size to draw in. `strength` is from 0, the picture as
    it is, to 1, anything: that part of the steps is made."""
    call = text_to_image.prepare(pipeline, text)
    return Call(call.arguments | {"image": image, "strength": strength}, call.notices)
