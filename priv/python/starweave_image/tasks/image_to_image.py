"""Image to image: noise is added to a picture, which is then denoised as the prompt says."""

from __future__ import annotations

from typing import Any

from . import call
from .call import Call, Given
from .task import Signature, Task


def offered(pipeline: Signature, listed: bool) -> bool:
    return {"image", "strength"} <= pipeline.takes and "mask_image" not in pipeline.takes


def prepare(pipeline: Any, given: Given) -> Call:
    """`strength` is the share of the steps that is made, from 0 (the picture stays as it is) to 1 (anything)."""
    [image] = given.images
    return call.prepare(pipeline, given.text).also(image=image, strength=given.strength)


TASK = Task(
    name="image_to_image",
    fields=frozenset({"image"}),
    said="from an image",
    offered=offered,
    call=prepare,
    table="AUTO_IMAGE2IMAGE_PIPELINES_MAPPING",
    derived="AutoPipelineForImage2Image",
    takes_strength=True,
)
