"""The engine: requests in, pictures out.

Each picture is drawn by a thread that runs the *stock* pipeline call on a copy of the loaded pipeline. What these ask
of their networks is run by the executor, together where it can be (executor.py): so all of them advance together, and
each notices a cancel or its deadline before its next step.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import logging
import os
import platform
import secrets
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import msgspec
from PIL import ImageOps
from PIL.Image import Image

from .. import __version__, schema
from ..device import devices
from ..device.lanes import Lane, Request, request_id
from ..device.limits import Limits
from ..errors import ID_IN_USE, ImageError, is_device_lost, is_out_of_memory, missing_package
from ..paths import cache_folder
from ..pictures import images, schedulers
from ..pictures.preview import Previews
from ..tasks import edit, image_to_image, inpaint, reading, text_to_image
from ..weights import offered
from ..weights.cache import Model, ModelCache, release_memory
from ..weights.catalog import ModelCard, Settings, State, rendered_size, settle
from ..weights.find import Weights
from ..weights.integrity import Check
from ..weights.layout import unfit
from ..weights.load import divide, import_libraries, load_pipeline, quiet_libraries
from ..weights.upkeep import Upkeep

if TYPE_CHECKING:
    from ..device.executor import Executor

_logger = logging.getLogger(__name__)

_MEMORY_SHARE = 0.85
_CANCEL_WAIT_S = 5.0
# What arguments and tensors raise that do not fit together.
_MISFITS = (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)
# So many pictures of one request are drawn at a time.
_ABREAST = 8
# Seeds that are drawn leave room for those of sixteen pictures below 2⁵³: JavaScript, JSON and spreadsheets keep them.
_DRAWN = 2**53 - 16

Outcome = Literal["done", "failed", "cancelled"]


class Engine:
    """Runs requests. `emit` gets every message, from many threads; `changed` is called when the phase, the running
    or the resident set has changed. The constructor is light; `start` imports torch."""

    def __init__(
        self, config: schema.Config, emit: Callable[[schema.Event], None], changed: Callable[[], None]
    ) -> None:
        self._config = config
        self._emit = emit
        self._changed = changed
        self._upkeep = Upkeep(config, {*config.pinned, config.default_model})
        self._weights = Weights(config.models, config.offline, self._upkeep.make_room)
        self._choice: devices.Choice | None = None
        self._cache: ModelCache | None = None
        self._versions: dict[str, str] = {}
        self._executor: Executor | None = None
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._running: dict[str, Request] = {}
        self._preloading = Request("preload", None, silent=True)
        self._operations: dict[str, Request] = {}
        self._counters = schema.Counters()
        self._ending = 0
        self._draining = False

    def start(self) -> schema.Facts:
        """Import the libraries and choose the device; raises `unavailable`, and `model_not_found` or `model_load_failed`
        when the default model is not to be had."""
        # OpenMP threads that spin while they wait for each other lose tenfold when anyone else wants a core.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Measuring memory on a CPU would write lines of its own to the log.
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
        from ..device.executor import Executor

        choice = self._choice = devices.choose(self._config)
        if choice.backend == "openvino":
            self._versions["openvino"] = importlib.metadata.version("openvino")
        budget = self._config.memory_budget
        cache = ModelCache(
            self._load,
            int(choice.device.total_bytes * _MEMORY_SHARE) if budget is None else budget,
            self._changed,
            # A CPU computes where it would park.
            0 if choice.device.kind == "cpu" else self._config.ram_budget,
            [self._weights.card(name, fetch=False).id for name in self._config.pinned],
        )
        limits = Limits(cache_folder() / "limits.json", choice.free_bytes)
        self._executor = Executor(choice, limits, cache.make_room, release_memory)
        self._cache = cache
        default = self._weights.card(self._config.default_model)
        # A sidecar whose requests would all fail is better not started: so its application learns of it now.
        if default.source in ("local", "embedded"):
            self._weights.require(default)
        for entry in self._config.models:
            for name in entry.fallbacks or ():
                self._weights.card(name, fetch=False)
        self._changed()
        self._upkeep.begin()
        if self._config.preload:
            for name in self._config.preload:
                self._weights.card(name, fetch=False)
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

    def generate(self, message: schema.Request) -> None:
        """Run a request, or answer it with an error at once; never blocks."""
        request = Request(message.id, message.timeout_ms)
        with self._lock:
            refusal = self._refusal(message.id)
            if refusal is None:
                self._running[message.id] = request
        if refusal is not None:
            self._emit(refusal)
            return
        self._changed()
        threading.Thread(
            target=self._serve, args=(request, message), name=f"request {message.id}", daemon=True
        ).start()

    def cancel(self, id: str) -> None:
        with self._lock:
            request = self._running.get(id) or self._operations.get(id)
        if request is not None:
            request.cancel()

    def load_model(self, id: str, model: str) -> None:
        def load(request: Request) -> None:
            card = self._card(model, request)
            with self._use(card, request):
                pass

        self._operate(id, load)

    def unload_model(self, id: str, model: str) -> None:
        self._operate(id, lambda _: self._loaded_models().unload(self._weights.card(model, fetch=False).id))

    def is_open(self, id: str) -> bool:
        """Whether a request or an operation of this id runs."""
        with self._lock:
            return self._is_open(id)

    def models(self) -> list[schema.Card]:
        """All cards, with the state of each; usable without `start`."""
        return [card.told(*self._state(card), **self._loaded_fields(card)) for card in self._weights.cards()]

    def snapshot(self) -> schema.Snapshot:
        """What a heartbeat tells; from any thread, never blocks."""
        cache = self._cache
        with self._lock:
            running = [request.stand() for request in self._running.values()]
            counters = msgspec.structs.replace(self._counters)
            draining, operating = self._draining, bool(self._operations)
        capacity = self._config.capacity
        if self._executor is not None and (room := self._executor.room()) is not None:
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
            device_memory=self._choice.memory() if self._choice else None,
            device_work=self._executor.at_work() if self._executor else None,
            loads=cache.loads() if cache else [],
            counters=counters,
        )

    def drain(self, grace_s: float) -> None:
        """Take no more work, wait for what runs, and cancel what is left after `grace_s` seconds."""
        with self._lock:
            self._draining = True
        self._preloading.cancel()
        self._upkeep.end()
        self._changed()
        if self._settled(grace_s):
            return
        with self._lock:
            left = [*self._running.values(), *self._operations.values()]
        # Another sidecar can do what this one cannot any more.
        stopped = ImageError("cancelled", "the image service is shutting down", retryable=True)
        for request in left:
            request.cancel(stopped.message, stopped.retryable)
        if self._settled(_CANCEL_WAIT_S):
            return
        # A step that does not end in time cannot be broken off; its caller need not wait for it.
        for request in left:
            self._end(request, "cancelled", _error(request.id, stopped))

    # One request

    def _serve(self, request: Request, message: schema.Request) -> None:
        with self._answered(request):
            self._loaded_models()
            card = self._card(message.model or self._config.default_model, request)
            self._weights.require(card)
            image = None if message.image is None else images.decode(message.image, "image")
            settings = settle(message, card, None if image is None else image.size)
            mask = images.decode_mask(message.mask, image.size) if message.mask and image else None
            wanted = message.scheduler or card.defaults.scheduler
            scheduler = schedulers.resolve(wanted, *self._weights.scheduler(card), settings.steps, card.id)
            first = message.seed
            if first is None or first == -1:
                first = secrets.randbelow(_DRAWN)
            own = first if message.variation_seed is None else message.variation_seed
            seeds = [(own + index) % 2**63 for index in range(message.num_images)]
            request.check()
            with self._lock:
                self._counters.accepted += 1
            self._send(
                request,
                schema.Accepted(
                    id=request.id,
                    model=card.id,
                    width=settings.width,
                    height=settings.height,
                    steps=settings.steps,
                    guidance_scale=settings.guidance_scale,
                    scheduler=scheduler or "",
                    seeds=seeds,
                    format=message.format,
                ),
            )
            with self._use(card, request) as model:
                send = functools.partial(self._send, request)
                job = Job(message, card, settings, model, self._environment(model), image, mask, first, send)
                files = self._pictures(request, job, seeds)
            done = schema.Done(
                id=request.id,
                model=card.id,
                parameters={**files[0][1], "seeds": seeds},
                timings=request.timings(),
                notices=job.notices,
            )
            request.check()
            for index, (data, record) in enumerate(files):
                for part in _parts(request.id, index, data, record, message.format):
                    self._send(request, part)
            self._finish(request, done)

    def _pictures(self, request: Request, job: Job, seeds: list[int]) -> list[tuple[bytes, dict[str, Any]]]:
        """The pictures of a request, in order, each drawn by a lane of its own."""
        lanes = request.lanes(len(seeds))
        if len(lanes) == 1:
            return [self._picture(lanes[0], job, seeds[0])]
        slots = threading.Semaphore(_ABREAST)
        files: list[Future[tuple[bytes, dict[str, Any]]]] = [Future() for _ in lanes]

        def draw(lane: Lane, seed: int, file: Future[tuple[bytes, dict[str, Any]]]) -> None:
            request_id.set(request.id)
            with slots:
                try:
                    file.set_result(self._picture(lane, job, seed))
                except BaseException as error:
                    file.set_exception(error)

        threads = [
            threading.Thread(target=draw, args=each, name=f"request {request.id}", daemon=True)
            for each in zip(lanes, seeds, files, strict=True)
        ]
        for thread in threads:
            thread.start()
        ended, _ = wait(files, return_when=FIRST_EXCEPTION)
        failure = next((error for file in files if file in ended and (error := file.exception())), None)
        if failure is not None:
            request.abandon()
        for thread in threads:
            thread.join()
        if failure is not None:
            try:
                raise failure
            finally:
                # It keeps this frame, and with it the other pictures.
                del failure
        return [file.result() for file in files]

    def _picture(self, lane: Lane, job: Job, seed: int) -> tuple[bytes, dict[str, Any]]:
        """One picture as an encoded file, and the record of it."""
        lane.request.check()
        lane.begin()
        try:
            return self._made(lane, job, seed)
        finally:
            # Also one that failed: else the request would seem to stand still while its other pictures are drawn.
            lane.finish()

    def _made(self, lane: Lane, job: Job, seed: int) -> tuple[bytes, dict[str, Any]]:
        message, settings = job.message, job.settings
        picture, scheduler = self._draw(lane, job, seed)
        job.note(*lane.notices)
        lane.request.check()
        lane.enter("encoding")
        self._send(lane.request, lane.progress())
        record = {
            "prompt": job.prompt,
            "negative_prompt": message.negative_prompt,
            "model": job.card.id,
            "width": settings.width,
            "height": settings.height,
            "rendered_width": job.width,
            "rendered_height": job.height,
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "scheduler": scheduler,
            "environment": job.environment,
            **job.seeded(seed),
            **job.origin,
        }
        picture = job.finish(picture)
        data = images.encode(picture, message.format, message.quality, record if message.metadata else None)
        return data, record

    def _draw(self, lane: Lane, job: Job, seed: int) -> tuple[Image, str]:
        """One picture at the size at which the model draws, and the name of the scheduler used."""
        import torch

        from ..pictures.noise import Between

        assert self._executor is not None
        with job.model.borrow() as pipeline:
            own, config = type(pipeline.scheduler).__name__, pipeline.scheduler.config
            wanted = job.message.scheduler or job.card.defaults.scheduler
            scheduler = schedulers.resolve(wanted, own, config, job.settings.steps, job.card.id)
            if scheduler != own:
                pipeline.scheduler = schedulers.make(scheduler, config)
            scheduler = schedulers.name_of(scheduler, pipeline.scheduler)
            pipeline, call = job.prepare(pipeline)
            job.note(*call.notices)
            exact = job.message.reproducible
            result = None
            noise = torch.Generator("cpu").manual_seed(seed)
            towards: AbstractContextManager[Any] = nullcontext()
            if (fraction := job.message.variation_strength) is not None:
                base = torch.Generator("cpu").manual_seed(job.base_seed)
                noise, towards = base, Between(base, noise, fraction)
            with (
                towards,
                self._executor.drawing(lane, pipeline, job.model.networks, exact),
                job.previews.watch(pipeline, lane.image) if job.previews else nullcontext(),
                self._hooked(lane, pipeline, noise),
            ):
                try:
                    result = pipeline(**call.arguments, generator=noise, output_type="pil")
                except ImageError:
                    raise
                except Exception as error:
                    if not is_out_of_memory(error):
                        self._blame(job, error)
                job.note(*job.model.notices)
            # Outside of `except`: an error that remembered the other one would keep all its tensors.
            if result is None:
                raise ImageError(
                    "out_of_memory",
                    f"{job.width}x{job.height} pixels with {job.card.id} need more device memory than is free",
                    # What has the device for itself will not fit later either.
                    retryable=self._in_company(lane.request),
                )
        if any(getattr(result, "nsfw_content_detected", None) or []):
            raise ImageError("unsafe_content", "the model's safety checker withheld the picture")
        job.model.proven.add(job.settings.task)
        return result.images[0], scheduler

    def _blame(self, job: Job, error: Exception) -> NoReturn:
        """Raise what an error of a stock pipeline is for the request: a model that has never done this task does not do it,
        since its parts do not fit together; one that has is not to blame."""
        unproven = job.settings.task not in job.model.proven
        if not unproven or not isinstance(error, _MISFITS) or is_device_lost(error):
            raise error
        _logger.error("%s failed at its first %s", job.card.id, job.settings.task, exc_info=error)
        why = f"cannot do {job.settings.task}: its parts do not fit together; the log has the details"
        raise unfit(job.card.id, why) from None

    @contextmanager
    def _hooked(self, lane: Lane, pipeline: Any, noise: Any) -> Iterator[None]:
        """Have the scheduler's `step` report the step.

        Every pipeline steps its scheduler once a step, while only some take a callback; and the hook may raise,
        which ends the call and leaves the weights usable.
        """
        request, scheduler = lane.request, pipeline.scheduler
        step = scheduler.step
        draws = "generator" in inspect.signature(step).parameters
        # What starts from an image leaves the first steps out.
        chosen: list[int] = []
        if choose := getattr(pipeline, "get_timesteps", None):

            @functools.wraps(choose)
            def get_timesteps(*args: Any, **kwargs: Any) -> Any:
                timesteps, count = choose(*args, **kwargs)
                chosen[:] = [len(timesteps)]
                return timesteps, count

            pipeline.get_timesteps = get_timesteps

        @functools.wraps(step)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            if draws and kwargs.get("generator") is None:
                # Not every pipeline passes its generator on, and without one the noise would be that of all requests.
                kwargs["generator"] = noise
            result = step(*args, **kwargs)
            lane.stepped(chosen[0] if chosen else len(scheduler.timesteps))
            self._send(request, lane.progress())
            request.check()
            if lane.step >= lane.steps:
                lane.enter("decoding")
                self._send(request, lane.progress())
            return result

        scheduler.step = hooked
        try:
            yield
        finally:
            # Each refers to what it hangs on, and that to latents: a circle, which would live on for long.
            del scheduler.step
            vars(pipeline).pop("get_timesteps", None)

    def _environment(self, model: Model) -> dict[str, Any]:
        """What besides the request decides the picture: the packages, the machine and the model."""
        assert self._choice is not None
        return {
            **self._versions,
            "device": self._choice.device.name,
            "dtype": self._choice.dtype,
            "revision": model.revision,
            "checksum": model.checksum,
            **model.divided,
        }

    # Models

    def _card(self, name: str, request: Request) -> ModelCard:
        """The card of an id or alias. One that is not known yet may have to come from the hub, for which a cancel or the
        deadline does not wait."""
        card = self._weights.card(name, fetch=False)
        if card.pipeline:
            return card
        answer: Future[ModelCard] = Future()

        def ask() -> None:
            try:
                answer.set_result(self._weights.card(name))
            except Exception as error:
                answer.set_exception(error)

        answer.add_done_callback(lambda _: request.wake())
        threading.Thread(target=ask, name=f"card {card.id}", daemon=True).start()
        request.first.wait(answer.done)
        return answer.result()

    def _load(self, card: ModelCard, room: Callable[[int], AbstractContextManager[None]]) -> Model:
        assert self._choice is not None and self._cache is not None
        source = self._weights.obtain(card)
        check = Check(card.id, source.screened.weights, self._weights.pins(card))
        assert self._executor is not None
        config, executor = self._config, self._executor
        compiled = config.compile == "blocks"
        load = functools.partial(
            load_pipeline, source, card.id, self._choice, executor.alone, config.offload, compiled
        )
        with room(card.memory_bytes or source.bytes):
            begun = time.monotonic()
            pipeline = None
            try:
                pipeline = load()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            if pipeline is None:
                self._cache.make_room()
                pipeline = load()
            # Nothing that is not what it should be has drawn anything by now.
            whole = check.wait()
            # A hub revision names its files; a folder on this machine may have been changed.
            digest = whole if source.revision is None else None
            model = Model(card, pipeline, source.folder, source.revision, digest, self._choice)
            model.divided = divide(
                pipeline, config.attention, config.vae, self._choice.device, model.bytes, card.most_pixels
            )
        model.load_s = time.monotonic() - begun
        cache = self._cache
        check.again(lambda sentence: cache.condemn(card.id, sentence))
        _logger.info("%s loaded in %.1f s, %d MB", card.id, time.monotonic() - begun, model.bytes // 10**6)
        return model

    @contextmanager
    def _use(self, card: ModelCard, request: Request) -> Iterator[Model]:
        def patiently(model: Future[Model]) -> None:
            if not model.done():
                request.first.enter("loading")
                self._send(request, request.first.progress())
                model.add_done_callback(lambda _: request.wake())
                with request.first.waiting():
                    request.first.wait(model.done)

        with self._loaded_models().use(card, patiently) as model:
            yield model

    def _loaded_models(self) -> ModelCache:
        if self._cache is None:
            raise ImageError("unavailable", "the image service is still starting", retryable=True)
        return self._cache

    def _state(self, card: ModelCard) -> tuple[State, str | None]:
        state, error = self._cache.state(card.id) if self._cache else (None, None)
        if state is None:
            return self._weights.state(card)
        return cast(State, state), error

    def _loaded_fields(self, card: ModelCard) -> dict[str, Any]:
        report = self._cache.report(card.id) if self._cache else None
        if report is None:
            return {}
        return {
            "bytes": report.bytes,
            "parked": report.parked,
            "idle_ms": round(report.idle_s * 1000),
            "load_ms": round(report.load_s * 1000),
        }

    def _preload(self) -> None:
        """Load the configured models one by one, and let each make a step: the first pass of a shape is slow on most
        devices. One that fails is told in the log and in its state."""
        for name in self._config.preload:
            try:
                card = self._card(name, self._preloading)
                with self._use(card, self._preloading) as model:
                    message = schema.Request(id=self._preloading.id, prompt="a picture", steps=1)
                    job = Job(message, card, settle(message, card), model, {}, None, None, 0, self._emit)
                    lane = self._preloading.first
                    lane.begin()
                    self._draw(lane, job, seed=0)
            except ImageError as error:
                if error.kind == "cancelled":
                    return
                _logger.warning("%s was not preloaded: %s", name, error.message)
            except Exception:
                _logger.exception("%s was not preloaded", name)

    def _operate(self, id: str, work: Callable[[Request], None]) -> None:
        request = Request(id, None)
        with self._lock:
            refusal = self._refusal(id, counted=False)
            if refusal is None:
                self._operations[id] = request
        if refusal is not None:
            self._emit(refusal)
            return

        def run() -> None:
            with self._answered(request):
                try:
                    work(request)
                finally:
                    # Before the answer, so that whoever has it finds the model's new state.
                    self._send(request, schema.Models(id=id, models=self.models()))
                self._finish(request, schema.Done(id=id))

        threading.Thread(target=run, name=f"operation {id}", daemon=True).start()

    def _in_company(self, request: Request) -> bool:
        """Whether others run that take memory."""
        assert self._cache is not None
        with self._lock:
            others = [other for other in self._running.values() if other is not request]
        return bool(others) or self._cache.loading()

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
    def _answered(self, request: Request) -> Iterator[None]:
        """Whatever is raised inside becomes the one error that ends the request."""
        request_id.set(request.id)
        try:
            yield
        except ImageError as error:
            # A fresh one: with its traceback it would keep this frame, and all that it passed through.
            known = ImageError(error.kind, error.message, error.field, error.retryable)
        except Exception:
            _logger.exception("request %s failed", request.id)
            known = ImageError("internal", "something unexpected went wrong; the log has the details")
        else:
            return
        if known.kind == "out_of_memory":
            release_memory()
        outcome: Outcome = "cancelled" if known.kind == "cancelled" else "failed"
        self._end(request, outcome, _error(request.id, known))

    def _finish(self, request: Request, done: schema.Done) -> None:
        self._end(request, "done", done)

    def _end(self, request: Request, outcome: Outcome, last: schema.Event) -> None:
        """End a request, once. It is off the books *before* its last message, for its reader may send the next one;
        the engine counts as settled only *after* it, for whoever drains ends the process then."""
        with request.speaking:
            with self._lock:
                if request.ended:
                    return
                request.ended = True
                if self._running.pop(request.id, None) is not None:
                    setattr(self._counters, outcome, getattr(self._counters, outcome) + 1)
                self._operations.pop(request.id, None)
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

    def _send(self, request: Request, message: schema.Event) -> None:
        with request.speaking:
            if not request.ended and not request.silent:
                self._emit(message)


def _error(id: str, error: ImageError, terminal: bool = True) -> schema.Failed:
    return schema.Failed(
        id=id,
        kind=error.kind,
        message=error.message,
        field=error.field,
        retryable=error.retryable,
        terminal=terminal,
    )


class Job:
    """What all pictures of one request have in common."""

    def __init__(
        self,
        message: schema.Request,
        card: ModelCard,
        settings: Settings,
        model: Model,
        environment: dict[str, Any],
        image: Image | None,
        mask: Image | None,
        base_seed: int,
        send: Callable[[schema.Event], None],
    ) -> None:
        self.message = message
        self.base_seed = base_seed
        self.card = card
        self.settings = settings
        self.model = model
        self.environment = environment
        self.notices: list[str] = []
        style = message.style.strip()
        self.prompt = f"{message.prompt}, {style}" if style else message.prompt
        self.width, self.height = rendered_size(settings.width, settings.height, card)
        if (self.width, self.height) != (settings.width, settings.height):
            self.note(
                f"Rendered at {self.width}x{self.height} and enlarged: {card.name} draws at that scale only."
            )
        rendered, size = (self.width, self.height), (settings.width, settings.height)
        self.previews = None
        if message.preview and model.offloaded:
            self.note("No previews: the model does not fit on its device as a whole.")
        elif message.preview:
            self.previews = Previews(message.id, model.pipeline, rendered, size, send)
        known = reading.vocabulary(model.folder)
        self._said = self._read("prompt", self.prompt, known)
        self._unwanted = self._read("negative_prompt", message.negative_prompt, known)
        self._image, self._mask = image, mask

    def _read(self, field: str, typed: str, known: reading.Vocabulary | None) -> str:
        """What the model is given of a text. The record keeps what was typed."""
        # Letters and their marks as one, as in what models were trained on.
        text = unicodedata.normalize("NFC", typed)
        if known is None or not text.strip():
            return text
        read = reading.read(text, known)
        first, *others = read.notices(self.card.name, field) or [""]
        if field == "prompt" and (read.dropped or read.is_empty):
            first = (
                f"{first} {self.card.description} For anything else choose a larger model, such as "
                "stable-diffusion-v1-5/stable-diffusion-v1-5: with `mix image.gen --model`, or in the option `models`."
            )
        self.note(*filter(None, [first, *others]))
        return read.text

    @property
    def origin(self) -> dict[str, Any]:
        """What the record of a picture says of the one that it was made from."""
        if self.message.image is None:
            return {}
        digests = {"image_sha256": hashlib.sha256(self.message.image).hexdigest()}
        if self.message.mask is not None:
            digests["mask_sha256"] = hashlib.sha256(self.message.mask).hexdigest()
        return {"task": self.settings.task, "strength": self.message.strength, **digests}

    def seeded(self, seed: int) -> dict[str, Any]:
        """What the record of a picture says of its noise, given its own seed."""
        if self.message.variation_strength is None:
            return {"seed": seed}
        return {
            "seed": self.base_seed,
            "variation_seed": seed,
            "variation_strength": self.message.variation_strength,
        }

    def prepare(self, pipeline: Any) -> tuple[Any, text_to_image.Call]:
        """The pipeline of this task, over the parts of `pipeline`, and its call."""
        text = text_to_image.Text(
            self._said,
            self._unwanted,
            self.width,
            self.height,
            self.settings.steps,
            self.settings.guidance_scale,
            self.message.guidance_scale is not None,
        )
        task, strength = self.settings.task, self.message.strength
        pipeline = offered.derive(pipeline, task)
        if task == "text_to_image":
            return pipeline, text_to_image.prepare(pipeline, text)
        assert self._image is not None
        image = images.resize(self._image, self.width, self.height)
        if task == "edit":
            return pipeline, edit.prepare(pipeline, text, image, strength != schema.STRENGTH)
        if task == "image_to_image":
            return pipeline, image_to_image.prepare(pipeline, text, image, strength)
        assert self._mask is not None
        mask = images.resize(self._mask, self.width, self.height)
        return pipeline, inpaint.prepare(pipeline, text, image, mask, strength)

    def finish(self, picture: Image) -> Image:
        """The picture in the size asked for; where a mask is black, the original to the pixel."""
        size = self.settings.width, self.settings.height
        picture = images.resize(picture, *size)
        if self._image is not None and self._mask is not None:
            original, mask = images.resize(self._image, *size), images.resize(self._mask, *size)
            picture.paste(original, mask=ImageOps.invert(mask))
        return picture

    def note(self, *sentences: str) -> None:
        self.notices += [sentence for sentence in dict.fromkeys(sentences) if sentence not in self.notices]


def _parts(
    id: str, index: int, data: bytes, record: dict[str, Any], format: str
) -> Iterator[schema.ImagePart]:
    whole, digest = memoryview(data), hashlib.sha256(data).hexdigest()
    for offset in range(0, len(data), schema.MAX_PART):
        yield schema.ImagePart(
            id=id,
            index=index,
            seed=record.get("variation_seed", record["seed"]),
            format=format,
            width=record["width"],
            height=record["height"],
            sha256=digest,
            size=len(data),
            offset=offset,
            data=whole[offset : offset + schema.MAX_PART],
        )
