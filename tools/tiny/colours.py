"""Colour words, and recolouring of a rendered icon's body.

Colours are compared and moved in OKLab (Björn Ottosson, 2020), where equal steps look equal.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .icons import Pixels

Colour = tuple[int, int, int]
Floats = np.ndarray[Any, np.dtype[np.float32]]

COLOURS: Mapping[str, Colour] = {
    "red": (222, 38, 38),
    "orange": (250, 138, 22),
    "yellow": (250, 218, 40),
    "green": (40, 160, 62),
    "blue": (36, 84, 214),
    "purple": (132, 48, 176),
    "pink": (250, 140, 190),
    "brown": (124, 76, 40),
    "black": (18, 18, 20),
    "white": (252, 252, 252),
    "gray": (140, 142, 146),
    "cyan": (50, 206, 222),
}

# How a coloured body is drawn: a black cat is dark gray, so that what lies within its outline stays visible.
_BODIES: Mapping[str, Colour] = {**COLOURS, "black": (44, 44, 48), "white": (244, 244, 246)}

SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "gray": ("gray", "gray", "grey"),
    "purple": ("purple", "purple", "purple", "violet"),
    "cyan": ("cyan", "cyan", "turquoise", "light blue"),
    "blue": ("blue",) * 7 + ("dark blue",),
    "green": ("green",) * 7 + ("dark green",),
    "yellow": ("yellow",) * 7 + ("golden",),
}
"""The words for a colour, as often as they are to be used; a colour that is not here has its own name alone."""


def colour_word(rng: random.Random, colour: str) -> str:
    return rng.choice(SPELLINGS.get(colour, (colour,)))


def jitter(rng: random.Random, colour: Colour, by: int = 6) -> Colour:
    r, g, b = (max(0, min(255, c + rng.randint(-by, by))) for c in colour)
    return (r, g, b)


_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    np.float32,
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    np.float32,
)
_FROM_LMS = np.linalg.inv(_TO_LMS).astype(np.float32)
_FROM_LAB = np.linalg.inv(_TO_LAB).astype(np.float32)
_LINEAR = np.where(
    np.arange(256) <= 10, np.arange(256) / 255 / 12.92, ((np.arange(256) / 255 + 0.055) / 1.055) ** 2.4
).astype(np.float32)


def to_lab(rgb: Pixels) -> Floats:
    """(..., 3) uint8 sRGB to OKLab: lightness 0..1, a and b about -0.3..0.3."""
    lab: Floats = np.cbrt(_LINEAR[rgb] @ _TO_LMS.T) @ _TO_LAB.T
    return lab


def to_rgb(lab: Floats) -> Pixels:
    """OKLab (..., 3) to sRGB uint8; what no screen shows is clipped."""
    linear = np.clip((lab @ _FROM_LAB.T) ** 3 @ _FROM_LMS.T, 0.0, 1.0)
    rgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(np.rint(rgb * 255), np.uint8)


def lab_of(colour: Colour) -> Floats:
    return to_lab(np.array(colour, np.uint8))


@dataclass(frozen=True)
class Body:
    """What of an icon takes a colour: its typical OKLab colour, and how much (EDGE, EDGE) 0..1 each pixel belongs to it.

    `share` is the part of the visible area that belongs.
    """

    lab: Floats
    weight: Floats
    share: float


def find_body(icon: Pixels) -> Body:
    """The body of `icon` (EDGE, EDGE, 4): what is as its commonest colour.

    With a hue, pixels of about that hue belong, whatever their lightness; without one, pixels as colourless and about
    as light, so that black eyes and white teeth stay.
    """
    visible = icon[..., 3] > 128
    lab = to_lab(icon[..., :3])
    seen = lab[visible]
    if len(seen) == 0:
        return Body(np.zeros(3, np.float32), np.zeros(icon.shape[:2], np.float32), 0.0)
    bins = np.rint(seen * (12.0, 24.0, 24.0)).astype(np.int64)
    codes = (bins[:, 0] * 100 + bins[:, 1] + 50) * 100 + bins[:, 2] + 50
    values, counts = np.unique(codes, return_counts=True)
    near = codes == values[counts.argmax()]
    typical = np.asarray(np.median(seen[near], axis=0), np.float32)
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    if np.hypot(typical[1], typical[2]) > 0.04:
        angle = np.arctan2(lab[..., 2], lab[..., 1]) - np.arctan2(typical[2], typical[1])
        away = np.abs((angle + np.pi) % (2 * np.pi) - np.pi)
        weight = np.clip((0.75 - away) / 0.25, 0, 1) * np.clip((chroma - 0.02) / 0.03, 0, 1)
    else:
        away = np.abs(lab[..., 0] - typical[0])
        weight = np.clip((0.30 - away) / 0.1, 0, 1) * np.clip((0.07 - chroma) / 0.03, 0, 1)
    weight = np.asarray(weight, np.float32)
    return Body(typical, weight, float(weight[visible].mean()))


def recolour(icon: Pixels, body: Body, colour: str) -> Pixels:
    """`icon` with its body in `colour`; shades stay lighter or darker by as much as they were."""
    lab = to_lab(icon[..., :3])
    target = lab_of(_BODIES[colour])
    # Shades of very light and very dark bodies are pressed together, or they would leave the range.
    room = 0.45 if colour in ("black", "white") else 0.8
    lightness = target[0] + (lab[..., 0] - body.lab[0]) * room
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    own = max(float(np.hypot(body.lab[1], body.lab[2])), 1e-3)
    strength = np.clip(chroma / own, 0.5, 1.15) if own > 0.04 else np.ones_like(chroma)
    painted = np.stack([np.clip(lightness, 0.08, 0.99), strength * target[1], strength * target[2]], -1)
    mixed = lab + (painted - lab) * body.weight[..., None]
    return np.concatenate([to_rgb(mixed.astype(np.float32)), icon[..., 3:]], -1)
