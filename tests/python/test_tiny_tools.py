"""The pictures and captions that the embedded model's second form learns from, with icons drawn here instead of fetched."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny.captions import count_words, noun
from tiny.colours import COLOURS, find_body, lab_of, recolour, to_lab
from tiny.icons import EDGE, Icons, Pixels
from tiny.judges import ThingJudge, see_pair
from tiny.pictures import MAKERS, Studio, draw, held_out, one, pair_held_out, related
from tiny.shapes import SHAPES, shape_icon
from tiny.things import article, collect, plural
from tiny.words import CONTEXT, build_tokenizer, words_of

pytestmark = pytest.mark.slow

KEYS = ("cat", "dog", "chair", "automobile", "old-man", "grapes", "smiling-face-with-sunglasses", "keycap-5")


def icon(number: int) -> Pixels:
    """A body of an own colour and outline with black eyes and a cyan belt, which no plain shape has."""
    image = Image.new("RGBA", (EDGE, EDGE))
    pencil = ImageDraw.Draw(image)
    ink = (
        (150, 150, 152),
        (240, 170, 60),
        (120, 80, 40),
        (210, 40, 40),
        (250, 205, 50),
        (120, 60, 170),
        (60, 160, 90),
        (40, 90, 200),
    )
    corners = [
        (64 + 60 * np.cos(a * 2 * np.pi / (3 + number)), 64 + 60 * np.sin(a * 2 * np.pi / (3 + number)))
        for a in range(3 + number)
    ]
    pencil.polygon([(float(x), float(y)) for x, y in corners], fill=ink[number])
    pencil.rectangle((30, 72, 98, 84), fill=(60, 220, 230))
    for x in (52, 76):
        pencil.ellipse((x - 5, 50, x + 5, 60), fill=(10, 10, 10))
    return np.asarray(image)


@pytest.fixture(scope="module")
def studio() -> Studio:
    rows = {
        (style, key): row for row, (style, key) in enumerate((s, k) for k in KEYS for s in ("flat", "glossy"))
    }
    pixels = np.stack([icon(KEYS.index(key)) for _, key in rows])
    return Studio(Icons(pixels, rows), collect(rows, {"automobile": ("vehicle",), "cat": ("animal", "pet")}))


def test_things_have_peoples_names_and_signs_are_left_out(studio: Studio) -> None:
    names = {thing.names[0]: thing.names for thing in studio.things}
    assert names["cat"] == ("cat", "kitten", "kitty")
    assert "car" in names and "automobile" in names["car"]
    assert not any("keycap" in name for name in names)


@pytest.mark.parametrize(
    ("name", "several", "with_article"),
    [
        ("cat", "cats", "a cat"),
        ("mouse", "mice", "a mouse"),
        ("cup of tea", "cups of tea", "a cup of tea"),
        ("old man", "old men", "an old man"),
        ("man with a beard", "men with a beard", "a man with a beard"),
        ("unicorn", "unicorns", "a unicorn"),
        ("glasses", "glasses", "glasses"),
        ("city", "cities", "a city"),
    ],
)
def test_plurals_and_articles(name: str, several: str, with_article: str) -> None:
    assert plural(name) == several
    assert article(name) == with_article


@pytest.mark.parametrize("number", [0, 1, 5])
@pytest.mark.parametrize("colour", ["green", "black", "white", "pink"])
def test_a_body_takes_the_colour_and_its_eyes_stay(number: int, colour: str) -> None:
    plain = icon(number)
    painted = recolour(plain, find_body(plain), colour)
    body, eye = painted[64, 64, :3], painted[55, 52, :3]
    away = {name: float(np.square(to_lab(body) - lab_of(rgb)).sum()) for name, rgb in COLOURS.items()}
    assert min(away, key=lambda name: away[name]) == colour
    assert eye.max() < 40
    assert np.array_equal(painted[..., 3], plain[..., 3])


@pytest.mark.parametrize("kind", MAKERS)
def test_pictures_depend_on_their_seed_alone_and_their_words_are_known(studio: Studio, kind: str) -> None:
    make = MAKERS[kind][0]
    for k in range(6):
        first, again = (make(studio, random.Random(f"{kind}/{k}")) for _ in range(2))
        assert first.image.tobytes() == again.image.tobytes() and first.caption == again.caption
        assert first.image.size == (EDGE, EDGE) and first.image.mode == "RGB"
        assert first.caption == first.caption.strip() and "  " not in first.caption


def test_no_training_caption_or_pair_is_held_out(studio: Studio) -> None:
    for k in range(150):
        sample = draw(studio, f"test/{k}")
        assert not held_out(sample.caption)
        assert not any(s.colour and pair_held_out(s.key, s.colour) for s in sample.facts.subjects)
    kept = one(studio, random.Random("kept"), pairs=True).facts.subjects[0]
    assert pair_held_out(kept.key, kept.colour)


def test_several_are_as_many_as_the_caption_says(studio: Studio) -> None:
    for k in range(20):
        facts = MAKERS["several"][0](studio, random.Random(f"several/{k}")).facts
        assert len(facts.boxes) == facts.count
    assert count_words(random.Random(3), "mouse", "green", 3).endswith("green mice")
    assert noun(random.Random(0), "circle", "red").split()[-1] in SHAPES["circle"]


def test_every_word_is_one_token(studio: Studio) -> None:
    words = words_of(studio.phrases())
    tokenizer = build_tokenizer(words)
    ids = tokenizer(words, add_special_tokens=False).input_ids
    assert [word for word, own in zip(words, ids, strict=True) if len(own) != 1] == []
    assert tokenizer.model_max_length == CONTEXT


def test_judges_are_right_about_drawn_pictures(studio: Studio) -> None:
    shapes = ThingJudge(studio, (), coloured=True)
    for shape in ("circle", "star", "triangle"):
        picture = np.full((EDGE, EDGE, 3), 255, np.uint8)
        cutout = shape_icon(shape, COLOURS["purple"])[::2, ::2]
        picture[30 : 30 + len(cutout), 20 : 20 + len(cutout)][cutout[..., 3] > 128] = COLOURS["purple"]
        seen = shapes(picture)
        assert (seen.names[0], seen.colour) == (shape, "purple")
    judge = ThingJudge(studio, studio.things, coloured=False)
    verdicts = []
    for k in range(90):
        sample = related(studio, random.Random(f"pair/{k}"))
        facts = sample.facts
        plain = not facts.background and not any(subject.colour for subject in facts.subjects)
        if plain and facts.relation in ("left", "above", "on"):
            pair = see_pair(np.asarray(sample.image), judge)
            seen = (pair.stand == "beside", pair.first.names[0], pair.second.names[0])
            verdicts.append(seen == (facts.relation == "left", *(subject.key for subject in facts.subjects)))
    # The polygons that stand for things here are cut into one another's likeness more often than icons are.
    assert len(verdicts) > 8 and np.mean(verdicts) > 0.8
