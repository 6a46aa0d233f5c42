"""Captions as people write them: with articles and without, long and short, in this order and in that."""

from __future__ import annotations

import random
from collections.abc import Mapping

from .colours import colour_word
from .scenes import GROUNDS, Scene
from .shapes import SHAPES
from .things import article, is_plural, plural

_NUMBERS: Mapping[int, tuple[str, ...]] = {
    2: ("two", "two", "two", "2", "a pair of", "a couple of"),
    3: ("three", "three", "three", "3"),
    4: ("four", "four", "four", "4"),
}
_SIZE_WORDS: Mapping[str, tuple[str, ...]] = {
    "tiny": ("tiny", "very small"),
    "small": ("small", "little"),
    "medium": ("",),
    "large": ("large", "big", "huge"),
}
_STYLE_WORDS: Mapping[str, tuple[str, ...]] = {
    "flat": ("flat", "flat", "flat design", "flat style", "simple flat"),
    "glossy": ("glossy", "glossy", "shiny", "detailed"),
}


def size_word(rng: random.Random, size: str) -> str:
    return rng.choice(_SIZE_WORDS[size])


def _phrase(rng: random.Random, name: str, colour: str, size: str = "") -> str:
    """Size, colour and name without an article."""
    name = rng.choice(SHAPES.get(name, (name,)))
    word = colour_word(rng, colour) if colour else ""
    # "a red book" in blue is a blue book.
    if word and name.split()[0] in (
        "red",
        "green",
        "blue",
        "brown",
        "white",
        "yellow",
        "black",
        "orange",
        "pink",
    ):
        name = " ".join(name.split()[1:])
    return " ".join(w for w in (size, word, name) if w)


def noun(rng: random.Random, name: str, colour: str, size: str = "") -> str:
    """A thing as a noun phrase: "a small green dog", "green dog", "the green dog", "a dog that is green"."""
    if colour and not size and rng.random() < 0.04:
        be = "are" if is_plural(name) else "is"
        return f"{article(_phrase(rng, name, ''))} that {be} {colour_word(rng, colour)}"
    words = _phrase(rng, name, colour, size)
    form = rng.choices(("article", "bare", "the"), (0.68, 0.27, 0.05))[0]
    if form == "article":
        return article(words)
    return words if form == "bare" else f"the {words}"


def count_words(rng: random.Random, name: str, colour: str, count: int) -> str:
    words = plural(_phrase(rng, name, colour))
    return f"{rng.choice(_NUMBERS[count])} {words}"


def background_words(rng: random.Random, background: str) -> str:
    """ " on a red background"; of the plain one mostly nothing."""
    if not background:
        return rng.choice((" on a white background", " on white")) if rng.random() < 0.04 else ""
    word = colour_word(rng, background)
    plain = "plain " if rng.random() < 0.06 else ""
    whole = article(f"{plain}{word} background")
    forms = (f" on {whole}", f" on {word}", f", {word} background", f" with {whole}")
    return rng.choices(forms, (0.5, 0.2, 0.2, 0.1))[0]


_RELATED: Mapping[str, tuple[tuple[str, float], ...]] = {
    "left": (("{a} to the left of {b}", 0.4), ("{a} left of {b}", 0.3), ("{a} on the left and {b} on the right", 0.3)),
    "right": (("{a} to the right of {b}", 0.4), ("{a} right of {b}", 0.3), ("{a} on the right and {b} on the left", 0.3)),
    "above": (("{a} above {b}", 0.6), ("{a} over {b}", 0.25), ("{a} at the top and {b} at the bottom", 0.15)),
    "below": (("{a} below {b}", 0.7), ("{a} at the bottom and {b} at the top", 0.3)),
    "on": (("{a} on {b}", 0.55), ("{a} on top of {b}", 0.2), ("{a} sitting on {b}", 0.15), ("{a} standing on {b}", 0.1)),
    "under": (("{a} under {b}", 0.7), ("{a} underneath {b}", 0.15), ("{a} beneath {b}", 0.15)),
    "front": (("{a} in front of {b}", 1.0),),
    "behind": (("{a} behind {b}", 1.0),),
    "beside": (
        ("{a} next to {b}", 0.3), ("{a} beside {b}", 0.2), ("{a} and {b}", 0.35), ("{a} with {b}", 0.1),
        ("{a} near {b}", 0.05),
    ),
}  # fmt: skip


def related_words(rng: random.Random, first: str, second: str, relation: str) -> str:
    forms = _RELATED[relation]
    chosen: str = rng.choices([f for f, _ in forms], [w for _, w in forms])[0]
    return chosen.format(a=first, b=second)


def _snowy(place: str) -> str:
    for lead in ("in a ", "on a ", "in the ", "on the ", "on "):
        if place.startswith(lead):
            rest = place[len(lead) :].removeprefix("green ")
            return f"{lead}snowy {rest}" if lead != "on " else f"on snowy {rest}"
    return place


def _tail(rng: random.Random, scene: Scene) -> str:
    """Time of day and weather, as an open-air scene has them."""
    if not GROUNDS[scene.ground].open_air:
        return ""
    by_time = {
        "day": ("", "", "", "during the day", "on a sunny day" if scene.orb else "in daylight"),
        "sunset": ("at sunset", "at sunset", "in the evening"),
        "night": ("at night", "at night", "by night"),
    }
    words = [rng.choice(by_time[scene.time])]
    if scene.weather == "rain":
        words.append(
            rng.choice(
                ("in the rain", "with rain", "on a rainy day" if scene.time == "day" else "in the rain")
            )
        )
    elif scene.weather == "snow":
        words.append(rng.choice(("with falling snow", "in the snow", "while it snows")))
    elif scene.weather == "clouds":
        words.append(rng.choice(("with clouds", "under a cloudy sky")))
    elif scene.orb:
        orb = {"sun": "the sun", "moon": "the moon"}[scene.orb]
        words.append(rng.choice((f"with {orb}", f"under {orb}", "", "")))
    if scene.weather == "clear" and scene.time == "night" and rng.random() < 0.3:
        words.append(
            "and stars" if scene.orb and words[-1] else rng.choice(("with stars", "under the stars"))
        )
    return " ".join(w for w in words if w)


def placed_words(rng: random.Random, subject: str, scene: Scene) -> str:
    place = rng.choice(GROUNDS[scene.ground].places)
    if scene.snow:
        place = rng.choice((_snowy(place), _snowy(place), f"{place} in winter"))
        if scene.weather != "snow" and rng.random() < 0.4:
            place = rng.choice((f"{place} with snow", "in the snow"))
    tail = _tail(rng, scene)
    if tail and rng.random() < 0.12:
        return f"{tail}, {subject} {place}"
    return " ".join(w for w in (subject, place, tail) if w)


def scene_words(rng: random.Random, scene: Scene) -> str:
    ground = GROUNDS[scene.ground]
    tail = _tail(rng, scene)
    if scene.thing:
        place = rng.choice(("on the sea", "on the water") if scene.thing == "boat" else ground.places)
        if scene.snow:
            place = _snowy(place) if rng.random() < 0.6 else f"{_snowy(place)} in the snow"
        words = f"{article(scene.thing)} {place}" if rng.random() < 0.8 else f"{scene.thing} {place}"
    else:
        words = rng.choice(ground.views)
        if scene.snow:
            bare = words.removeprefix("a ").removeprefix("the ").removeprefix("green ")
            words = f"a snowy {bare}" if words.startswith(("a ", "the ")) else f"snowy {bare}"
        if rng.random() < 0.15:
            words = words.removeprefix("a ").removeprefix("the ")
        orb = "the moon and stars" if scene.orb == "moon" and rng.random() < 0.5 else f"the {scene.orb}"
        if scene.ground == "sky" and scene.orb and scene.weather == "clear" and rng.random() < 0.6:
            return rng.choice((orb, f"{orb} in the sky", f"{orb} {rng.choice(('at night', ''))}".strip()))
    if tail and rng.random() < 0.06:
        return f"{tail}, {words}"
    return " ".join(w for w in (words, tail) if w)


def finish(rng: random.Random, words: str, style: str) -> str:
    """The whole caption: style words, and sometimes what people put around a wish.

    The style "glossy" is the plain one and mostly goes without saying.
    """
    if style == "flat" or rng.random() < 0.05:
        word = rng.choice(_STYLE_WORDS[style])
        if rng.random() < 0.3 and " " not in word and words.startswith(("a ", "an ")):
            words = article(f"{word} {words.split(' ', 1)[1]}")
        else:
            words = f"{words}, {word}"
    lead = rng.choices(
        ("", "a picture of ", "an image of ", "a drawing of ", "an icon of ", "draw ", "cute ", "emoji of "),
        (0.86, 0.045, 0.02, 0.025, 0.015, 0.015, 0.01, 0.01),
    )[0]
    if lead == "cute ":
        return (
            article(f"cute {words.split(' ', 1)[1]}") if words.startswith(("a ", "an ")) else f"cute {words}"
        )
    if lead and lead != "draw " and words.startswith("the "):
        lead = "a picture of "
    return lead + words
