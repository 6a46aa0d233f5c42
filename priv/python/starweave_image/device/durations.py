"""How long the device takes for its passes: what tells one that hangs from one that is long."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

_KINDS = 256
# A first pass is often slow, as where kernels are compiled for it: what it took must not count for ever.
_FADING = 0.9


class Kind(NamedTuple):
    """Passes that should take the same time: `work` is the network and what it is asked to do, `shape` that of its inputs,
    and `size` how many numbers these have."""

    work: Hashable
    shape: Hashable
    size: int


@dataclass(frozen=True)
class Current:
    """What the device works on since `begun`. Such work took `usual_s` at the longest lately: where `known`, that is of
    passes of the same kind, else it is an estimate from others, 0 without any."""

    begun: float
    usual_s: float = 0.0
    known: bool = False


class Durations:
    """One thread says what the device does; any may read `current`, None while it does nothing."""

    def __init__(self) -> None:
        self.current: Current | None = None
        self._kind: Kind | None = None
        self._longest: dict[Kind, float] = {}

    def begin(self, now: float, kind: Kind | None = None) -> None:
        """The device begins a pass, or without a `kind` something else, such as to make room."""
        self._kind = kind
        if kind is None:
            self.current = Current(now, max(self._longest.values(), default=0.0))
        elif kind in self._longest:
            self.current = Current(now, self._longest[kind], known=True)
        else:
            estimates = (_scaled(seconds, other, kind) for other, seconds in self._longest.items())
            self.current = Current(now, max(estimates, default=0.0))

    def end(self, now: float) -> None:
        """The pass has ended, and well."""
        assert self.current is not None and self._kind is not None
        # Put in anew, so that the first is the one not seen for longest.
        before = self._longest.pop(self._kind, 0.0)
        self._longest[self._kind] = max(now - self.current.begun, _FADING * before)
        if len(self._longest) > _KINDS:
            del self._longest[next(iter(self._longest))]
        self.begin(now)

    def rest(self) -> None:
        self.current = None


def _scaled(seconds: float, other: Kind, kind: Kind) -> float:
    """An upper estimate from what another kind took: attention takes the square of what it looks at."""
    return seconds * max(1.0, kind.size / other.size) ** 2 if kind.work == other.work else seconds
