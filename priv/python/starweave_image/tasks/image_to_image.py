"""Image to image: a picture is taken part of the way to noise, and from there as the prompt says."""

from __future__ import annotations

import inspect
from typing import Any

from PIL.Image import Image

from . import text_to_image
from .text_to_image import Call


def derive(pipeline: Any) -> Any:
    """The stock image-to-image pipeline of the same family, over the same parts."""
    from diffusers import AutoPipelineForImage2Image

    derived: Any = AutoPipelineForImage2Image.from_pipe(pipeline)
    derived.set_progress_bar_config(disable=True)
    return derived


def prepare(pipeline: Any, text: text_to_image.Text, image: Image, strength: float) -> Call:
    """The call for one picture made from `image`, which has the size to draw in. `strength` is from 0, the picture as
    it is, to 1, anything: that part of the steps is made."""
    call = text_to_image.prepare(pipeline, text)
    # Some of these pipelines take the size from the image alone.
    takes = inspect.signature(pipeline.__call__).parameters
    arguments = {name: value for name, value in call.arguments.items() if name in takes}
    return Call(arguments | {"image": image, "strength": strength}, call.notices)
