"""A clock that stands still while the process does, so that a pause of the machine is not taken for a hang."""

from __future__ import annotations

import time

_lost_s = 0.0


def now() -> float:
    """Seconds since some moment, without those in which nothing here could run."""
    return time.monotonic() - _lost_s


def stood_still(seconds: float) -> None:
    """The process was stopped for so long. For the one thread that sees it: the heartbeat's."""
    global _lost_s
    _lost_s += seconds
