"""Training of the embedded model: rendering, vocabulary, resuming, export and command line.

Everything runs on a configuration of a few thousand weights, without the network.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny.first import cli, tiny
from tiny.first.data import Counts, build_pool
from tiny.first.denoiser import Denoiser, DenoiserRecipe, train_denoiser
from tiny.first.emoji import Emoji, emoji_picture, everyday_things
from tiny.first.loop import learning_rate
from tiny.first.scenes import landscape
from tiny.first.shapes import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    SIZE,
    Sample,
    single_shape,
    two_shapes,
)
from tiny.first.vae import VaeRecipe, train_vae
from tiny.first.vocabulary import CONTEXT, build_tokenizer, learn_merges, words_of

pytestmark = pytest.mark.slow

SMALL_VAE = VaeRecipe(width=8, encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1), steps=3, batch=8)
SMALL_DENOISER = DenoiserRecipe(
    channels=(16, 16, 32),
    heads=2,
    groups=4,
    text=32,
    text_layers=1,
    steps=3,
    batch=4,
    warmup=1,
    checkpoint_every=1,
    sheet_every=2,
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Training sets the number of threads of the process, which the other tests keep."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Interrupted(Exception):
    """Stands for whatever ends a training run early."""


def nearest_colour(pixel: tuple[int, ...]) -> str:
    return min(COLOURS, key=lambda c: sum((a - b) ** 2 for a, b in zip(COLOURS[c], pixel, strict=True)))


def colours_of(image: Image.Image) -> dict[str, int]:
    """How many pixels are nearest to each colour."""
    found: dict[str, int] = {}
    for pixel in np.asarray(image).reshape(-1, 3).tolist():
        name = nearest_colour(tuple(pixel))
        found[name] = found.get(name, 0) + 1
    return found


@pytest.mark.parametrize("render", [single_shape, two_shapes, landscape])
def test_a_sample_depends_on_its_seed_alone(render: Callable[[random.Random], Sample]) -> None:
    first, again = render(random.Random("a")), render(random.Random("a"))
    assert first.caption == again.caption
    assert first.facts == again.facts
    assert first.image.size == (SIZE, SIZE)
    assert first.image.tobytes() == again.image.tobytes()
    others = {render(random.Random(i)).image.tobytes() for i in range(20)}
    assert len(others) == 20


@pytest.mark.parametrize("seed", range(40))
def test_one_shape_shows_what_its_caption_says(seed: int) -> None:
    sample = single_shape(random.Random(seed))
    words = sample.caption.split()
    assert sample.facts["colour"] in words
    assert sample.facts["shape"] in words
    assert nearest_colour(sample.image.getpixel((0, 0))) == sample.facts["background"]  # type: ignore[arg-type]
    found = colours_of(sample.image)
    assert found[sample.facts["colour"]] > 60
    if sample.facts["background"] not in words:
        usual = "gray" if sample.facts["colour"] == "white" else "white"
        assert sample.facts["background"] == usual


@pytest.mark.parametrize("seed", range(40))
def test_two_shapes_are_where_the_caption_puts_them(seed: int) -> None:
    sample = two_shapes(random.Random(seed))
    half = {
        "left": (0, 0, 32, 64),
        "right": (32, 0, 64, 64),
        "above": (0, 0, 64, 32),
        "below": (0, 32, 64, 64),
    }[sample.facts["relation"]]
    first, whole = colours_of(sample.image.crop(half)), colours_of(sample.image)
    colour, other = sample.facts["colour"], sample.facts["colour2"]
    assert first[colour] > 60
    assert first[colour] > 0.8 * whole[colour]
    assert first.get(other, 0) < 0.2 * whole[other]


def test_held_out_pairs_are_drawn_only_on_request() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        facts = single_shape(rng).facts
        assert (facts["colour"], facts["shape"]) not in HELD_OUT
        facts = two_shapes(rng).facts
        assert (facts["colour"], facts["shape"]) not in HELD_OUT
        assert (facts["colour2"], facts["shape2"]) not in HELD_OUT
    facts = single_shape(rng, held_out=True).facts
    assert (facts["colour"], facts["shape"]) in HELD_OUT
    assert {c for c, _ in HELD_OUT} == set(COLOURS)
    assert all(s in SHAPES for _, s in HELD_OUT)


def test_the_everyday_things_are_at_least_300_and_apples_have_their_plain_name() -> None:
    things = everyday_things()
    assert len(things) >= 300
    assert things["red apple"] == ("red apple", "apple")
    names = [n for group in things.values() for n in group]
    assert len(names) == len(set(names))


def test_a_thing_stands_on_the_background_that_its_caption_names() -> None:
    disc = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    disc.paste((200, 30, 30, 255), (16, 16, 48, 48))
    thing = Emoji(("red apple", "apple"), ("fruit",), disc)
    for seed in range(30):
        sample = emoji_picture(random.Random(seed), thing)
        assert "apple" in sample.caption
        background = sample.facts["background"]
        assert nearest_colour(sample.image.getpixel((0, 0))) == background  # type: ignore[arg-type]
        assert background == "white" or background in sample.caption.split()


def test_every_known_word_is_one_token_and_unknown_ones_fall_apart() -> None:
    words = words_of(["a red circle, and 2 t-shirts", "an orange star"])
    assert words == sorted(
        {"a", "red", "circle", ",", "and", "2", "t", "-", "shirts"} | {"an", "orange", "star"}
    )
    tokenizer = build_tokenizer(words)
    for word in words:
        assert tokenizer.tokenize(word) == [word + "</w>"]
    assert len(tokenizer.tokenize("zebra")) > 1
    for odd in ("", "日本 é 🍎", "x" * 500, "<|endoftext|>"):
        ids = tokenizer(odd, padding="max_length", truncation=True, max_length=CONTEXT).input_ids
        assert len(ids) == CONTEXT
        assert max(ids) < len(tokenizer)


def test_merges_take_the_commonest_pair_first() -> None:
    assert learn_merges(["ab", "ab", "cb"]) == [("a", "b</w>"), ("c", "b</w>")]


def test_the_learning_rate_warms_up_stays_and_decays_to_three_percent() -> None:
    rates = [learning_rate(s, 1000, 1.0, 100, 0.3) for s in range(1000)]
    assert rates[0] == 0.01
    assert rates[99:300] == [1.0] * 201
    assert all(a >= b for a, b in pairwise(rates[299:]))
    assert rates[-1] == pytest.approx(0.03, abs=1e-3)


def test_the_pool_is_kept_and_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    counts = Counts(per_emoji=0, single=5, pair=4, scene=3)
    one = build_pool(tmp_path / "one", 7, counts, [], workers=1)
    two = build_pool(tmp_path / "two", 7, counts, [], workers=2)
    kept = build_pool(tmp_path / "one", 7, counts, [], workers=1)
    assert one.spans == {"emoji": (0, 0), "single": (0, 5), "pair": (5, 9), "scene": (9, 12)}
    assert one.captions == two.captions == kept.captions
    assert np.array_equal(one.images, two.images)
    assert np.array_equal(one.images, kept.images)
    other = build_pool(tmp_path / "one", 8, counts, [], workers=1)
    assert not np.array_equal(one.images, other.images)


def train_small_denoiser(folder: Path, stop_at: int | None = None) -> Denoiser:
    tokenizer = build_tokenizer(["a", "red", "circle"])
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(12, 4, 16, 16, generator=rng)
    ids = torch.randint(0, len(tokenizer), (12, CONTEXT), generator=rng)
    spans = {"emoji": (0, 0), "single": (0, 4), "pair": (4, 8), "scene": (8, 12)}

    def interrupt(average: Denoiser, step: int) -> None:
        if step == stop_at:
            raise Interrupted

    return train_denoiser(latents, ids, spans, tokenizer, SMALL_DENOISER, 1, folder, CPU, interrupt)


def test_an_interrupted_denoiser_ends_with_the_weights_of_an_unbroken_run(tmp_path: Path) -> None:
    unbroken = train_small_denoiser(tmp_path / "unbroken").state_dict()
    with pytest.raises(Interrupted):
        train_small_denoiser(tmp_path / "broken", stop_at=2)
    resumed = train_small_denoiser(tmp_path / "broken").state_dict()
    assert unbroken.keys() == resumed.keys()
    for name, weight in unbroken.items():
        assert torch.equal(weight, resumed[name]), name


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    images = np.zeros((4, SIZE, SIZE, 3), np.uint8)
    train_vae(images, [(0, 4)], SMALL_VAE, 1, tmp_path, CPU)
    with pytest.raises(ValueError, match="other settings"):
        train_vae(images, [(0, 4)], SMALL_VAE, 2, tmp_path, CPU)


def test_the_whole_run_exports_a_plain_diffusers_checkpoint(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    recipe = tiny.Recipe(
        emoji=False,
        counts=Counts(per_emoji=0, single=12, pair=12, scene=12),
        vae=SMALL_VAE,
        denoiser=SMALL_DENOISER,
    )
    out = tmp_path / "model"
    tiny.train(recipe, out, tmp_path / "work", tmp_path / "cache", "cpu", threads=1)

    assert (tmp_path / "work" / "sheet-000002.png").exists()
    log = (tmp_path / "work" / "train.log").read_text()
    assert all(
        line in log for line in ("pool: 36 pictures", "vae 3/3 loss", "denoiser 3/3 loss", "exported to")
    )
    assert (out / "sheet.png").exists()
    vocabulary = json.loads((out / "vocabulary.json").read_text())
    assert vocabulary["words"] == sorted(set(vocabulary["words"]))
    assert "background" in vocabulary["words"]
    assert "red circle" in vocabulary["subjects"]
    for weights in out.glob("*/*.safetensors"):
        kinds = {t.dtype for t in load_file(weights).values() if t.is_floating_point()}
        assert kinds == {torch.float16}, weights

    pipeline = StableDiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        ["a red circle", "an unheard-of thing, 日本"],
        height=SIZE,
        width=SIZE,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
    ).images
    assert [p.size for p in pictures] == [(SIZE, SIZE), (SIZE, SIZE)]
    assert np.isfinite(np.asarray(pictures[0], np.float32)).all()


def test_a_run_that_starts_from_a_checkpoint_begins_with_its_weights(tmp_path: Path) -> None:
    recipe = tiny.Recipe(
        emoji=False,
        counts=Counts(per_emoji=0, single=6, pair=6, scene=6),
        vae=SMALL_VAE,
        denoiser=SMALL_DENOISER,
    )
    first, second = tmp_path / "first", tmp_path / "second"
    tiny.train(recipe, first, tmp_path / "work1", tmp_path, "cpu", threads=1)
    untouched = replace(recipe, seed=1, start=first, denoiser=replace(SMALL_DENOISER, steps=0))
    tiny.train(untouched, second, tmp_path / "work2", tmp_path, "cpu", threads=1)
    assert str(tmp_path) not in "".join(p.read_text() for p in second.glob("**/*.json"))
    # The captions of another seed have other words; what the weights know is what they were trained with.
    words = [json.loads((folder / "vocabulary.json").read_text())["words"] for folder in (first, second)]
    assert words[0] == words[1]
    paths = sorted(p.relative_to(first) for p in first.glob("*/*.safetensors"))
    assert len(paths) == 3
    for path in paths:
        before, after = load_file(first / path), load_file(second / path)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), path


def test_the_command_line_parses_without_loading_torch(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    cli.add_commands(parser.add_subparsers(required=True))
    arguments = parser.parse_args(
        ["train", "tiny", "--out", str(tmp_path), "--steps", "7", "--seed", "3", "--no-emoji"]
    )
    assert callable(arguments.run)
    assert (arguments.out, arguments.steps, arguments.seed) == (tmp_path, 7, 3)
    assert arguments.no_emoji
    check = "import sys, tiny.first.cli; sys.exit('torch' in sys.modules)"
    search = [p for p in sys.path if p]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {search!r}; {check}"], check=False
    )
    assert done.returncode == 0
