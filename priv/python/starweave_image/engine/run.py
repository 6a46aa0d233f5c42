"""The run of one request: from the request to the files of its results.

Each result is made by a thread that runs the *stock* pipeline call on a copy of the loaded pipeline. The executor runs
the networks' calls of all these threads, in common passes where possible (executor.py): so all pictures advance
together, and each thread notices a cancel or its deadline before its next step.
"""

from __future__ import annotations

import functools
import inspect
import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

from PIL.Image import Image

from .. import schema
from ..device.lanes import Job, Lane, request_id
from ..errors import ImageError, is_device_lost, is_out_of_memory
from ..pictures import images, schedulers
from ..tasks.settings import settle
from ..tasks.task import File
from ..weights.cache import Model
from ..weights.layout import unfit
from .models import Models
from .plan import Plan, Result

_logger = logging.getLogger(__name__)

# The exceptions that arguments or tensors raise if they do not fit together.
_MISFITS = (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)
# How many results of one request are made at the same time.
_ABREAST = 8
# Drawn seeds leave room for those of sixteen pictures below 2⁵³, which JavaScript, JSON and spreadsheets keep exact.
_DRAWN = 2**53 - 16


class Run:
    """`tell` is called with each event except the last; `in_company` tells whether other jobs run that use memory."""

    def __init__(
        self,
        job: Job,
        request: schema.Request,
        models: Models,
        default_model: str,
        versions: dict[str, str],
        tell: Callable[[schema.Event], None],
        in_company: Callable[[], bool],
    ) -> None:
        self._job = job
        self._request = request
        self._models = models
        self._default_model = default_model
        self._versions = versions
        self._tell = tell
        self._in_company = in_company

    def serve(self) -> schema.Done:
        """Run the request and return its last event, which the caller sends; raises the error that ends it."""
        job, request, models = self._job, self._request, self._models
        models.loaded()
        card = models.card(request.model or self._default_model, job)
        models.weights.require(card)
        named = "image" if request.images is None else "images[{}]"
        pictures = [images.decode(data, named.format(at)) for at, data in enumerate(request.pictures)]
        settings = settle(request, card, pictures[0].size if pictures else None)
        mask = None if request.mask is None else images.decode_mask(request.mask, pictures[0].size)
        # If the model's files are not on this machine yet, its scheduler is looked up once they are.
        own, config = models.weights.scheduler(card)
        wanted = request.scheduler or card.defaults.scheduler
        scheduler = own and schedulers.resolve(wanted, own, config, settings.steps, card.id)
        first = request.seed
        if first is None or first == -1:
            first = secrets.randbelow(_DRAWN)
        base = first if request.variation_seed is None else request.variation_seed
        seeds = [(base + index) % 2**63 for index in range(request.num_images)]
        job.check()
        self._tell(
            schema.Accepted(
                id=job.id,
                model=card.id,
                width=settings.width,
                height=settings.height,
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                scheduler=scheduler or wanted or "",
                seeds=seeds,
                format=request.format,
            )
        )
        with models.use(card, job, self._tell) as model:
            environment = self._environment(model)
            plan = Plan(
                request, card, settings, model, environment, pictures, mask, first, scheduler, self._tell
            )
            results = self._results(plan, seeds)
        done = schema.Done(
            id=job.id,
            model=card.id,
            parameters={**results[0].record, "seeds": seeds},
            timings=job.timings(),
            notices=plan.notices,
        )
        job.check()
        for index, result in enumerate(results):
            for part in result.parts(job.id, index):
                self._tell(part)
        return done

    def _environment(self, model: Model) -> dict[str, Any]:
        """Everything besides the request that determines the picture: the packages, the machine and the model."""
        choice = self._models.choice
        assert choice is not None
        return {
            **self._versions,
            "device": choice.device.name,
            "dtype": choice.dtype,
            "revision": model.revision,
            "checksum": model.checksum,
            **model.divided,
        }

    def _results(self, plan: Plan, seeds: list[int]) -> list[Result]:
        """The results, in order, each made by a lane of its own."""
        lanes = self._job.lanes(len(seeds))
        if len(lanes) == 1:
            return [self._result(lanes[0], plan, seeds[0])]
        slots = threading.Semaphore(_ABREAST)
        results: list[Future[Result]] = [Future() for _ in lanes]

        def make(lane: Lane, seed: int, result: Future[Result]) -> None:
            request_id.set(self._job.id)
            with slots:
                try:
                    result.set_result(self._result(lane, plan, seed))
                except BaseException as error:
                    result.set_exception(error)

        threads = [
            threading.Thread(target=make, args=each, name=f"request {self._job.id}", daemon=True)
            for each in zip(lanes, seeds, results, strict=True)
        ]
        for thread in threads:
            thread.start()
        ended, _ = wait(results, return_when=FIRST_EXCEPTION)
        failure = next((error for each in results if each in ended and (error := each.exception())), None)
        if failure is not None:
            self._job.abandon()
        for thread in threads:
            thread.join()
        if failure is not None:
            try:
                raise failure
            finally:
                # The exception keeps this frame alive, and with it the other results.
                del failure
        return [result.result() for result in results]

    def _result(self, lane: Lane, plan: Plan, seed: int) -> Result:
        self._job.check()
        lane.begin()
        try:
            made, scheduler = self._make(lane, plan, seed)
            plan.note(*lane.notices)
            self._job.check()
            lane.enter("encoding")
            self._tell(lane.progress())
            return plan.result(made, seed, scheduler)
        finally:
            # Needed after a failure too: the request would seem stuck while its other pictures are drawn.
            lane.finish()

    def _make(self, lane: Lane, plan: Plan, seed: int) -> tuple[Image | File, str]:
        """One result, a picture in the size at which the model draws, and the name of the scheduler used."""
        import torch

        from ..pictures.noise import Between

        task, executor = plan.settings.task, self._models.executor
        assert executor is not None
        with plan.model.borrow() as pipeline:
            if plan.scheduler != type(pipeline.scheduler).__name__:
                pipeline.scheduler = schedulers.make(plan.scheduler, pipeline.scheduler.config)
            scheduler = schedulers.name_of(plan.scheduler, pipeline.scheduler)
            pipeline, call = plan.prepare(pipeline)
            plan.note(*call.notices)
            output = None
            noise = torch.Generator("cpu").manual_seed(seed)
            towards: AbstractContextManager[Any] = nullcontext()
            if (fraction := plan.request.variation_strength) is not None:
                base = torch.Generator("cpu").manual_seed(plan.base_seed)
                noise, towards = base, Between(base, noise, fraction)
            with (
                towards,
                executor.drawing(lane, pipeline, plan.model.networks, plan.request.reproducible),
                plan.previews.watch(pipeline, lane.image) if plan.previews else nullcontext(),
                self._hooked(lane, pipeline, noise),
            ):
                try:
                    output = pipeline(**call.arguments, generator=noise, output_type="pil")
                except ImageError:
                    raise
                except Exception as error:
                    if not is_out_of_memory(error):
                        _blame(plan, error)
                plan.note(*plan.model.notices)
            # Raised outside of `except`: as the context of the new error, the old one would keep all its tensors alive.
            if output is None:
                raise ImageError(
                    "out_of_memory",
                    f"{plan.width}x{plan.height} pixels with {plan.card.id} need more device memory than is free",
                    # A request that had the device to itself will not fit later either.
                    retryable=self._in_company(),
                )
        if any(getattr(output, "nsfw_content_detected", None) or []):
            raise ImageError("unsafe_content", "the model's safety checker withheld the picture")
        plan.model.proven.add(task.name)
        return task.result(output), scheduler

    @contextmanager
    def _hooked(self, lane: Lane, pipeline: Any, noise: Any) -> Iterator[None]:
        """Make the scheduler's `step` report each step.

        Every pipeline calls its scheduler once per step, while only some take a callback. The hook may raise, which
        ends the call and leaves the weights usable.
        """
        scheduler = pipeline.scheduler
        step = scheduler.step
        draws = "generator" in inspect.signature(step).parameters
        # Pipelines that start from an image skip the first steps.
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
                # Not every pipeline passes its generator on. Without one, the noise would come from the generator that
                # all requests share.
                kwargs["generator"] = noise
            result = step(*args, **kwargs)
            lane.stepped(chosen[0] if chosen else len(scheduler.timesteps))
            self._tell(lane.progress())
            self._job.check()
            if lane.step >= lane.steps:
                lane.enter("decoding")
                self._tell(lane.progress())
            return result

        scheduler.step = hooked
        try:
            yield
        finally:
            # The hooks form reference cycles with the objects they are set on, which would keep latents alive for long.
            del scheduler.step
            vars(pipeline).pop("get_timesteps", None)


def _blame(plan: Plan, error: Exception) -> NoReturn:
    """Raise the request's error for an error of a stock pipeline. If the model has never done this task, its parts do
    not fit together and it cannot do the task; if it has, the model is not to blame."""
    task = plan.settings.task.name
    if task in plan.model.proven or not isinstance(error, _MISFITS) or is_device_lost(error):
        raise error
    _logger.error("%s failed at its first %s", plan.card.id, task, exc_info=error)
    why = f"cannot do {task}: its parts do not fit together; the log has the details"
    raise unfit(plan.card.id, why) from None
