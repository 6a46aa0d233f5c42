"""One request among others: where it stands, how it waits, and whose turn the device is."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from . import wire
from .errors import ImageError

Phase = Literal["loading", "denoising", "decoding", "encoding"]


class Request:
    """Where one request stands. It waits on one event, which a cancel, a load and the device turn all set."""

    def __init__(self, id: str, timeout_ms: int | None) -> None:
        self.id = id
        self.wake = threading.Event()
        self.ended = False
        self.phase: Phase = "loading"
        self.image = 0
        self.step = 0
        self.steps = 0
        self.queued_s = 0.0
        self._begun = self._since = self._entered = time.monotonic()
        self._deadline = None if timeout_ms is None else self._begun + timeout_ms / 1000
        self._cancelled: str | None = None
        self._longest_s = 0.0
        self._spent: dict[str, float] = {}

    def cancel(self, why: str = "the request was cancelled") -> None:
        self._cancelled = why
        self.wake.set()

    def check(self) -> None:
        """Raise `cancelled` or `timeout` if the request must not go on."""
        if self._cancelled is not None:
            raise ImageError("cancelled", self._cancelled)
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise ImageError("timeout", "the request did not end within its timeout", retryable=True)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Block until `ready`, which whoever makes it true announces by `wake`; raises as `check` does."""
        while True:
            # Cleared before looking, so that an event between the look and the wait is not lost.
            self.wake.clear()
            self.check()
            if ready():
                return
            self.wake.wait(None if self._deadline is None else max(0.0, self._deadline - time.monotonic()))

    def enter(self, phase: Phase, image: int) -> None:
        self._account()
        if phase == "denoising":
            self.step = self.steps = 0
        self.phase, self.image = phase, image
        self._since = time.monotonic()

    def stepped(self, steps: int) -> None:
        now = time.monotonic()
        self._longest_s = max(self._longest_s, now - self._since)
        self._since = now
        self.step, self.steps = self.step + 1, steps

    def queued(self, seconds: float) -> None:
        """Account for a wait for the device: it is no part of the phase, nor of the step that follows."""
        self.queued_s += seconds
        self._entered += seconds
        self._since = time.monotonic()

    def progress(self) -> wire.Progress:
        return wire.Progress(
            id=self.id,
            phase=self.phase,
            image=self.image,
            step=self.step,
            steps=self.steps,
            elapsed_ms=round((time.monotonic() - self._begun) * 1000),
        )

    def on_wire(self, now: float) -> wire.Running:
        return wire.Running(
            id=self.id,
            phase=self.phase,
            step=self.step,
            steps=self.steps,
            step_age_ms=max(0, round((now - self._since) * 1000)),
            step_ms=round(self._longest_s * 1000),
        )

    def timings(self) -> dict[str, int]:
        """Milliseconds by phase, for all images together."""
        self._account()
        spent = {
            "queue": self.queued_s,
            "load": self._spent.get("loading", 0.0),
            "denoise": self._spent.get("denoising", 0.0),
            "decode": self._spent.get("decoding", 0.0),
            "encode": self._spent.get("encoding", 0.0),
            "total": time.monotonic() - self._begun,
        }
        return {name: round(seconds * 1000) for name, seconds in spent.items()}

    def _account(self) -> None:
        now = time.monotonic()
        self._spent[self.phase] = self._spent.get(self.phase, 0.0) + now - self._entered
        self._entered = now


class DeviceTurn:
    """Who may compute: one request at a time, in the order of asking."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: Request | None = None
        self._waiting: deque[Request] = deque()

    @contextmanager
    def held(self, request: Request) -> Iterator[None]:
        self._acquire(request)
        try:
            yield
        finally:
            self._leave(request)

    def hand_over(self, request: Request) -> None:
        """Let the others that wait go first; raises, without the turn, if the request must not go on."""
        request.check()
        self._leave(request)
        self._acquire(request)

    def _acquire(self, request: Request) -> None:
        with self._lock:
            self._waiting.append(request)
            self._advance()
        begun = time.monotonic()
        try:
            request.wait(lambda: self._holder is request)
        except BaseException:
            self._leave(request)
            raise
        request.queued(time.monotonic() - begun)

    def _leave(self, request: Request) -> None:
        with self._lock:
            if self._holder is request:
                self._holder = None
            elif request in self._waiting:
                self._waiting.remove(request)
            self._advance()

    def _advance(self) -> None:
        if self._holder is None and self._waiting:
            self._holder = self._waiting.popleft()
            self._holder.wake.set()
