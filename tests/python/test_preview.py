"""Previews: the map of an autoencoder, what a step predicts, which steps are shown, and what goes out."""

from __future__ import annotations

import functools
import gc
import io
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, config
from engines import Bench
from PIL import Image
from sidecar import Sidecar
from starweave_image import schema
from starweave_image.pictures import preview

EMBEDDED = ROOT / "priv" / "models" / "starweave-tiny"
SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 12}
# Mean difference in levels of 255: of four pictures it was 14 to 19, and 47 or more with a wrong map.
CLOSE = 27.0

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def tiny() -> Bench:
    return Bench().start()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is no reason to leave a preview out."""
    monkeypatch.setattr(preview, "_INTERVAL_S", 0.0)


def shown(data: bytes | memoryview, size: int = 16) -> Array:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BOX), np.float64)


def distance(one: Array, other: Array) -> float:
    return float(np.abs(one - other).mean())


def pipeline_of(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# The map


@pytest.mark.parametrize(
    "prompt",
    ["a red circle", "a house on green hills", "a yellow star on a black background", "a boat on the sea"],
)
def test_the_last_preview_is_close_to_the_picture(tiny: Bench, hasty: None, prompt: str) -> None:
    id = tiny.submit(prompt=prompt, seed=7, preview=True, **SMALL)
    assert isinstance(tiny.end(id), schema.Done)
    [file] = tiny.files(id)
    picture, previews = shown(file), [shown(p.data) for p in tiny.of(id, schema.Preview)]
    assert distance(previews[-1], picture) < CLOSE


def test_a_red_circle_is_red_in_the_middle_and_white_around_it(tiny: Bench, hasty: None) -> None:
    id = tiny.submit(prompt="a red circle", seed=7, preview=True, **SMALL)
    tiny.end(id)
    last = shown(tiny.of(id, schema.Preview)[-1].data)
    red, green, blue = last[7:9, 7:9].mean((0, 1))
    assert red > 150 and green < 80 and blue < 80
    assert last[1:3, 1:3].min() > 180


def test_a_wrong_map_is_far_from_the_picture() -> None:
    """So that the bound above says something."""
    pipeline = pipeline_of(EMBEDDED)
    map = preview.fitted(pipeline.vae, pipeline.vae_scale_factor)
    made = {"num_inference_steps": 12, "guidance_scale": 4.0, "width": 64, "height": 64}
    latents = pipeline(
        "a red circle", generator=torch.Generator().manual_seed(7), output_type="latent", **made
    ).images
    latents = preview.unscale(pipeline.vae, latents, 64, 64, pipeline.vae_scale_factor)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents).sample
    picture = pipeline.image_processor.postprocess(decoded, output_type="pil")[0].resize(
        (16, 16), Image.Resampling.BOX
    )

    def far(map: Any) -> float:
        drawn = np.asarray(preview.draw(latents, map), np.float64)
        return distance(drawn, np.asarray(picture, np.float64))

    assert far(map) < CLOSE
    channels, colours = map[:, [1, 0, 2, 3, 4]], map[[2, 0, 1]]
    assert min(far(channels), far(colours), far(-map), far(map * 0)) > 1.5 * CLOSE


def test_a_map_is_fitted_once_and_always_the_same() -> None:
    vae = diffusers.AutoencoderTiny.from_pretrained(EMBEDDED / "vae")
    again = diffusers.AutoencoderTiny.from_pretrained(EMBEDDED / "vae")
    torch.manual_seed(3)
    map = preview.fitted(vae, 4)
    assert map.shape == (3, 5, 3, 3)
    assert preview.fitted(vae, 4) is map
    assert torch.equal(preview.fitted(again, 4), map)
    # The noise of a caller comes from elsewhere all the same.
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    gone = weakref.ref(vae)
    del vae
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_map_needs_no_wide_autoencoder_and_leaves_it_as_it_is(dtype: torch.dtype) -> None:
    exact = diffusers.AutoencoderTiny.from_pretrained(EMBEDDED / "vae")
    vae = diffusers.AutoencoderTiny.from_pretrained(EMBEDDED / "vae", torch_dtype=dtype)
    map, wanted = preview.fitted(vae, 4), preview.fitted(exact, 4)
    assert vae.dtype == dtype
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    both = [np.asarray(preview.draw(latents, each), np.float64) for each in (map, wanted)]
    assert distance(*both) < 3


# Each family's latents


def qwen_image() -> tuple[Any, dict[str, Any]]:
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 2.0, 0.5, 0.7],
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    mask = torch.ones(1, 5, dtype=torch.long)
    return pipeline, {"prompt_embeds": torch.ones(1, 5, 16), "prompt_embeds_mask": mask}


def flux_2() -> tuple[Any, dict[str, Any]]:
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    pipeline = diffusers.Flux2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    return pipeline, {"prompt_embeds": torch.ones(1, 5, 16)}


def with_statistics(folder: Path) -> Path:
    """As some of the family of Stable Diffusion XL are: latents with a mean and a deviation of their own."""
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(checkpoints.stable_diffusion_xl(folder))
    pipeline.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 0.7])
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "make",
    [
        checkpoints.stable_diffusion,
        checkpoints.stable_diffusion_xl,
        with_statistics,
        checkpoints.stable_diffusion_3,
        checkpoints.flux,
        checkpoints.pixart,
        qwen_image,
        flux_2,
    ],
)
def test_what_is_drawn_is_what_the_pipeline_decodes(make: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    if make in (qwen_image, flux_2):
        pipeline, call = make()
    else:
        pipeline, call = pipeline_of(make(tmp_path / "model")), {"prompt": "a red apple"}
    pipeline.set_progress_bar_config(disable=True)
    if make is checkpoints.pixart:
        call["use_resolution_binning"] = False
    stepped: list[Any] = []
    decoded: list[Any] = []
    step, decode = pipeline.scheduler.step, pipeline.vae.decode

    @functools.wraps(step)
    def record(*args: Any, **kwargs: Any) -> Any:
        stepped.append(step(*args, **kwargs))
        return stepped[-1]

    def see(latents: Any, *args: Any, **kwargs: Any) -> Any:
        decoded.append(latents)
        return decode(latents, *args, **kwargs)

    pipeline.scheduler.step, pipeline.vae.decode = record, see
    sent: list[schema.Preview] = []
    previews = preview.Previews("r", pipeline, (96, 64), (96, 64), sent.append)
    with previews.watch(pipeline, 0):
        pipeline(**call, width=96, height=64, num_inference_steps=2)
    wanted = decoded[0][:, :, 0] if decoded[0].dim() == 5 else decoded[0]
    unscaled = preview.unscale(pipeline.vae, stepped[-1][0], 96, 64, pipeline.vae_scale_factor)
    torch.testing.assert_close(unscaled, wanted)
    assert [(p.width, p.height, p.step) for p in sent][0] == (96, 64, 1)


# What a step predicts

# What needs a package that is not here is there as a stand-in, which is no scheduler.
SCHEDULERS = sorted(
    kind.__name__
    for kind in diffusers.DDIMScheduler._get_compatibles()
    if issubclass(kind, diffusers.SchedulerMixin)
)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_every_scheduler_tells_the_picture_it_is_heading_for(name: str, kind: str) -> None:
    check_prediction(scheduler_of(name, kind), kind)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_model_may_predict_the_picture_itself(name: str) -> None:
    check_prediction(scheduler_of(name, "sample"), "sample")


def scheduler_of(name: str, kind: str) -> Any:
    noise = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False).config
    scheduler = getattr(diffusers, name).from_config(noise, prediction_type=kind)
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@pytest.mark.parametrize("begin", [None, 0])
def test_flow_schedulers_do_too(scheduler: Any, begin: int | None) -> None:
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(10)
    if begin is not None:
        scheduler.set_begin_index(begin)
    check_prediction(scheduler, "flow")


def check_prediction(scheduler: Any, kind: str) -> None:
    """With a model that knows the picture every step tells it, and the steps lead there."""
    random = torch.Generator().manual_seed(0)
    truth, sample = (torch.randn(1, 4, 8, 8, generator=random) for _ in range(2))
    sample = sample * getattr(scheduler, "init_noise_sigma", 1.0)
    one, none = torch.ones(1), torch.zeros(1)
    for t in scheduler.timesteps:
        at = t.reshape(1)
        if hasattr(scheduler, "add_noise"):
            a, s = scheduler.add_noise(one, none, at), scheduler.add_noise(none, one, at)
        else:
            a, s = scheduler.scale_noise(one, at, none), scheduler.scale_noise(none, at, one)
        noise, size = (sample - a * truth) / s, (a**2 + s**2) ** 0.5
        outputs = {
            "epsilon": noise,
            "v_prediction": (a * noise - s * truth) / size,
            "sample": truth,
            "flow": noise - truth,
        }
        output = outputs[kind]
        if name := getattr(scheduler, "precondition_outputs", None):
            output = (truth - name(sample, 0.0, s)) / name(0.0, 1.0, s)
        torch.testing.assert_close(preview.predict(scheduler, output, t, sample), truth, atol=1e-3, rtol=1e-3)
        sample = scheduler.step(output, t, sample, return_dict=False)[0]
    assert (sample - truth).abs().mean() < 0.1


def test_of_a_scheduler_that_does_not_tell_its_sample_is_shown() -> None:
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(10)
    sample = torch.ones(1, 4, 8, 8)
    assert torch.equal(preview.predict(scheduler, sample * 2, scheduler.timesteps[0], sample), sample)


# Which steps are shown


@pytest.mark.parametrize(
    ("steps", "step_ms", "wanted"),
    [
        (1, 5, [1]),
        (4, 500, [1, 2, 3, 4]),
        (20, 500, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
        (25, 500, [3, 6, 9, 12, 15, 18, 21, 24]),
        (20, 30, [2, 6, 10, 14, 18]),
        (200, 3, [20, 54, 88, 122, 156, 190]),
    ],
)
def test_at_most_ten_are_shown_and_none_too_soon(steps: int, step_ms: int, wanted: list[int]) -> None:
    now = 0

    def clock() -> float:
        return now / 1000

    pace = preview.Pace(clock)
    shown = []
    for step in range(1, steps + 1):
        now += step_ms
        if pace.due(steps):
            shown.append(step)
    assert shown == wanted


# What goes out


def test_previews_over_the_port(ready: Callable[..., Sidecar]) -> None:
    sidecar = ready(**config())
    asked = {
        "t": "generate",
        "prompt": "a red apple",
        "reproducible": True,
        "steps": 40,
        "num_images": 2,
        "width": 128,
        "height": 64,
    }
    sidecar.send({**asked, "id": "shown", "preview": True, "seed": 1})
    said = sidecar.collect_until("done", "error", id="shown", timeout=180)
    kinds = [message["t"] for message in said]
    assert kinds[-1] == "done"
    assert kinds.index("image") > max(at for at, kind in enumerate(kinds) if kind == "preview")
    for index in (0, 1):
        previews = [m for m in said if m["t"] == "preview" and m["image"] == index]
        steps = [m["step"] for m in previews]
        assert 1 <= len(steps) <= 10
        assert steps == sorted(set(steps)) and steps[0] == 4
    for at, message in enumerate(said):
        if message["t"] == "preview":
            # Before the word of its own step, as the next that is said of its image.
            after = next(m for m in said[at + 1 :] if m.get("image") == message["image"])
            assert (after["t"], after["step"]) == ("progress", message["step"])
            assert (message["format"], message["width"], message["height"]) == ("jpeg", 128, 64)
            with Image.open(io.BytesIO(message["data"])) as image:
                assert (image.format, image.size) == ("JPEG", (128, 64))
    sidecar.send({**asked, "id": "hidden", "seed": 1})
    hidden = sidecar.collect_until("done", "error", id="hidden", timeout=180)
    assert {message["t"] for message in hidden} == {"accepted", "progress", "image", "done"}
    # To look on changes nothing.
    files = [[m["data"] for m in messages if m["t"] == "image"] for messages in (said, hidden)]
    assert files[0] == files[1]


def test_a_preview_has_the_shape_that_was_asked_for_and_is_small(tiny: Bench) -> None:
    id = tiny.submit(prompt="a red apple", seed=1, preview=True, width=512, height=128, steps=4)
    tiny.end(id)
    first = tiny.of(id, schema.Preview)[0]
    assert (first.width, first.height) == (256, 64)
    assert len(first.data) < 20_000


def test_what_starts_from_an_image_has_previews_too(tiny: Bench, hasty: None) -> None:
    red = io.BytesIO()
    Image.new("RGB", (64, 64), (222, 38, 38)).save(red, "PNG")
    id = tiny.submit(image=red.getvalue(), strength=0.5, preview=True, seed=1, steps=20)
    assert isinstance(tiny.end(id), schema.Done)
    assert [p.step for p in tiny.of(id, schema.Preview)] == [2, 4, 6, 8, 10]


def test_nothing_is_fitted_for_who_wants_no_preview(tmp_path: Path) -> None:
    models = [schema.ModelEntry(id="local/sd", path=str(checkpoints.stable_diffusion(tmp_path / "sd")))]
    bench = Bench(models=models, default_model="local/sd").start()
    known = len(preview._maps)
    bench.done(width=64, height=64, steps=2)
    assert len(preview._maps) == known
    bench.done(width=64, height=64, steps=2, preview=True)
    assert len(preview._maps) == known + 1


def test_a_failure_ends_the_previews_and_not_the_request(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = pipeline_of(EMBEDDED)
    call = {"prompt": "a red apple", "num_inference_steps": 4, "width": 64, "height": 64, "output_type": "pt"}
    wanted = pipeline(**call, generator=torch.Generator().manual_seed(1)).images
    pipeline.vae.encoder = None
    sent: list[schema.Preview] = []
    previews = preview.Previews("unlucky", pipeline, (64, 64), (64, 64), sent.append)
    with caplog.at_level(logging.ERROR):
        for index in (0, 1):
            with previews.watch(pipeline, index):
                made = pipeline(**call, generator=torch.Generator().manual_seed(1)).images
            assert torch.equal(made, wanted)
    assert not sent
    [record] = [r for r in caplog.records if r.name == "starweave_image.pictures.preview"]
    assert record.getMessage() == "request unlucky goes on without previews"
