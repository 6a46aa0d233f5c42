"""Captioned training pictures: things, colours, numbers, relations, places, shapes and landscapes.

Every picture depends on nothing but its `random.Random` and the icons.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image

from . import icons as icon_cache
from .captions import (
    background_words,
    count_words,
    finish,
    noun,
    placed_words,
    related_words,
    scene_words,
    size_word,
)
from .colours import COLOURS, SPELLINGS, Body, Colour, find_body, jitter, recolour
from .icons import EDGE, Icons, Pixels
from .scenes import GROUNDS, Scene, draw_scene, lit, paint
from .shapes import SHAPES, shape_icon
from .things import KINDS, Thing, collect, countable, plural

PLAIN = "glossy"
"""The style of a picture whose caption names none."""

RELATIONS: tuple[str, ...] = ("left", "right", "above", "below", "on", "under", "front", "behind", "beside")

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of what is visible, in pixels."""


@dataclass(frozen=True)
class Subject:
    """What stands in a picture: a thing of icons or a shape, and its colour; "" is the thing's own."""

    name: str
    thing: Thing | None
    colour: str

    @property
    def key(self) -> str:
        """The commonest name of what it is, whichever name the caption has."""
        return self.thing.names[0] if self.thing else self.name


@dataclass(frozen=True)
class Facts:
    """What a picture shows, for the judges. `relation` is of the first subject to the second."""

    kind: str
    style: str = PLAIN
    subjects: tuple[Subject, ...] = ()
    count: int = 1
    relation: str = ""
    size: str = "medium"
    background: str = ""
    scene: Scene | None = None
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A picture EDGE x EDGE with its caption."""

    image: Image.Image
    caption: str
    facts: Facts


def held_out(caption: str) -> bool:
    """Whether this caption is kept out of training, for the evaluation: one in sixteen, by its checksum."""
    return zlib.crc32(caption.encode()) % 16 == 0


def pair_held_out(key: str, colour: str) -> bool:
    """Whether this thing is never coloured so in training: one pair in sixteen, by its checksum."""
    return zlib.crc32(f"{colour}/{key}".encode()) % 16 == 5


class Choice:
    """Things to draw one of, each as often as its weight says."""

    def __init__(self, things: Iterable[Thing]) -> None:
        self.things = tuple(things)
        self._sums = list(accumulate(thing.weight for thing in self.things))

    def draw(self, rng: random.Random) -> Thing:
        return rng.choices(self.things, cum_weights=self._sums)[0]


class Studio:
    """Icons and things, and what samples are drawn with."""

    def __init__(self, icons: Icons, things: Sequence[Thing]) -> None:
        self.icons, self.things = icons, things
        self.body = lru_cache(4096)(self._find_body)
        self.any = Choice(things)
        self.countable = Choice(t for t in things if countable(t.names[0]))
        # Where things stand on the ground or on one another, what is itself a place or weather looks odd.
        self.solid = Choice(t for t in self.countable.things if not _UNSOLID.intersection(t.names[0].split()))
        self.seats = Choice(t for t in self.solid.things if t.names[0] in _SEATS)

    def phrases(self) -> Iterator[str]:
        """All names, plurals and tags, and all words for colours and shapes."""
        for thing in self.things:
            yield from thing.names
            yield from (plural(name) for name in thing.names)
            yield from thing.tags
        for words in SHAPES.values():
            yield from words
            yield from (plural(word) for word in words)
        yield from COLOURS
        for words in SPELLINGS.values():
            yield from words

    def _find_body(self, style: str, key: str) -> Body:
        return find_body(np.asarray(self.icons[style, key]))

    def colourable(self, thing: Thing, style: str) -> bool:
        """Whether enough of the thing is of one colour for it to be called by another."""
        key = thing.key(style)
        return not thing.person and key is not None and self.body(style, key).share > 0.34

    def cutout(self, subject: Subject, style: str, rng: random.Random) -> Pixels:
        """RGBA (EDGE, EDGE, 4) of the subject."""
        if subject.thing is None:
            return shape_icon(subject.name, jitter(rng, COLOURS[subject.colour or "black"]))
        key = subject.thing.key(style)
        assert key is not None
        icon = np.asarray(self.icons[style, key])
        return recolour(icon, self.body(style, key), subject.colour) if subject.colour else icon

    def alone(self, rng: random.Random, thing: Thing, caption: str) -> Sample:
        """The thing in its own colour on white, with a caption that is given."""
        sample = _alone(self, rng, Subject(thing.names[0], thing, ""), PLAIN, "", "one", "medium")
        return replace(sample, caption=caption)

    def pick(
        self,
        rng: random.Random,
        style: str,
        among: Choice,
        coloured: float,
        avoid: str = "",
        pairs: bool = False,
    ) -> Subject:
        """A subject of `among`, in another colour than its own with the chance `coloured`.

        `avoid` is the background. With `pairs` its colour and thing are a pair that training never shows.
        """
        while True:
            thing = among.draw(rng)
            if thing.key(style) is None:
                continue
            colour = ""
            if rng.random() < coloured:
                if not self.colourable(thing, style):
                    continue
                colours = [c for c in COLOURS if c != avoid and pair_held_out(thing.names[0], c) == pairs]
                if not colours:
                    continue
                colour = rng.choice(colours)
            name = thing.names[0] if rng.random() < 0.55 else rng.choice(thing.names)
            return Subject(name, thing, colour)

    def pick_shape(
        self, rng: random.Random, avoid: str, coloured: float = 0.9, pairs: bool = False
    ) -> Subject:
        while True:
            shape, colour = rng.choice(tuple(SHAPES)), rng.choice(tuple(COLOURS))
            if not pairs and rng.random() >= coloured:
                return Subject(shape, None, "")
            if colour != avoid and pair_held_out(shape, colour) == pairs:
                return Subject(shape, None, colour)


_UNSOLID = frozenset(
    """face sunset sunrise city cityscape fog foggy cyclone dizzy milky bubbles landslide map island beach wave mountain
    fire tornado storm thunderstorm cloud lightning rainbow fireworks space sign button arrow symbol mark hole park desert
    volcano village night moon sun""".split()
)
_SEATS = frozenset(
    """chair table sofa bed bench fence shelf seat suitcase bathtub car truck bus rock wood package gift taxi boat
    sailboat canoe horse elephant cow camel pig turtle skateboard sled piano television computer laptop basket
    cake hamburger pizza pickup drum cabinet toolbox castle house barrel book books train tractor locomotive
    minibus ambulance motorcycle bicycle donkey ox bison whale hippo rhino tank ship raft tent bucket
    briefcase radio printer toilet bread cheese pumpkin watermelon pineapple lion tiger bear sheep dog
    crocodile trophy treasure keyboard plate hat shoe boot scooter""".split()
) | {"red book", "treasure chest", "birthday cake", "filing cabinet", "pickup truck", "file box"}


def _visible(cutout: Pixels) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part of a cutout that is not transparent."""
    alpha = cutout[..., 3] > 40
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    if len(rows) == 0:
        return 0, 0, EDGE, EDGE
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class _Stage:
    """A canvas that cutouts are put on by where their visible part shall be."""

    def __init__(self, ground: Colour | None) -> None:
        """`ground` None is a transparent canvas."""
        fill = (0, 0, 0, 0) if ground is None else (*ground, 255)
        self.image = Image.new("RGBA", (EDGE, EDGE), fill)
        self.boxes: list[Box] = []

    def put(
        self, cutout: Pixels, x: float, bottom: float, size: float, shade: Sequence[float] | None = None
    ) -> Box:
        """Puts `cutout` so that its visible part's longer side is `size`, its middle at `x`, its lowest row at `bottom`."""
        left, top, right, low = _visible(cutout)
        scale = size / max(right - left, low - top)
        wide, high = max(1, round((right - left) * scale)), max(1, round((low - top) * scale))
        part = Image.fromarray(np.ascontiguousarray(cutout[top:low, left:right]))
        part = part.resize((wide, high), Image.Resampling.LANCZOS, reducing_gap=3.0)
        if shade is not None:
            bands = part.split()
            parts = [band.point(lambda v, f=f: int(v * f)) for band, f in zip(bands[:3], shade, strict=True)]
            part = Image.merge("RGBA", (*parts, bands[3]))
        at = (round(x - wide / 2), round(bottom - high))
        self.image.alpha_composite(part, (max(0, at[0]), max(0, at[1])), (max(0, -at[0]), max(0, -at[1])))
        box = (float(at[0]), float(at[1]), float(at[0] + wide), float(at[1] + high))
        self.boxes.append(box)
        return box


SOFT: Colour = (196, 204, 212)


def _ground_colour(background: str, subjects: Sequence[Subject]) -> Colour:
    if background:
        return COLOURS[background]
    return SOFT if any(s.colour == "white" for s in subjects) else (255, 255, 255)


_SIZES: Mapping[str, tuple[float, float]] = {
    "tiny": (26, 34),
    "small": (44, 60),
    "medium": (96, 116),
    "large": (119, 125),
}


def one(studio: Studio, rng: random.Random, pairs: bool = False) -> Sample:
    """One thing, on a plain or a coloured background."""
    style = PLAIN if rng.random() < 0.7 else "flat"
    background = "" if rng.random() < 0.75 else rng.choice(tuple(COLOURS))
    coloured = 1.0 if pairs else 0.42
    subject = studio.pick(rng, style, studio.any, coloured, background, pairs)
    return _alone(studio, rng, subject, style, background, "one")


def shape(studio: Studio, rng: random.Random, pairs: bool = False) -> Sample:
    """One shape."""
    background = "" if rng.random() < 0.6 else rng.choice(tuple(COLOURS))
    avoid = background or "white" if rng.random() < 0.8 else background
    subject = studio.pick_shape(rng, avoid if background != "black" else "black", pairs=pairs)
    if not subject.colour and background == "black":
        background = ""
    return _alone(studio, rng, subject, PLAIN, background, "shape")


def _alone(
    studio: Studio,
    rng: random.Random,
    subject: Subject,
    style: str,
    background: str,
    kind: str,
    size: str = "",
) -> Sample:
    size = size or rng.choices(tuple(_SIZES), (0.06, 0.12, 0.7, 0.12))[0]
    if kind == "shape" and size == "medium":
        longest = rng.uniform(66, 84)
    else:
        longest = rng.uniform(*_SIZES[size])
    stage = _Stage(_ground_colour(background, [subject]))
    cutout = studio.cutout(subject, style, rng)
    slack = max(0.0, min(6.0, (EDGE - longest) / 2 - 1))
    left, top, right, low = _visible(cutout)
    high = longest * (low - top) / max(right - left, low - top)
    x, y = EDGE / 2 + rng.uniform(-slack, slack), EDGE / 2 + rng.uniform(-slack, slack)
    stage.put(cutout, x, y + high / 2, longest)
    tags = subject.thing.tags if subject.thing else ()
    kinds = sorted(KINDS.intersection(tags))
    name = rng.choice(kinds) if kinds and rng.random() < 0.05 else subject.name
    words = noun(rng, name, subject.colour, size_word(rng, size))
    if tags and rng.random() < 0.08:
        words += f", {rng.choice(tags)}"
    caption = finish(rng, words + background_words(rng, background), style)
    facts = Facts(kind, style, (subject,), 1, "", size, background, None, tuple(stage.boxes))
    return Sample(stage.image.convert("RGB"), caption, facts)


_ROWS: Mapping[int, tuple[tuple[tuple[float, float], ...], ...]] = {
    2: (((0.27, 0.5), (0.73, 0.5)),),
    3: (((0.18, 0.5), (0.5, 0.5), (0.82, 0.5)), ((0.5, 0.27), (0.27, 0.73), (0.73, 0.73))),
    4: (((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)),),
}


def several(studio: Studio, rng: random.Random) -> Sample:
    """Two to four of the same."""
    count = rng.choices((2, 3, 4), (0.4, 0.33, 0.27))[0]
    style = PLAIN if rng.random() < 0.75 else "flat"
    background = "" if rng.random() < 0.85 else rng.choice(tuple(COLOURS))
    if rng.random() < 0.2:
        subject = studio.pick_shape(rng, background or "white", 0.85)
        if not subject.colour and background == "black":
            background = ""
        style = PLAIN
    else:
        subject = studio.pick(rng, style, studio.countable, 0.35, background)
    places = rng.choices(_ROWS[count], (0.4, 0.6) if count == 3 else None)[0]
    room = 0.29 if count == 3 and places[0][1] == places[1][1] else 0.42
    size = rng.uniform(0.88, 1.0) * room * EDGE
    stage = _Stage(_ground_colour(background, [subject]))
    cutout = studio.cutout(subject, style, rng)
    left, top, right, low = _visible(cutout)
    high = size * (low - top) / max(right - left, low - top)
    for x, y in places:
        stage.put(
            cutout,
            x * EDGE + rng.uniform(-2, 2),
            y * EDGE + high / 2 + rng.uniform(-2, 2),
            size * rng.uniform(0.96, 1.04),
        )
    words = count_words(rng, subject.name, subject.colour, count)
    caption = finish(rng, words + background_words(rng, background), style)
    facts = Facts("several", style, (subject,), count, "", "medium", background, None, tuple(stage.boxes))
    return Sample(stage.image.convert("RGB"), caption, facts)


def related(studio: Studio, rng: random.Random) -> Sample:
    """Two things, the first somehow placed to the second."""
    relation = rng.choices(RELATIONS, (0.11, 0.11, 0.1, 0.07, 0.22, 0.1, 0.07, 0.06, 0.16))[0]
    background = "" if rng.random() < 0.9 else rng.choice(tuple(COLOURS))
    shapes = relation in ("left", "right", "above", "below", "beside") and rng.random() < 0.35
    style = PLAIN if shapes or rng.random() < 0.75 else "flat"
    if shapes:
        first = studio.pick_shape(rng, background or "white", 1.0)
        second = studio.pick_shape(rng, background or "white", 1.0)
        while second.colour == first.colour:
            second = studio.pick_shape(rng, background or "white", 1.0)
    else:
        seated = relation in ("on", "under", "front", "behind") and rng.random() < 0.6
        low_things = studio.seats if seated else studio.solid
        first = studio.pick(rng, style, studio.solid, 0.3, background)
        second = studio.pick(rng, style, low_things, 0.3, background)
        while second.thing is first.thing:
            second = studio.pick(rng, style, low_things, 0.3, background)
    stage = _Stage(_ground_colour(background, [first, second]))
    a, b = studio.cutout(first, style, rng), studio.cutout(second, style, rng)
    _place(rng, stage, a, b, relation)
    words = related_words(
        rng, noun(rng, first.name, first.colour), noun(rng, second.name, second.colour), relation
    )
    caption = finish(rng, words + background_words(rng, background), style)
    facts = Facts(
        "related", style, (first, second), 1, relation, "medium", background, None, tuple(stage.boxes)
    )
    return Sample(stage.image.convert("RGB"), caption, facts)


def _place(rng: random.Random, stage: _Stage, a: Pixels, b: Pixels, relation: str) -> None:
    """Puts `a` in its relation to `b` on the stage; the boxes come in this order."""

    def wobble(by: float = 2.0) -> float:
        return rng.uniform(-by, by)

    if relation == "beside":
        relation = rng.choice(("left", "right"))
    if relation in ("left", "right"):
        at = (0.26, 0.74) if relation == "left" else (0.74, 0.26)
        size, floor = rng.uniform(50, 57), EDGE * 0.72 + wobble(3)
        stage.put(a, at[0] * EDGE + wobble(), floor, size)
        stage.put(b, at[1] * EDGE + wobble(), floor, size)
    elif relation in ("above", "below"):
        at = (0.47, 0.97) if relation == "above" else (0.97, 0.47)
        size = rng.uniform(50, 57)
        stage.put(a, EDGE / 2 + wobble(), at[0] * EDGE + wobble(), size)
        stage.put(b, EDGE / 2 + wobble(), at[1] * EDGE + wobble(), size)
    elif relation == "on":
        # The lower one first, to know where its upper edge lies; the upper one overlaps it a little.
        lower = stage.put(b, EDGE / 2 + wobble(), EDGE * 0.97, rng.uniform(66, 74))
        stage.put(
            a, EDGE / 2 + wobble(5), lower[1] + rng.uniform(5, 9), min(rng.uniform(50, 58), lower[1] + 4)
        )
        stage.boxes.reverse()
    elif relation == "under":
        upper = stage.put(b, EDGE / 2 + wobble(), EDGE * 0.66, rng.uniform(70, 80))
        stage.put(a, EDGE / 2 + wobble(5), EDGE * 0.985, EDGE * 0.985 - upper[3] + rng.uniform(2, 5))
        stage.boxes.reverse()
    else:
        # What stands in front is lower, smaller and over the other.
        big, small = rng.uniform(92, 102), rng.uniform(50, 58)
        side = rng.choice((-1, 1))
        if relation == "front":
            stage.put(b, EDGE / 2 - side * 9, EDGE * 0.84, big)
            stage.put(a, EDGE / 2 + side * 26 + wobble(), EDGE * 0.98, small)
            stage.boxes.reverse()
        else:
            stage.put(a, EDGE / 2 - side * 9, EDGE * 0.84, big)
            stage.put(b, EDGE / 2 + side * 26 + wobble(), EDGE * 0.98, small)


def placed(studio: Studio, rng: random.Random) -> Sample:
    """One thing, or two of it, somewhere: in the forest, at night, under water."""
    style = PLAIN if rng.random() < 0.8 else "flat"
    subject = studio.pick(rng, style, studio.solid, 0.3)
    scene = draw_scene(rng, rng.choice(tuple(GROUNDS)), things=False)
    count = 2 if rng.random() < 0.1 else 1
    kind = GROUNDS[scene.ground]
    stage = _Stage(None)
    shade = None
    if kind.open_air and scene.time != "day":
        # Things take a little of the light, and stay clear.
        shade = [0.35 + 0.65 * c / 255 for c in lit((255, 255, 255), scene.time)]
    cutout = studio.cutout(subject, style, rng)
    size = rng.uniform(52, 66) if count == 1 else rng.uniform(42, 50)
    floor = kind.floor * EDGE + rng.uniform(-4, 3)
    for k in range(count):
        x = EDGE / 2 + rng.uniform(-18, 18) if count == 1 else EDGE * (0.28 + 0.44 * k)
        stage.put(cutout, x, floor, size, shade)
    image = paint(scene, rng, stage.image)
    words = (
        noun(rng, subject.name, subject.colour)
        if count == 1
        else count_words(rng, subject.name, subject.colour, 2)
    )
    caption = finish(rng, placed_words(rng, words, scene), style)
    facts = Facts("placed", style, (subject,), count, "", "medium", "", scene, tuple(stage.boxes))
    return Sample(image, caption, facts)


def landscape(studio: Studio, rng: random.Random) -> Sample:
    """A landscape or a place without anything of the icons."""
    scene = draw_scene(rng)
    image = paint(scene, rng)
    return Sample(image, finish(rng, scene_words(rng, scene), PLAIN), Facts("landscape", scene=scene))


MAKERS: Mapping[str, tuple[Callable[[Studio, random.Random], Sample], float]] = {
    "one": (one, 0.46),
    "several": (several, 0.12),
    "related": (related, 0.16),
    "placed": (placed, 0.10),
    "shape": (shape, 0.07),
    "landscape": (landscape, 0.09),
}
"""Each kind of picture: what draws it, and its share of the training."""


def open_studio(cache: Path) -> Studio:
    """The studio over the icons kept in `cache`, which gets them if need be."""
    found = icon_cache.load(cache)
    return Studio(found, collect(found.rows, icon_cache.load_tags(cache)))


def draw(studio: Studio, seed: str) -> Sample:
    """A training picture: of a likely kind, with a caption that is not held out."""
    kinds = tuple(MAKERS)
    for attempt in range(1000):
        rng = random.Random(f"{seed}/{attempt}")
        kind = rng.choices(kinds, [MAKERS[k][1] for k in kinds])[0]
        sample = MAKERS[kind][0](studio, rng)
        if not held_out(sample.caption):
            return sample
    raise AssertionError("a thousand captions in a row cannot all be held out")
