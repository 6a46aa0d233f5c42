"""Which schedulers may be asked for: those that draw with the model's kind of prediction, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import diffusers
import pytest
from starweave_image import schedulers
from starweave_image.errors import ImageError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LISTED = sorted(
    kind.__name__
    for kind in diffusers.DDIMScheduler._get_compatibles()
    if issubclass(kind, diffusers.SchedulerMixin)
)


@pytest.fixture(scope="module")
def pipeline(checkpoint: Callable[[Callable[[Path], Path]], Path]) -> Any:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint(checkpoints.stable_diffusion))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, scheduler: Any, steps: int) -> None:
    pipeline.scheduler = scheduler
    pipeline(
        "a cat", width=32, height=32, num_inference_steps=steps, guidance_scale=0.0, output_type="latent"
    )


@pytest.mark.parametrize(
    ("own", "config", "refused"),
    [
        (diffusers.DDIMScheduler, {"prediction_type": "epsilon"}, set()),
        (diffusers.DDIMScheduler, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, set()),
        (
            diffusers.EulerDiscreteScheduler,
            {"prediction_type": "sample"},
            {
                "EDMEulerScheduler",
                "EulerAncestralDiscreteScheduler",
                "KDPM2AncestralDiscreteScheduler",
                "KDPM2DiscreteScheduler",
                "PNDMScheduler",
            },
        ),
        (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, set()),
        (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}, set()),
        (diffusers.DEISMultistepScheduler, {}, set()),
        (diffusers.LCMScheduler, {}, set()),
        (diffusers.TCDScheduler, {}, set()),
    ],
)
def test_what_may_be_asked_for_draws_and_what_is_refused_could_not(
    pipeline: Any, own: Any, config: dict[str, Any], refused: set[str]
) -> None:
    made = dict(own(**(BETAS | config)).config)
    compatible = {kind.__name__ for kind in own._get_compatibles()} & set(LISTED) | {own.__name__}
    for name in sorted(compatible - refused):
        assert schedulers.resolve(name, own.__name__, made, 4, "m") == name
        draw(pipeline, schedulers.make(name, made), 4)
    for name in refused:
        with pytest.raises(ImageError) as error:
            schedulers.resolve(name, own.__name__, made, 4, "m")
        assert (error.value.kind, error.value.field) == ("invalid_request", "scheduler")
        offered = error.value.message.removeprefix("scheduler must be one of ").partition(" for ")[0]
        assert set(offered.split(", ")) == compatible - refused
        with pytest.raises((NotImplementedError, ValueError)):
            draw(pipeline, getattr(diffusers, name).from_config(made), 4)


@pytest.mark.parametrize(
    ("own", "steps", "message"),
    [
        (diffusers.LCMScheduler, 51, "steps must be at most 50 with LCMScheduler, got 51"),
        (diffusers.TCDScheduler, 200, "steps must be at most 50 with TCDScheduler, got 200"),
        (diffusers.PNDMScheduler, 2, "steps must be at least 4 with PNDMScheduler, got 2"),
    ],
)
def test_steps_that_a_scheduler_cannot_make_are_refused(
    pipeline: Any, own: Any, steps: int, message: str
) -> None:
    made = dict(own(**BETAS).config)
    with pytest.raises(ImageError) as error:
        schedulers.resolve(None, own.__name__, made, steps, "m")
    assert (error.value.field, error.value.message) == ("steps", message)
    with pytest.raises(ValueError):
        draw(pipeline, own.from_config(made), steps)


def test_a_scheduler_that_its_pipeline_tells_more_is_let_be() -> None:
    made = dict(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config)
    own = "FlowMatchEulerDiscreteScheduler"
    assert schedulers.resolve(None, own, made, 3, "m") == own
