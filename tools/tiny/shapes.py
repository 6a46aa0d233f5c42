"""Plain shapes as icons: a transparent square with the shape in one colour."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from .colours import Colour
from .icons import EDGE, Pixels

_OVERSAMPLING = 4
Point = tuple[float, float]


def _regular(corners: int, turn: float = 0.0) -> list[Point]:
    step = 2 * math.pi / corners
    return [(math.sin(turn + i * step), -math.cos(turn + i * step)) for i in range(corners)]


def _star(points: int, inner: float) -> list[Point]:
    near = [(x * inner, y * inner) for x, y in _regular(points, math.pi / points)]
    return [p for pair in zip(_regular(points), near, strict=True) for p in pair]


def _heart() -> list[Point]:
    # The usual parametric heart: x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t.
    points = []
    for i in range(90):
        t = 2 * math.pi * i / 90
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3 / 16.5, -(y + 2.5) / 16.5))
    return points


_POLYGONS: Mapping[str, list[Point]] = {
    "square": [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)],
    "rectangle": [(-0.98, -0.58), (0.98, -0.58), (0.98, 0.58), (-0.98, 0.58)],
    "triangle": [(x * 1.08, y * 1.08 + 0.22) for x, y in _regular(3)],
    "diamond": [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)],
    "star": [(x, y + 0.05) for x, y in _star(5, 0.42)],
    "heart": _heart(),
    "hexagon": _regular(6, math.pi / 6),
    "pentagon": [(x, y + 0.05) for x, y in _regular(5)],
    "octagon": _regular(8, math.pi / 8),
    "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.75), (1, 0), (0.1, 0.75), (0.1, 0.3), (-1, 0.3)],
    "cross": [
        (-0.33, -0.97), (0.33, -0.97), (0.33, -0.33), (0.97, -0.33), (0.97, 0.33), (0.33, 0.33),
        (0.33, 0.97), (-0.33, 0.97), (-0.33, 0.33), (-0.97, 0.33), (-0.97, -0.33), (-0.33, -0.33),
    ],
}  # fmt: skip

SHAPES: Mapping[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "circle", "disc", "dot"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "diamond": ("diamond", "diamond", "rhombus"),
    "heart": ("heart",),
    "ring": ("ring",),
    "cross": ("cross",),
    "crescent": ("crescent",),
    "hexagon": ("hexagon",),
    "rectangle": ("rectangle",),
    "oval": ("oval", "ellipse"),
    "pentagon": ("pentagon",),
    "octagon": ("octagon",),
    "arrow": ("arrow",),
}
"""Each shape and the words for it, as often as they are to be used."""


@cache
def _coverage(shape: str) -> Pixels:
    """(EDGE, EDGE) uint8: the shape, as large as the square allows."""
    edge = EDGE * _OVERSAMPLING
    image = Image.new("L", (edge, edge))
    draw = ImageDraw.Draw(image)
    half, radius = edge / 2, edge / 2 * 0.98

    def disc(x: float, y: float, wide: float, high: float, ink: int) -> None:
        x, y = half + x * radius, half + y * radius
        draw.ellipse((x - wide * radius, y - high * radius, x + wide * radius, y + high * radius), fill=ink)

    if shape in ("circle", "ring", "crescent"):
        disc(0, 0, 1, 1, 255)
        if shape == "ring":
            disc(0, 0, 0.58, 0.58, 0)
        elif shape == "crescent":
            disc(0.44, -0.16, 0.86, 0.86, 0)
    elif shape == "oval":
        disc(0, 0, 1, 0.66, 255)
    else:
        draw.polygon([(half + x * radius, half + y * radius) for x, y in _POLYGONS[shape]], fill=255)
    return np.asarray(image.reduce(_OVERSAMPLING))


def shape_icon(shape: str, colour: Colour) -> Pixels:
    """(EDGE, EDGE, 4): `shape`, one of SHAPES, in `colour` on nothing."""
    alpha = _coverage(shape)
    return np.concatenate(
        [np.broadcast_to(np.array(colour, np.uint8), (*alpha.shape, 3)), alpha[..., None]], -1
    )
