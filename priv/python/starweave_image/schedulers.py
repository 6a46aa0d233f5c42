"""Names of schedulers, as people and other tools write them, and which of them can do a model's work."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from typing import Any

from .errors import ImageError

# So many can be made with every scheduler that can do any.
_PLENTY = 10
_MOST_STEPS = 200


def resolve(wanted: str | None, own: str | None, config: Mapping[str, Any], steps: int, model: str) -> str:
    """The class name of a scheduler, given its class name or short name; raises `invalid_request`.

    `own` is the model's and `config` what that is made with; where they are not known yet, what is wanted is only looked
    up once the model is here.
    """
    if own is None:
        return wanted or ""
    text = json.dumps(dict(config), default=str, sort_keys=True)
    name = own if wanted is None else _found(wanted, own, config, text, model)
    if not _works(name, text, steps):
        others = sorted(range(1, _MOST_STEPS + 1), key=lambda count: abs(count - steps))
        # None at all: it wants to be told more than this trial knows, by the pipeline that it belongs to.
        near = next((count for count in others if _works(name, text, count)), None)
        if near is not None:
            bound = f"at {'least' if near > steps else 'most'} {near}"
            raise ImageError("invalid_request", f"steps must be {bound} with {name}, got {steps}", "steps")
    return name


def _found(wanted: str, own: str, config: Mapping[str, Any], text: str, model: str) -> str:
    import diffusers

    # What lacks an optional package is there as a stand-in that is no scheduler.
    kinds = [
        kind
        for kind in getattr(diffusers, own)._get_compatibles()
        if issubclass(kind, diffusers.SchedulerMixin)
    ]
    if config.get("use_flow_sigmas"):
        # diffusers lists those too that know no flow.
        kinds = [kind for kind in kinds if "use_flow_sigmas" in inspect.signature(kind.__init__).parameters]
    names: list[str] = sorted({own, *(kind.__name__ for kind in kinds)})
    by_key = {key: name for name in names for key in _keys(name)}
    found = next((by_key[key] for key in _keys(wanted)[::-1] if key in by_key), None)
    if found is not None and (found == own or _works(found, text, _PLENTY)):
        return found
    names = [name for name in names if name == own or _works(name, text, _PLENTY)]
    raise ImageError(
        "invalid_request",
        f"scheduler must be one of {', '.join(names)} for {model}, got {wanted}",
        "scheduler",
    )


@functools.lru_cache(maxsize=1024)
def _works(name: str, config: str, steps: int) -> bool:
    """Whether it makes so many steps of a sample of a few numbers: diffusers lists as compatible, and only refuses at the
    first step, what cannot use the kind of prediction or the noise schedule that `config` names."""
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


def make(name: str, config: Any) -> Any:
    """A scheduler of this class with the noise schedule of another's `config`."""
    import diffusers

    kind = getattr(diffusers, name)
    try:
        return kind.from_config(config)
    except (NotImplementedError, ValueError):
        # A solver's variant goes by names that only some of the others know.
        return kind.from_config({key: value for key, value in config.items() if key != "algorithm_type"})


def _keys(name: str) -> list[str]:
    """The spellings under which a scheduler is found, the loosest first."""
    exact = name.lower().replace("_", "").removesuffix("scheduler")
    loose = exact.replace("discrete", "").replace("multistep", "")
    return [loose, exact]
