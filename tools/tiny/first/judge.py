"""Judges of pictures: what shape, colour, landscape or everyday thing does one show?

They look at pixels alone and never at the prompt. Each is checked against rendered pictures before its word counts
(`evaluation.py`). Pictures are arrays (64, 64, 3) uint8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .emoji import Emoji
from .shapes import COLOURS, OVERSAMPLING, SHAPES, SIZE, draw_shape

Array = np.ndarray[Any, Any]

_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), np.float32)


def nearest_colour(rgb: Array) -> str:
    """The palette's colour nearest to `rgb` (3,) by squared distance."""
    return _NAMES[int(np.square(_PALETTE - rgb).sum(1).argmin())]


def background(picture: Array) -> Array:
    """Median colour (3,) of the outermost two pixels."""
    edge = np.ones(picture.shape[:2], bool)
    edge[2:-2, 2:-2] = False
    return np.asarray(np.median(picture[edge].astype(np.float32), axis=0))


@dataclass(frozen=True)
class Seen:
    """What one shape is taken for."""

    colour: str
    shape: str


def see_shape(picture: Array, ground: Array) -> Seen | None:
    """The shape in `picture` (H, W, 3), which shows nothing else on the colour `ground`; None where there is none.

    Its coverage of each pixel is taken from the colour between ground and ink. Area and centre of that fix the size and
    the place of each candidate, and the candidate whose drawing differs least wins.
    """
    away = picture.astype(np.float32) - ground
    distance = np.sqrt(np.square(away).sum(-1))
    if distance.max() < 30:
        return None
    # The ink is the typical colour of what differs most: its edges are mixed with the ground.
    strong = distance > 0.6 * np.quantile(distance, 0.995)
    ink = np.median(picture[strong].astype(np.float32), axis=0)
    line = ink - ground
    coverage = np.clip((away @ line) / max(float(line @ line), 1.0), 0.0, 1.0)
    coverage[coverage < 0.2] = 0.0
    area = float(coverage.sum())
    if area < 12:
        return None
    y, x = (float((coverage * axis).sum()) / area + 0.5 for axis in np.indices(coverage.shape))
    errors = {}
    for shape in SHAPES:
        unit_area, dx, dy = _unit_moments(shape)
        radius = (area / unit_area) ** 0.5
        drawn = _drawn(shape, (x - dx * radius, y - dy * radius), radius, coverage.shape)
        errors[shape] = float(np.square(drawn - coverage).sum())
    return Seen(nearest_colour(ink), min(errors, key=lambda shape: errors[shape]))


def _drawn(shape: str, center: tuple[float, float], radius: float, size: tuple[int, ...]) -> Array:
    image = Image.new("RGB", (size[1] * OVERSAMPLING, size[0] * OVERSAMPLING))
    at = (center[0] * OVERSAMPLING, center[1] * OVERSAMPLING)
    draw_shape(ImageDraw.Draw(image), shape, at, radius * OVERSAMPLING, (255, 255, 255), (0, 0, 0))
    return np.asarray(image.reduce(OVERSAMPLING), np.float32)[..., 0] / 255


@cache
def _unit_moments(shape: str) -> tuple[float, float, float]:
    """Area of the shape of radius 1, and where its centre of mass lies from its own centre."""
    radius = 24.0
    drawn = _drawn(shape, (SIZE / 2, SIZE / 2), radius, (SIZE, SIZE))
    area = float(drawn.sum())
    y, x = (float((drawn * axis).sum()) / area + 0.5 - SIZE / 2 for axis in np.indices(drawn.shape))
    return area / radius**2, x / radius, y / radius


def see_pair(picture: Array) -> tuple[str, Seen | None, Seen | None]:
    """How two shapes stand, `beside` or `stacked`, and the left or upper and the right or lower one."""
    ground = background(picture)
    distance = np.sqrt(np.square(picture.astype(np.float32) - ground).sum(-1))
    middle = slice(SIZE // 2 - 2, SIZE // 2 + 2)
    half = SIZE // 2
    if distance[:, middle].sum() <= distance[middle].sum():
        return "beside", see_shape(picture[:, :half], ground), see_shape(picture[:, half:], ground)
    return "stacked", see_shape(picture[:half], ground), see_shape(picture[half:], ground)


class ThingJudge:
    """Ranks everyday things by how well they match a picture, over sizes and places.

    Pictures are compared at half their resolution by squared difference with each thing as the training draws it, on the
    background that the picture has.
    """

    _EDGES = (54, 56, 58, 60, 62)
    _SHIFTS = (-2, 0, 2)

    def __init__(self, things: Sequence[Emoji]) -> None:
        self._things = things
        self._cutouts: list[list[Array]] = []
        for thing in things:
            sizes = []
            for edge in self._EDGES:
                canvas = Image.new("RGBA", (SIZE, SIZE))
                slack = (SIZE - edge) // 2
                canvas.paste(thing.image.resize((edge, edge), Image.Resampling.LANCZOS), (slack, slack))
                sizes.append(np.asarray(canvas, np.float32) / 255)
            self._cutouts.append(sizes)

    def ranks(self, pictures: Sequence[Array], expected: Sequence[int]) -> list[int]:
        """For each picture, how many things match it better than the `expected` one."""
        grounds = [_NAMES.index(nearest_colour(background(picture))) for picture in pictures]
        ranks = [0] * len(pictures)
        for ground in sorted(set(grounds)):
            rows = [row for row, own in enumerate(grounds) if own == ground]
            flat = np.stack([_halved(pictures[row].astype(np.float32)).ravel() for row in rows])
            best = np.full((len(rows), len(self._things)), np.inf, np.float32)
            for templates in self._templates(_PALETTE[ground]):
                # The squared difference, but for the picture's own square, which is the same for all.
                differences = np.square(templates).sum(-1) - 2.0 * flat @ templates.T
                np.minimum(best, differences, out=best)
            for row, scores in zip(rows, best, strict=True):
                ranks[row] = int((scores < scores[expected[row]]).sum())
        return ranks

    def _templates(self, ground: Array) -> Iterator[Array]:
        """For each size and place, all things on `ground` (things, pixels)."""
        for size in range(len(self._EDGES)):
            cutouts = np.stack([sizes[size] for sizes in self._cutouts])
            alpha = cutouts[..., 3:]
            drawn = cutouts[..., :3] * 255 * alpha + ground * (1 - alpha)
            for dy in self._SHIFTS:
                for dx in self._SHIFTS:
                    # A cutout keeps clear of the edges, so what rolls over them is background.
                    moved = np.roll(drawn, (dy, dx), (1, 2))
                    yield _halved(moved).reshape(len(drawn), -1).astype(np.float32)


def _halved(pictures: Array) -> Array:
    """(..., 64, 64, 3) to (..., 32, 32, 3) by the mean of four pixels."""
    *lead, high, wide, channels = pictures.shape
    halved: Array = pictures.reshape(*lead, high // 2, 2, wide // 2, 2, channels).mean((-4, -2))
    return halved
