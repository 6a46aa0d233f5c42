"""Landscapes and places, drawn by Pillow from a `random.Random` alone."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .colours import Colour
from .icons import EDGE

_OVERSAMPLING = 2
_EDGE = EDGE * _OVERSAMPLING
_UNIT = _EDGE / 192
"""Thickness of a thin line, in oversampled pixels."""

TIMES: tuple[str, ...] = ("day", "sunset", "night")
WEATHERS: tuple[str, ...] = ("clear", "clouds", "rain", "snow")


@dataclass(frozen=True)
class Ground:
    """A kind of place: how captions call it, alone (`views`) and with something in it (`places`).

    `horizon` is where the ground begins and `floor` where things stand, as shares of the height. `open_air` places have
    times of day and weather; `snows` ones may lie under snow.
    """

    views: tuple[str, ...]
    places: tuple[str, ...]
    horizon: float
    floor: float
    open_air: bool = True
    snows: bool = False


GROUNDS: Mapping[str, Ground] = {
    "mountains": Ground(("mountains", "a mountain landscape"), ("in the mountains",), 0.8, 0.93, snows=True),
    "hills": Ground(("green hills", "hills"), ("on green hills", "in the hills", "on a hill"), 0.6, 0.88, snows=True),
    "sea": Ground(("the sea", "the ocean", "a sea"), ("on the sea", "on the ocean", "on the water"), 0.56, 0.82),
    "desert": Ground(("a desert", "the desert with a cactus"), ("in the desert", "in a desert"), 0.64, 0.9),
    "forest": Ground(
        ("a forest", "a forest of fir trees", "the woods"),
        ("in a forest", "in the forest", "in the woods"),
        0.68,
        0.94,
        snows=True,
    ),
    "field": Ground(
        ("a field of flowers", "a meadow", "a field"),
        ("in a field", "on a meadow", "on the grass", "in a garden"),
        0.62,
        0.9,
        snows=True,
    ),
    "beach": Ground(("a beach", "the beach"), ("on the beach", "on a beach", "by the sea"), 0.5, 0.9),
    "city": Ground(
        ("a city", "a city skyline", "tall buildings"), ("in the city", "in a city", "in town"), 0.84, 0.95, snows=True
    ),
    "street": Ground(("a street", "a road"), ("on the street", "on a road", "on the road"), 0.6, 0.86, snows=True),
    "sky": Ground(("the sky", "a sky"), ("in the sky",), 1.1, 0.75),
    "space": Ground(("space", "outer space"), ("in space", "in outer space"), 1.1, 0.8, open_air=False),
    "underwater": Ground(("under water", "the bottom of the sea"), ("under water", "underwater"), 0.85, 0.8, open_air=False),
    "room": Ground(("a room", "an empty room"), ("in a room", "in the house", "indoors"), 0.66, 0.9, open_air=False),
}  # fmt: skip

# Top and bottom colour of the sky for each time of day.
_SKIES: Mapping[str, tuple[Colour, Colour]] = {
    "day": ((84, 164, 240), (198, 230, 252)),
    "sunset": ((120, 66, 148), (255, 158, 72)),
    "night": ((10, 14, 44), (36, 48, 96)),
}
_GRAY_SKY: tuple[Colour, Colour] = ((128, 140, 154), (190, 198, 206))
_SNOW: Colour = (240, 244, 250)
_INKS: Mapping[str, Colour] = {
    "mountains": (112, 118, 138),
    "hills": (88, 172, 76),
    "sea": (30, 110, 180),
    "desert": (232, 192, 116),
    "forest": (40, 112, 62),
    "field": (128, 188, 72),
    "beach": (240, 214, 150),
    "city": (96, 100, 108),
    "street": (92, 94, 100),
}
# Light falling on the ground: factor for each channel.
_LIGHT: Mapping[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (0.86, 0.64, 0.62),
    "night": (0.44, 0.5, 0.7),
}


@dataclass(frozen=True)
class Scene:
    """What a landscape shows; `orb` is sun, moon or nothing, `thing` a house, cabin, tree, boat or nothing."""

    ground: str
    time: str = "day"
    weather: str = "clear"
    snow: bool = False
    orb: str = ""
    thing: str = ""


def lit(colour: Colour, time: str) -> Colour:
    """`colour` in the light of a time of day."""
    r, g, b = (int(c * f) for c, f in zip(colour, _LIGHT[time], strict=True))
    return (r, g, b)


def _mix(a: Colour, b: Colour, t: float) -> Colour:
    r, g, b_ = (int(x + (y - x) * t) for x, y in zip(a, b, strict=True))
    return (r, g, b_)


class _Painter:
    """One picture while it is painted, back to front."""

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self.scene, self.rng = scene, rng
        self.image = Image.new("RGB", (_EDGE, _EDGE))
        self.draw = ImageDraw.Draw(self.image)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """A rectangle; places are shares of the edge, here and below."""
        self.draw.rectangle((left * _EDGE, top * _EDGE, right * _EDGE, bottom * _EDGE), fill=colour)

    def disc(self, x: float, y: float, r: float, colour: Colour) -> None:
        self.draw.ellipse([(v * _EDGE) for v in (x - r, y - r, x + r, y + r)], fill=colour)

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        self.draw.polygon([(x * _EDGE, y * _EDGE) for x, y in points], fill=colour)

    def line(self, x: float, y: float, to_x: float, to_y: float, colour: Colour, width: float = 2) -> None:
        ends = (x * _EDGE, y * _EDGE, to_x * _EDGE, to_y * _EDGE)
        self.draw.line(ends, fill=colour, width=round(width * _UNIT))

    def fade(self, top: float, bottom: float, first: Colour, last: Colour) -> None:
        start, end = int(top * _EDGE), min(int(bottom * _EDGE), _EDGE)
        for y in range(start, end):
            shade = _mix(first, last, (y - start) / max(1, end - start))
            self.draw.line((0, y, _EDGE, y), fill=shade)

    def lit(self, colour: Colour) -> Colour:
        return lit(colour, self.scene.time)

    def sky(self) -> None:
        top, bottom = _SKIES[self.scene.time]
        if self.scene.weather in ("rain", "snow"):
            blend = 0.3 if self.scene.time == "night" else 0.75
            gray = tuple(self.lit(c) for c in _GRAY_SKY)
            top, bottom = _mix(top, gray[0], blend), _mix(bottom, gray[1], blend)
        self.fade(0, 0.7, top, bottom)
        self.box(0, 0.7, 1, 1, bottom)

    def lights(self) -> None:
        if self.scene.time == "night":
            for _ in range(self.rng.randint(14, 26)):
                x, y = self.rng.random(), self.rng.uniform(0, 0.5)
                self.disc(x, y, self.rng.uniform(0.005, 0.009), (240, 240, 220))
        x = self.rng.uniform(0.15, 0.85)
        if self.scene.orb == "moon":
            y = self.rng.uniform(0.14, 0.24)
            self.disc(x, y, 0.085, (246, 242, 214))
        elif self.scene.orb == "sun" and self.scene.time == "sunset":
            self.disc(x, self.rng.uniform(0.42, 0.5), 0.12, (255, 206, 96))
        elif self.scene.orb == "sun":
            self.disc(x, self.rng.uniform(0.14, 0.22), 0.095, (255, 226, 66))

    def clouds(self) -> None:
        gray = self.scene.weather != "clouds"
        colour = self.lit((168, 174, 184) if gray else (250, 250, 252))
        for _ in range(self.rng.randint(2, 3)):
            x, y = self.rng.uniform(0.1, 0.9), self.rng.uniform(0.08, 0.3)
            for dx, r in ((-0.09, 0.05), (0.0, 0.075), (0.09, 0.05)):
                self.disc(x + dx, y - (r - 0.05), r, colour)

    def ridge(self, base: float, swing: float, colour: Colour) -> None:
        phase, waves = self.rng.uniform(0, 2 * math.pi), self.rng.uniform(0.9, 1.6)
        steps = [x / 48 for x in range(49)]
        line = [(x, base + swing * math.sin(phase + waves * 2 * math.pi * x)) for x in steps]
        self.polygon([(0, 1), *line, (1, 1)], colour)

    def fir(self, x: float, y: float, h: float, colour: Colour, cap: bool) -> None:
        for k in range(3):
            top, wide = y - h + k * h * 0.24, h * (0.2 + 0.08 * k)
            self.polygon([(x, top), (x + wide, top + h * 0.42), (x - wide, top + h * 0.42)], colour)
            if cap:
                tip = [(x, top), (x + wide * 0.45, top + h * 0.19), (x - wide * 0.45, top + h * 0.19)]
                self.polygon(tip, _mix(colour, (255, 255, 255), 0.8))

    def peaks(self) -> None:
        for k, (px, py) in enumerate(((0.1, 0.36), (0.82, 0.34), (0.45, 0.24))):
            x, y = px + self.rng.uniform(-0.08, 0.08), py + self.rng.uniform(-0.04, 0.06)
            wide, base = self.rng.uniform(0.36, 0.46), 0.82
            rock = self.lit(_mix(_INKS["mountains"], (60, 66, 90), 0.25 * k))
            self.polygon([(x, y), (x + wide, base), (x - wide, base)], rock)
            t = 0.5 if self.scene.snow else 0.24
            cap = [(x, y), (x + wide * t, y + (base - y) * t), (x - wide * t, y + (base - y) * t)]
            self.polygon(cap, self.lit(_SNOW))

    def water(self, top: float, bottom: float) -> None:
        ink = self.lit(_INKS["sea"])
        self.fade(top, bottom, ink, self.lit((14, 60, 124)))
        for _ in range(9):
            x, y = self.rng.random(), self.rng.uniform(top + 0.04, bottom - 0.03)
            self.line(x, y, x + 0.1, y, _mix(ink, (255, 255, 255), 0.35))

    def cactus(self) -> None:
        x, y = (
            self.rng.choice((self.rng.uniform(0.1, 0.3), self.rng.uniform(0.7, 0.9))),
            self.rng.uniform(0.72, 0.84),
        )
        green = self.lit((58, 128, 66))
        self.box(x - 0.02, y - 0.17, x + 0.02, y, green)
        self.box(x - 0.08, y - 0.11, x + 0.07, y - 0.08, green)
        self.box(x - 0.08, y - 0.145, x - 0.052, y - 0.083, green)
        self.box(x + 0.042, y - 0.14, x + 0.07, y - 0.08, green)

    def buildings(self) -> None:
        glow = (255, 222, 120) if self.scene.time != "day" else (170, 206, 230)
        x = -0.03
        while x < 1:
            wide, top = self.rng.uniform(0.12, 0.2), self.rng.uniform(0.22, 0.55)
            wall = self.lit(
                self.rng.choice(((126, 134, 150), (150, 130, 120), (110, 120, 134), (168, 160, 150)))
            )
            self.box(x, top, x + wide, 0.85, wall)
            for row in range(int((0.8 - top) / 0.08)):
                for column in range(int(wide / 0.05)):
                    if self.rng.random() < 0.75:
                        left, upper = x + 0.018 + column * 0.05, top + 0.03 + row * 0.08
                        self.box(left, upper, left + 0.025, upper + 0.04, glow)
            x += wide + 0.01

    def ground(self) -> None:
        name = self.scene.ground
        white = self.lit(_SNOW)
        ink = white if self.scene.snow else self.lit(_INKS[name])
        if name == "mountains":
            self.peaks()
            self.ridge(0.8, 0.02, white if self.scene.snow else self.lit((104, 150, 92)))
        elif name == "sea":
            self.water(0.56, 1)
        elif name == "forest":
            self.ridge(0.68, 0.02, white if self.scene.snow else self.lit((74, 130, 66)))
            for row, (y, h) in enumerate(((0.72, 0.3), (0.82, 0.34), (0.95, 0.38))):
                for k in range(6):
                    x = (k + 0.5 * (row % 2)) / 5 + self.rng.uniform(-0.04, 0.04)
                    tree = self.lit(_INKS["forest"])
                    shade = _mix(tree, (16, 50, 34), 0.15 * row + self.rng.uniform(0, 0.15))
                    self.fir(x, y, h * self.rng.uniform(0.85, 1.1), shade, self.scene.snow)
        elif name == "field":
            self.box(0, 0.62, 1, 1, ink)
            for _ in range(0 if self.scene.snow else 16):
                x, y = self.rng.random(), self.rng.uniform(0.68, 1)
                self.disc(x, y, 0.0125, self.lit(self.rng.choice(((250, 220, 60), (236, 84, 84)))))
        elif name == "beach":
            self.water(0.5, 0.7)
            self.ridge(0.68, 0.015, ink)
        elif name == "city":
            self.buildings()
            self.box(0, 0.84, 1, 1, ink)
        elif name == "street":
            self.box(0, 0.6, 1, 0.72, white if self.scene.snow else self.lit(_INKS["hills"]))
            self.box(0, 0.7, 1, 1, self.lit(_INKS["street"]))
            for k in range(5):
                self.box(k * 0.24, 0.84, k * 0.24 + 0.13, 0.865, self.lit((240, 240, 230)))
        else:
            back, swing = (0.6, 0.06) if name == "hills" else (0.64, 0.035)
            self.ridge(back, swing, _mix(ink, self.lit((60, 90, 80)), 0.3))
            self.ridge(back + 0.14, swing, ink)
            if name == "desert":
                for _ in range(self.rng.randint(1, 2)):
                    self.cactus()

    def indoors(self) -> None:
        name = self.scene.ground
        if name == "space":
            self.box(0, 0, 1, 1, (12, 12, 34))
            for _ in range(self.rng.randint(30, 50)):
                shade = self.rng.choice(((255, 255, 255), (210, 220, 255), (255, 240, 200)))
                self.disc(self.rng.random(), self.rng.random(), self.rng.uniform(0.004, 0.01), shade)
        elif name == "underwater":
            self.fade(0, 1, (60, 170, 220), (14, 66, 130))
            self.ridge(0.88, 0.02, (206, 186, 130))
            for _ in range(5):
                x, h = self.rng.random(), self.rng.uniform(0.12, 0.26)
                for k in range(8):
                    swing = 0.018 * math.sin(k * 1.2)
                    self.disc(x + swing, 0.93 - h * k / 8, 0.014, (40, 130, 80))
            for _ in range(8):
                x, y = self.rng.random(), self.rng.uniform(0.05, 0.8)
                self.disc(x, y, self.rng.uniform(0.008, 0.02), (160, 220, 244))
        else:
            wall, floor = self.rng.choice(
                (
                    ((244, 226, 196), (166, 116, 70)),
                    ((206, 224, 232), (150, 110, 76)),
                    ((226, 214, 232), (140, 104, 80)),
                )
            )
            self.box(0, 0, 1, 1, wall)
            self.box(0, 0.66, 1, 1, floor)
            for k in range(3):
                self.line(0, 0.75 + 0.09 * k, 1, 0.75 + 0.09 * k, _mix(floor, (40, 20, 10), 0.25))
            left = self.rng.choice((0.08, 0.66))
            self.box(left, 0.12, left + 0.26, 0.44, (250, 250, 250))
            self.box(left + 0.02, 0.14, left + 0.24, 0.42, (140, 200, 240))
            self.line(left + 0.13, 0.14, left + 0.13, 0.42, (250, 250, 250))

    def thing(self) -> None:
        kind, snow = self.scene.thing, self.scene.snow
        x = self.rng.uniform(0.3, 0.7)
        if kind == "boat":
            y, w = self.rng.uniform(0.72, 0.8), 0.16
            hull = [(x - w, y), (x + w, y), (x + w * 0.65, y + w * 0.5), (x - w * 0.65, y + w * 0.5)]
            self.polygon(hull, self.lit((156, 60, 44)))
            sail = [(x + 0.01, y - w * 1.6), (x + 0.01, y - 0.015), (x + w * 0.85, y - 0.015)]
            self.polygon(sail, lit((250, 248, 240), "day" if self.scene.time != "night" else "sunset"))
            self.line(x, y, x, y - w * 1.65, self.lit((90, 60, 40)), 3)
        elif kind == "tree":
            y, r = 0.86, 0.13
            self.box(x - 0.026, y - r * 1.4, x + 0.026, y, self.lit((112, 72, 42)))
            leaf = _SNOW if snow else (52, 138, 58)
            for dx, dy in ((-0.5, 1.5), (0.5, 1.5), (0.0, 2.1)):
                self.disc(x + dx * r, y - dy * r, r * 0.8, self.lit(leaf))
        elif kind:
            y, w = self.rng.uniform(0.84, 0.89), 0.15
            wall = (236, 220, 190) if kind == "house" else (134, 86, 48)
            roof = _SNOW if snow else (190, 58, 46) if kind == "house" else (84, 54, 36)
            self.box(x - w, y - w * 1.1, x + w, y, self.lit(wall))
            peak = [(x - w * 1.25, y - w * 1.05), (x, y - w * 2.0), (x + w * 1.25, y - w * 1.05)]
            self.polygon(peak, self.lit(roof))
            glow = (255, 214, 96) if self.scene.time != "day" else (120, 176, 214)
            self.box(x + w * 0.25, y - w * 0.8, x + w * 0.72, y - w * 0.35, glow)
            self.box(x - w * 0.65, y - w * 0.75, x - w * 0.15, y, self.lit((98, 60, 38)))

    def fall(self) -> None:
        """Rain or snow in the air."""
        snow = self.scene.weather == "snow"
        for _ in range(70 if snow else 55):
            x, y = self.rng.random(), self.rng.random()
            if snow:
                self.disc(x, y, self.rng.uniform(0.008, 0.0145), (250, 252, 255))
            else:
                self.line(x, y, x - 0.026, y + 0.078, (196, 216, 236))


def paint(scene: Scene, rng: random.Random, middle: Image.Image | None = None) -> Image.Image:
    """The scene, EDGE x EDGE; `middle`, RGBA of that size, stands in it, behind what falls from the sky."""
    painter = _Painter(scene, rng)
    if GROUNDS[scene.ground].open_air:
        painter.sky()
        if scene.weather in ("clear", "clouds"):
            painter.lights()
        if scene.weather != "clear":
            painter.clouds()
        if scene.ground != "sky":
            painter.ground()
        painter.thing()
    else:
        painter.indoors()
    image = painter.image
    if middle is not None:
        large = middle.resize((_EDGE, _EDGE), Image.Resampling.BILINEAR)
        image.paste(large, (0, 0), large)
    if scene.weather in ("rain", "snow"):
        painter.fall()
    return image.reduce(_OVERSAMPLING)


def draw_scene(rng: random.Random, ground: str | None = None, things: bool = True) -> Scene:
    """A likely scene. Rain and falling snow hide sun and moon; boats are only on the sea."""
    ground = ground or rng.choice([*GROUNDS, "mountains", "hills", "sea", "desert", "forest", "field"])
    kind = GROUNDS[ground]
    if not kind.open_air:
        return Scene(ground)
    time = rng.choices(TIMES, (0.45, 0.25, 0.3))[0]
    weather = rng.choices(WEATHERS, (0.55, 0.15, 0.13, 0.17))[0]
    snow = kind.snows and weather != "rain" and (weather == "snow" or rng.random() < 0.2)
    if weather == "snow" and not snow:
        weather = "clear"
    thing = ""
    if things and ground == "sea":
        thing = rng.choice(("boat", ""))
    elif things and ground in ("mountains", "hills", "field"):
        thing = rng.choice(("house", "cabin", "tree", ""))
    elif things and ground in ("forest", "desert", "beach"):
        thing = rng.choice(("house", "cabin", ""))
    orb = ""
    if weather in ("clear", "clouds") and rng.random() < 0.7:
        orb = "moon" if time == "night" else "sun"
    return Scene(ground, time, weather, snow, orb, thing)
