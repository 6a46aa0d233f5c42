"""Model cards: what is known of a model before it is loaded, and what a request may ask of it.

`catalog.json` holds the cards that ship with the package; a card for any other local folder is read from the
folder itself (weights.py). Nothing here touches a model's files.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from importlib.resources import files
from typing import Literal

import msgspec

from . import wire
from .errors import ImageError

State = Literal["loaded", "loading", "available", "remote", "absent", "failed"]


class ModelCard(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A card of the catalog. `source` is a hub id, `embedded` or `local`.

    `native` is the length in pixels at which the model draws, for a model that draws at one scale only:
    what is asked for in another size is rendered at that scale and enlarged.
    """

    id: str
    name: str
    description: str
    aliases: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("text_to_image",)
    pipeline: str
    source: str
    revision: str | None = None
    licence: str
    defaults: wire.Defaults
    limits: wire.Limits
    memory_bytes: int
    native: int | None = None

    def on_wire(self, state: State, error: str | None) -> wire.Card:
        return wire.Card(
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
            state=state,
            error=error,
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

    width: int
    height: int
    steps: int
    guidance_scale: float


def settle(request: wire.Generate, card: ModelCard) -> Settings:
    """The request's settings within the card's limits; raises `invalid_request` naming the field."""
    if "text_to_image" not in card.tasks:
        raise ImageError("invalid_request", f"{card.id} does not make images from text", "model")
    for field in ("image", "mask"):
        if getattr(request, field) is not None:
            raise ImageError(
                "invalid_request", f"{card.id} takes no {field}: it draws from text alone", field
            )
    defaults, limits = card.defaults, card.limits
    settings = Settings(
        width=defaults.width if request.width is None else request.width,
        height=defaults.height if request.height is None else request.height,
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
            f"got {settings.guidance_scale:g}",
            "guidance_scale",
        )
    return settings


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
