"""The sidecar's end of the wire: start, main loop and shutdown (docs/protocol.md).

The main thread reads frames and hands each message to the engine, which answers from threads of its own
through `Port.send`. Heavy imports happen in a starting thread, so that reading and heartbeats never wait for them.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from typing import TYPE_CHECKING

import msgspec

from .. import schema
from ..device.lanes import request_id
from ..errors import ID_IN_USE, ImageError, missing_package
from . import exits, log, wire
from .heartbeat import Heartbeat
from .process import FRAMES_IN, FRAMES_OUT

if TYPE_CHECKING:
    from ..engine.engine import Engine

_CHUNK = 1024 * 1024
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_STOP_GRACE_S = 2.0
# If a write makes no progress for this long while the process is ending, it has no reader any more.
_UNREAD_S = 1.0

_logger = logging.getLogger(__name__)


class Port:
    """One sidecar: `run` returns its exit code."""

    def __init__(self, hello_timeout_s: float = 60.0) -> None:
        self._hello_timeout_s = hello_timeout_s
        self._generation = 0
        self._decoder = wire.FrameDecoder()
        self._write_lock = threading.Lock()
        self._writing_since: float | None = None
        self._heartbeat = Heartbeat(self._snapshot, self.send)
        self._engine: Engine | None = None
        self._ready = False
        self._draining = False
        self._drain_lock = threading.Lock()
        self._exit_code: int | None = None
        self._exit_since: float | None = None
        self._wakeup, self._wake = os.pipe()
        self._signals, self._signalled = os.pipe()
        for end in (self._wake, self._signalled):
            os.set_blocking(end, False)

    def run(self) -> int:
        self._heartbeat.start()
        log.install(self.send)
        # The handlers do nothing: the interpreter writes each signal's number to a pipe, and a thread that waits for
        # nothing else acts on it, even while this thread is blocked on a write.
        signal.set_wakeup_fd(self._signalled, warn_on_full_buffer=False)
        for number in _STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._obey, name="signals", daemon=True).start()

        hello_by = time.monotonic() + self._hello_timeout_s
        inputs = select.poll()
        inputs.register(FRAMES_IN, select.POLLIN)
        inputs.register(self._wakeup, select.POLLIN)
        while self._exit_code is None:
            wait_s = None if self._generation else hello_by - time.monotonic()
            if wait_s is not None and wait_s <= 0:
                return exits.NO_HELLO
            for fd, _ in inputs.poll(None if wait_s is None else wait_s * 1000):
                if fd == FRAMES_IN:
                    self._read()
        return self._exit_code

    def send(self, message: wire.Outgoing) -> None:
        """Write one complete frame; may be called from any thread."""
        buffers = wire.encode(message, self._generation)
        try:
            with self._write_lock:
                while buffers:
                    self._writing_since = time.monotonic()
                    written = os.writev(FRAMES_OUT, buffers)
                    self._writing_since = None
                    while buffers and written >= len(buffers[0]):
                        written -= len(buffers.pop(0))
                    if written:
                        buffers[0] = memoryview(buffers[0])[written:]
        except BrokenPipeError:
            # The application is gone. End at once, rather than let each working thread fail on its own write.
            os._exit(exits.OK)

    def _finish(self, code: int) -> None:
        self._exit_code, self._exit_since = code, time.monotonic()
        try:
            os.write(self._wake, b"\0")
        except BlockingIOError:
            pass

    def _snapshot(self) -> schema.Snapshot:
        snapshot = self._engine.snapshot() if self._engine else schema.Snapshot()
        if self._draining:
            snapshot.phase, snapshot.grant = "draining", 0
        return snapshot

    # Reading

    def _read(self) -> None:
        data = os.read(FRAMES_IN, _CHUNK)
        if not data:
            self._finish(exits.OK)
            return
        try:
            for body in self._decoder.feed(data):
                self._receive(body)
                if self._exit_code is not None:
                    return
        except wire.FramingError as error:
            self._refuse(None, ImageError("invalid_frame", str(error)))
            self._finish(exits.FRAMING_LOST)

    def _receive(self, body: bytes) -> None:
        try:
            message = wire.decode(body)
        except wire.InvalidMessage as error:
            self._refuse(error.id, error)
            # No other `hello` will follow.
            if error.type == "hello" and not self._generation:
                self._finish(exits.NO_HELLO)
            return
        id: str | None = getattr(message.content, "id", None)
        token = request_id.set(id)
        try:
            self._dispatch(message)
        except ImageError as error:
            self._refuse(id, error)
        except Exception:
            _logger.exception("%s failed", type(message.content).__name__)
            self._refuse(id, ImageError("internal", "the image service failed on this request"))
        finally:
            request_id.reset(token)

    def _dispatch(self, message: wire.Message) -> None:
        generation, content = message
        if isinstance(content, wire.Hello):
            self._greet(content)
            return
        if generation is not None and self._generation and generation != self._generation:
            raise ImageError("wrong_generation", f"g must be {self._generation}, got {generation}", "g")
        if isinstance(content, wire.Shutdown):
            self._drain(content.grace_ms / 1000)
            return
        engine = self._engine
        if engine is None or not self._ready:
            raise ImageError("unavailable", "the image service is still starting", retryable=True)

        match content:
            case wire.Cancel(id=id):
                engine.cancel(id)
            case wire.ListModels(id=id) if engine.is_open(id):
                raise ImageError("invalid_request", ID_IN_USE, "id")
            case wire.ListModels(id=id):
                self.send(schema.Models(id=id, models=engine.models()))
            case _ if self._draining:
                raise ImageError("unavailable", "the image service is shutting down", retryable=True)
            case schema.Request():
                engine.generate(content)
            case wire.LoadModel(id=id, model=model):
                engine.load_model(id, model)
            case wire.UnloadModel(id=id, model=model):
                engine.unload_model(id, model)

    def _refuse(self, id: str | None, error: ImageError) -> None:
        """Answer a message with an error that does not end the request that runs under its id."""
        self.send(
            schema.Failed(
                id=id,
                kind=error.kind,
                message=error.message,
                field=error.field,
                retryable=error.retryable,
                terminal=id is None or self._engine is None or not self._engine.is_open(id),
            )
        )

    # Start and end

    def _greet(self, hello: wire.Hello) -> None:
        if self._generation:
            raise ImageError("invalid_request", "hello must come once")
        self._generation = hello.g
        self._heartbeat.interval = hello.config.heartbeat_interval_ms / 1000
        self._heartbeat.beat()
        threading.Thread(target=self._start, args=(hello.config,), name="start", daemon=True).start()

    def _start(self, config: schema.Config) -> None:
        try:
            from ..engine.engine import Engine

            engine = Engine(config, self.send, self._heartbeat.beat)
            self._engine = engine
            facts = engine.start()
            # Set before `ready` is sent: the requests that the application then sends must be accepted.
            self._ready = True
            self.send(wire.Ready(pid=os.getpid(), **msgspec.structs.asdict(facts)))
        except ImageError as error:
            self._refuse(None, error)
            self._finish(exits.UNAVAILABLE)
        except ImportError as error:
            _logger.exception("an import failed")
            self._refuse(None, ImageError("unavailable", missing_package(error)))
            self._finish(exits.UNAVAILABLE)
        except Exception:
            _logger.exception("the engine could not start")
            self._refuse(None, ImageError("internal", "the image service could not start; see its log"))
            self._finish(exits.INTERNAL)

    def _obey(self) -> None:
        while True:
            if _STOP_SIGNALS & set(os.read(self._signals, 4096)):
                self._drain(_STOP_GRACE_S)

    def _drain(self, grace_s: float) -> None:
        threading.Thread(target=self._leave, args=(grace_s,), name="leave", daemon=True).start()
        engine = self._engine
        with self._drain_lock:
            again, self._draining = self._draining, True
        if engine is None or not self._ready or again:
            # Nothing runs yet, or this is the second request to stop.
            self._finish(exits.OK)
            return
        self._heartbeat.beat()
        threading.Thread(target=self._end, args=(engine, grace_s), name="drain", daemon=True).start()

    def _end(self, engine: Engine, grace_s: float) -> None:
        try:
            engine.drain(grace_s)
        except Exception:
            _logger.exception("draining failed")
            self._finish(exits.INTERNAL)
        else:
            self._finish(exits.OK)

    def _leave(self, grace_s: float) -> None:
        """End the process after its grace period even if its last messages cannot be written."""
        time.sleep(grace_s)
        while True:
            now = time.monotonic()
            for since in (self._writing_since, self._exit_since):
                if since is not None and now - since > _UNREAD_S:
                    os._exit(self._exit_code or exits.OK)
            time.sleep(_UNREAD_S / 4)
