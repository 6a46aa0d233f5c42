"""The state of one request: whether it may go on, and the progress of each of its pictures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from .. import clock, schema
from ..errors import ImageError

Phase = Literal["loading", "denoising", "decoding", "encoding"]

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The request that the current thread works for; its log lines carry it."""


class Job:
    """A running request or operation, and its lanes: the first one loads the model, and each makes one result in a
    thread of its own. A silent job emits no events."""

    def __init__(self, id: str, timeout_ms: int | None, silent: bool = False) -> None:
        self.id = id
        self.silent = silent
        self.ended = False
        # Held while an event of the job is sent, so that no event follows its end.
        self.speaking = threading.RLock()
        self.begun = time.monotonic()
        self._deadline = None if timeout_ms is None else self.begun + timeout_ms / 1000
        self._cancelled: ImageError | None = None
        self._lanes = [Lane(self, 0)]
        self.first.at_work = True

    @property
    def first(self) -> Lane:
        return self._lanes[0]

    def lanes(self, count: int) -> list[Lane]:
        """The lanes of `count` pictures, the first among them."""
        self._lanes += [Lane(self, index) for index in range(1, count)]
        return list(self._lanes)

    def cancel(self, why: str = "the request was cancelled", retryable: bool = False) -> None:
        self._cancelled = ImageError("cancelled", why, retryable=retryable)
        self.wake()

    def abandon(self) -> None:
        """One of its pictures failed, so the others need not be drawn."""
        self.cancel("another picture of the request failed")

    def wake(self) -> None:
        """Make all waiting threads check their conditions again."""
        for lane in self._lanes:
            lane.wake.set()

    def check(self) -> None:
        """Raise `cancelled` or `timeout` if the request must not go on."""
        if (known := self._cancelled) is not None:
            # A new exception for each thread that gets here.
            raise ImageError(known.kind, known.message, retryable=known.retryable)
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise ImageError("timeout", "the request did not end within its timeout", retryable=True)

    def left_s(self) -> float | None:
        """Seconds until the deadline, where there is one."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def stand(self) -> schema.Running:
        """The progress of the least advanced picture in work; if none is in work, of the one that advanced last."""
        latest = max(self._lanes, key=lambda lane: lane.advanced)
        at_work = [lane for lane in self._lanes if lane.at_work] or [latest]
        return min(at_work, key=lambda lane: (_ORDER[lane.phase], lane.step)).stand()

    def timings(self) -> dict[str, int]:
        """Milliseconds by phase, summed over all pictures; `total` is elapsed time."""
        spent: dict[str, float] = dict.fromkeys(("queue", *_TIMED.values()), 0.0)
        for lane in self._lanes:
            lane.account()
            spent["queue"] += lane.queued_s
            for phase, seconds in lane.spent.items():
                spent[_TIMED[phase]] += seconds
        spent["total"] = time.monotonic() - self.begun
        return {name: round(seconds * 1000) for name, seconds in spent.items()}


_ORDER: dict[Phase, int] = {"loading": 0, "denoising": 1, "decoding": 2, "encoding": 3}
_TIMED: dict[Phase, str] = {
    "loading": "load",
    "denoising": "denoise",
    "decoding": "decode",
    "encoding": "encode",
}


class Lane:
    """The progress of one picture. Its thread waits on one event, which a cancel, a load and the device all set."""

    def __init__(self, job: Job, image: int) -> None:
        self.job = job
        self.image = image
        self.wake = threading.Event()
        self.at_work = False
        self.phase: Phase = "loading"
        self.step = 0
        self.steps = 0
        self.queued_s = 0.0
        self.spent: dict[Phase, float] = {}
        # Sentences for the caller about how the picture was drawn.
        self.notices: list[str] = []
        self.advanced = clock.now()
        self._step_begun = self._entered = time.monotonic()
        self._longest_s = 0.0
        self._waits = False

    def wait(self, ready: Callable[[], bool]) -> None:
        """Block until `ready` is true; the thread that makes it true must call `wake`. Raises as `Job.check` does."""
        while True:
            # Cleared before the check, so that an event between the check and the wait is not lost.
            self.wake.clear()
            self.job.check()
            if ready():
                return
            self.wake.wait(self.job.left_s())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which the lane waits for the device or for a model."""
        self.advanced, self._waits = clock.now(), True
        try:
            yield
        finally:
            self.advanced, self._waits = clock.now(), False

    def enter(self, phase: Phase) -> None:
        self.account()
        self.phase = phase
        self.advanced = clock.now()

    def begin(self) -> None:
        """The lane's own thread starts to draw."""
        self.account()
        self.at_work = True
        self.phase, self.step, self.steps = "denoising", 0, 0
        self.advanced, self._step_begun = clock.now(), time.monotonic()

    def finish(self) -> None:
        """The picture is done: time after this does not count as its own."""
        self.account()
        self.at_work = False
        self.advanced = clock.now()

    def stepped(self, steps: int) -> None:
        now = time.monotonic()
        self._longest_s = max(self._longest_s, now - self._step_begun)
        self.advanced, self._step_begun = clock.now(), now
        self.step, self.steps = self.step + 1, steps

    def queued(self, seconds: float) -> None:
        """Account for a wait for the device, which counts neither for the phase nor for the step."""
        self.queued_s += seconds
        self._entered += seconds
        self._step_begun += seconds

    def progress(self) -> schema.Progress:
        return schema.Progress(
            id=self.job.id,
            phase=self.phase,
            image=self.image,
            step=self.step,
            steps=self.steps,
            elapsed_ms=round((time.monotonic() - self.job.begun) * 1000),
        )

    def stand(self) -> schema.Running:
        return schema.Running(
            id=self.job.id,
            phase=self.phase,
            step=self.step,
            steps=self.steps,
            step_age_ms=max(0, round((clock.now() - self.advanced) * 1000)),
            step_ms=round(self._longest_s * 1000),
            waits=self._waits,
        )

    def account(self) -> None:
        now = time.monotonic()
        if self.at_work:
            self.spent[self.phase] = self.spent.get(self.phase, 0.0) + now - self._entered
        self._entered = now
