"""Names of schedulers, as people and other tools write them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from .errors import ImageError


def resolve(wanted: str | None, own: str | None, config: Mapping[str, Any], steps: int, model: str) -> str:
    """The class name of a scheduler, given its class name or short name; raises `invalid_request`.

    `own` is the model's and `config` what that is made with; where they are not known yet, what is wanted is only looked
    up once the model is here.
    """
    if own is None:
        return wanted or ""
    name = own if wanted is None else _found(wanted, own, config, model)
    # It begins with three steps of another kind, unless it is told to leave them out.
    if name == "PNDMScheduler" and steps < 4 and not config.get("skip_prk_steps"):
        raise ImageError("invalid_request", f"steps must be at least 4 with {name}, got {steps}", "steps")
    return name


def _found(wanted: str, own: str, config: Mapping[str, Any], model: str) -> str:
    import diffusers

    # What lacks an optional package is there as a stand-in that is no scheduler.
    kinds = [
        kind
        for kind in getattr(diffusers, own)._get_compatibles()
        if issubclass(kind, diffusers.SchedulerMixin)
    ]
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        # diffusers lists those too that know no flow, and their first step fails.
        kinds = [kind for kind in kinds if "use_flow_sigmas" in inspect.signature(kind.__init__).parameters]
    names: list[str] = sorted({own, *(kind.__name__ for kind in kinds)})
    by_key = {key: name for name in names for key in _keys(name)}
    for key in _keys(wanted)[::-1]:
        if key in by_key:
            return by_key[key]
    raise ImageError(
        "invalid_request",
        f"scheduler must be one of {', '.join(names)} for {model}, got {wanted}",
        "scheduler",
    )


def make(name: str, config: Any) -> Any:
    """A scheduler of this class with the noise schedule of another's `config`."""
    import diffusers

    return getattr(diffusers, name).from_config(config)


def _keys(name: str) -> list[str]:
    """The spellings under which a scheduler is found, the loosest first."""
    exact = name.lower().replace("_", "").removesuffix("scheduler")
    loose = exact.replace("discrete", "").replace("multistep", "")
    return [loose, exact]
