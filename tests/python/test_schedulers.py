"""Which schedulers may be asked for: those that draw with the model's kind of prediction, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import diffusers
import pytest
from starweave_image.errors import ImageError
from starweave_image.pictures import schedulers

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
        offered = error.value.message.removeprefix("scheduler must be one of ").partition(", or its")[0]
        found = {
            schedulers.resolve(label, own.__name__, made, 4, "m").split()[0] for label in offered.split(", ")
        }
        assert found <= compatible - refused
        assert {schedulers.label(name)[0] for name in compatible - refused} <= set(offered.split(", "))
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


KARRAS, SDE = "DPMSolverMultistepScheduler karras", "DPMSolverMultistepScheduler sde"


@pytest.mark.parametrize(
    ("name", "label", "spellings"),
    [
        ("EulerDiscreteScheduler", ("Euler", "Automatic"), "Euler, euler, k_euler, EULER, EulerDiscrete"),
        (
            "EulerAncestralDiscreteScheduler",
            ("Euler a", "Automatic"),
            "Euler a, euler a, Euler Ancestral, euler_ancestral, k_euler_a, k_euler_ancestral, euler-a, Euler A",
        ),
        ("EulerDiscreteScheduler karras", ("Euler", "Karras"), "Euler Karras, euler_k, euler_karras"),
        ("EulerDiscreteScheduler trailing", ("Euler", "SGM Uniform"), "Euler SGM Uniform, euler_sgm_uniform"),
        ("DPMSolverMultistepScheduler", ("DPM++ 2M", "Uniform"), "DPM++ 2M, dpmpp_2m, dpm ++ 2m, k_dpmpp_2m"),
        (
            KARRAS,
            ("DPM++ 2M", "Karras"),
            f"DPM++ 2M Karras, dpmpp_2m_karras, dpmpp_2m_k, k_dpmpp_2m_ka, DPM++2M Karras, {KARRAS}",
        ),
        (SDE, ("DPM++ 2M SDE", "Uniform"), f"DPM++ 2M SDE, dpmpp_2m_sde, dpmpp_2m_sde_gpu, {SDE}"),
        (f"{SDE} karras", ("DPM++ 2M SDE", "Karras"), "DPM++ 2M SDE Karras, dpmpp_2m_sde_k"),
        (f"{SDE} 3m exponential", ("DPM++ 3M SDE", "Exponential"), "DPM++ 3M SDE Exponential"),
        ("DPMSolverSinglestepScheduler sde karras", ("DPM++ SDE", "Karras"), "DPM++ SDE Karras, dpmpp_sde_k"),
        (
            "DPMSolverSinglestepScheduler",
            ("DPM++ 2S a", "Uniform"),
            "DPM++ 2S a, dpmpp_2s, dpmpp_2s_ancestral",
        ),
        ("KDPM2DiscreteScheduler", ("DPM2", "Uniform"), "DPM2, dpm_2, k_dpm_2, kdpm_2"),
        ("KDPM2AncestralDiscreteScheduler", ("DPM2 a", "Uniform"), "DPM2 a, dpm_2_ancestral, kdpm_2_a"),
        ("HeunDiscreteScheduler karras", ("Heun", "Karras"), "Heun Karras, heun_k"),
        ("UniPCMultistepScheduler", ("UniPC", "Automatic"), "UniPC, uni_pc, unipc, uni_pc_bh2, Uni-PC"),
        ("DDIMScheduler", ("DDIM", "Automatic"), "DDIM, ddim, DDIMScheduler, ddim scheduler"),
        ("PNDMScheduler", ("PLMS", "Automatic"), "PLMS, plms, pndm, PNDM"),
        ("DEISMultistepScheduler", ("DEIS", "Automatic"), "DEIS, deis, deis_multistep"),
    ],
)
def test_every_spelling_of_a_sampler_is_one_name_that_other_tools_know(
    name: str, label: tuple[str, str], spellings: str
) -> None:
    made = dict(diffusers.DDIMScheduler(**BETAS).config)
    for spelling in spellings.split(", "):
        assert schedulers.resolve(spelling, "DDIMScheduler", made, 12, "m") == name, spelling
    assert schedulers.label(name) == label
    # The name of a picture's record is one that gives the same scheduler again.
    scheduler = schedulers.make(name, made)
    assert schedulers.name_of(name, scheduler) == name
    assert schedulers.resolve(name, "DDIMScheduler", made, 12, "m") == name


def test_what_sets_a_variant_apart_reaches_its_scheduler() -> None:
    made = dict(diffusers.EulerDiscreteScheduler(**BETAS, use_exponential_sigmas=True).config)
    sde = schedulers.make(f"{SDE} 3m karras", made).config
    assert (sde.algorithm_type, sde.solver_order) == ("sde-dpmsolver++", 3)
    assert (sde.use_karras_sigmas, sde.use_exponential_sigmas) == (True, False)
    plain = schedulers.resolve("Euler Normal", "EulerDiscreteScheduler", made, 12, "m")
    assert not schedulers.make(plain, made).config.use_exponential_sigmas
    # What nobody asked for and the model brings is told all the same.
    own = schedulers.make("EulerDiscreteScheduler", made)
    assert schedulers.name_of("EulerDiscreteScheduler", own) == "EulerDiscreteScheduler exponential"


def test_a_flow_model_takes_the_names_that_people_use_for_its_own_scheduler() -> None:
    own = "FlowMatchEulerDiscreteScheduler"
    made = dict(diffusers.FlowMatchEulerDiscreteScheduler().config)
    for spelling in ("euler", "Euler", "flow_match_euler", own):
        assert schedulers.resolve(spelling, own, made, 4, "m") == own
    assert schedulers.label(own) == ("Euler", "Automatic")


@pytest.mark.parametrize("wanted", ["DDIM Karras", "PLMS Exponential", "Karras", "euler b", "k", "++", "()"])
def test_what_no_scheduler_is_called_is_refused_with_what_is_known(wanted: str) -> None:
    made = dict(diffusers.DDIMScheduler(**BETAS).config)
    with pytest.raises(ImageError) as error:
        schedulers.resolve(wanted, "DDIMScheduler", made, 12, "m")
    assert (error.value.kind, error.value.field) == ("invalid_request", "scheduler")
    for known in ("DPM++ 2M SDE", "Euler a", "UniPC", "Karras"):
        assert known in error.value.message
    assert error.value.message.endswith(f"got {wanted}")
