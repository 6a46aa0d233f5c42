"""A clock that stands still while the process does, so that a pause of the machine is not taken for a hang."""

from __future__ import annotations

import time

_lost_s = 0.0


def now() -> float:
    """Seconds since some moment, without those during which this process was stopped."""
    return time.monotonic() - _lost_s


def stood_still(seconds: float) -> None:
    """Count a time during which the process was stopped. Only the heartbeat's thread, which notices it, calls this."""
    global _lost_s
    _lost_s += seconds
