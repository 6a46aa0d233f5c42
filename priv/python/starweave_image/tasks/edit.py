"""Editing: a picture is changed as the prompt says, by a model that was trained to."""

from __future__ import annotations

from typing import Any

from PIL.Image import Image

from . import text_to_image
from .text_to_image import Call


def prepare(pipeline: Any, text: text_to_image.Text, image: Image, strength_asked: bool) -> Call:
    """The call for one picture made from `image`, which has the size to draw in."""
    call = text_to_image.prepare(pipeline, text)
    notices = ["strength has no effect on this model."] if strength_asked else []
    return Call(call.arguments | {"image": image}, call.notices + notices)
