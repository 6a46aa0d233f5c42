"""What becomes of a prompt on its way to the tokenizers: composed, read as far as it goes, and told of otherwise."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import diffusers
import pytest
from engines import Bench
from starweave_image import schema
from starweave_image.pictures import images
from starweave_image.tasks import call

SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "seed": 1}
# Each is one token to all of the tokenizers.
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def tiny() -> Bench:
    return Bench().start()


def prepared(pipeline: Any, prompt: str, negative_prompt: str = "") -> list[str]:
    text = call.Text(prompt, negative_prompt, 64, 64, 4, 4.0, False)
    return call.prepare(pipeline, text).notices


def words(count: int) -> list[str]:
    return [LETTERS[index % len(LETTERS)] for index in range(count)]


# The limits are those of the tokenizers, two of whose tokens are markers (one, of T5's).
@pytest.mark.parametrize(
    ("make", "length", "kept"),
    [
        (checkpoints.stable_diffusion, 77, 75),
        (checkpoints.stable_diffusion_xl, 77, 75),
        (checkpoints.stable_diffusion_3, 77, 256),
        (checkpoints.flux, 77, 512),
        (checkpoints.stable_diffusion, 24, 22),
    ],
)
def test_what_was_cut_off_is_quoted_from_its_first_word(
    checkpoint: Callable[[Callable[[Path], Path]], Path], make: Callable[[Path], Path], length: int, kept: int
) -> None:
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(checkpoint(make))
    for name in ("tokenizer", "tokenizer_2"):
        if type(getattr(pipeline, name, None)).__name__.startswith("CLIP"):
            setattr(pipeline, name, checkpoints._clip_tokenizer(length))
    assert prepared(pipeline, " ".join(words(kept))) == []
    text = " ".join(words(kept + 3))
    [notice] = prepared(pipeline, text)
    said, quoted, rest = notice.split('"')
    assert (said, rest) == ("prompt is longer than this model reads: ", " was not used.")
    assert quoted.split() == words(kept + 3)[kept:]
    assert text.endswith(quoted)
    # A long end is quoted in short.
    [notice] = prepared(pipeline, " ".join(words(kept + 200)))
    assert notice.endswith('…" was not used.') and len(notice) < 250


def test_the_patience_of_one_encoder_is_enough_and_each_prompt_is_told_of(
    checkpoint: Callable[[Callable[[Path], Path]], Path],
) -> None:
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(checkpoint(checkpoints.stable_diffusion_xl))
    pipeline.tokenizer_2 = checkpoints._clip_tokenizer(40)
    assert prepared(pipeline, " ".join(words(38)), " ".join(words(38))) == []
    notices = prepared(pipeline, " ".join(words(40)), " ".join(words(39)))
    assert [notice.partition(" ")[0] for notice in notices] == ["prompt", "negative_prompt"]
    assert '"m n"' in notices[0] and '"m"' in notices[1]


def test_a_word_that_is_cut_in_the_middle_is_quoted_whole(
    checkpoint: Callable[[Callable[[Path], Path]], Path],
) -> None:
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(checkpoint(checkpoints.stable_diffusion))
    [notice] = prepared(pipeline, "a big green elephant walks")
    assert '"elephant walks"' in notice


@pytest.mark.parametrize("make", [checkpoints.stable_diffusion, checkpoints.stable_diffusion_3])
def test_a_prompt_of_which_no_tokenizer_knows_a_character_is_told_of(
    checkpoint: Callable[[Callable[[Path], Path]], Path], make: Callable[[Path], Path]
) -> None:
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(checkpoint(make))
    for prompt in ("苹果", "🍎 🍏"):
        assert prepared(pipeline, prompt) == [
            "This model understood nothing of prompt: it knows none of its characters."
        ]
    assert prepared(pipeline, "苹果 apple") == []
    assert prepared(pipeline, "a cat", "") == []


def test_a_prompt_is_composed_before_it_is_tokenized_and_kept_as_it_was_typed(
    checkpoint: Callable[[Callable[[Path], Path]], Path],
) -> None:
    folder = str(checkpoint(checkpoints.stable_diffusion))
    bench = Bench(models=[schema.ModelEntry(id="local/sd", path=folder)], default_model="local/sd").start()
    typed = "a café, Ångström"
    apart, whole = (unicodedata.normalize(form, typed) for form in ("NFD", "NFC"))
    assert apart != whole
    pixels = []
    for text in (apart, whole):
        for field in ("prompt", "negative_prompt", "style"):
            done, [data] = bench.done(**SMALL, guidance_scale=4.0, **{field: text}, metadata=True)
            assert done.parameters is not None
            assert text in done.parameters["prompt" if field == "style" else field]
            record = images.read(data)
            assert record is not None
            assert record["prompt"] == done.parameters["prompt"]
            pixels.append((field, images.decode(data, "image").tobytes()))
    assert pixels[:3] == pixels[3:]


def test_the_embedded_model_draws_what_it_knows_of_a_prompt(tiny: Bench) -> None:
    fields = SMALL | {"metadata": False, "steps": 4}
    done, asked = tiny.done(prompt="A cozy kitty, 4k", negative_prompt="blurry blue", **fields)
    plain, known = tiny.done(prompt="a cat", negative_prompt="blue", **fields)
    assert asked == known
    assert done.parameters and plain.parameters
    assert (done.parameters["prompt"], done.parameters["negative_prompt"]) == (
        "A cozy kitty, 4k",
        "blurry blue",
    )
    assert plain.notices == []
    first, second, third = done.notices
    assert first.startswith('Starweave Tiny does not know "cozy", "4k" in the prompt, and draws without. ')
    assert second == 'Starweave Tiny reads "cat" for "kitty" in the prompt.'
    assert third == 'Starweave Tiny does not know "blurry" in the negative prompt, and draws without.'
    assert "larger model" in first


def test_a_style_is_read_with_the_prompt(tiny: Bench) -> None:
    done, _ = tiny.done(prompt="a cat", style="watercolour", **SMALL)
    assert done.notices[0].startswith('Starweave Tiny does not know "watercolour" in the prompt')
    assert done.parameters and done.parameters["prompt"] == "a cat, watercolour"


@pytest.mark.parametrize("prompt", ["ein Astronaut", "苹果", "🍎", "the"])
def test_a_prompt_of_which_nothing_was_understood_is_told_of(tiny: Bench, prompt: str) -> None:
    done, [_] = tiny.done(prompt=prompt, **SMALL)
    assert done.notices[0].startswith("Starweave Tiny understood nothing of the prompt")
    assert done.parameters and done.parameters["prompt"] == prompt
