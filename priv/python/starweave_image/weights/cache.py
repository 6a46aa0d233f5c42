"""Loaded models: each is loaded once for all who wait for it, and the longest unused make room for the next.

There are two tiers. What must leave the device is parked in main memory where there is room for it, from where it comes
back in a fraction of a load; on a CPU both are the same memory, and there is one tier. A load runs in a thread of its
own and goes on when those who asked for it have left.
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
    """A loaded pipeline. `borrow` gives a copy of it for one request; all copies share the weights. `notices` are what
    whoever has it draw should know."""

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
        # The tasks of which it has made a picture.
        self.proven: set[str] = set()
        # Which networks work part by part, for want of memory.
        self.divided: dict[str, str] = {}
        self._home = choice.device.id
        # Its networks go to the device one after another, when they are called.
        self.offloaded = any(hasattr(part, "_hf_hook") for part in pipeline.components.values())
        # A tokenizer keeps the padding and truncation of its last call, and a large one takes a second to
        # copy: sets of them are lent, and made from the spare one, which nobody uses, when all are out.
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
        """Take it from the device to main memory."""
        # One that is offloaded is there already, but for the network that works.
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
        # At the end of a call it would send the weights away from others that are at work with them.
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
        # Done when it is back on the device; None while it is not on its way there.
        self.coming: Future[Model] | None = None
        # Since when it is loaded, or comes back; None while it waits for its turn.
        self.begun: float | None = clock.now()
        # Held by whoever moves it between the tiers.
        self.moving = threading.Lock()


Load = Callable[[ModelCard, Callable[[int], AbstractContextManager[None]]], Model]
"""Loads a card's model. It enters what the second argument gives for so many bytes when its files are here and the
loading itself begins: one at a time, with room made for it."""


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
            # Nobody parks what is in use.
            if not entry.parked:
                return entry.model
            if entry.coming is None:
                entry.coming, entry.begun = Future(), None
                # Until it is back, whoever gives up meanwhile.
                entry.users += 1
                threading.Thread(target=self._bring_back, args=(entry,), daemon=True).start()
            return entry.coming

    def _bring_back(self, entry: _Entry) -> None:
        model, coming, failure = entry.model.result(), entry.coming, None
        assert coming is not None
        # In the order of those who park others while they load.
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
        # The last reference goes before the device is asked to give its memory back.
        del entry
        release_memory()
        self._changed()

    def condemn(self, id: str, error: str) -> None:
        """Let nobody else have a model whose weights turned out to be damaged: whoever asks next has it loaded anew, or is
        told why not. Whoever has it goes on."""
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
        """What is being loaded, without what waits for its turn."""
        with self._lock:
            now = clock.now()
            at_work = [(id, e) for id, e in self._entries.items() if e.coming or not e.model.done()]
            begun = [(id, entry.begun) for id, entry in at_work if entry.begun]
        return [schema.Load(model=id, age_ms=max(0, round((now - since) * 1000))) for id, since in begun]

    def report(self, id: str) -> Report | None:
        """What is known of a model that is loaded."""
        with self._lock:
            entry = self._entries.get(id)
            if entry is None or not entry.model.done() or entry.model.exception():
                return None
            model = entry.model.result()
            idle_s = 0.0 if entry.users else time.monotonic() - entry.used
            return Report(model.bytes, entry.parked, idle_s, model.load_s)

    def state(self, id: str) -> tuple[str | None, str | None]:
        """`loaded`, `loading` or `failed`, with the last error; None where nothing was tried."""
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
            # One at a time: two together would each find room for themselves.
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
            # What is in use now may be gone later; what has the device for itself does not fit.
            with self._lock:
                crowded = any(entry.users for other, entry in self._entries.items() if other != id)
            words = f"there is not enough device memory to load {id}"
            return ImageError("out_of_memory", words, retryable=crowded)
        _logger.error("loading %s failed", id, exc_info=error)
        return ImageError("model_load_failed", f"{id} could not be loaded; see the log")

    def make_room(self, wanted: int | None = None) -> bool:
        """Let idle models go until `wanted` bytes more fit into the budget; without a number, all of them. Whether any
        went."""
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
            # The longest unused have to leave main memory for those that leave the device now. One that is parked and
            # has users is on its way back.
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
        # Before the device is asked to give the memory back, the last reference must be gone.
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
            # Main memory is short too: it is loaded again when it is asked for.
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
        # A fresh one for each who waited: an exception keeps the traceback of whoever raised it.
        raise ImageError(error.kind, error.message, error.field, error.retryable)


@dataclass(frozen=True)
class Report:
    """A loaded model: its weights in bytes, whether it is parked, seconds since its last use, and those of its load."""

    bytes: int
    parked: bool
    idle_s: float
    load_s: float


def release_memory() -> None:
    """Give back to the device what nothing refers to any more."""
    import gc

    import torch

    gc.collect()
    for device in (torch.cuda, torch.xpu, torch.mps):
        if device.is_available():
            device.empty_cache()
