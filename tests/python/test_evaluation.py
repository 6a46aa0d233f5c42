"""The judges against rendered pictures, and the evaluation as a whole on the embedded model."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from starweave_image.weights.find import embedded_folder
from tiny.first import data, evaluation
from tiny.first.emoji import Emoji, emoji_picture
from tiny.first.judge import ThingJudge, background, nearest_colour, see_shape
from tiny.first.scene_judge import FACTS, rendered, train_scene_judge
from tiny.first.shapes import COLOURS, SHAPES, SIZE, single_shape, two_shapes

pytestmark = pytest.mark.slow

TINY = embedded_folder("starweave/tiny")


def test_a_shape_is_told_by_its_pixels() -> None:
    samples = [single_shape(random.Random(i), held_out=i % 2 == 0) for i in range(300)]
    verdicts = [evaluation.judge_single(np.asarray(s.image), s.facts) for s in samples]
    assert all(share >= 0.99 for share in evaluation.shares(verdicts).values())


def test_a_wrong_shape_colour_or_background_is_seen() -> None:
    sample = single_shape(random.Random(1))
    picture = np.asarray(sample.image)
    for fact, values in (("shape", SHAPES), ("colour", COLOURS), ("background", COLOURS)):
        for value in values:
            verdict = evaluation.judge_single(picture, sample.facts | {fact: value})
            assert verdict[fact] == (value == sample.facts[fact])


def test_two_shapes_are_told_and_so_is_a_swap() -> None:
    samples = [two_shapes(random.Random(i)) for i in range(300)]
    verdicts = [evaluation.judge_pair(np.asarray(s.image), s.facts) for s in samples]
    assert all(share >= 0.99 for share in evaluation.shares(verdicts).values())
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    for sample in samples[:50]:
        swapped = sample.facts | {"relation": opposite[sample.facts["relation"]]}
        assert not evaluation.judge_pair(np.asarray(sample.image), swapped)["colours in place"]


def test_an_empty_picture_shows_nothing() -> None:
    empty = np.full((SIZE, SIZE, 3), 200, np.uint8)
    assert see_shape(empty, background(empty)) is None
    facts = two_shapes(random.Random(0)).facts
    assert not any(evaluation.judge_pair(empty, facts).values())


def things() -> list[Emoji]:
    """Twelve discs with a bar, each of its own colours."""
    made = []
    for i, colour in enumerate(COLOURS.values()):
        image = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
        draw = ImageDraw.Draw(image)
        draw.ellipse((8, 8, 56, 56), fill=(*colour, 255))
        draw.rectangle((8, 16 + 2 * i, 56, 24 + 2 * i), fill=(90, 90 + 10 * i, 130, 255))
        made.append(Emoji((f"thing{i}",), (), image))
    return made


def test_a_thing_is_found_among_all_on_any_background() -> None:
    known = things()
    samples = [emoji_picture(random.Random(i), known[i % len(known)]) for i in range(60)]
    expected = [i % len(known) for i in range(60)]
    judge = ThingJudge(known)
    pictures = [np.asarray(sample.image) for sample in samples]
    assert judge.ranks(pictures, expected) == [0] * 60
    others = [(i + 1) % len(known) for i in expected]
    assert all(rank > 0 for rank in judge.ranks(pictures, others))


def test_every_thing_has_a_caption_that_was_not_trained_on() -> None:
    known = things()
    for thing in known:
        prompt = evaluation.thing_prompt(thing)
        assert data.held_out(prompt.caption) or prompt.caption == f"the {thing.names[0]}"
        assert prompt.facts["subject"] == thing.names[0]
    # By their checksums all captions of this one were trained on.
    dress = evaluation.thing_prompt(Emoji(("dress",), (), known[0].image))
    assert (dress.caption, dress.facts["background"]) == ("the dress", "white")


def test_landscapes_are_told_by_a_judge_that_has_seen_others() -> None:
    judge = train_scene_judge(count=2000, epochs=4)
    pictures, facts = rendered("test", 200)
    told = judge(pictures)
    for fact in FACTS:
        right = np.mean([a[fact] == b[fact] for a, b in zip(told, facts, strict=True)])
        assert right > 0.85, fact


def test_captions_for_the_evaluation_are_never_trained_on() -> None:
    prompts = evaluation.prompts("single", 40, partial(data.draw, "single"))
    captions = {sample.caption for sample in prompts}
    assert len(captions) == 40
    assert all(data.held_out(caption) for caption in captions)
    for index in range(500):
        assert not data.held_out(data.render(0, "single", index, []).caption)
    # One in sixteen.
    all_captions = {single_shape(random.Random(i)).caption for i in range(4000)}
    share = sum(map(data.held_out, all_captions)) / len(all_captions)
    assert 0.04 < share < 0.09


def test_a_checkpoint_is_scored_line_by_line(tmp_path: Path) -> None:
    judge = partial(train_scene_judge, count=640, epochs=1)
    told: list[str] = []
    lines = evaluation.evaluate(
        TINY,
        tmp_path,
        "cpu",
        count=6,
        seeds=2,
        steps=10,
        with_things=False,
        scene_judge=judge,
        report=lambda name, line: told.append(name),
    )
    assert told == list(lines) == ["one shape", "pairs kept out", "two objects", "scenes"]
    for name, line in lines.items():
        assert (line.prompts, line.pictures) == (6, 12)
        assert set(line.scores) == set(line.judge) >= set(evaluation.GOALS[name])
        assert all(0.0 <= score <= 1.0 for score in line.scores.values())
    for name in ("one shape", "pairs kept out", "two objects"):
        assert all(share >= 0.99 for share in lines[name].judge.values()), name


@pytest.mark.parametrize("colour", ["red", "green", "blue", "yellow", "purple", "black"])
def test_the_embedded_model_draws_what_it_is_asked_for(colour: str) -> None:
    painter = evaluation.Painter(TINY, "cpu", 25, 4.0)
    prompts = [f"a {colour} {shape}" for shape in ("circle", "square", "star", "triangle")]
    pictures = painter.draw(prompts, range(4))
    seen = [see_shape(picture, background(picture)) for picture in pictures]
    assert [nearest_colour(background(picture)) for picture in pictures] == ["white"] * 4
    assert sum(s is not None and s.colour == colour for s in seen) >= 3
    assert torch.get_default_dtype() == torch.float32
