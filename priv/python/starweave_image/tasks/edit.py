"""Editing: a model trained for it changes a picture, or combines several, as the prompt says."""

from __future__ import annotations

from typing import Any

from . import call
from .call import Call, Given
from .task import Signature, Task


def offered(pipeline: Signature, listed: bool) -> bool:
    edits = "image_guidance_scale" in pipeline.takes or listed
    return edits and "image" in pipeline.takes and not pipeline.takes & {"mask_image", "strength"}


def prepare(pipeline: Any, given: Given) -> Call:
    image, *others = given.images
    return call.prepare(pipeline, given.text).also(image=[image, *others] if others else image)


TASK = Task(
    name="edit",
    fields=frozenset({"image"}),
    said="from an image",
    offered=offered,
    call=prepare,
    table="AUTO_IMAGE2IMAGE_PIPELINES_MAPPING",
    derived="AutoPipelineForImage2Image",
    # The input image's latents are concatenated with those of the picture.
    channels=lambda latents: (2 * latents,),
)
