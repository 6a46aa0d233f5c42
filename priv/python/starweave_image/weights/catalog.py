"""Model cards: what is known of a model before it is loaded, and what a request may ask of it.

`catalog.json` holds the cards that ship with the package; a card for any other local folder is read from the
folder itself (weights.py). Nothing here touches a model's files.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from importlib.resources import files
from typing import Any, Literal

import msgspec

from .. import schema
from ..errors import ImageError
from .offered import Task

State = Literal["loaded", "loading", "available", "remote", "absent", "failed"]


class ModelCard(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A card of the catalog. `source` is a hub id, `embedded` or `local`.

    `fallbacks` are ids or aliases of models that may draw in its place, the best first, where it cannot be loaded: of the
    same kind and smaller.

    `native` is the length in pixels at which the model draws, for a model that draws at one scale only:
    what is asked for in another size is rendered at that scale and enlarged.
    """

    id: str
    name: str
    description: str
    aliases: tuple[str, ...] = ()
    pipeline: str
    tasks: tuple[Task, ...]
    source: str
    revision: str | None = None
    licence: str
    defaults: schema.Defaults
    limits: schema.Limits
    memory_bytes: int
    native: int | None = None
    fallbacks: tuple[str, ...] = ()

    @property
    def most_pixels(self) -> int:
        """The most pixels that the model itself draws at once."""
        return self.limits.max_pixels if self.native is None else 3 * self.native**2 // 2

    def told(self, state: State, error: str | None, **loaded: Any) -> schema.Card:
        """`loaded` are the fields of the wire's card that only a loaded model has."""
        return schema.Card(
            id=self.id,
            name=self.name,
            description=self.description,
            aliases=list(self.aliases),
            tasks=list(self.tasks),
            pipeline=self.pipeline,
            source=self.source,
            revision=self.revision,
            licence=self.licence,
            defaults=self.defaults,
            limits=self.limits,
            memory_bytes=self.memory_bytes,
            fallbacks=list(self.fallbacks),
            state=state,
            error=error,
            **loaded,
        )


def shipped() -> list[ModelCard]:
    """The cards of `catalog.json`."""
    text = files(__package__).joinpath("catalog.json").read_bytes()
    return msgspec.json.decode(text, type=list[ModelCard])


def find(name: str, cards: Iterable[ModelCard]) -> ModelCard:
    """The card with this id or alias; raises `model_not_found` with the nearest known id."""
    known = {key: card for card in cards for key in (*card.aliases, card.id)}
    if name in known:
        return known[name]
    # Owners are often guessed wrongly, so the last part alone counts as well.
    lowered = {key.lower(): key for key in known} | {key.lower().rpartition("/")[2]: key for key in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=1) or difflib.get_close_matches(
        name.lower().rpartition("/")[2], lowered, n=1
    )
    hint = f"; did you mean {lowered[near[0]]}?" if near else ""
    raise ImageError("model_not_found", f"model {name} is not known{hint}", "model")


class Settings(msgspec.Struct, kw_only=True, frozen=True):
    """What a request asks for once the card's defaults have filled the gaps."""

    task: Task
    width: int
    height: int
    steps: int
    guidance_scale: float


def settle(request: schema.Request, card: ModelCard, image_size: tuple[int, int] | None = None) -> Settings:
    """The request's settings within the card's limits; raises `invalid_request` naming the field.

    `image_size` is the size of the request's image, which is then what it is made in unless it says otherwise.
    """
    task = _task(request, card)
    defaults, limits = card.defaults, card.limits
    width, height = (defaults.width, defaults.height) if image_size is None else fitted(image_size, limits)
    settings = Settings(
        task=task,
        width=width if request.width is None else request.width,
        height=height if request.height is None else request.height,
        steps=defaults.steps if request.steps is None else request.steps,
        guidance_scale=float(
            defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
        ),
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
    if task in ("image_to_image", "inpaint") and int(settings.steps * request.strength) < 1:
        # Rounded up: what is told is accepted.
        least = math.ceil(1000 / settings.steps) / 1000
        raise ImageError(
            "invalid_request",
            f"strength must be at least 1 / steps, {least:g} here, got {request.strength!r}",
            "strength",
        )
    return settings


_SAID: dict[Task, str] = {
    "text_to_image": "from text alone",
    "image_to_image": "from an image",
    "edit": "from an image",
    "inpaint": "from an image with a mask",
}


def _task(request: schema.Request, card: ModelCard) -> Task:
    """What is given decides the task; raises `invalid_request` where the model does not do it."""
    asked: tuple[Task, ...] = ("text_to_image",)
    if request.mask is not None:
        asked = ("inpaint",)
    elif request.image is not None:
        # A model that is for edits changes an image; one that is not leaves it as far as the strength says.
        asked = ("image_to_image", "edit")
    for task in asked:
        if task in card.tasks:
            return task
    field = "mask" if request.mask is not None else "image"
    draws = f"it draws {' or '.join(dict.fromkeys(_SAID[task] for task in card.tasks))}"
    if getattr(request, field) is not None:
        raise ImageError("invalid_request", f"{card.id} takes no {field}: {draws}", field)
    raise ImageError("invalid_request", f"{card.id} needs an image: {draws}", field)


def fitted(size: tuple[int, int], limits: schema.Limits) -> tuple[int, int]:
    """The size in pixels, (width, height), within the limits that is nearest to an image's, its shape kept."""
    longer, shorter = max(size), min(size)
    scale = min(1.0, limits.max_size / longer, math.sqrt(limits.max_pixels / (longer * shorter)))
    scale = max(scale, limits.min_size / shorter)
    unit = limits.multiple_of
    least, most = -(-limits.min_size // unit), limits.max_size // unit
    # A hair over a multiple is one: the scale is rounded.
    width, height = (unit * min(max(int(side * scale / unit + 1e-6), least), most) for side in size)
    return width, height


def rendered_size(width: int, height: int, card: ModelCard) -> tuple[int, int]:
    """The size in pixels, (width, height), at which the model draws a picture of the size asked for.

    At the native scale the shorter side is `native` and the longer keeps the aspect up to 3:2; beyond that
    composition falls apart, so what is wider or taller is cut from a 3:2 picture.
    """
    if card.native is None:
        return width, height
    longer = min(max(width, height) / min(width, height), 1.5) * card.native
    longer = max(card.native, math.floor(longer / 8 + 0.5) * 8)
    return (int(longer), card.native) if width >= height else (card.native, int(longer))
