"""Captioned landscapes, drawn by Pillow from a `random.Random` alone."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

from .shapes import SIZE, Colour, Sample

OVERSAMPLING = 3
_EDGE = SIZE * OVERSAMPLING

TIMES: tuple[str, ...] = ("day", "sunset", "night")
GROUNDS: tuple[str, ...] = ("mountains", "hills", "sea", "desert", "forest", "field")
OBJECTS: tuple[str, ...] = ("house", "cabin", "boat", "tree", "")
WEATHERS: tuple[str, ...] = ("clear", "clouds", "rain", "snow")

# Top and bottom colour of the sky for each time of day.
_SKIES: dict[str, tuple[Colour, Colour]] = {
    "day": ((84, 164, 240), (198, 230, 252)),
    "sunset": ((120, 66, 148), (255, 158, 72)),
    "night": ((10, 14, 44), (36, 48, 96)),
}
_GRAY_SKY: tuple[Colour, Colour] = ((128, 140, 154), (190, 198, 206))
_INKS: dict[str, Colour] = {
    "mountains": (112, 118, 138),
    "hills": (88, 172, 76),
    "sea": (30, 110, 180),
    "desert": (232, 192, 116),
    "forest": (40, 112, 62),
    "field": (128, 188, 72),
    "snow": (240, 244, 250),
}
# Light falling on the ground: factor for each channel.
_LIGHT: dict[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (0.86, 0.64, 0.62),
    "night": (0.44, 0.5, 0.7),
}


def _lit(colour: Colour, time: str) -> Colour:
    r, g, b = (int(c * f) for c, f in zip(colour, _LIGHT[time], strict=True))
    return (r, g, b)


def _mix(a: Colour, b: Colour, t: float) -> Colour:
    r, g, b_ = (int(x + (y - x) * t) for x, y in zip(a, b, strict=True))
    return (r, g, b_)


def _sky(draw: ImageDraw.ImageDraw, time: str, weather: str) -> None:
    top, bottom = _SKIES[time]
    if weather in ("rain", "snow"):
        blend = 0.3 if time == "night" else 0.75
        gray = tuple(_lit(c, time) for c in _GRAY_SKY)
        top, bottom = _mix(top, gray[0], blend), _mix(bottom, gray[1], blend)
    horizon = int(_EDGE * 0.7)
    for y in range(_EDGE):
        draw.line((0, y, _EDGE, y), fill=_mix(top, bottom, min(1.0, y / horizon)))


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _lights(draw: ImageDraw.ImageDraw, rng: random.Random, time: str, orb: str) -> None:
    if time == "night":
        for _ in range(rng.randint(14, 26)):
            x, y = rng.uniform(0, _EDGE), rng.uniform(0, _EDGE * 0.5)
            _disc(draw, x, y, rng.uniform(0.8, 1.7), (240, 240, 220))
    x = _EDGE * rng.uniform(0.2, 0.8)
    if orb == "moon":
        _disc(draw, x, _EDGE * rng.uniform(0.14, 0.26), _EDGE * 0.085, (246, 242, 214))
    elif orb == "sun":
        low = time == "sunset"
        y = _EDGE * (rng.uniform(0.42, 0.5) if low else rng.uniform(0.14, 0.24))
        colour = (255, 206, 96) if low else (255, 226, 66)
        _disc(draw, x, y, _EDGE * (0.12 if low else 0.095), colour)


def _clouds(draw: ImageDraw.ImageDraw, rng: random.Random, time: str, gray: bool) -> None:
    colour = _lit((168, 174, 184) if gray else (250, 250, 252), time)
    for _ in range(rng.randint(2, 3)):
        x, y = _EDGE * rng.uniform(0.1, 0.9), _EDGE * rng.uniform(0.08, 0.3)
        for dx, r in ((-0.09, 0.05), (0.0, 0.075), (0.09, 0.05)):
            _disc(draw, x + dx * _EDGE, y - (r - 0.05) * _EDGE, r * _EDGE, colour)


def _ridge(draw: ImageDraw.ImageDraw, rng: random.Random, base: float, swing: float, colour: Colour) -> None:
    phase, waves = rng.uniform(0, 2 * math.pi), rng.uniform(0.9, 1.6)
    line: list[tuple[float, float]] = [
        (x, _EDGE * (base + swing * math.sin(phase + waves * 2 * math.pi * x / _EDGE)))
        for x in range(0, _EDGE + 1, 4)
    ]
    draw.polygon([(0, _EDGE), *line, (_EDGE, _EDGE)], fill=colour)


def _fir(draw: ImageDraw.ImageDraw, x: float, y: float, h: float, c: Colour, cap: bool) -> None:
    for k in range(3):
        top, wide = y - h + k * h * 0.24, h * (0.2 + 0.08 * k)
        draw.polygon([(x, top), (x + wide, top + h * 0.42), (x - wide, top + h * 0.42)], fill=c)
        if cap:
            tip = [(x, top), (x + wide * 0.45, top + h * 0.19), (x - wide * 0.45, top + h * 0.19)]
            draw.polygon(tip, fill=_mix(c, (255, 255, 255), 0.8))


def _mountains(draw: ImageDraw.ImageDraw, rng: random.Random, time: str, snow: bool) -> None:
    peaks = [(0.1, 0.36), (0.82, 0.34), (0.45, 0.24)]
    for k, (px, py) in enumerate(peaks):
        x, y = _EDGE * (px + rng.uniform(-0.08, 0.08)), _EDGE * (py + rng.uniform(-0.04, 0.06))
        wide, base = _EDGE * rng.uniform(0.36, 0.46), _EDGE * 0.82
        rock = _lit(_mix(_INKS["mountains"], (60, 66, 90), 0.25 * k), time)
        draw.polygon([(x, y), (x + wide, base), (x - wide, base)], fill=rock)
        t = 0.5 if snow else 0.24
        cap = [(x, y), (x + wide * t, y + (base - y) * t), (x - wide * t, y + (base - y) * t)]
        draw.polygon(cap, fill=_lit(_INKS["snow"], time))


def _ground(draw: ImageDraw.ImageDraw, rng: random.Random, ground: str, time: str, snow: bool) -> None:
    white = _lit(_INKS["snow"], time)
    ink = _lit(_INKS[ground], time)
    if ground == "mountains":
        _mountains(draw, rng, time, snow)
        foot = white if snow else _lit((104, 150, 92), time)
        _ridge(draw, rng, 0.8, 0.02, foot)
    elif ground == "sea":
        top = int(_EDGE * 0.56)
        for line in range(top, _EDGE):
            shade = _mix(ink, _lit((14, 60, 124), time), (line - top) / (_EDGE - top))
            draw.line((0, line, _EDGE, line), fill=shade)
        for _ in range(9):
            x, y = rng.uniform(0, _EDGE), rng.uniform(top + 8, _EDGE - 6)
            draw.line((x, y, x + _EDGE * 0.1, y), fill=_mix(ink, (255, 255, 255), 0.35), width=2)
    elif ground == "forest":
        _ridge(draw, rng, 0.68, 0.02, white if snow else _lit((74, 130, 66), time))
        for row, (y, h) in enumerate(((0.72, 0.3), (0.82, 0.34), (0.95, 0.38))):
            for k in range(6):
                x = _EDGE * ((k + 0.5 * (row % 2)) / 5 + rng.uniform(-0.04, 0.04))
                shade = _mix(ink, (16, 50, 34), 0.15 * row + rng.uniform(0, 0.15))
                _fir(draw, x, _EDGE * y, _EDGE * h * rng.uniform(0.85, 1.1), shade, snow)
    elif ground == "field":
        draw.rectangle((0, _EDGE * 0.62, _EDGE, _EDGE), fill=white if snow else ink)
        if not snow:
            for _ in range(16):
                x, y = rng.uniform(0, _EDGE), rng.uniform(_EDGE * 0.68, _EDGE)
                _disc(draw, x, y, 2.4, _lit(rng.choice(((250, 220, 60), (236, 84, 84))), time))
    else:
        back, swing = (0.6, 0.06) if ground == "hills" else (0.64, 0.035)
        near = white if snow else ink
        _ridge(draw, rng, back, swing, _mix(near, _lit((60, 90, 80), time), 0.3))
        _ridge(draw, rng, back + 0.14, swing, near)
        if ground == "desert":
            for _ in range(rng.randint(1, 2)):
                x, y = _EDGE * rng.uniform(0.12, 0.88), _EDGE * rng.uniform(0.72, 0.86)
                green = _lit((58, 128, 66), time)
                draw.rectangle((x - 4, y - 32, x + 4, y), fill=green)
                draw.rectangle((x - 15, y - 21, x + 13, y - 15), fill=green)
                draw.rectangle((x - 15, y - 28, x - 10, y - 16), fill=green)
                draw.rectangle((x + 8, y - 27, x + 13, y - 16), fill=green)


def _thing(draw: ImageDraw.ImageDraw, rng: random.Random, kind: str, time: str, snow: bool) -> None:
    x = _EDGE * rng.uniform(0.3, 0.7)
    if kind == "boat":
        y = _EDGE * rng.uniform(0.72, 0.8)
        w = _EDGE * 0.16
        hull = [(x - w, y), (x + w, y), (x + w * 0.65, y + w * 0.5), (x - w * 0.65, y + w * 0.5)]
        draw.polygon(hull, fill=_lit((156, 60, 44), time))
        sail = [(x + 2, y - w * 1.6), (x + 2, y - 3), (x + w * 0.85, y - 3)]
        draw.polygon(sail, fill=_lit((250, 248, 240), "day" if time != "night" else "sunset"))
        draw.line((x, y, x, y - w * 1.65), fill=_lit((90, 60, 40), time), width=3)
    elif kind == "tree":
        y, r = _EDGE * 0.86, _EDGE * 0.13
        draw.rectangle((x - 5, y - r * 1.4, x + 5, y), fill=_lit((112, 72, 42), time))
        leaf = _INKS["snow"] if snow else (52, 138, 58)
        for dx, dy in ((-0.5, 1.5), (0.5, 1.5), (0.0, 2.1)):
            _disc(draw, x + dx * r, y - dy * r, r * 0.8, _lit(leaf, time))
    else:
        y, w = _EDGE * rng.uniform(0.84, 0.89), _EDGE * 0.15
        wall = (236, 220, 190) if kind == "house" else (134, 86, 48)
        roof = (190, 58, 46) if kind == "house" else (84, 54, 36)
        if snow:
            roof = _INKS["snow"]
        draw.rectangle((x - w, y - w * 1.1, x + w, y), fill=_lit(wall, time))
        peak = [(x - w * 1.25, y - w * 1.05), (x, y - w * 2.0), (x + w * 1.25, y - w * 1.05)]
        draw.polygon(peak, fill=_lit(roof, time))
        glow = (255, 214, 96) if time != "day" else (120, 176, 214)
        draw.rectangle((x + w * 0.25, y - w * 0.8, x + w * 0.72, y - w * 0.35), fill=glow)
        door = (x - w * 0.65, y - w * 0.75, x - w * 0.15, y)
        draw.rectangle(door, fill=_lit((98, 60, 38), time))


def _fall(draw: ImageDraw.ImageDraw, rng: random.Random, weather: str) -> None:
    for _ in range(70 if weather == "snow" else 55):
        x, y = rng.uniform(0, _EDGE), rng.uniform(0, _EDGE)
        if weather == "snow":
            _disc(draw, x, y, rng.uniform(1.5, 2.8), (250, 252, 255))
        else:
            draw.line((x, y, x - 5, y + 15), fill=(196, 216, 236), width=2)


_PLACES: dict[str, tuple[str, ...]] = {
    "mountains": ("in the mountains",),
    "hills": ("on green hills", "in the hills"),
    "sea": ("by the sea",),
    "desert": ("in the desert",),
    "forest": ("in a forest", "in the woods"),
    "field": ("in a field", "on a meadow"),
}
_VIEWS: dict[str, tuple[str, ...]] = {
    "mountains": ("mountains", "a mountain landscape"),
    "hills": ("green hills", "hills"),
    "sea": ("the sea", "the ocean", "a sea"),
    "desert": ("a desert", "the desert with a cactus"),
    "forest": ("a forest", "a forest of fir trees"),
    "field": ("a field of flowers", "a meadow"),
}
_TIME_WORDS: dict[str, tuple[str, ...]] = {
    "day": ("", "", "by day", "during the day"),
    "sunset": ("at sunset",),
    "night": ("at night",),
}


def _caption(rng: random.Random, facts: dict[str, str]) -> str:
    ground, thing, weather = facts["ground"], facts["object"], facts["weather"]
    snow = facts["snow"] == "yes"
    if thing:
        place = "on the sea" if thing == "boat" else rng.choice(_PLACES[ground])
        words = f"a {thing} {place}"
        if snow:
            word = place.replace("green ", "").replace("in a ", "in a snowy ")
            word = word.replace("on a ", "on a snowy ").replace("in the ", "in the snowy ")
            word = word.replace("on hills", "on snowy hills")
            words = f"a {thing} {word}" if rng.random() < 0.6 else f"a {thing} {word} in the snow"
    else:
        words = rng.choice(_VIEWS[ground])
        if snow:
            bare = ground if ground in ("mountains", "hills") else f"a snowy {ground}"
            words = f"snowy {bare}" if ground in ("mountains", "hills") else bare
    tail = [rng.choice(_TIME_WORDS[facts["time"]])]
    if weather == "rain":
        tail.append(rng.choice(("in the rain", "with rain")))
    elif weather == "snow":
        tail.append("with falling snow")
    elif weather == "clouds":
        tail.append("with clouds")
    elif facts["orb"]:
        orb = {"sun": "the sun", "moon": "the moon"}[facts["orb"]]
        tail.append(rng.choice((f"with {orb}", f"under {orb}", "")))
    if weather == "clear" and facts["time"] == "night" and rng.random() < 0.3:
        tail.append("and stars" if facts["orb"] and tail[-1] else "with stars")
    lead = rng.choices(("", "a landscape, ", "a picture of "), (0.8, 0.1, 0.1))[0]
    return " ".join(w for w in (lead + words, *tail) if w)


def landscape(rng: random.Random) -> Sample:
    """A landscape. Rain and falling snow hide sun and moon; boats are only on the sea."""
    time = rng.choice(TIMES)
    ground = rng.choice(GROUNDS)
    weather = rng.choices(WEATHERS, (0.55, 0.15, 0.13, 0.17))[0]
    snow = ground not in ("sea", "desert") and (weather == "snow" or rng.random() < 0.2)
    if weather == "rain":
        snow = False
    if weather == "snow" and not snow:
        weather = "clear"
    things: tuple[str, ...] = ("boat", "") if ground == "sea" else ("house", "cabin", "tree", "")
    if ground in ("forest", "desert"):
        things = ("house", "cabin", "")
    thing = rng.choice(things)
    clear = weather in ("clear", "clouds")
    orb = ""
    if clear and rng.random() < 0.75:
        orb = "moon" if time == "night" else "sun"

    image = Image.new("RGB", (_EDGE, _EDGE))
    draw = ImageDraw.Draw(image)
    _sky(draw, time, weather)
    if clear:
        _lights(draw, rng, time, orb)
    if weather != "clear":
        _clouds(draw, rng, time, gray=weather != "clouds")
    _ground(draw, rng, ground, time, snow)
    if thing:
        _thing(draw, rng, thing, time, snow)
    if weather in ("rain", "snow"):
        _fall(draw, rng, weather)
    facts = {
        "time": time,
        "ground": ground,
        "object": thing,
        "weather": weather,
        "snow": "yes" if snow else "no",
        "orb": orb,
    }
    return Sample(image.reduce(OVERSAMPLING), _caption(rng, facts), facts)
