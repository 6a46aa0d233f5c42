"""Inpainting: image to image where a mask is white; elsewhere the picture stays as it is."""

from __future__ import annotations

from typing import Any

from . import image_to_image
from .call import Call, Given
from .task import Signature, Task


def offered(pipeline: Signature, listed: bool) -> bool:
    return {"image", "mask_image"} <= pipeline.takes


def prepare(pipeline: Any, given: Given) -> Call:
    return image_to_image.prepare(pipeline, given).also(mask_image=given.mask)


TASK = Task(
    name="inpaint",
    fields=frozenset({"image", "mask"}),
    said="from an image with a mask",
    offered=offered,
    call=prepare,
    table="AUTO_INPAINT_PIPELINES_MAPPING",
    derived="AutoPipelineForInpainting",
    # Some UNets take the masked image and the mask in addition to the latents.
    channels=lambda latents: (latents, 2 * latents + 1),
    takes_strength=True,
)
