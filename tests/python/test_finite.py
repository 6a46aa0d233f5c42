"""Weights and steps that give no numbers: whoever they concern is told, and all others get their pictures."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from engines import Bench, difference
from PIL import Image
from starweave_image import schema
from starweave_image.device import finite
from starweave_image.weights import load as loading

SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 4, "seed": 1}
NAN, INF = float("nan"), float("inf")

Spoil = Callable[[Any], None]


@pytest.fixture
def bench(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    """Starts an engine over a checkpoint whose loaded pipeline was spoiled."""

    def start(
        spoil: Spoil, make: Callable[[Path], Path] = checkpoints.stable_diffusion, **config: Any
    ) -> Bench:
        load = loading.load_pipeline

        def spoiled(*arguments: Any) -> Any:
            pipeline = load(*arguments)
            spoil(pipeline)
            return pipeline

        monkeypatch.setattr("starweave_image.engine.models.load_pipeline", spoiled)
        models = [schema.ModelEntry(id="local/test", path=str(checkpoint(make)))]
        return Bench(models=models, default_model="local/test", **config).start()

    return start


def image() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(out, "PNG")
    return out.getvalue()


def fill(part: str, parameter: str, value: float) -> Spoil:
    return lambda pipeline: getattr(pipeline, part).get_parameter(parameter).data.fill_(value)


def refused(end: schema.Done | schema.Failed) -> str:
    assert isinstance(end, schema.Failed), end
    assert (end.kind, end.field, end.retryable) == ("internal", "model", False)
    return end.message


@pytest.mark.parametrize("reproducible", [True, False])
@pytest.mark.parametrize(
    ("make", "spoil", "fields", "whose"),
    [
        (checkpoints.stable_diffusion, fill("unet", "conv_out.bias", NAN), {}, "the answer of unet (UNet2D"),
        (checkpoints.stable_diffusion, fill("unet", "conv_in.weight", INF), {}, "the answer of unet (UNet2D"),
        (
            checkpoints.stable_diffusion,
            fill("vae", "decoder.conv_out.bias", NAN),
            {},
            "the answer of vae (Auto",
        ),
        (
            checkpoints.stable_diffusion,
            fill("vae", "decoder.conv_out.bias", -INF),
            {},
            "the answer of vae (Auto",
        ),
        (
            checkpoints.stable_diffusion,
            fill("vae", "encoder.conv_out.bias", NAN),
            {"image": image()},
            "the answer of vae (Auto",
        ),
        (
            checkpoints.stable_diffusion,
            fill("text_encoder", "final_layer_norm.weight", NAN),
            {},
            "what the text encoder told unet (UNet2D",
        ),
        (
            checkpoints.stable_diffusion_xl,
            fill("text_encoder_2", "text_projection.weight", NAN),
            {},
            "what the text encoder told unet (UNet2D",
        ),
        # Finite itself, and no more so once it is multiplied.
        (
            checkpoints.stable_diffusion,
            fill("unet", "conv_out.bias", 3e38),
            {},
            "what the scheduler made of the denoiser's answers, before unet (UNet2D",
        ),
        (
            checkpoints.stable_diffusion_3,
            fill("transformer", "proj_out.bias", NAN),
            {},
            "the answer of transformer (SD3",
        ),
    ],
)
def test_the_network_whose_numbers_are_none_is_named(
    bench: Callable[..., Bench],
    make: Any,
    spoil: Spoil,
    fields: dict[str, Any],
    whose: str,
    reproducible: bool,
) -> None:
    message = refused(
        bench(spoil, make, dtype="float32").generate(reproducible=reproducible, **SMALL | fields)
    )
    assert message.startswith(whose)
    assert " has numbers in float32 that are NaN or infinite: " in message


def test_the_format_is_the_one_that_overflowed(bench: Callable[..., Bench]) -> None:
    spoil = fill("unet", "conv_out.bias", INF)
    assert "numbers in bfloat16" in refused(bench(spoil, dtype="bfloat16").generate(**SMALL))


@pytest.mark.parametrize("value", [NAN, INF])
def test_in_a_shared_pass_only_those_fail_whose_rows_they_are(
    bench: Callable[..., Bench], value: float
) -> None:
    # Of those that draw in five steps one time is spoiled: nobody else has it.
    rows: list[int] = []

    def spoil(pipeline: Any) -> None:
        def hook(_: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Any:
            times = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).flatten()
            sample = result[0].clone()
            rows.append(len(sample))
            sample[(times.expand(len(sample)) == 601)] = value
            return (sample,)

        pipeline.unet.register_forward_hook(hook, with_kwargs=True)

    shared = bench(spoil, dtype="float32")
    wanted = [
        SMALL | {"steps": steps, "seed": seed} for steps, seed in ((4, 1), (5, 2), (4, 3), (5, 4), (4, 5))
    ]
    alone = [shared.generate(**fields) for fields in wanted]
    assert [isinstance(end, schema.Done) for end in alone] == [True, False, True, False, True]
    rows.clear()
    ids = [shared.submit(**fields) for fields in wanted]
    ends = [shared.end(id) for id in ids]
    assert [isinstance(end, schema.Done) for end in ends] == [True, False, True, False, True]
    assert {refused(ends[index]) for index in (1, 3)} == {refused(alone[1])}
    assert max(rows) > 2
    # The engine goes on.
    assert isinstance(shared.generate(**SMALL), schema.Done)
    assert shared.engine.snapshot().running == []


def test_a_scheduler_that_spoils_its_step_is_told_by_the_next_network(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import EulerDiscreteScheduler

    step = EulerDiscreteScheduler.step

    def spoiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(self, *args, **kwargs)
        return (result[0] * NAN, *result[1:]) if self.step_index == spoil_at else result

    monkeypatch.setattr(EulerDiscreteScheduler, "step", spoiled)
    shared = bench(lambda pipeline: None, dtype="float32")
    for spoil_at, before in ((2, "unet"), (4, "vae")):  # noqa: B007 read by the step
        message = refused(shared.generate(scheduler="euler", **SMALL))
        assert message.startswith(f"what the scheduler made of the denoiser's answers, before {before} (")
    spoil_at = -1
    assert isinstance(shared.generate(scheduler="euler", **SMALL), schema.Done)


@pytest.mark.parametrize("reproducible", [True, False])
def test_a_decoder_that_leaves_the_range_of_half_precision_is_asked_in_single(
    bench: Callable[..., Bench], reproducible: bool
) -> None:
    def loud(pipeline: Any) -> None:
        # Far over what float16 holds once they are added up; a normalization behind it takes that back.
        pipeline.vae.decoder.conv_in.weight.data.sign_().mul_(60_000)
        pipeline.vae.half()

    def wide(pipeline: Any) -> None:
        loud(pipeline)
        pipeline.vae.float()

    fields = SMALL | {"reproducible": reproducible}
    done, expected = bench(wide, dtype="float32").done(**fields)
    assert done.notices == []
    narrow = bench(loud, dtype="float32")
    for _ in range(2):
        done, files = narrow.done(**fields)
        assert done.notices == ["Decoded in float32, because the picture left the range of float16."]
        assert difference(files, expected) <= 1

    # What no format holds is told as before.
    def damaged(pipeline: Any) -> None:
        loud(pipeline)
        pipeline.vae.decoder.conv_out.bias.data.fill_(NAN)

    message = refused(bench(damaged, dtype="float32").generate(**fields))
    assert message.startswith("the answer of vae (Auto") and "numbers in float16" in message


def test_what_is_finite() -> None:
    large = torch.tensor([60_000.0, -60_000.0], dtype=torch.float16)
    assert finite.is_finite(
        {"a": [large, torch.tensor([3e38, -3e38])], "b": (torch.zeros(0), torch.tensor([1]), "x")}
    )
    for value in (NAN, INF, -INF):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            tensor = torch.zeros(3, 5)
            tensor[1, 2] = value
            assert not finite.is_finite([(tensor.to(dtype),)])
