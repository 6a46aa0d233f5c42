"""Loaded models: each is loaded once for all who wait for it, and the longest unused make room for the next.

There are two tiers. A model that must leave the device is parked in main memory if there is room, and returns from there in
a fraction of a load's time. On a CPU both are the same memory, so there is one tier. A load runs in its own thread and
goes on when all who asked for it have left.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import clock, schema
from ..device.devices import Choice
from ..errors import ImageError, is_out_of_memory
from .catalog import ModelCard

_logger = logging.getLogger(__name__)


class Model:
    """A loaded pipeline. `borrow` gives a copy of it for one request; all copies share the weights. `notices` go to every
    request that it draws."""

    def __init__(
        self,
        card: ModelCard,
        pipeline: Any,
        folder: Path,
        revision: str | None,
        checksum: str | None,
        choice: Choice,
    ) -> None:
        self.card = card
        self.pipeline = pipeline
        self.folder = folder
        self.revision = revision
        self.checksum = checksum
        self.bytes = _weight_bytes(pipeline)
        self.load_s = 0.0
        # The tasks for which it has drawn a picture.
        self.proven: set[str] = set()
        # Which networks work in parts, because memory is short.
        self.divided: dict[str, str] = {}
        self._home = choice.device.id
        # Whether each network goes to the device only when it is called.
        self.offloaded = any(hasattr(part, "_hf_hook") for part in pipeline.components.values())
        # A tokenizer keeps the padding and truncation of its last call, and a large one takes a second to copy. So sets
        # of them are lent; when all are lent, a new one is copied from the spare one, which is never used itself.
        own = {name: part for name, part in pipeline.components.items() if _is_tokenizer(part)}
        self._tokenizers = [own]
        self._spare = copy.deepcopy(own)
        self._lock = threading.Lock()
        from ..device.executor import networks_of

        where = f"{card.id} {revision or checksum} {choice.device.name} {choice.dtype}"
        self.notices: list[str] = []
        if choice.backend == "openvino":
            from ..device import openvino

            where += " openvino"
            self.bytes += openvino.attach(pipeline, pipeline.view.folder, where, self.notices.append)
        self.networks = networks_of(pipeline, where)

    def park(self) -> None:
        """Move it from the device to main memory."""
        # An offloaded one is there already, except for the network that works.
        if not self.offloaded:
            self.pipeline.to("cpu")
            release_memory()

    def unpark(self) -> None:
        if not self.offloaded:
            self.pipeline.to(self._home)

    @contextmanager
    def borrow(self) -> Iterator[Any]:
        """A pipeline whose per-call state, scheduler and tokenizers are its own."""
        with self._lock:
            tokenizers = self._tokenizers.pop() if self._tokenizers else copy.deepcopy(self._spare)
        pipeline = copy.copy(self.pipeline)
        # At the end of a call it would offload weights that other requests use.
        pipeline.maybe_free_model_hooks = _nothing
        for name, part in tokenizers.items():
            setattr(pipeline, name, part)
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        try:
            yield pipeline
        finally:
            with self._lock:
                self._tokenizers.append(tokenizers)


def _nothing() -> None:
    pass


def _is_tokenizer(part: Any) -> bool:
    from transformers import PreTrainedTokenizerBase

    return isinstance(part, PreTrainedTokenizerBase)


def _weight_bytes(pipeline: Any) -> int:
    import torch

    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Entry:
    def __init__(self, card: ModelCard) -> None:
        self.card = card
        self.model: Future[Model] = Future()
        self.users = 0
        self.turn = 0
        self.used = time.monotonic()
        self.parked = False
        # Done when it is back on the device; None unless it is on its way there.
        self.coming: Future[Model] | None = None
        # When its load or return began; None while it waits for its turn.
        self.begun: float | None = clock.now()
        # Held while it is moved between the tiers.
        self.moving = threading.Lock()


Load = Callable[[ModelCard, Callable[[int], AbstractContextManager[None]]], Model]
"""Loads a card's model. When its files are here, it enters the context manager that the second argument returns for its
size in bytes: that lets one load in at a time, and makes room for it."""


class ModelCache:
    """At most `budget` bytes of models on the device and `parked_budget` beside it, as far as those in use and those that
    are `pinned` allow. `changed` is called after every load and unload."""

    def __init__(
        self,
        load: Load,
        budget: int,
        changed: Callable[[], None],
        parked_budget: int = 0,
        pinned: Collection[str] = (),
    ) -> None:
        self._load = load
        self._budget = budget
        self._parked_budget = parked_budget
        self._pinned = frozenset(pinned)
        self._changed = changed
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._errors: dict[str, str] = {}
        self._clock = 0

    @contextmanager
    def use(self, card: ModelCard, wait: Callable[[Future[Model]], None]) -> Iterator[Model]:
        """The model, loaded if need be; `wait` blocks until the future is done, or raises to give up."""
        entry = self._enter(card)
        try:
            _await(entry.model, wait)
            _await(self._fetch(entry), wait)
            yield entry.model.result()
        finally:
            with self._lock:
                entry.users -= 1
                entry.used = time.monotonic()

    def _fetch(self, entry: _Entry) -> Future[Model]:
        """The entry's model, done when it is on the device."""
        with self._lock:
            # A model in use is never parked.
            if not entry.parked:
                return entry.model
            if entry.coming is None:
                entry.coming, entry.begun = Future(), None
                # Held until it is back, also if the one who asked gives up.
                entry.users += 1
                threading.Thread(target=self._bring_back, args=(entry,), daemon=True).start()
            return entry.coming

    def _bring_back(self, entry: _Entry) -> None:
        model, coming, failure = entry.model.result(), entry.coming, None
        assert coming is not None
        # Locks in the same order as a load that parks other models, so that neither blocks the other.
        with self._loading, entry.moving:
            entry.begun = clock.now()
            try:
                self.make_room(model.bytes)
                model.unpark()
                _logger.info("%s back on the device in %.2f s", entry.card.id, clock.now() - entry.begun)
            except Exception as error:
                failure = self._unexpected(entry.card.id, error)
            with self._lock:
                entry.parked, entry.coming = failure is not None, None
                entry.users -= 1
        if failure is None:
            coming.set_result(model)
        else:
            coming.set_exception(failure)

    def unload(self, id: str) -> None:
        """Forget an idle model, loaded or not; raises `invalid_request` for one in use."""
        with self._lock:
            entry = self._entries.get(id)
            if entry is None:
                return
            if entry.users or not entry.model.done():
                why = f"{id} is in use and cannot be unloaded now"
                raise ImageError("invalid_request", why, "model", retryable=True)
            del self._entries[id]
        # The last reference must be gone before the device frees the memory.
        del entry
        release_memory()
        self._changed()

    def condemn(self, id: str, error: str) -> None:
        """Withdraw a model whose weights turned out to be damaged. Requests that use it go on; the next one loads it
        again, or gets the reason why it cannot."""
        with self._lock:
            self._entries.pop(id, None)
            self._errors[id] = error
        self._changed()

    def resident(self) -> list[str]:
        with self._lock:
            return sorted(id for id, entry in self._entries.items() if entry.model.done())

    def loading(self) -> bool:
        with self._lock:
            return any(not entry.model.done() or entry.coming for entry in self._entries.values())

    def loads(self) -> list[schema.Load]:
        """The models that are being loaded, without those that wait for their turn."""
        with self._lock:
            now = clock.now()
            at_work = [(id, e) for id, e in self._entries.items() if e.coming or not e.model.done()]
            begun = [(id, entry.begun) for id, entry in at_work if entry.begun]
        return [schema.Load(model=id, age_ms=max(0, round((now - since) * 1000))) for id, since in begun]

    def report(self, id: str) -> Report | None:
        """The facts about a loaded model."""
        with self._lock:
            entry = self._entries.get(id)
            if entry is None or not entry.model.done() or entry.model.exception():
                return None
            model = entry.model.result()
            idle_s = 0.0 if entry.users else time.monotonic() - entry.used
            return Report(model.bytes, entry.parked, idle_s, model.load_s)

    def state(self, id: str) -> tuple[str | None, str | None]:
        """`loaded`, `loading` or `failed`, with the last error; None if no load was tried."""
        with self._lock:
            entry, error = self._entries.get(id), self._errors.get(id)
        if entry is not None:
            return ("loaded", None) if entry.model.done() else ("loading", error)
        return ("failed" if error else None), error

    def _enter(self, card: ModelCard) -> _Entry:
        with self._lock:
            entry = self._entries.get(card.id)
            fresh = entry is None
            if entry is None:
                entry = self._entries[card.id] = _Entry(card)
            self._clock += 1
            entry.users += 1
            entry.turn = self._clock
        if fresh:
            threading.Thread(target=self._fill, args=(entry,), name=f"load {card.id}", daemon=True).start()
            self._changed()
        return entry

    def _fill(self, entry: _Entry) -> None:
        id = entry.card.id

        @contextmanager
        def room(wanted: int) -> Iterator[None]:
            entry.begun = None
            # One at a time: two together would both take the same room.
            with self._loading:
                entry.begun = clock.now()
                self.make_room(wanted)
                yield

        try:
            model = self._load(entry.card, room)
        except Exception as error:
            known = error if isinstance(error, ImageError) else self._unexpected(id, error)
            with self._lock:
                del self._entries[id]
                self._errors[id] = known.message
            entry.model.set_exception(known)
        else:
            with self._lock:
                self._errors.pop(id, None)
            entry.model.set_result(model)
        self._changed()

    def _unexpected(self, id: str, error: Exception) -> ImageError:
        if is_out_of_memory(error):
            # Models in use may be gone later. A model that does not fit on an empty device never will.
            with self._lock:
                crowded = any(entry.users for other, entry in self._entries.items() if other != id)
            words = f"there is not enough device memory to load {id}"
            return ImageError("out_of_memory", words, retryable=crowded)
        _logger.error("loading %s failed", id, exc_info=error)
        return ImageError("model_load_failed", f"{id} could not be loaded; see the log")

    def make_room(self, wanted: int | None = None) -> bool:
        """Remove idle models until `wanted` bytes more fit into the budget; without a number, remove all. Says
        whether any was removed."""
        wanted = self._budget if wanted is None else wanted
        parking: list[_Entry] = []
        leaving: list[str] = []
        with self._lock:
            loaded = [
                entry
                for entry in sorted(self._entries.values(), key=lambda entry: entry.turn)
                if entry.model.done() and not entry.model.exception()
            ]
            held = sum(entry.model.result().bytes for entry in loaded if not entry.parked)
            for entry in loaded:
                if held + wanted <= self._budget:
                    break
                if entry.users or entry.parked or entry.card.id in self._pinned:
                    continue
                held -= entry.model.result().bytes
                entry.parked = True
                parking.append(entry)
            # The longest unused models leave main memory to make room for those that leave the device. A parked one
            # with users is on its way back.
            aside = [entry for entry in loaded if entry.parked and not entry.users]
            while sum(entry.model.result().bytes for entry in aside) > self._parked_budget:
                leaving.append(aside.pop(0).card.id)
                del self._entries[leaving[-1]]
            parking = [entry for entry in parking if entry.card.id not in leaving]
        if not parking and not leaving:
            return False
        for entry in parking:
            with entry.moving:
                if entry.parked and not self._park(entry):
                    leaving.append(entry.card.id)
        parked = [entry.card.id for entry in parking if entry.card.id not in leaving]
        if parked:
            _logger.info("%s parked in main memory", ", ".join(parked))
        # The last reference must be gone before the device frees the memory.
        del loaded, parking, aside
        entry = None  # type: ignore[assignment]
        if leaving:
            release_memory()
            _logger.info("%s left memory to make room", ", ".join(leaving))
        self._changed()
        return True

    def _park(self, entry: _Entry) -> bool:
        try:
            entry.model.result().park()
        except Exception:
            # Main memory is short too: the model is removed, and loaded again when a request needs it.
            _logger.warning("%s could not be parked", entry.card.id, exc_info=True)
            with self._lock:
                if self._entries.get(entry.card.id) is entry:
                    del self._entries[entry.card.id]
            return False
        return True


def _await(model: Future[Model], wait: Callable[[Future[Model]], None]) -> None:
    wait(model)
    error = model.exception()
    if isinstance(error, ImageError):
        # A new exception for each waiting caller: one that is raised twice would collect both tracebacks.
        raise ImageError(error.kind, error.message, error.field, error.retryable)


@dataclass(frozen=True)
class Report:
    """A loaded model: its weights in bytes, whether it is parked, seconds since its last use, and those of its load."""

    bytes: int
    parked: bool
    idle_s: float
    load_s: float


def release_memory() -> None:
    """Free the device memory that nothing refers to any more."""
    import gc

    import torch

    gc.collect()
    for device in (torch.cuda, torch.xpu, torch.mps):
        if device.is_available():
            device.empty_cache()
