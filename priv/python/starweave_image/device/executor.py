"""The one thread that computes: it runs the networks of all pictures, several calls in one pass where they stack.

A running pipeline gets stand-ins for its networks, whose forward waits here for its turn (`Executor.drawing`). So the
pipelines stay as diffusers ships them, and only one thread uses the device.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import clock, schema
from ..errors import ImageError, is_device_lost, is_out_of_memory
from . import devices, finite, stacking
from .batching import Batch, Batcher, Call
from .caps import Caps
from .durations import Durations, Kind
from .lanes import Lane

_logger = logging.getLogger(__name__)

_REMEMBERED_BYTES = 64 * 1024 * 1024
# A small encoder's answers have few bytes: the budget alone would keep thousands that are never used again.
_REMEMBERED_ANSWERS = 256
_IN_HALVES = "Drawn in smaller passes, because memory was short: it took longer, and may differ by rounding."
_IN_TILES = "Drawn in tiles, because memory was short: slight differences are possible."
_WIDENED = "Decoded in float32, because the picture left the range of float16."
# As port.INTERNAL: docs/protocol.md, exit codes.
_BROKEN = 70


class Network:
    """A network of a loaded model. `role` is its name in the pipeline, `name` is unique on this machine. With
    `remembers` its answers are cached, so that equal inputs are computed only once."""

    def __init__(self, name: str, role: str, module: Any, remembers: bool) -> None:
        self.name = name
        self.role = role
        self.module = module
        self.kind = type(module).__name__
        self.is_autoencoder = hasattr(module, "encode") and hasattr(module, "decode")
        self.memory = Memory(_REMEMBERED_BYTES, _REMEMBERED_ANSWERS) if remembers else None
        self._wide: Any = None

    def tiled(self) -> Callable[..., Any] | None:
        """Its decoder, working tile by tile: uses less memory, with hardly visible seams. None if it cannot do that."""
        if not hasattr(self.module, "enable_tiling"):
            return None
        twin = copy.copy(self.module)
        try:
            twin.enable_tiling()
        except NotImplementedError:
            return None
        decode: Callable[..., Any] = twin.decode
        return decode

    def widened(self) -> Callable[..., Any] | None:
        """Its decoder in float32, by a copy that is made once. None if the format has the range of float32 already, or
        if the weights are offloaded."""
        if self.module.dtype != torch.float16 or hasattr(self.module, "_hf_hook"):
            return None
        if self._wide is None:
            self._wide = copy.deepcopy(self.module).to(torch.float32)

        def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._wide.decode(latents.to(torch.float32), *args, **kwargs)

        return decode


def networks_of(pipeline: Any, where: str) -> dict[str, Network]:
    """The networks of a loaded pipeline by their names in it; `where` names the model, the device and the format."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {
        name: Network(f"{where} {name}", name, part, name.startswith("text_encoder"))
        for name, part in parts.items()
    }


class Memory:
    """A cache of a network's latest answers, limited in bytes and in number. For text encoders: all pictures of a
    request have the same prompt, and nearly all requests have the empty negative prompt."""

    def __init__(self, budget: int, most: int) -> None:
        self._budget = budget
        self._most = most
        self._held = 0
        self._lock = threading.Lock()
        self._answers: OrderedDict[str, tuple[int, Any]] = OrderedDict()

    def get(self, question: str) -> Any:
        with self._lock:
            if question not in self._answers:
                return None
            self._answers.move_to_end(question)
            return self._answers[question][1]

    def put(self, question: str, answer: Any) -> None:
        # A tensor that is a view keeps the whole storage of the other tensor in memory.
        storages = [tensor.untyped_storage() for tensor in _tensors(answer)]
        size = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        with self._lock:
            if question in self._answers or size > self._budget:
                return
            self._answers[question] = (size, answer)
            self._held += size
            while self._held > self._budget or len(self._answers) > self._most:
                _, (freed, _) = self._answers.popitem(last=False)
                self._held -= freed


@dataclass(eq=False)
class _Ticket(Call[Lane]):
    """A call that waits for the device, and its outcome."""

    network: Network
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stackable: stacking.Stackable | None
    label: str
    exact: bool
    question: str | None = None
    asked: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    done: bool = False
    result: Any = None
    error: Exception | None = None


class Gate:
    """A lock that many threads can share, or one can hold alone. While one waits to be alone, no other may enter."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._inside = 0
        self._alone = False
        self._waiting = 0

    def enter(self) -> None:
        with self._news:
            self._news.wait_for(lambda: not self._alone and not self._waiting)
            self._inside += 1

    def leave(self) -> None:
        with self._news:
            self._inside -= 1
            self._news.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._news:
            self._waiting += 1
            self._news.wait_for(lambda: not self._alone and not self._inside)
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._news:
                self._alone = False
                self._news.notify_all()


class Executor:
    """Runs the networks' calls for the pipelines. `evict` unloads idle models and tells whether there were any;
    `release` returns unused memory to the device."""

    def __init__(
        self, choice: devices.Choice, caps: Caps, evict: Callable[[], bool], release: Callable[[], None]
    ) -> None:
        self._choice = choice
        self._caps = caps
        self._evict = evict
        self._release = release
        self._news = threading.Condition()
        self._batcher: Batcher[Lane] = Batcher(self._most)
        self._gate = Gate()
        self._durations = Durations()
        threading.Thread(target=self._work, name="executor", daemon=True).start()

    @property
    def alone(self) -> Callable[[], Any]:
        """A context in which no pipeline and no network computes."""
        return self._gate.alone

    def at_work(self) -> schema.DeviceWork | None:
        """The device's current work, and since how long; None while it is idle."""
        current = self._durations.current
        if current is None:
            return None
        age_ms, usual_ms = (max(0, round(s * 1000)) for s in (clock.now() - current.begun, current.usual_s))
        return schema.DeviceWork(age_ms=age_ms, usual_ms=usual_ms, known=current.known)

    @contextmanager
    def drawing(self, lane: Lane, pipeline: Any, networks: dict[str, Network], alone: bool) -> Iterator[None]:
        """A context for one call of `pipeline` in the thread of `lane`, in which its networks wait for the device here.
        With `alone`, its calls share no pass with other calls."""
        for name, network in networks.items():
            if vars(pipeline).get(name) is network.module:
                vars(pipeline)[name] = self._twin(lane, network, alone)
        with lane.waiting():
            self._gate.enter()
        try:
            yield
        finally:
            self._gate.leave()
            with self._news:
                self._batcher.leave(lane)
                self._batcher.forget(("alone", lane))
                self._news.notify_all()

    def room(self) -> int | None:
        """How many pictures of the kinds now being drawn fit on the device at once, with one pass for each kind; None
        before the first measurement."""
        with self._news:
            active = {label: rows for key, rows in self._batcher.active().items() if (label := _label(key))}
        fit = [max(1, self._caps.ceiling(label) // rows) for label, rows in active.items()]
        return sum(fit) or None

    def _twin(self, lane: Lane, network: Network, alone: bool) -> Any:
        """A shallow copy of the network over the same weights, whose forward waits for the device."""
        module = network.module
        twin = copy.copy(module)
        surface = vars(twin)
        # The hooks run in the network itself; with copies in the twin they would run twice.
        surface |= {name: OrderedDict() for name in surface if name.endswith("_hooks")}

        def waits_for(run: Callable[..., Any], alone: bool = alone) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._call(lane, network, run, args, kwargs, alone)

        if not network.is_autoencoder:
            surface["forward"] = waits_for(module)
            return twin
        decode, encode = waits_for(module.decode), waits_for(module.encode, alone=True)
        surface["decode"] = lambda latents, *args, **kwargs: decode(latents.to(module.dtype), *args, **kwargs)
        surface["encode"] = lambda image, *args, **kwargs: encode(image.to(module.dtype), *args, **kwargs)
        # Some pipelines call `to` to widen the decoder for one picture. The weights are shared, so this must do
        # nothing.
        surface["to"] = lambda *_, **__: twin
        return twin

    # In the threads of the lanes

    def _call(
        self,
        lane: Lane,
        network: Network,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        alone: bool,
    ) -> Any:
        question = _question(args, kwargs) if network.memory else None
        if network.memory and question and (answer := network.memory.get(question)) is not None:
            return answer
        ticket = self._ticket(lane, network, run, args, kwargs, alone)
        ticket.question = question
        with lane.waiting():
            self._gate.leave()
            try:
                self._await(ticket)
            finally:
                self._gate.enter()
        lane.queued(ticket.begun - ticket.asked)
        if ticket.error is not None:
            try:
                raise ticket.error
            finally:
                # The error's traceback keeps this frame alive, and with it all arguments of the call.
                ticket.error = None
        return ticket.result

    def _ticket(
        self,
        lane: Lane,
        network: Network,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        alone: bool,
    ) -> _Ticket:
        forward = getattr(run, "forward", run)
        stackable = None if alone else stacking.read(network.kind, forward, args, kwargs)
        if stackable is None:
            return _Ticket(lane, ("alone", lane), 1, network, run, args, kwargs, None, "", alone)
        label = f"{network.name} {hashlib.sha256(repr(stackable.key).encode()).hexdigest()[:16]}"
        key = (id(network), label)
        return _Ticket(lane, key, stackable.rows, network, run, args, kwargs, stackable, label, alone)

    def _await(self, ticket: _Ticket) -> None:
        with self._news:
            self._batcher.add(ticket)
            self._news.notify_all()
        try:
            ticket.member.wait(lambda: ticket.done)
        except BaseException:
            with self._news:
                if not ticket.begun:
                    self._batcher.leave(ticket.member, ticket)
                    self._news.notify_all()
                # A pass that has begun cannot be cut short. Wait for its end: until then its model is in use, and
                # leaving earlier would let the cache evict it.
                self._news.wait_for(lambda: ticket.done or not ticket.begun)
            ticket.result = ticket.error = None
            raise

    # In the executor's own thread

    def _work(self) -> None:
        try:
            self._serve()
        except BaseException:
            # Without this thread no request would ever be answered. So end the process: the application notices that,
            # and its requests run again in the next process.
            _logger.critical("the executor failed", exc_info=True)
            os._exit(_BROKEN)

    def _serve(self) -> None:
        torch.set_grad_enabled(False)
        while True:
            self._caps.refresh()
            with self._news:
                while not isinstance(batch := self._batcher.next(time.monotonic()), Batch):
                    self._news.wait(batch)
                self._batcher.begin(batch)
                begun = time.monotonic()
                tickets: Any = batch.calls
                for ticket in tickets:
                    ticket.begun = begun
            self._gate.enter()
            try:
                self._compute(tickets)
            finally:
                self._durations.rest()
                self._gate.leave()
            with self._news:
                self._batcher.ran(batch, time.monotonic() - begun)
                for ticket in tickets:
                    ticket.done = True
                    ticket.member.wake.set()
                self._news.notify_all()
            # Drop our references, so that the lanes alone decide how long results stay in memory.
            del batch, tickets, ticket

    def _compute(self, tickets: Sequence[_Ticket]) -> None:
        """Run the tickets in one pass, or in several if memory or errors require it; each gets its result or its
        error."""
        error = self._attempt(tickets)
        if error is None:
            error = self._widen(tickets[0])
        if error is None:
            return
        if is_device_lost(error):
            # Every later call in this process would fail too; a new process can run them.
            raise error
        if not is_out_of_memory(error):
            if len(tickets) == 1:
                tickets[0].error = error
                return
            # One of them caused the error: run each by itself, so that only that one fails.
            for ticket in tickets:
                self._compute([ticket])
            return
        error.__traceback__ = None
        self._release()
        if self._evict() and self._attempt(tickets) is None:
            return
        rows, first = sum(ticket.rows for ticket in tickets), tickets[0]
        if first.stackable is not None and rows > 1:
            self._caps.overflow(first.label, rows)
            _logger.warning("%d rows of %s do not fit into memory together", rows, first.network.kind)
            self._release()
            if len(tickets) > 1:
                half = len(tickets) // 2
                self._compute(tickets[:half])
                self._compute(tickets[half:])
            else:
                self._compute_by_halves(first)
            return
        if not first.exact and first.network.is_autoencoder and (tiled := first.network.tiled()):
            _logger.warning("%s works tile by tile, for want of memory", first.network.kind)
            first.run = tiled
            if self._attempt(tickets) is None:
                first.member.notices.append(_IN_TILES)
                return
        self._release()
        first.error = error

    def _widen(self, ticket: _Ticket) -> Exception | None:
        """Decode a picture again in float32 if it left the range of float16. The next picture starts in float16 again:
        its bytes must not depend on the pictures before it."""
        network = ticket.network
        if not isinstance(ticket.error, ImageError) or not network.is_autoencoder:
            return None
        if ticket.run != network.module.decode or not finite.is_finite(ticket.args):
            return None
        try:
            decode = network.widened()
        except Exception as failure:
            return failure
        if decode is None:
            return None
        unsound, ticket.run, ticket.error = ticket.error, decode, None
        error = self._attempt([ticket])
        if error is None and ticket.error is None:
            ticket.member.notices.append(_WIDENED)
        elif ticket.error is not None:
            ticket.error = unsound
        return error

    def _compute_by_halves(self, ticket: _Ticket) -> None:
        whole = ticket.stackable
        assert whole is not None
        results = []
        for start, stop in ((0, whole.rows // 2), (whole.rows // 2, whole.rows)):
            part = whole.cut(start, stop)
            half = dataclasses.replace(ticket, rows=part.rows, stackable=part)
            self._compute([half])
            if half.error is not None:
                ticket.error = half.error
                return
            results.append(half.result)
        ticket.member.notices.append(_IN_HALVES)
        ticket.result = stacking.unite(results)

    def _attempt(self, tickets: Sequence[_Ticket]) -> Exception | None:
        first = tickets[0]
        self._durations.begin(clock.now(), _kind(tickets))
        try:
            if first.stackable is None:
                memory, question = first.network.memory, first.question
                # Another call with the same inputs may have been answered while this one waited.
                first.result = memory.get(question) if memory and question else None
                if first.result is None:
                    first.result = first.run(*first.args, **first.kwargs)
                    self._choice.synchronize()
                    self._durations.end(clock.now())
                    if memory and question:
                        memory.put(question, first.result)
                # Some text encoders have infinities in layers that are never read. If they matter, the denoiser's
                # result is not finite either.
                if memory is None and not finite.is_finite(first.result):
                    first.result, first.error = None, _not_finite(first)
                return None
            calls = [ticket.stackable for ticket in tickets if ticket.stackable]
            rows = [call.rows for call in calls]
            wanted = self._caps.wants(first.label, sum(rows))
            begun = time.monotonic()
            with self._choice.measured() if wanted else nullcontext(int) as peak:
                result = first.run(**stacking.stack(calls))
                # The device works asynchronously: without this, only the launch of the pass would be timed.
                self._choice.synchronize()
            self._durations.end(clock.now())
            self._caps.record(first.label, sum(rows), time.monotonic() - begun, peak())
            results = [result] if len(calls) == 1 else stacking.split(result, rows)
            sound = finite.is_finite(result)
        except Exception as error:
            # From here on the time is spent on recovery, and must not count as part of a pass.
            self._durations.begin(clock.now())
            return error
        for ticket, part in zip(tickets, results, strict=True):
            ticket.result = part
            if not sound and not finite.is_finite(part):
                ticket.result, ticket.error = None, _not_finite(ticket)
        return None

    def _most(self, key: Any) -> int:
        label = _label(key)
        return self._caps.rows(label) if label else 1


def _not_finite(ticket: _Ticket) -> ImageError:
    """The error for a result that is NaN or infinite: it names this network, or the one whose output was its input."""
    network = ticket.network
    named: dict[Any, Any] = ticket.kwargs | dict(enumerate(ticket.args))
    if ticket.stackable is not None:
        named = ticket.stackable.arguments
    # Attention masks hold infinities on purpose.
    given = {name: finite.is_finite(value) for name, value in named.items() if "mask" not in str(name)}
    sample = all(given.pop(name, True) for name in (0, *stacking.SAMPLES))
    dtype = str(getattr(network.module, "dtype", None)).removeprefix("torch.")
    return finite.error(network.role, network.kind, dtype, sample, list(given.values()))


def _label(key: Any) -> str | None:
    """The name under which the caps of a key are kept; None for calls that run alone."""
    return key[1] if isinstance(key[1], str) else None


def _kind(tickets: Sequence[_Ticket]) -> Kind:
    first = tickets[0]
    if first.stackable is None:
        tensors = list(_tensors([first.args, first.kwargs]))
        work = (first.network.name, getattr(first.run, "__name__", ""))
        return Kind(work, tuple(tuple(tensor.shape) for tensor in tensors), _size(tensors))
    size = sum(_size(list(_tensors(ticket.stackable.arguments))) for ticket in tickets if ticket.stackable)
    return Kind(first.network.name, (first.label, sum(ticket.rows for ticket in tickets)), size)


def _size(tensors: Sequence[torch.Tensor]) -> int:
    """The number of elements of the first input, as a measure of the network's work."""
    return tensors[0].numel() if tensors else 1


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _question(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """A digest of the arguments; None if one of them is neither a tensor nor a plain value."""
    digest = hashlib.sha256()
    for name, value in [*enumerate(args), *sorted(kwargs.items())]:
        if isinstance(value, torch.Tensor):
            data = value.detach().to("cpu").contiguous().flatten()
            digest.update(f"{name} {list(value.shape)} {value.dtype} {value.device}".encode())
            digest.update(data.view(torch.uint8).numpy().tobytes())
        elif value is None or isinstance(value, (bool, int, float, str)):
            digest.update(f"{name} {value!r}".encode())
        else:
            return None
    return digest.hexdigest()
