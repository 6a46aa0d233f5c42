"""The settings of a request for its model: the task, and all numbers, with defaults and limits from the model's
card."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .. import schema
from ..errors import ImageError
from ..weights.catalog import ModelCard
from . import registry
from .task import Task

# Models distilled to at most this many steps get worse with fewer steps, and with more.
_FEW_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a request, completed by the card's defaults."""

    task: Task
    width: int
    height: int
    steps: int
    guidance_scale: float
    # Sentences for the caller about changes to the requested settings.
    notices: list[str]


def settle(request: schema.Request, card: ModelCard, image_size: tuple[int, int] | None = None) -> Settings:
    """The request's settings within the card's limits; raises `invalid_request` naming the field.

    `image_size` is the size in pixels of the request's first image, which is the default for the size to draw in.
    """
    task = registry.asked(request, card.id, card.tasks)
    if len(request.pictures) > 1 and not registry.takes_several(card.pipeline, task):
        count = len(request.pictures)
        raise ImageError(
            "invalid_request", f"{card.id} takes one image for {task.name}, got {count}", "images"
        )
    defaults, limits = card.defaults, card.limits
    width, height = (defaults.width, defaults.height) if image_size is None else fitted(image_size, limits)
    steps, notices = _steps(request, card)
    settings = Settings(
        task=task,
        width=width if request.width is None else request.width,
        height=height if request.height is None else request.height,
        steps=steps,
        guidance_scale=float(
            defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
        ),
        notices=notices,
    )
    for field, pixels in (("width", settings.width), ("height", settings.height)):
        if pixels % limits.multiple_of or not limits.min_size <= pixels <= limits.max_size:
            raise ImageError(
                "invalid_request",
                f"{field} must be a multiple of {limits.multiple_of} from {limits.min_size} to "
                f"{limits.max_size} for {card.id}, got {pixels}",
                field,
            )
    if settings.width * settings.height > limits.max_pixels:
        raise ImageError(
            "invalid_request",
            f"width times height must be at most {limits.max_pixels} pixels for {card.id}, "
            f"got {settings.width}x{settings.height}",
            "width",
        )
    if not 1 <= settings.steps <= limits.max_steps:
        raise ImageError(
            "invalid_request",
            f"steps must be from 1 to {limits.max_steps} for {card.id}, got {settings.steps}",
            "steps",
        )
    if not 0 <= settings.guidance_scale <= limits.max_guidance:
        raise ImageError(
            "invalid_request",
            f"guidance_scale must be from 0 to {limits.max_guidance:g} for {card.id}, "
            f"got {settings.guidance_scale!r}",
            "guidance_scale",
        )
    if task.takes_strength and int(settings.steps * request.strength) < 1:
        # Rounded up, so that the value in the message is accepted.
        least = math.ceil(1000 / settings.steps) / 1000
        raise ImageError(
            "invalid_request",
            f"strength must be at least 1 / steps, {least:g} here, got {request.strength!r}",
            "strength",
        )
    return settings


def _steps(request: schema.Request, card: ModelCard) -> tuple[int, list[str]]:
    default = card.defaults.steps
    if request.steps is not None:
        return request.steps, []
    if request.effort == "standard":
        return default, []
    if default <= _FEW_STEPS:
        return default, [f"{card.name} is made for {default} steps, whatever the effort."]
    if request.effort == "draft":
        return math.ceil(default / 2), []
    return min(-(-default * 8 // 5), card.limits.max_steps), []


def fitted(size: tuple[int, int], limits: schema.Limits) -> tuple[int, int]:
    """The size in pixels, (width, height), within the limits that is nearest to an image's and keeps its
    proportions."""
    longer, shorter = max(size), min(size)
    scale = min(1.0, limits.max_size / longer, math.sqrt(limits.max_pixels / (longer * shorter)))
    scale = max(scale, limits.min_size / shorter)
    unit = limits.multiple_of
    least, most = -(-limits.min_size // unit), limits.max_size // unit
    # The small addition corrects the rounding of the scale: just below a multiple counts as that multiple.
    width, height = (unit * min(max(int(side * scale / unit + 1e-6), least), most) for side in size)
    return width, height
