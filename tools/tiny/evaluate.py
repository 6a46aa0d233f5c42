"""How well a checkpoint draws what it is asked for, on captions and seeds that the training never used."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import draw_prompts
from .colours import COLOURS
from .icons import Pixels
from .judges import CountJudge, Seen, ThingJudge, see_pair, train_count_judge
from .pictures import PLAIN, Facts, Sample, Studio, held_out, one, open_studio, related, several, shape

GOALS: Mapping[str, Mapping[str, float]] = {
    "things": {"top 1": 0.80, "top 5": 0.95},
    "colour on thing": {"colour": 0.85, "thing": 0.85, "both": 0.85},
    "one shape": {"colour": 0.97, "thing": 0.97},
    "shapes, pairs kept out": {"colour": 0.97, "thing": 0.97},
    "counts": {"number": 0.80},
    "relations": {"all right": 0.70},
}
"""What the model is meant to reach, as shares of right answers."""

# Seeds of pictures begin here; sheets use the ones below.
_FIRST_SEED = 1_000_000

Verdict = dict[str, bool]


@dataclass(frozen=True)
class Line:
    """One line of the report: shares of right answers, of the checkpoint and of the judge on drawn pictures."""

    name: str
    prompts: int
    pictures: int
    scores: Mapping[str, float]
    judge: Mapping[str, float]


def _plain(facts: Facts) -> bool:
    """Whether the judges know such pictures: of the plain style and background, and not tiny."""
    return facts.style == PLAIN and not facts.background and facts.size in ("medium", "large")


def prompts(
    name: str, count: int, make: Callable[[random.Random], Sample], fits: Callable[[Facts], bool]
) -> list[Sample]:
    """`count` samples of `make` that `fits`, with different captions, all held out from training."""
    found: dict[str, Sample] = {}
    for i in range(4000 * count):
        sample = make(random.Random(f"evaluation/{name}/{i}"))
        if held_out(sample.caption) and fits(sample.facts):
            found.setdefault(sample.caption, sample)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"only {len(found)} captions of {name} are held out")


def _thing_prompts(studio: Studio) -> Iterator[Sample]:
    """For each thing a held-out caption of its commonest name; the plainest one where training has seen them all."""
    from .captions import finish, noun

    for thing in studio.things:
        if not thing.key(PLAIN):
            continue
        for k in itertools.count():
            rng = random.Random(f"evaluation/thing/{thing.names[0]}/{k}")
            words = finish(rng, noun(rng, thing.names[0], ""), PLAIN)
            if held_out(words) or k == 100:
                break
        yield studio.alone(rng, thing, words)


def _alone(judge: ThingJudge, picture: Pixels, facts: Facts) -> Verdict:
    seen = judge(picture)
    subject = facts.subjects[0]
    thing = seen.names[:1] == (subject.key,)
    colour = seen.colour == subject.colour
    return {"colour": colour, "thing": thing, "both": colour and thing}


def _ranked(seen: Seen, facts: Facts) -> Verdict:
    key = facts.subjects[0].key
    return {"top 1": key in seen.names[:1], "top 5": key in seen.names[:5]}


def _stand(picture: Pixels, judge: ThingJudge, facts: Facts) -> Verdict:
    pair = see_pair(picture, judge)
    seen = [side.names[0] if side.names else "" for side in (pair.first, pair.second)]
    asked = [subject.key for subject in facts.subjects]
    wanted = "beside" if facts.relation in ("left", "right", "beside") else "stacked"
    if facts.relation in ("right", "below", "under"):
        asked.reverse()
    both = seen == asked or (facts.relation == "beside" and seen == asked[::-1])
    return {
        "things": sorted(seen) == sorted(asked),
        "place": pair.stand == wanted,
        "all right": both and pair.stand == wanted,
    }


def shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The share of right answers to each question."""
    return {question: float(np.mean([verdict[question] for verdict in verdicts])) for question in verdicts[0]}


def _coloured(facts: Facts) -> bool:
    """Of one thing: in a colour that its name does not have already, as a green book has."""
    subject = facts.subjects[0]
    return _plain(facts) and bool(subject.colour) and subject.key.split()[0] not in COLOURS


def _natural(facts: Facts) -> bool:
    """Of two things: such as the judge tells apart when they are small, and coloured only where they are shapes."""
    people = any(s.thing is not None and (s.thing.person or "face" in s.key) for s in facts.subjects)
    return (
        _plain(facts)
        and not people
        and not any(s.colour and (s.thing or s.colour == "white") for s in facts.subjects)
    )


def evaluate(
    checkpoint: Path, cache: Path, count: int, seeds: int, only: Sequence[str], report: Callable[[Line], None]
) -> None:
    """Draws and judges line by line; `only` names the lines, none means all. `report` is told each line as it is known."""
    import diffusers

    stable_diffusion: Any = diffusers.StableDiffusionPipeline
    pipeline = stable_diffusion.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    studio = open_studio(cache)
    # Made when they are needed: the second takes a minute.
    natural = functools.cache(lambda: ThingJudge(studio, studio.things, coloured=False))
    coloured = functools.cache(lambda: ThingJudge(studio, studio.things, coloured=True))
    shapes = functools.cache(lambda: ThingJudge(studio, (), coloured=True))

    def line(
        name: str, samples: list[Sample], judge: Callable[[list[Pixels], list[Facts]], list[Verdict]]
    ) -> None:
        asked = [sample for sample in samples for _ in range(seeds)]
        numbers = [_FIRST_SEED + i for i in range(len(asked))]
        drawn = [np.asarray(p) for p in draw_prompts(pipeline, [s.caption for s in asked], numbers)]
        truth = judge([np.asarray(s.image) for s in samples], [s.facts for s in samples])
        found = judge(drawn, [s.facts for s in asked])
        report(Line(name, len(samples), len(asked), shares(found), shares(truth)))

    def wanted(name: str) -> bool:
        return not only or name in only

    def each(
        judge: Callable[[Pixels, Facts], Verdict],
    ) -> Callable[[list[Pixels], list[Facts]], list[Verdict]]:
        return lambda pictures, facts: [judge(p, f) for p, f in zip(pictures, facts, strict=True)]

    if wanted("things"):
        line("things", list(_thing_prompts(studio)), each(lambda p, f: _ranked(natural()(p), f)))
    if wanted("relations"):
        relations = ("left", "right", "above", "below", "on", "under", "beside")
        samples = prompts(
            "relations",
            count,
            lambda rng: related(studio, rng),
            lambda f: _natural(f) and f.relation in relations,
        )
        line("relations", samples, each(lambda p, f: _stand(p, natural(), f)))
    if wanted("counts"):
        count_judge: CountJudge = train_count_judge(studio)
        samples = prompts("counts", count, lambda rng: several(studio, rng), _plain)
        line(
            "counts",
            samples,
            lambda pictures, facts: [
                {"number": told == f.count} for told, f in zip(count_judge(pictures), facts, strict=True)
            ],
        )
    for name, make, judge in (
        ("colour on thing", lambda rng: one(studio, rng, pairs=True), coloured),
        ("one shape", lambda rng: shape(studio, rng), shapes),
        ("shapes, pairs kept out", lambda rng: shape(studio, rng, pairs=True), shapes),
    ):
        if wanted(name):
            samples = prompts(name, count, make, _coloured)
            line(name, samples, each(functools.partial(_alone, judge())))
