"""How well a checkpoint draws what it is asked for, on captions and seeds that the training never used.

The prompts are of the grammar that the training pictures are captioned with, but captions that `data.held_out` keeps
out. A judge that looks at pixels alone says what each picture shows, and is checked on rendered pictures first.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from starweave_image.device import devices
from starweave_image.weights.load import quiet_libraries

from . import emoji
from .data import draw, held_out
from .judge import Array, ThingJudge, background, nearest_colour, see_pair, see_shape
from .scene_judge import FACTS, SceneJudge, train_scene_judge
from .shapes import SIZE, Sample, single_shape

GOALS: dict[str, dict[str, float]] = {
    "one shape": {"colour": 0.98, "shape": 0.95, "background": 0.98},
    "pairs kept out": {"colour": 0.95, "shape": 0.90},
    "two objects": {"colours in place": 0.85, "all right": 0.70},
    "scenes": {"time": 0.95, "ground": 0.90, "snow": 0.95, "object": 0.80},
    "things": {"top 1": 0.70, "top 5": 0.90},
}
"""What the embedded model is meant to reach, as shares of right answers."""

# Seeds of pictures begin here; the sheet in the model card uses the ones below.
_FIRST_SEED = 1_000_000

Verdicts = list[dict[str, bool]]


@dataclass(frozen=True)
class Line:
    """One line of the report: the shares of right answers, of the checkpoint and of the judge on rendered pictures."""

    prompts: int
    pictures: int
    scores: dict[str, float]
    judge: dict[str, float] = field(default_factory=dict)


def prompts(kind: str, count: int, make: Callable[[random.Random], Sample]) -> list[Sample]:
    """`count` samples of `make` with different captions, all held out from training."""
    found: dict[str, Sample] = {}
    for i in range(1000 * count):
        sample = make(random.Random(f"evaluation/{kind}/{i}"))
        if held_out(sample.caption):
            found.setdefault(sample.caption, sample)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"only {len(found)} captions of {kind} are held out")


def thing_prompt(thing: emoji.Emoji) -> Sample:
    """A caption of the thing that is held out; where checksums leave none out, a form that training does not have."""
    name = thing.names[0]
    try:
        return prompts(name, 1, partial(draw, "emoji", thing=thing))[0]
    except ValueError:
        for i in itertools.count():
            sample = draw("emoji", random.Random(f"evaluation/{name}/{i}"), thing)
            if sample.facts["background"] == "white":
                return Sample(sample.image, f"the {name}", sample.facts)
        raise AssertionError("unreachable") from None


def judge_single(picture: Array, facts: dict[str, str]) -> dict[str, bool]:
    ground = background(picture)
    seen = see_shape(picture, ground)
    return {
        "colour": seen is not None and seen.colour == facts["colour"],
        "shape": seen is not None and seen.shape == facts["shape"],
        "background": nearest_colour(ground) == facts["background"],
    }


def judge_pair(picture: Array, facts: dict[str, str]) -> dict[str, bool]:
    stands, one, other = see_pair(picture)
    relation = facts["relation"]
    first, second = (one, other) if relation in ("left", "above") else (other, one)
    placed = stands == ("beside" if relation in ("left", "right") else "stacked")
    if not placed or first is None or second is None:
        return {"colours in place": False, "all right": False}
    colours = (first.colour, second.colour) == (facts["colour"], facts["colour2"])
    shapes = (first.shape, second.shape) == (facts["shape"], facts["shape2"])
    ground = nearest_colour(background(picture)) == facts["background"]
    return {"colours in place": colours, "all right": colours and shapes and ground}


def judge_scenes(judge: SceneJudge, pictures: Array, facts: Sequence[dict[str, str]]) -> Verdicts:
    """`object` counts where a house, cabin or boat was asked for, and only there."""
    verdicts = []
    for told, asked in zip(judge(pictures), facts, strict=True):
        right = {fact: told[fact] == asked[fact] for fact in FACTS}
        if asked["object"] not in ("house", "cabin", "boat"):
            del right["object"]
        verdicts.append(right)
    return verdicts


def judge_things(judge: ThingJudge, pictures: Sequence[Array], expected: Sequence[int]) -> Verdicts:
    return [{"top 1": rank < 1, "top 5": rank < 5} for rank in judge.ranks(pictures, expected)]


def shares(verdicts: Verdicts) -> dict[str, float]:
    """The share of right answers to each question, among the verdicts that answer it."""
    questions = dict.fromkeys(question for verdict in verdicts for question in verdict)
    return {
        question: float(np.mean([verdict[question] for verdict in verdicts if question in verdict]))
        for question in questions
    }


class Painter:
    """Draws prompts with the stock pipeline of a checkpoint, in batches, on the device and in the dtype of the sidecar."""

    def __init__(self, checkpoint: Path, device: str, steps: int, guidance: float) -> None:
        import diffusers

        quiet_libraries()
        choice = devices.decide(device, "auto", devices.present(), os.environ)
        stable_diffusion: Any = diffusers.StableDiffusionPipeline
        self._pipeline = stable_diffusion.from_pretrained(checkpoint, dtype=getattr(torch, choice.dtype))
        self._pipeline.to(choice.device.id)
        for part in (self._pipeline.unet, self._pipeline.vae):
            part.to(memory_format=torch.channels_last)
        self._pipeline.set_progress_bar_config(disable=True)
        self._steps, self._guidance = steps, guidance

    def draw(self, captions: Sequence[str], seeds: Iterable[int], batch: int = 30) -> list[Array]:
        """One picture (64, 64, 3) uint8 for each caption and seed."""
        numbers = list(seeds)
        pictures: list[Array] = []
        for start in range(0, len(captions), batch):
            rows = slice(start, start + batch)
            drawn = self._pipeline(
                list(captions[rows]),
                height=SIZE,
                width=SIZE,
                num_inference_steps=self._steps,
                guidance_scale=self._guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in numbers[rows]],
            ).images
            pictures += [np.asarray(picture) for picture in drawn]
        return pictures


def evaluate(
    checkpoint: Path,
    cache: Path,
    device: str,
    count: int = 200,
    seeds: int = 3,
    steps: int = 25,
    guidance: float = 4.0,
    with_things: bool = True,
    scene_judge: Callable[[], SceneJudge] = train_scene_judge,
    report: Callable[[str, Line], None] = lambda name, line: None,
) -> dict[str, Line]:
    """Scores of the checkpoint, line by line: `count` prompts (of things one each) with `seeds` seeds.

    `cache` has the pictures of everyday things, or gets them. `report` is told each line as it is known.
    """
    painter = Painter(checkpoint, device, steps, guidance)
    lines: dict[str, Line] = {}

    def score(
        name: str,
        samples: list[Sample],
        judge: Callable[[list[Array], list[Sample]], Verdicts],
        truth: list[Sample],
    ) -> None:
        asked = [sample for sample in samples for _ in range(seeds)]
        numbers = [_FIRST_SEED + i for i in range(len(asked))]
        drawn = painter.draw([sample.caption for sample in asked], numbers)
        checked = judge([np.asarray(sample.image) for sample in truth], truth)
        lines[name] = Line(len(samples), len(asked), shares(judge(drawn, asked)), shares(checked))
        report(name, lines[name])

    def each(judge: Callable[[Array, dict[str, str]], dict[str, bool]]) -> Any:
        return lambda pictures, samples: [
            judge(picture, sample.facts) for picture, sample in zip(pictures, samples, strict=True)
        ]

    def fresh(kind: str) -> list[Sample]:
        return [draw(kind, random.Random(f"truth/{kind}/{i}")) for i in range(1000)]

    def held(kind: str) -> list[Sample]:
        return prompts(kind, count, lambda rng: draw(kind, rng))

    score("one shape", held("single"), each(judge_single), fresh("single"))
    kept_out = prompts("kept out", count, lambda rng: single_shape(rng, held_out=True))
    score("pairs kept out", kept_out, each(judge_single), kept_out)
    score("two objects", held("pair"), each(judge_pair), fresh("pair"))
    trained = scene_judge()

    def scenes(pictures: list[Array], samples: list[Sample]) -> Verdicts:
        return judge_scenes(trained, np.stack(pictures), [sample.facts for sample in samples])

    score("scenes", held("scene"), scenes, fresh("scene"))
    if with_things:
        known = emoji.load(cache)
        names = [thing.names[0] for thing in known]
        thing_judge = ThingJudge(known)

        def things(pictures: list[Array], samples: list[Sample]) -> Verdicts:
            return judge_things(thing_judge, pictures, [names.index(s.facts["subject"]) for s in samples])

        asked = [thing_prompt(thing) for thing in known]
        score("things", asked, things, asked)
    return lines
