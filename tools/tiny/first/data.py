"""The data set: four kinds of captioned pictures, rendered once into a pool.

The pool is a function of its seed and the counts: sample `i` of a kind draws from its own
`random.Random`, so neither the number of workers nor their order matters.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import emoji as emoji_source
from .scenes import landscape
from .shapes import SIZE, Sample, single_shape, two_shapes

KINDS: tuple[str, ...] = ("emoji", "single", "pair", "scene")


@dataclass(frozen=True)
class Counts:
    """How many pictures of each kind the pool holds; `per_emoji` is for each everyday thing."""

    per_emoji: int = 64
    single: int = 24_000
    pair: int = 40_000
    scene: int = 24_000


@dataclass(frozen=True)
class Pool:
    """Pictures (N, SIZE, SIZE, 3) uint8, their captions, and the span of rows of each kind."""

    images: np.ndarray[Any, np.dtype[np.uint8]]
    captions: list[str]
    spans: dict[str, tuple[int, int]]
    subjects: list[str]


def held_out(caption: str) -> bool:
    """Whether this caption is kept out of training, for the evaluation: one in sixteen, by its checksum."""
    return zlib.crc32(caption.encode()) % 16 == 0


def draw(kind: str, rng: random.Random, thing: emoji_source.Emoji | None = None) -> Sample:
    """One picture of `kind`, whatever its caption; `thing` is what an emoji shows."""
    if kind == "single":
        return single_shape(rng)
    if kind == "pair":
        return two_shapes(rng)
    if kind == "scene":
        return landscape(rng)
    assert thing is not None
    return emoji_source.emoji_picture(rng, thing)


def render(seed: int, kind: str, index: int, emojis: list[emoji_source.Emoji]) -> Sample:
    """Sample `index` of `kind`, with a caption that is not held out; the things of `emojis` take turns."""
    thing = emojis[index % len(emojis)] if kind == "emoji" else None
    for attempt in itertools.count():
        sample = draw(kind, random.Random(f"{seed}/{kind}/{index}/{attempt}"), thing)
        if not held_out(sample.caption):
            return sample
    raise AssertionError("unreachable")


_worker_emojis: list[emoji_source.Emoji] = []


def _start_worker(emojis: list[emoji_source.Emoji]) -> None:
    _worker_emojis[:] = emojis


def _render_one(task: tuple[int, str, int]) -> tuple[bytes, str]:
    sample = render(*task, _worker_emojis)
    return sample.image.tobytes(), sample.caption


def _spans(counts: Counts, emojis: int) -> dict[str, tuple[int, int]]:
    sizes = (counts.per_emoji * emojis, counts.single, counts.pair, counts.scene)
    spans, start = {}, 0
    for kind, size in zip(KINDS, sizes, strict=True):
        spans[kind] = (start, start + size)
        start += size
    return spans


def build_pool(
    folder: Path, seed: int, counts: Counts, emojis: list[emoji_source.Emoji], workers: int = 2
) -> Pool:
    """The pool kept in `folder`, rendered now unless it is there for the same seed and counts."""
    spans = _spans(counts, len(emojis))
    subjects = [e.names[0] for e in emojis]
    key = {"seed": seed, "counts": asdict(counts), "subjects": subjects}
    images_path, index_path = folder / "images.npy", folder / "captions.json"
    if index_path.exists():
        index = json.loads(index_path.read_text())
        if index["key"] == key:
            images = np.load(images_path, mmap_mode="r")
            return Pool(images, index["captions"], spans, subjects)

    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(seed, kind, i) for kind in KINDS for i in range(spans[kind][1] - spans[kind][0])]
    images = np.empty((len(tasks), SIZE, SIZE, 3), np.uint8)
    captions: list[str] = []
    with ExitStack() as stack:
        rendered: Iterable[tuple[bytes, str]]
        if workers > 1:
            # Spawned, because a fork would inherit whatever threads the caller's torch has started.
            context = multiprocessing.get_context("spawn")
            processes = stack.enter_context(context.Pool(workers, _start_worker, (emojis,)))
            rendered = processes.imap(_render_one, tasks, chunksize=200)
        else:
            _start_worker(emojis)
            rendered = map(_render_one, tasks)
        for row, (pixels, caption) in enumerate(rendered):
            images[row] = np.frombuffer(pixels, np.uint8).reshape(SIZE, SIZE, 3)
            captions.append(caption)
    np.save(images_path, images)
    # The index is written last: it is what says that the pool is whole.
    index_path.write_text(json.dumps({"key": key, "captions": captions}))
    return Pool(images, captions, spans, subjects)
