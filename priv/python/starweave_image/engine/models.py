"""The models of this machine: their cards, and the loaded ones."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, cast

from .. import paths, schema
from ..device.caps import Caps
from ..device.lanes import Job
from ..errors import ImageError, is_out_of_memory
from ..tasks import registry
from ..weights.cache import Model, ModelCache, release_memory
from ..weights.catalog import ModelCard, State
from ..weights.find import Weights
from ..weights.hub import Plan
from ..weights.integrity import Check
from ..weights.load import divide, load_pipeline

if TYPE_CHECKING:
    from ..device.devices import Choice
    from ..device.executor import Executor

_logger = logging.getLogger(__name__)

_MEMORY_SHARE = 0.85


class Models:
    """The cards of the models and, after `start`, the loaded models: `choice`, `cache` and `executor` are None until
    then. Methods may be called from any thread."""

    def __init__(self, config: schema.Config, make_room: Callable[[Plan], None]) -> None:
        """`make_room` is called before the weights of a model are downloaded."""
        self._config = config
        self.weights = Weights(config.models, config.offline, registry.offered, make_room)
        self.choice: Choice | None = None
        self.cache: ModelCache | None = None
        self.executor: Executor | None = None

    def start(self, choice: Choice, changed: Callable[[], None]) -> None:
        """`changed` is called after every load and unload. Imports torch."""
        from ..device.executor import Executor

        config, budget = self._config, self._config.memory_budget
        cache = ModelCache(
            self._load,
            int(choice.device.total_bytes * _MEMORY_SHARE) if budget is None else budget,
            changed,
            # On a CPU there is no other memory to park a model in.
            0 if choice.device.kind == "cpu" else config.ram_budget,
            [self.weights.card(name, fetch=False).id for name in config.pinned],
        )
        caps = Caps(paths.measured(), choice.free_bytes)
        self.choice = choice
        self.executor = Executor(choice, caps, cache.make_room, release_memory)
        self.cache = cache

    def loaded(self) -> ModelCache:
        """The cache of loaded models; raises `unavailable` before `start`."""
        if self.cache is None:
            raise ImageError("unavailable", "the image service is still starting", retryable=True)
        return self.cache

    def told(self) -> list[schema.Card]:
        """All cards, with their states."""
        return [card.told(*self._state(card), **self._loaded_fields(card)) for card in self.weights.cards()]

    def card(self, name: str, job: Job) -> ModelCard:
        """The card of an id or alias. An unknown one may have to be fetched from the hub; a cancel or the deadline of
        the job interrupts that wait."""
        card = self.weights.card(name, fetch=False)
        if card.pipeline:
            return card
        answer: Future[ModelCard] = Future()

        def ask() -> None:
            try:
                answer.set_result(self.weights.card(name))
            except Exception as error:
                answer.set_exception(error)

        answer.add_done_callback(lambda _: job.wake())
        threading.Thread(target=ask, name=f"card {card.id}", daemon=True).start()
        job.first.wait(answer.done)
        return answer.result()

    @contextmanager
    def use(self, card: ModelCard, job: Job, tell: Callable[[schema.Event], None]) -> Iterator[Model]:
        """A context with the card's model; if it is not loaded, the job waits for its load."""

        def patiently(model: Future[Model]) -> None:
            if not model.done():
                job.first.enter("loading")
                tell(job.first.progress())
                model.add_done_callback(lambda _: job.wake())
                with job.first.waiting():
                    job.first.wait(model.done)

        with self.loaded().use(card, patiently) as model:
            yield model

    def _load(self, card: ModelCard, room: Callable[[int], AbstractContextManager[None]]) -> Model:
        assert self.choice is not None and self.cache is not None and self.executor is not None
        config, choice, cache = self._config, self.choice, self.cache
        source = self.weights.obtain(card)
        check = Check(card.id, source.screened.weights, self.weights.pins(card))
        compiled = config.compile == "blocks"
        load = functools.partial(
            load_pipeline, source, card.id, choice, self.executor.alone, config.offload, compiled
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
                cache.make_room()
                pipeline = load()
            # The weights' checksums are verified here, before the model draws anything.
            whole = check.wait()
            # A hub revision identifies its files; a local folder may have been changed, so it needs the digest.
            digest = whole if source.revision is None else None
            model = Model(card, pipeline, source.folder, source.revision, digest, choice)
            model.divided = divide(
                pipeline, config.attention, config.vae, choice.device, model.bytes, card.most_pixels
            )
        model.load_s = time.monotonic() - begun
        check.again(lambda sentence: cache.condemn(card.id, sentence))
        _logger.info("%s loaded in %.1f s, %d MB", card.id, time.monotonic() - begun, model.bytes // 10**6)
        return model

    def _state(self, card: ModelCard) -> tuple[State, str | None]:
        state, error = self.cache.state(card.id) if self.cache else (None, None)
        if state is None:
            return self.weights.state(card)
        return cast(State, state), error

    def _loaded_fields(self, card: ModelCard) -> dict[str, Any]:
        report = self.cache.report(card.id) if self.cache else None
        if report is None:
            return {}
        return {
            "bytes": report.bytes,
            "parked": report.parked,
            "idle_ms": round(report.idle_s * 1000),
            "load_ms": round(report.load_s * 1000),
        }
