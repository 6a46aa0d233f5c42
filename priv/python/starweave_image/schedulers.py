"""Names of schedulers, as people and other tools write them."""

from __future__ import annotations

from typing import Any

from .errors import ImageError


def resolve(wanted: str | None, own: str | None, model: str) -> str:
    """The class name of a scheduler, given its class name or short name; raises `invalid_request`.

    `own` is the model's; where it is not known yet, what is wanted is only looked up once the model is here.
    """
    import diffusers

    if wanted is None or own is None:
        return wanted or own or ""
    # What lacks an optional package is there as a stand-in that is no scheduler.
    kinds = getattr(diffusers, own)._get_compatibles()
    names: set[str] = {kind.__name__ for kind in kinds if issubclass(kind, diffusers.SchedulerMixin)}
    by_key = {key: name for name in sorted(names) for key in _keys(name)}
    for key in _keys(wanted)[::-1]:
        if key in by_key:
            return by_key[key]
    allowed = ", ".join(sorted(names))
    raise ImageError(
        "invalid_request", f"scheduler must be one of {allowed} for {model}, got {wanted}", "scheduler"
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
