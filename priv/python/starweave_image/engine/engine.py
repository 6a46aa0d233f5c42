"""The engine: requests in, pictures and other results out. This module starts and ends it; run.py runs one request."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import msgspec

from .. import __version__, schema
from ..device import devices
from ..device.lanes import Job, request_id
from ..errors import ID_IN_USE, ImageError, missing_package
from ..weights.cache import release_memory
from ..weights.load import import_libraries, quiet_libraries
from ..weights.upkeep import Upkeep
from .models import Models
from .run import Run

_logger = logging.getLogger(__name__)

_CANCEL_WAIT_S = 5.0

Outcome = Literal["done", "failed", "cancelled"]


class Engine:
    """Runs requests. `emit` is called with every message, from many threads; `changed` is called when the phase, the
    running requests or the resident models have changed. The constructor is cheap; `start` imports torch."""

    def __init__(
        self, config: schema.Config, emit: Callable[[schema.Event], None], changed: Callable[[], None]
    ) -> None:
        self._config = config
        self._emit = emit
        self._changed = changed
        self._upkeep = Upkeep(config, {*config.pinned, config.default_model})
        self._models = Models(config, self._upkeep.make_room)
        self._versions: dict[str, str] = {}
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._running: dict[str, Job] = {}
        self._preloading = Job("preload", None, silent=True)
        self._operations: dict[str, Job] = {}
        self._counters = schema.Counters()
        self._ending = 0
        self._draining = False

    def start(self) -> schema.Facts:
        """Import the libraries and choose the device; raises `unavailable`, and `model_not_found` or
        `model_load_failed` when the default model is missing."""
        # OpenMP threads that spin while waiting for each other slow down tenfold when another process needs a core.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Without this, the profiler that measures memory on a CPU writes to the log.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        try:
            import diffusers
            import torch
            import transformers
        except ImportError as error:
            _logger.exception("an import failed")
            raise ImageError("unavailable", missing_package(error)) from None
        quiet_libraries()
        import_libraries()
        self._versions = {
            "starweave_image": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        }
        choice = devices.choose(self._config)
        if choice.backend == "openvino":
            self._versions["openvino"] = importlib.metadata.version("openvino")
        self._models.start(choice, self._changed)
        weights = self._models.weights
        default = weights.card(self._config.default_model)
        # Check the default model now: if it cannot be used, its requests would all fail, and the application should
        # know.
        if default.source in ("local", "embedded"):
            weights.require(default)
        for entry in self._config.models:
            for name in entry.fallbacks or ():
                weights.card(name, fetch=False)
        self._changed()
        self._upkeep.begin()
        if self._config.preload:
            for name in self._config.preload:
                weights.card(name, fetch=False)
            threading.Thread(target=self._preload, name="preload", daemon=True).start()
        return schema.Facts(
            versions=self._versions,
            device=choice.device.id,
            dtype=choice.dtype,
            device_name=choice.device.name,
            capacity=self._config.capacity,
            default_model=default.id,
            catalog=self.models(),
        )

    def generate(self, request: schema.Request) -> None:
        """Start a request, or answer it with an error at once; never blocks."""
        job = Job(request.id, request.timeout_ms)
        with self._lock:
            refusal = self._refusal(job.id)
            if refusal is None:
                self._running[job.id] = job
        if refusal is not None:
            self._emit(refusal)
            return
        self._changed()
        threading.Thread(
            target=self._serve, args=(job, request), name=f"request {job.id}", daemon=True
        ).start()

    def cancel(self, id: str) -> None:
        with self._lock:
            job = self._running.get(id) or self._operations.get(id)
        if job is not None:
            job.cancel()

    def load_model(self, id: str, model: str) -> None:
        def load(job: Job) -> None:
            with self._models.use(self._models.card(model, job), job, functools.partial(self._tell, job)):
                pass

        self._operate(id, load)

    def unload_model(self, id: str, model: str) -> None:
        def unload(job: Job) -> None:
            self._models.loaded().unload(self._models.weights.card(model, fetch=False).id)

        self._operate(id, unload)

    def is_open(self, id: str) -> bool:
        """Whether a request or an operation with this id runs."""
        with self._lock:
            return self._is_open(id)

    def models(self) -> list[schema.Card]:
        """All cards, with the state of each; usable without `start`."""
        return self._models.told()

    def snapshot(self) -> schema.Snapshot:
        """The content of a heartbeat; may be called from any thread, never blocks."""
        cache, executor, choice = self._models.cache, self._models.executor, self._models.choice
        with self._lock:
            running = [job.stand() for job in self._running.values()]
            counters = msgspec.structs.replace(self._counters)
            draining, operating = self._draining, bool(self._operations)
        capacity = self._config.capacity
        if executor is not None and (room := executor.room()) is not None:
            capacity = min(capacity, room)
        grant = 0 if draining or cache is None else max(0, capacity - len(running))
        phase: Literal["starting", "loading", "ready", "busy", "draining"]
        if draining:
            phase = "draining"
        elif cache is None:
            phase = "starting"
        elif any(entry.phase != "loading" for entry in running):
            phase = "busy"
        else:
            phase = "loading" if running or operating or cache.loading() else "ready"
        return schema.Snapshot(
            phase=phase,
            capacity=capacity,
            grant=grant,
            running=running,
            resident=cache.resident() if cache else [],
            device_memory=choice.memory() if choice else None,
            device_work=executor.at_work() if executor else None,
            loads=cache.loads() if cache else [],
            counters=counters,
        )

    def drain(self, grace_s: float) -> None:
        """Accept no more work, wait for running work, and cancel what still runs after `grace_s` seconds."""
        with self._lock:
            self._draining = True
        self._preloading.cancel()
        self._upkeep.end()
        self._changed()
        if self._settled(grace_s):
            return
        with self._lock:
            left = [*self._running.values(), *self._operations.values()]
        # Retryable, since another sidecar can run the request.
        stopped = ImageError("cancelled", "the image service is shutting down", retryable=True)
        for job in left:
            job.cancel(stopped.message, stopped.retryable)
        if self._settled(_CANCEL_WAIT_S):
            return
        # A step cannot be interrupted, so answer the caller without waiting for the end of the step.
        for job in left:
            self._end(job, "cancelled", _error(job.id, stopped))

    def _serve(self, job: Job, request: schema.Request) -> None:
        with self._answered(job):
            self._end(job, "done", self._run(job, request).serve())

    def _run(self, job: Job, request: schema.Request) -> Run:
        return Run(
            job,
            request,
            self._models,
            self._config.default_model,
            self._versions,
            functools.partial(self._tell, job),
            functools.partial(self._in_company, job),
        )

    def _preload(self) -> None:
        """Load the configured models one by one, and run one step of each, since the first pass of a shape is slow on
        most devices. A failure is logged and shown in the model's state."""
        job = self._preloading
        for name in self._config.preload:
            try:
                card = self._models.card(name, job)
                with self._models.use(card, job, functools.partial(self._tell, job)):
                    if "text_to_image" in card.tasks:
                        request = schema.Request(
                            id=job.id, prompt="a picture", model=card.id, steps=1, seed=0
                        )
                        self._run(job, request).serve()
            except ImageError as error:
                if error.kind == "cancelled":
                    return
                _logger.warning("%s was not preloaded: %s", name, error.message)
            except Exception:
                _logger.exception("%s was not preloaded", name)

    def _operate(self, id: str, work: Callable[[Job], None]) -> None:
        job = Job(id, None)
        with self._lock:
            refusal = self._refusal(id, counted=False)
            if refusal is None:
                self._operations[id] = job
        if refusal is not None:
            self._emit(refusal)
            return

        def run() -> None:
            with self._answered(job):
                try:
                    work(job)
                finally:
                    # Sent before the answer, so that a caller who has the answer sees the model's new state.
                    self._tell(job, schema.Models(id=id, models=self.models()))
                self._end(job, "done", schema.Done(id=id))

        threading.Thread(target=run, name=f"operation {id}", daemon=True).start()

    def _in_company(self, job: Job) -> bool:
        """Whether other jobs run that use memory."""
        with self._lock:
            others = [other for other in self._running.values() if other is not job]
        return bool(others) or self._models.loaded().loading()

    # The end of a request

    def _refusal(self, id: str, counted: bool = True) -> schema.Failed | None:
        if self._is_open(id):
            return _error(id, ImageError("invalid_request", ID_IN_USE, "id"), terminal=False)
        if self._draining:
            return _error(id, ImageError("unavailable", "the image service is shutting down", retryable=True))
        if counted and len(self._running) >= self._config.capacity:
            message = f"{self._config.capacity} requests are running, which is the most at once"
            return _error(id, ImageError("overloaded", message, retryable=True))
        return None

    def _is_open(self, id: str) -> bool:
        return id in self._running or id in self._operations

    @contextmanager
    def _answered(self, job: Job) -> Iterator[None]:
        """A context in which any exception becomes the one error that ends the request."""
        request_id.set(job.id)
        try:
            yield
        except ImageError as error:
            # A new error, because the old one's traceback keeps this frame and all others it passed through alive.
            known = ImageError(error.kind, error.message, error.field, error.retryable)
        except Exception:
            _logger.exception("request %s failed", job.id)
            known = ImageError("internal", "something unexpected went wrong; the log has the details")
        else:
            return
        if known.kind == "out_of_memory":
            release_memory()
        outcome: Outcome = "cancelled" if known.kind == "cancelled" else "failed"
        self._end(job, outcome, _error(job.id, known))

    def _end(self, job: Job, outcome: Outcome, last: schema.Event) -> None:
        """End a request, once. It is removed from the running ones *before* its last message, because the application
        may then send the next request; the engine counts as drained only *after* it, because the process ends then."""
        with job.speaking:
            with self._lock:
                if job.ended:
                    return
                job.ended = True
                if self._running.pop(job.id, None) is not None:
                    setattr(self._counters, outcome, getattr(self._counters, outcome) + 1)
                self._operations.pop(job.id, None)
                self._ending += 1
            self._changed()
            try:
                self._emit(last)
            finally:
                with self._lock:
                    self._ending -= 1
                    self._idle.notify_all()

    def _settled(self, timeout_s: float) -> bool:
        with self._idle:
            return self._idle.wait_for(
                lambda: not (self._running or self._operations or self._ending), timeout_s
            )

    def _tell(self, job: Job, event: schema.Event) -> None:
        with job.speaking:
            if job.ended or job.silent:
                return
            if isinstance(event, schema.Accepted):
                with self._lock:
                    self._counters.accepted += 1
            self._emit(event)


def _error(id: str, error: ImageError, terminal: bool = True) -> schema.Failed:
    return schema.Failed(
        id=id,
        kind=error.kind,
        message=error.message,
        field=error.field,
        retryable=error.retryable,
        terminal=terminal,
    )
