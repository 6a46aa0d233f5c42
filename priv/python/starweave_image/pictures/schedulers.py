"""Names of schedulers, as people and other tools write them, and which of them can do a model's work.

A scheduler has one name here: its diffusers class, and behind it, in small letters, what sets it apart from others of
its class ("DPMSolverMultistepScheduler sde karras"). The record of a picture bears that name, and it may be asked for.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

from ..errors import ImageError

# Every usable scheduler can make this many steps.
_PLENTY = 10
_MOST_STEPS = 200

# The settings for the words after a class name.
_WORDS: dict[str, dict[str, Any]] = {
    "sde": {"algorithm_type": "sde-dpmsolver++"},
    "heun": {"solver_type": "heun"},
    "3m": {"solver_order": 3},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "trailing": {"timestep_spacing": "trailing"},
}
_SPACED_BY = ("karras", "exponential", "beta")
_PLAIN = {f"use_{word}_sigmas": False for word in _SPACED_BY}

# Other tools' words for how the steps are spread, which follow the sampler's name.
_SCHEDULES = {
    "karras": "karras",
    "ka": "karras",
    "k": "karras",
    "exponential": "exponential",
    "beta": "beta",
    "sgmuniform": "trailing",
    "sgm_uniform": "trailing",
    "simple": "trailing",
    "trailing": "trailing",
    "uniform": "plain",
    "normal": "plain",
    "plain": "plain",
    "automatic": "",
}

# What A1111 calls a scheduler, the one that stands for a name first, and further names: of A1111's aliases, ComfyUI,
# InvokeAI and the papers. Case, spaces and punctuation do not count, "a" is "ancestral", and "++" is "pp".
_SAMPLERS: list[tuple[str, str, list[str]]] = [
    ("EulerDiscreteScheduler", "Euler", []),
    ("EulerAncestralDiscreteScheduler", "Euler a", []),
    ("HeunDiscreteScheduler", "Heun", []),
    ("LMSDiscreteScheduler", "LMS", []),
    ("KDPM2DiscreteScheduler", "DPM2", ["kdpm2"]),
    ("KDPM2AncestralDiscreteScheduler", "DPM2 a", ["kdpm2 a"]),
    ("DPMSolverMultistepScheduler", "DPM++ 2M", ["DPM++", "DPM solver++", "DPM solver"]),
    ("DPMSolverMultistepScheduler sde", "DPM++ 2M SDE", []),
    ("DPMSolverMultistepScheduler sde heun", "DPM++ 2M SDE Heun", []),
    ("DPMSolverMultistepScheduler 3m", "DPM++ 3M", []),
    ("DPMSolverMultistepScheduler sde 3m", "DPM++ 3M SDE", []),
    ("DPMSolverSDEScheduler", "DPM++ SDE", []),
    ("DPMSolverSinglestepScheduler sde", "DPM++ SDE", []),
    ("DPMSolverSinglestepScheduler", "DPM++ 2S a", ["DPM++ 2S"]),
    ("UniPCMultistepScheduler", "UniPC", ["uni_pc_bh2"]),
    ("DDIMScheduler", "DDIM", []),
    ("DDPMScheduler", "DDPM", []),
    ("PNDMScheduler", "PLMS", []),
    ("IPNDMScheduler", "IPNDM", []),
    ("DEISMultistepScheduler", "DEIS", []),
    ("LCMScheduler", "LCM", []),
    ("TCDScheduler", "TCD", []),
    ("SASolverScheduler", "SA-Solver", []),
    ("EDMEulerScheduler", "Euler", []),
    ("EDMDPMSolverMultistepScheduler", "DPM++ 2M", []),
    ("FlowMatchEulerDiscreteScheduler", "Euler", []),
    ("FlowMatchHeunDiscreteScheduler", "Heun", []),
    ("FlowMatchLCMScheduler", "LCM", []),
]


def resolve(wanted: str | None, own: str | None, config: Mapping[str, Any], steps: int, model: str) -> str:
    """The name of a scheduler, given in any spelling; raises `invalid_request`.

    `own` is the model's class and `config` what that is made with; where they are not known yet, what is wanted is only
    looked up once the model is here.
    """
    if own is None:
        return wanted or ""
    text = json.dumps(dict(config), default=str, sort_keys=True)
    name = own if wanted is None else _found(wanted, own, config, text, model)
    if not _works(name, text, steps):
        others = sorted(range(1, _MOST_STEPS + 1), key=lambda count: abs(count - steps))
        # No number of steps works: its own pipeline gives it arguments that this trial does not know.
        near = next((count for count in others if _works(name, text, count)), None)
        if near is not None:
            bound = f"at {'least' if near > steps else 'most'} {near}"
            raise ImageError("invalid_request", f"steps must be {bound} with {name}, got {steps}", "steps")
    return name


def make(name: str, config: Any) -> Any:
    """A scheduler of this name with the noise schedule of another's `config`; raises `ValueError` for a name whose class
    has no such variant."""
    import diffusers

    kind, *words = name.split()
    takes = inspect.signature(getattr(diffusers, kind).__init__).parameters
    settings: dict[str, Any] = {}
    for word in words:
        if any(key not in takes for key in _WORDS.get(word, {})):
            raise ValueError(f"{kind} knows no {word}")
        # Only one way of spreading the steps can be set.
        plain = _PLAIN if word in _SPACED_BY or word == "plain" else {}
        settings |= {key: value for key, value in plain.items() if key in takes} | _WORDS.get(word, {})
    try:
        return getattr(diffusers, kind).from_config(config, **settings)
    except (NotImplementedError, ValueError):
        # Not every solver has this variant.
        config = {key: value for key, value in config.items() if key != "algorithm_type"}
        return getattr(diffusers, kind).from_config(config, **settings)


def name_of(name: str, scheduler: Any) -> str:
    """The full name of a scheduler that was made by `name`, with the settings of the model's own configuration."""
    kind, *words = name.split()
    takes = inspect.signature(type(scheduler).__init__).parameters
    variants = {word for known, _, _ in _SAMPLERS if known.split()[0] == kind for word in known.split()[1:]}
    own = [
        word
        for word, settings in _WORDS.items()
        if word in variants.union(_SPACED_BY)
        and all(key in takes and scheduler.config.get(key) == value for key, value in settings.items())
    ]
    return " ".join([kind, *own, *(word for word in words if word not in own)])


def label(name: str) -> tuple[str, str]:
    """A1111's names of the scheduler of this name, a picture's `scheduler`: its sampler and its schedule type, such as
    ("DPM++ 2M SDE", "Karras")."""
    kind, *words = name.split()
    bare = " ".join([kind, *(word for word in words if word in ("sde", "heun", "3m"))])
    sampler = next((label for known, label, _ in _SAMPLERS if known == bare), kind.removesuffix("Scheduler"))
    spread = next((word for word in words if word in _SPACED_BY), None)
    if spread is None and "trailing" in words:
        return sampler, "SGM Uniform"
    # For these, A1111's "Automatic" is another schedule.
    return sampler, spread.capitalize() if spread else "Uniform" if sampler.startswith("DPM") else "Automatic"


def _found(wanted: str, own: str, config: Mapping[str, Any], text: str, model: str) -> str:
    import diffusers

    # A class whose optional package is missing is a dummy that is no scheduler.
    kinds = [
        kind
        for kind in getattr(diffusers, own)._get_compatibles()
        if issubclass(kind, diffusers.SchedulerMixin)
    ]
    if config.get("use_flow_sigmas"):
        # diffusers also lists schedulers that cannot predict a flow.
        kinds = [kind for kind in kinds if "use_flow_sigmas" in inspect.signature(kind.__init__).parameters]
    names = sorted({own, *(kind.__name__ for kind in kinds)})
    for name in _meant(wanted, own, names):
        if name == own or _works(name, text, _PLENTY):
            return name
    labels = [
        next((label for known, label, _ in _SAMPLERS if known == name), name)
        for name in _named(names)
        if name == own or _works(name, text, _PLENTY)
    ]
    raise ImageError(
        "invalid_request",
        f"scheduler must be one of {', '.join(sorted(set(labels)))}, or its diffusers class, for {model}; most may be "
        f"followed by Karras, Exponential, Beta, SGM Uniform or Normal; got {wanted}",
        "scheduler",
    )


def _named(kinds: list[str]) -> list[str]:
    """All names that other tools have for these classes; for a class without one, its own."""
    known = [name for name, _, _ in _SAMPLERS if name.split()[0] in kinds]
    return known + [kind for kind in kinds if kind not in known]


def _meant(wanted: str, own: str, kinds: list[str]) -> list[str]:
    """The names, of these classes, that a spelling may stand for, the likeliest first: the model's own among equals."""
    names = [name for name, _, _ in _SAMPLERS] + kinds
    spellings = {name: _keys(name) for name in names}
    for name, label, others in _SAMPLERS:
        spellings[name] += ["".join(_split(text)) for text in (label, *others)]
    spread, bare = _schedule(_split(wanted))
    meant = []
    for words, further in ((_split(wanted), ""), (bare, spread)):
        for key in ("".join(words), "".join(words[1:]) if words[:1] == ["k"] else None):
            found = [name for name in names if key in spellings[name] and name.split()[0] in kinds]
            meant += [f"{name} {further}".strip() for name in sorted(found, key=lambda name: name != own)]
    return meant


def _split(text: str) -> list[str]:
    """A spelling's words: "DPM++ 2M Karras" and "dpmpp_2m_karras" give dpmpp, 2m, karras."""
    words = re.findall(r"[a-z0-9]+", text.lower().replace("++", "pp"))
    return ["a" if word == "ancestral" else word for word in words if word != "gpu"]


def _schedule(words: list[str]) -> tuple[str, list[str]]:
    """The word for the schedule with which the words end, if any, and the words before it."""
    for count in (2, 1):
        said = "_".join(words[-count:])
        if len(words) > count and said in _SCHEDULES:
            return _SCHEDULES[said], words[:-count]
    return "", words


def _keys(name: str) -> list[str]:
    """The spellings under which a name is found by its class: whole, and as people shorten it."""
    exact = name.lower().replace(" ", "").replace("scheduler", "")
    return [exact, exact.replace("discrete", "").replace("multistep", ""), name.lower().replace(" ", "")]


@functools.lru_cache(maxsize=1024)
def _works(name: str, config: str, steps: int) -> bool:
    """Whether it can make this many steps, tried on a sample of a few numbers. diffusers lists schedulers as compatible that
    cannot use the prediction type or noise schedule in `config`, and refuses them only at the first step."""
    import torch

    try:
        scheduler = make(name, json.loads(config))
        scheduler.set_timesteps(steps)
        sample = torch.ones(1, 4, 8, 8, dtype=torch.float32)
        takes = inspect.signature(scheduler.step).parameters
        noise = {"generator": torch.Generator().manual_seed(0)} if "generator" in takes else {}
        for timestep in scheduler.timesteps:
            sample = scheduler.step(sample, timestep, sample, return_dict=False, **noise)[0]
    except Exception:
        return False
    return True
