"""Pictures of each family in company: they share the passes of their network, and each is the one that is drawn alone."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import diffusers
import numpy as np
import pytest
import torch
from engines import PATIENCE_S, Bench, difference, picture_of
from PIL import Image
from starweave_image import schema
from starweave_image.device import stacking
from starweave_image.weights import find as weights
from starweave_image.weights import load as loading

pytestmark = pytest.mark.slow

Make = Callable[[Path], Path]


@dataclass(frozen=True)
class Family:
    make: Make
    from_images: bool = True
    guided_by: str = "guidance_scale"
    contrasted: bool = True


FAMILIES = {
    "sd": Family(checkpoints.stable_diffusion),
    "sd2": Family(checkpoints.stable_diffusion_2),
    "sdxl": Family(checkpoints.stable_diffusion_xl),
    "sd3": Family(checkpoints.stable_diffusion_3),
    "flux": Family(functools.partial(checkpoints.flux, guided=True), contrasted=False),
    "flux-2-klein": Family(checkpoints.flux_2_klein, from_images=False, contrasted=False),
    "z-image": Family(checkpoints.z_image),
    "qwen-image": Family(checkpoints.qwen_image, guided_by="true_cfg_scale"),
    "pixart": Family(checkpoints.pixart, from_images=False),
    "sana": Family(checkpoints.sana, from_images=False),
}
LONG = "a red dog on the tree in the green sky of the blue night, the apple of the cat"
# Of both kinds of each task: with guidance and without, with few words and with many.
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("text", {"prompt": "a cat", "steps": 4, "seed": 1, "guidance_scale": 3.0}),
    ("text", {"prompt": "a red apple on the tree", "steps": 3, "guidance_scale": 0.0, "num_images": 2}),
    (
        "text",
        {"prompt": LONG, "negative_prompt": "the night on the tree", "steps": 2, "guidance_scale": 6.0},
    ),
    ("image", {"prompt": "the sky", "steps": 4, "guidance_scale": 2.0}),
    ("image", {"prompt": LONG, "steps": 3, "guidance_scale": 0.0}),
    ("inpaint", {"prompt": "a dog", "negative_prompt": LONG, "steps": 2, "guidance_scale": 4.0}),
    ("inpaint", {"prompt": LONG, "steps": 3, "seed": 4, "guidance_scale": 0.0}),
]


def file(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


IMAGE = Image.frombytes("RGB", (64, 64), bytes(i * 97 % 256 for i in range(64 * 64 * 3)))
MASK = Image.new("L", (64, 64), 0)
MASK.paste(255, (32, 0, 64, 64))
TASKS: dict[str, dict[str, Any]] = {
    "text": {},
    "image": {"image": file(IMAGE), "strength": 0.6},
    "inpaint": {"image": file(IMAGE), "mask": file(MASK), "strength": 1.0},
}


class Passes:
    """The rows of each pass that the networks of the loaded pipelines make."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self._barrier: threading.Barrier | None = None
        self._met: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    @contextmanager
    def meeting(self, pictures: int) -> Iterator[None]:
        """Meanwhile none of so many pictures begins to denoise before all do."""
        self._barrier = threading.Barrier(pictures)
        yield
        self._barrier = None

    def taken(self) -> list[int]:
        rows, self.rows = self.rows, []
        return rows

    def watch(self, pipeline: Any) -> Any:
        network = getattr(pipeline, "unet", None) or pipeline.transformer

        def called(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is network:
                names = ("sample", "hidden_states", "x")
                sample = args[0] if args else next(kwargs[name] for name in names if name in kwargs)
                self.rows.append(len(sample))
            elif self._barrier and threading.current_thread() not in self._met:
                # The copy that a picture's own thread calls, before it asks for the device.
                self._met.add(threading.current_thread())
                self._barrier.wait(PATIENCE_S)

        network.register_forward_pre_hook(called, with_kwargs=True)
        return pipeline


class Company:
    """An engine with one model, and what passes through its network."""

    def __init__(self, folder: Path, passes: Passes) -> None:
        self.folder = folder
        self.passes = passes
        models = [schema.ModelEntry(id="local/model", path=str(folder))]
        self.bench = Bench(models=models, default_model="local/model", dtype="float32", capacity=64).start()

    def alone(self, requests: list[dict[str, Any]]) -> tuple[list[list[bytes]], list[int]]:
        self.passes.taken()
        return [self.bench.done(**fields)[1] for fields in requests], self.passes.taken()

    def together(self, requests: list[dict[str, Any]]) -> tuple[list[list[bytes]], list[int]]:
        self.passes.taken()
        with self.passes.meeting(sum(fields.get("num_images", 1) for fields in requests)):
            ids = [self.bench.submit(**fields) for fields in requests]
            for id in ids:
                assert isinstance(end := self.bench.end(id), schema.Done), end
        return [self.bench.files(id) for id in ids], self.passes.taken()


@pytest.fixture(scope="module")
def company_of(
    checkpoint: Callable[[Make], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Make], Company]]:
    """Gives the company of a checkpoint, begun once."""
    watched: dict[Path, Passes] = {}
    load = loading.load_pipeline

    def loaded(source: weights.Source, *rest: Any) -> Any:
        return watched[source.folder].watch(load(source, *rest))

    @functools.cache
    def company(make: Make) -> Company:
        folder = checkpoint(make)
        return Company(folder, watched.setdefault(folder, Passes()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARWEAVE_IMAGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("starweave_image.engine.models.load_pipeline", loaded)
        yield company


@functools.cache
def stock(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain(pipeline: Any, family: Family, task: str, fields: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """What the stock pipeline draws when it is called without any of our code."""
    arguments: dict[str, Any] = {
        "prompt": fields["prompt"],
        "num_inference_steps": fields["steps"],
        family.guided_by: fields["guidance_scale"],
    }
    if fields["guidance_scale"] > 1:
        if fields.get("negative_prompt"):
            arguments["negative_prompt"] = fields["negative_prompt"]
        elif family.guided_by == "true_cfg_scale":
            # Without one there is no guidance.
            arguments["negative_prompt"] = " "
    if task == "image":
        pipeline = diffusers.AutoPipelineForImage2Image.from_pipe(pipeline)
        arguments |= {"image": IMAGE, "strength": fields["strength"]}
    elif task == "inpaint":
        pipeline = diffusers.AutoPipelineForInpainting.from_pipe(pipeline)
        arguments |= {"image": IMAGE, "mask_image": MASK, "strength": fields["strength"]}
    takes = inspect.signature(pipeline.__call__).parameters
    sized = {"width": 64, "height": 64, "use_resolution_binning": False}
    arguments |= {name: value for name, value in sized.items() if name in takes}
    pictures = []
    for index in range(fields.get("num_images", 1)):
        generator = torch.Generator("cpu").manual_seed(fields["seed"] + index)
        picture = pipeline(**arguments, generator=generator).images[0]
        if task == "inpaint":
            picture = Image.composite(picture, IMAGE, MASK)
        pictures.append(np.asarray(picture, np.int16))
    return pictures


@pytest.mark.parametrize("name", FAMILIES)
def test_a_picture_in_company_is_the_one_drawn_alone(
    company_of: Callable[[Make], Company], name: str
) -> None:
    family = FAMILIES[name]
    company = company_of(family.make)
    chosen = [(task, fields) for task, fields in REQUESTS if task == "text" or family.from_images]
    requests = [{"width": 64, "height": 64, "seed": 7} | fields | TASKS[task] for task, fields in chosen]
    if not family.contrasted:
        requests = [fields | {"negative_prompt": ""} for fields in requests]
    exact = [fields | {"reproducible": True} for fields in requests]
    alone, one_by_one = company.alone(exact)
    drawn, shared = company.together([*requests, *exact])
    # All rows were computed, and in fewer passes than one for each call of each picture.
    assert sum(shared) == 2 * sum(one_by_one)
    assert len(shared) < 2 * len(one_by_one) and max(shared) > max(one_by_one)
    worst = [difference(some, others) for some, others in zip(drawn[: len(alone)], alone, strict=True)]
    assert max(worst) <= 1, worst
    assert drawn[len(alone) :] == alone
    for (task, _), fields, files in zip(chosen, requests, alone, strict=True):
        theirs = plain(stock(company.folder), family, task, fields)
        for data, picture in zip(files, theirs, strict=True):
            assert np.array_equal(picture_of(data), picture), (task, fields["prompt"])
    # Else nothing here would tell a picture of the wrong words from that of the right ones.
    other = company.bench.done(**(requests[0] | {"prompt": LONG}))[1]
    assert difference(other, alone[0]) > 4


def listed(own: type[Any]) -> list[str]:
    kinds = own._get_compatibles()  # type: ignore[attr-defined]
    return sorted(kind.__name__ for kind in kinds if issubclass(kind, diffusers.SchedulerMixin))


FLOWS = [
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
]


@pytest.mark.parametrize(
    ("name", "schedulers"), [("sd", listed(diffusers.DDIMScheduler)), ("sana", FLOWS)], ids=["sd", "sana"]
)
def test_every_scheduler_draws_in_company_what_it_draws_alone(
    company_of: Callable[[Make], Company], name: str, schedulers: list[str]
) -> None:
    company = company_of(FAMILIES[name].make)
    # All from one seed: noise that one drew from the generator of another would show.
    fields = {"prompt": "a cat", "seed": 5, "steps": 4, "guidance_scale": 0.0, "width": 64, "height": 64}
    requests = [fields | {"scheduler": scheduler} for scheduler in schedulers]
    exact = [fields | {"reproducible": True} for fields in requests]
    alone, one_by_one = company.alone(exact)
    drawn, shared = company.together([*requests, *exact])
    assert sum(shared) == 2 * sum(one_by_one) and len(shared) < 2 * len(one_by_one)
    worst = [difference(some, others) for some, others in zip(drawn[: len(alone)], alone, strict=True)]
    assert max(worst) <= 1, dict(zip(schedulers, worst, strict=True))
    assert drawn[len(alone) :] == alone
    assert len({data for files in alone for data in files}) == len(schedulers)
    for scheduler, [data] in zip(schedulers, alone, strict=True):
        pipeline = copy.copy(stock(company.folder))
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
        [theirs] = plain(pipeline, FAMILIES[name], "text", fields)
        assert np.array_equal(picture_of(data), theirs), scheduler


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "sana",
            {"scheduler": name},
            "scheduler must be one of DEIS, DPM++ 2M, DPM++ 2M SDE, DPM++ 2M SDE Heun, DPM++ 2S a, DPM++ 3M, DPM++ 3M SDE, "
            "DPM++ SDE, UniPC, or its diffusers class, for local/model; most may be followed by Karras, Exponential, Beta, "
            f"SGM Uniform or Normal; got {name}",
        )
        for name in listed(diffusers.DDIMScheduler)
        if name not in FLOWS
    ]
    + [
        (
            "sd3",
            {"scheduler": "ddim"},
            "scheduler must be one of Euler, or its diffusers class, for local/model; most may be followed by Karras, "
            "Exponential, Beta, SGM Uniform or Normal; got ddim",
        ),
        ("sd", {"scheduler": "pndm", "steps": 3}, "steps must be at least 4 with PNDMScheduler, got 3"),
    ],
)
def test_a_scheduler_that_could_not_make_a_step_is_refused_before_any_work(
    company_of: Callable[[Make], Company], name: str, fields: dict[str, Any], message: str
) -> None:
    bench = company_of(FAMILIES[name].make).bench
    id = bench.submit(**({"width": 64, "height": 64, "steps": 4} | fields))
    refused = bench.end(id)
    assert isinstance(refused, schema.Failed)
    assert (refused.kind, refused.field) == ("invalid_request", message.split()[0])
    assert refused.message == message
    assert bench.of(id) == [refused]


def stochastic(folder: Path) -> Path:
    """Its scheduler draws noise at each step, and its pipeline does not pass the generator on."""
    checkpoints.z_image(folder)
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"stochastic_sampling": True}))
    return folder


def test_noise_of_a_step_comes_from_the_seed_of_its_own_picture(
    company_of: Callable[[Make], Company],
) -> None:
    company = company_of(stochastic)
    fields = {"prompt": "a cat", "steps": 3, "guidance_scale": 0.0, "width": 64, "height": 64}
    requests = [fields | {"seed": seed} for seed in (1, 1, 2)]
    alone, _ = company.alone(requests)
    assert alone[0] == alone[1] != alone[2]
    drawn, _ = company.together(requests)
    assert max(difference(some, others) for some, others in zip(drawn, alone, strict=True)) <= 1


@pytest.mark.parametrize(
    ("guidance_scale", "used", "notices"),
    [
        (3.0, True, []),
        (0.5, True, []),
        (0.0, False, ["negative_prompt has no effect at a guidance_scale of 0."]),
    ],
)
def test_z_image_heeds_a_negative_prompt_at_any_guidance(
    company_of: Callable[[Make], Company], guidance_scale: float, used: bool, notices: list[str]
) -> None:
    bench = company_of(checkpoints.z_image).bench
    fields = {"prompt": "a cat", "steps": 3, "seed": 1, "guidance_scale": guidance_scale}
    without = bench.done(width=64, height=64, **fields)[1]
    done, against = bench.done(width=64, height=64, negative_prompt=LONG, **fields)
    assert (difference(without, against) > 1) == used
    assert done.notices == notices


@pytest.mark.parametrize(
    ("make", "heeded"),
    [(family.make, True) for family in FAMILIES.values()]
    + [(checkpoints.flux, False), (functools.partial(checkpoints.flux_2_klein, distilled=True), False)],
)
def test_guidance_that_was_asked_for_and_has_no_effect_is_told(
    company_of: Callable[[Make], Company], make: Make, heeded: bool
) -> None:
    bench = company_of(make).bench
    fields = {"prompt": LONG, "steps": 2, "seed": 1, "width": 64, "height": 64, "reproducible": True}
    weak, strong = (bench.done(guidance_scale=scale, **fields) for scale in (2.0, 9.0))
    assert (difference(weak[1], strong[1]) > 0) == heeded
    notices = [] if heeded else ["guidance_scale has no effect on this model."]
    assert [notice for notice in strong[0].notices if "guidance" in notice] == notices
    assert not any("guidance" in notice for notice in bench.done(**fields)[0].notices)


@pytest.mark.parametrize(
    ("name", "scheduler"), [*((name, None) for name in FAMILIES), ("sd", "euler_ancestral")]
)
def test_a_variation_lies_between_the_pictures_of_two_seeds(
    company_of: Callable[[Make], Company], name: str, scheduler: str | None
) -> None:
    bench = company_of(FAMILIES[name].make).bench
    fields: dict[str, Any] = {"prompt": "a cat", "steps": 2, "guidance_scale": 0.0, "width": 64, "height": 64}
    fields |= {"scheduler": scheduler, "reproducible": True, "metadata": False}

    def drawn(**seeds: Any) -> list[bytes]:
        return bench.done(**fields, **seeds)[1]

    plain = drawn(seed=7, num_images=3)
    assert drawn(seed=7, num_images=3, variation_strength=0.0) == plain[:1] * 3
    assert drawn(seed=7, num_images=3, variation_strength=1.0) == plain
    varied = drawn(seed=7, num_images=3, variation_strength=0.4)
    assert varied[0] == plain[0] and len({*plain, *varied}) == 5
    # Each alone, by what the first request tells of it.
    assert drawn(seed=7, variation_seed=9, variation_strength=0.4) == varied[2:]


def together(network: Any, run: Callable[..., Any], calls: list[dict[str, Any]]) -> list[torch.Tensor]:
    """What each of the calls gets from one pass of all."""
    stacked = [stacking.read(type(network).__name__, run, (), call) for call in calls]
    read = [call for call in stacked if call is not None]
    assert len(read) == len(calls) and len({call.key for call in read}) == 1
    result = run(**stacking.stack(read))[0]
    return stacking.split(result, [call.rows for call in read])


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qwen_call(length: int, seed: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, 16, 16, seed=seed),
        "encoder_hidden_states": noise(1, length, 16, seed=seed + 100),
        "encoder_hidden_states_mask": None,
        "timestep": torch.tensor([0.1 * seed]),
        "img_shapes": [[(1, 4, 4)]],
        "return_dict": False,
    }


def z_image_call(length: int, seed: int) -> dict[str, Any]:
    """With guidance: the caption, and a short one against it."""
    return {
        "x": [noise(16, 1, 8, 8, seed=seed)] * 2,
        "t": torch.tensor([0.1 * seed] * 2),
        "cap_feats": [noise(length, 16, seed=seed + 100), noise(5, 16, seed=seed + 200)],
        "return_dict": False,
    }


@pytest.mark.parametrize(
    ("make", "call"), [(checkpoints.qwen_image, qwen_call), (checkpoints.z_image, z_image_call)]
)
@torch.no_grad()
def test_what_fills_up_shorter_captions_leaves_no_trace(
    checkpoint: Callable[[Make], Path], make: Make, call: Callable[[int, int], dict[str, Any]]
) -> None:
    transformer = stock(checkpoint(make)).transformer
    calls = [call(length, seed) for length, seed in ((64, 1), (33, 2), (50, 3), (64, 4))]
    for ours, fields in zip(together(transformer, transformer.forward, calls), calls, strict=True):
        for some, other in zip(ours, transformer(**fields)[0], strict=True):
            torch.testing.assert_close(some, other, atol=1e-5, rtol=1e-4)
    # Captions of another size class would cost the shorter ones more than they gain.
    kind = type(transformer).__name__
    keys = {stacking.read(kind, transformer.forward, (), call(length, 1)).key for length in (32, 33, 64, 65)}
    assert len(keys) == 3
