"""Model cards: what is known of a model before it is loaded.

`catalog.json` holds the cards that ship with the package; a card for any other local folder is read from the folder
itself (find.py). Nothing here touches a model's files.
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
    tasks: tuple[schema.Task, ...]
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
