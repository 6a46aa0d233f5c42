"""Captioned pictures of one or two coloured shapes, drawn by Pillow.

Every picture is `SIZE` x `SIZE` pixels RGB and depends on nothing but the `random.Random`
that is handed in.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

SIZE = 64
OVERSAMPLING = 4

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
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

SHAPES: tuple[str, ...] = (
    "circle",
    "square",
    "triangle",
    "star",
    "diamond",
    "heart",
    "ring",
    "cross",
    "crescent",
    "hexagon",
)

RELATIONS: tuple[str, ...] = ("left", "right", "above", "below")

HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "hexagon"),
        ("orange", "cross"),
        ("yellow", "diamond"),
        ("green", "heart"),
        ("blue", "ring"),
        ("purple", "star"),
        ("pink", "square"),
        ("brown", "circle"),
        ("black", "crescent"),
        ("white", "triangle"),
        ("gray", "star"),
        ("cyan", "triangle"),
    }
)
"""Colour-shape pairs that no training picture shows, alone or beside another shape."""

# Radius in pixels of the circle that a shape is drawn into.
_RADII: dict[str, tuple[float, float]] = {
    "small": (10.0, 12.5),
    "medium": (16.5, 20.0),
    "large": (24.5, 28.0),
}
_SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small",),
    "medium": ("",),
    "large": ("large", "big"),
}


@dataclass(frozen=True)
class Sample:
    """One training picture with its caption.

    `facts` holds what the picture shows as plain words, for the evaluation.
    """

    image: Image.Image
    caption: str
    facts: dict[str, str] = field(default_factory=dict)


def _regular(center: Point, radius: float, corners: int, turn: float = 0.0) -> list[Point]:
    step = 2 * math.pi / corners
    return [
        (
            center[0] + radius * math.sin(turn + i * step),
            center[1] - radius * math.cos(turn + i * step),
        )
        for i in range(corners)
    ]


def _star(center: Point, radius: float) -> list[Point]:
    outer = _regular(center, radius, 5)
    inner = _regular(center, radius * 0.42, 5, math.pi / 5)
    return [p for pair in zip(outer, inner, strict=True) for p in pair]


def _heart(center: Point, radius: float) -> list[Point]:
    # The usual parametric heart: x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t.
    points = []
    for i in range(60):
        t = 2 * math.pi * i / 60
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((center[0] + radius * x / 16.5, center[1] - radius * (y + 2.5) / 16.5))
    return points


def draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    center: Point,
    radius: float,
    colour: Colour,
    background: Colour,
) -> None:
    """Draws `shape` inside the circle of `radius` around `center`, all in oversampled pixels."""
    x, y = center
    if shape in ("circle", "ring", "crescent"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        if shape == "ring":
            r = radius * 0.58
            draw.ellipse((x - r, y - r, x + r, y + r), fill=background)
        elif shape == "crescent":
            r, cx, cy = radius * 0.86, x + radius * 0.44, y - radius * 0.16
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=background)
    elif shape == "square":
        r = radius * 0.82
        draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "cross":
        r, w = radius * 0.95, radius * 0.32
        draw.rectangle((x - r, y - w, x + r, y + w), fill=colour)
        draw.rectangle((x - w, y - r, x + w, y + r), fill=colour)
    elif shape == "triangle":
        draw.polygon(_regular((x, y + radius * 0.2), radius * 1.1, 3), fill=colour)
    elif shape == "diamond":
        w = radius * 0.72
        draw.polygon([(x, y - radius), (x + w, y), (x, y + radius), (x - w, y)], fill=colour)
    elif shape == "star":
        draw.polygon(_star((x, y + radius * 0.06), radius * 1.08), fill=colour)
    elif shape == "heart":
        draw.polygon(_heart(center, radius), fill=colour)
    elif shape == "hexagon":
        draw.polygon(_regular(center, radius, 6, math.pi / 6), fill=colour)
    else:
        raise ValueError(f"unknown shape {shape!r}")


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _pick_thing(rng: random.Random, background: str, held_out: bool) -> tuple[str, str]:
    if held_out:
        return rng.choice([p for p in sorted(HELD_OUT) if p[0] != background])
    while True:
        pair = (rng.choice(tuple(COLOURS)), rng.choice(SHAPES))
        if pair[0] != background and pair not in HELD_OUT:
            return pair


def _jitter(rng: random.Random, colour: Colour) -> Colour:
    r, g, b = (max(0, min(255, c + rng.randint(-6, 6))) for c in colour)
    return (r, g, b)


def _canvas(background: Colour) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIZE * OVERSAMPLING, SIZE * OVERSAMPLING), background)
    return image, ImageDraw.Draw(image)


def _background_words(rng: random.Random, background: str, may_omit: bool) -> str:
    if may_omit and rng.random() < 0.5:
        return ""
    word = "plain " if rng.random() < 0.1 else ""
    return rng.choice((f" on {_article(word + background)} background", f" on {background}"))


def single_shape(rng: random.Random, held_out: bool = False) -> Sample:
    """One shape near the centre. A caption without a background means white (gray for white)."""
    background = "white" if rng.random() < 0.5 else rng.choice(tuple(COLOURS))
    colour, shape = _pick_thing(rng, background, held_out)
    size = rng.choices(("small", "medium", "large"), (0.22, 0.5, 0.28))[0]
    radius = rng.uniform(*_RADII[size])
    slack = max(0.0, min(4.0, 30.0 - radius))
    center = (
        (32 + rng.uniform(-slack, slack)) * OVERSAMPLING,
        (32 + rng.uniform(-slack, slack)) * OVERSAMPLING,
    )
    bg = COLOURS[background]
    image, draw = _canvas(bg)
    ink = _jitter(rng, COLOURS[colour])
    draw_shape(draw, shape, center, radius * OVERSAMPLING, ink, bg)

    word = rng.choice(_SIZE_WORDS[size])
    thing = " ".join(w for w in (word, colour, shape) if w)
    plain = background == ("gray" if colour == "white" else "white")
    lead = rng.choices(
        (_article(thing), thing, f"a picture of {_article(thing)}", f"the {thing}"),
        (0.6, 0.25, 0.1, 0.05),
    )[0]
    caption = lead + _background_words(rng, background, plain)
    facts = {"colour": colour, "shape": shape, "background": background, "size": size}
    return Sample(image.reduce(OVERSAMPLING), caption, facts)


def _pair_caption(rng: random.Random, relation: str, first: str, second: str) -> str:
    a, b = _article(first), _article(second)
    if relation in ("left", "right"):
        other = "right" if relation == "left" else "left"
        forms = (
            f"{a} to the {relation} of {b}",
            f"{a} {relation} of {b}",
            f"{a} on the {relation} and {b} on the {other}",
            f"on the {relation} {a}, on the {other} {b}",
        )
        return rng.choices(forms, (0.35, 0.35, 0.2, 0.1))[0]
    ends = ("top", "bottom") if relation == "above" else ("bottom", "top")
    stacked = (
        f"{a} {relation} {b}",
        f"{first} {relation} {second}",
        f"{a} at the {ends[0]} and {b} at the {ends[1]}",
    )
    return rng.choices(stacked, (0.6, 0.2, 0.2))[0]


def two_shapes(rng: random.Random) -> Sample:
    """Two shapes of different colours, the first `relation` of the second."""
    background = "white" if rng.random() < 0.75 else rng.choice(tuple(COLOURS))
    first = _pick_thing(rng, background, held_out=False)
    second = _pick_thing(rng, background, held_out=False)
    while second[0] == first[0]:
        second = _pick_thing(rng, background, held_out=False)
    relation = rng.choice(RELATIONS)

    bg = COLOURS[background]
    image, draw = _canvas(bg)
    near, far = 16.5, 47.5
    centers = {
        "left": ((near, 32.0), (far, 32.0)),
        "right": ((far, 32.0), (near, 32.0)),
        "above": ((32.0, near), (32.0, far)),
        "below": ((32.0, far), (32.0, near)),
    }[relation]
    for (colour, shape), (x, y) in zip((first, second), centers, strict=True):
        center = (
            (x + rng.uniform(-1.5, 1.5)) * OVERSAMPLING,
            (y + rng.uniform(-1.5, 1.5)) * OVERSAMPLING,
        )
        radius = rng.uniform(11.5, 14.0) * OVERSAMPLING
        draw_shape(draw, shape, center, radius, _jitter(rng, COLOURS[colour]), bg)

    caption = _pair_caption(rng, relation, " ".join(first), " ".join(second))
    if background != "white" or rng.random() < 0.15:
        caption += _background_words(rng, background, may_omit=False)
    facts = {
        "colour": first[0],
        "shape": first[1],
        "colour2": second[0],
        "shape2": second[1],
        "relation": relation,
        "background": background,
    }
    return Sample(image.reduce(OVERSAMPLING), caption, facts)
