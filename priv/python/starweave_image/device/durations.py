"""How long the device takes for its passes, to tell a hanging pass from a long one."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

_KINDS = 256
# A first pass is often slow, for example while kernels are compiled, so its duration must not count for ever.
_FADING = 0.9


class Kind(NamedTuple):
    """Passes that should take the same time: `work` is the network and its method, `shape` the shapes of the inputs,
    and `size` how many numbers these have."""

    work: Hashable
    shape: Hashable
    size: int


@dataclass(frozen=True)
class Current:
    """The device's current work, begun at `begun`. `usual_s` is the longest time that such work took recently: measured
    from passes of the same kind if `known`, else estimated from other kinds, or 0 without any."""

    begun: float
    usual_s: float = 0.0
    known: bool = False


class Durations:
    """One thread reports the device's work; any thread may read `current`, which is None while the device is idle."""

    def __init__(self) -> None:
        self.current: Current | None = None
        self._kind: Kind | None = None
        self._longest: dict[Kind, float] = {}

    def begin(self, now: float, kind: Kind | None = None) -> None:
        """The device begins a pass or, without a `kind`, other work, such as freeing memory."""
        self._kind = kind
        if kind is None:
            self.current = Current(now, max(self._longest.values(), default=0.0))
        elif kind in self._longest:
            self.current = Current(now, self._longest[kind], known=True)
        else:
            estimates = (_scaled(seconds, other, kind) for other, seconds in self._longest.items())
            self.current = Current(now, max(estimates, default=0.0))

    def end(self, now: float) -> None:
        """The pass has succeeded."""
        assert self.current is not None and self._kind is not None
        # Reinserted, so that the first entry is always the least recently seen.
        before = self._longest.pop(self._kind, 0.0)
        self._longest[self._kind] = max(now - self.current.begun, _FADING * before)
        if len(self._longest) > _KINDS:
            del self._longest[next(iter(self._longest))]
        self.begin(now)

    def rest(self) -> None:
        self.current = None


def _scaled(seconds: float, other: Kind, kind: Kind) -> float:
    """An upper estimate from the duration of another kind: the cost of attention grows with the square of the size."""
    return seconds * max(1.0, kind.size / other.size) ** 2 if kind.work == other.work else seconds
