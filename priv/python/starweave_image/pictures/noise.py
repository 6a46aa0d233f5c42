"""The way from one seed's picture to another's: the noise of one turned towards that of the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Between(TorchFunctionMode):
    """Within, and in this thread alone, what is drawn from `base` is turned towards what `other` gives, by `fraction`: at 0
    it is what `base` gives alone, at 1 what `other` does.

    So it is with every draw of every pipeline and scheduler, the noise of a step included, whatever their latents look
    like; none of them has to know.
    """

    def __init__(self, base: torch.Generator, other: torch.Generator, fraction: float) -> None:
        super().__init__()
        self._base = base
        self._other = other
        self._fraction = fraction

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        drawn = func(*args, **kwargs)
        if kwargs.get("generator") is not self._base:
            return drawn
        return slerp(drawn, func(*args, **(kwargs | {"generator": self._other})), self._fraction)


def slerp(a: torch.Tensor, b: torch.Tensor, fraction: float) -> torch.Tensor:
    """Spherical linear interpolation from `a` (0) to `b` (1) along the arc between them (Shoemake, SIGGRAPH 1985).

    Noise has its length in common, and what lies on the straight line between two is shorter: less noise than a network
    expects, and a picture without detail.
    """
    one, two = a.double().flatten(), b.double().flatten()
    cosine = torch.dot(one, two) / (one.norm() * two.norm())
    angle = torch.arccos(cosine.clamp(-1.0, 1.0))
    if angle.sin() < 1e-5:
        # Equal noises, or opposite ones, between which no arc is the shortest.
        return a if fraction < 1 else b
    weights = ((1 - fraction) * angle).sin() / angle.sin(), (fraction * angle).sin() / angle.sin()
    return (weights[0] * one + weights[1] * two).reshape(a.shape).to(a.dtype)
