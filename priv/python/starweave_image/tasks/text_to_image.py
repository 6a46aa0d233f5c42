"""Text to image: a picture of the prompt, from noise."""

from __future__ import annotations

from typing import Any

from . import call
from .call import Call, Given
from .task import Signature, Task


def offered(pipeline: Signature, listed: bool) -> bool:
    # The signature does not say what an optional image is for, so then diffusers' list decides.
    return not pipeline.takes & {"mask_image", "strength"} and ("image" not in pipeline.takes or listed)


def prepare(pipeline: Any, given: Given) -> Call:
    return call.prepare(pipeline, given.text)


TASK = Task(
    name="text_to_image",
    fields=frozenset(),
    said="from text alone",
    offered=offered,
    call=prepare,
    table="AUTO_TEXT2IMAGE_PIPELINES_MAPPING",
    derived="AutoPipelineForText2Image",
)
