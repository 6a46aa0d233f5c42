"""The sidecar's heartbeats, sent by a thread of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec
import psutil

from .. import clock, schema
from . import wire

# A sleeping thread wakes up this late only if the process was stopped, or another thread held the interpreter.
_LATE_S = 1.0
_STARTED = time.monotonic()
_SELF = psutil.Process()


class Heartbeat:
    """Sends a heartbeat every `interval` seconds, and at once when `beat` is called."""

    def __init__(
        self, snapshot: Callable[[], schema.Snapshot], send: Callable[[wire.Outgoing], None]
    ) -> None:
        self.interval = 1.0
        self._snapshot = snapshot
        self._send = send
        self._seq = 0
        self._due = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def beat(self) -> None:
        self._due.set()

    def _run(self) -> None:
        while True:
            self._due.clear()
            self._send(
                wire.Heartbeat(
                    seq=self._seq,
                    uptime_ms=int((time.monotonic() - _STARTED) * 1000),
                    rss=_SELF.memory_info().rss,
                    **msgspec.structs.asdict(self._snapshot()),
                )
            )
            self._seq += 1
            asleep = time.monotonic()
            self._due.wait(self.interval)
            late_s = time.monotonic() - asleep - self.interval
            if late_s > _LATE_S:
                clock.stood_still(late_s)
