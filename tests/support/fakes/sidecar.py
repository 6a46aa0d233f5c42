"""An honest sidecar of docs/protocol.md without a model: the base of the fakes beside it.

Standard library only. Its picture is a few bytes that tell prompt and seed. A request whose prompt is "hold"
runs until it is cancelled or until one with the prompt "release" comes; the parameters of one whose prompt is
"report" say what this process saw so far.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import struct
import sys
import threading
import time
from typing import Any

FRAMES_IN = 3
FRAMES_OUT = 4
Message = dict[str, Any]


class Sidecar:
    def __init__(self) -> None:
        # Whatever becomes of the test, no fake stays for long.
        signal.alarm(300)
        self.generation = 0
        self.phase = "starting"
        self.interval_s = 0.05
        self.capacity = 8
        self.config: Message = {}
        self.running: dict[str, Message] = {}
        self.accepted: dict[str, float] = {}
        self.received: list[list[str | None]] = []
        self.started = time.monotonic()
        self._sequence = 0
        self._lock = threading.RLock()
        self._connect_log(sys.argv[sys.argv.index("--log-socket") + 1])

    def run(self) -> None:
        threading.Thread(target=self.beat_forever, daemon=True).start()
        while (message := self.read()) is not None:
            self.received.append([message["t"], message.get("id")])
            getattr(self, "on_" + message["t"])(message)
        os._exit(0)

    # Messages from the application

    def on_hello(self, hello: Message) -> None:
        self.generation = hello["g"]
        self.config = hello["config"]
        self.capacity = self.config["capacity"]
        self.interval_s = self.config["heartbeat_interval_ms"] / 1000
        self.phase = "ready"
        self.send("ready", **self.ready())

    def ready(self) -> Message:
        return {
            "v": 1,
            "pid": os.getpid(),
            "versions": {"python": "3"},
            "device": "cpu",
            "device_name": "no device",
            "dtype": "float32",
            "capacity": self.capacity,
            "default_model": "starweave/tiny",
            "catalog": [card("available")],
        }

    def on_generate(self, request: Message) -> None:
        self.accept(request)
        prompt = request["prompt"]
        if prompt == "release":
            for held in list(self.running.values()):
                self.finish(held)
        elif prompt != "hold":
            self.finish(request)

    def on_cancel(self, message: Message) -> None:
        if self.running.pop(message["id"], None):
            self.fail(message["id"], "cancelled", "the request was cancelled")

    def on_load_model(self, message: Message) -> None:
        self.send("done", id=message["id"])

    def on_unload_model(self, message: Message) -> None:
        self.fail(message["id"], "model_not_found", "no such model is loaded")

    def on_models(self, message: Message) -> None:
        self.send("models", id=message["id"], models=[card("loaded")])

    def on_shutdown(self, message: Message) -> None:
        for id in list(self.running):
            self.fail(id, "cancelled", "the image service is shutting down")
        os._exit(0)

    # The life of a request

    def accept(self, request: Message) -> None:
        self.running[request["id"]] = request
        self.accepted[request["id"]] = time.monotonic()
        self.send(
            "accepted",
            id=request["id"],
            model="starweave/tiny",
            width=64,
            height=64,
            steps=4,
            guidance_scale=1.0,
            scheduler=None,
            seeds=[request["seed"] + index for index in range(request["num_images"])],
            format=request["format"],
        )
        self.beat()
        self.progress(request, 1)

    def progress(self, request: Message, step: int) -> None:
        self.send(
            "progress", id=request["id"], phase="denoising", image=0, step=step, steps=4, elapsed_ms=step
        )

    def finish(self, request: Message) -> None:
        self.progress(request, 4)
        for index in range(request["num_images"]):
            self.image(request, index)
        self.done(request)

    def image(self, request: Message, index: int, sha256: str | None = None) -> None:
        seed = request["seed"] + index
        file = f"{request['prompt']}, seed {seed}".encode()
        half = len(file) // 2
        for offset, data in ((0, file[:half]), (half, file[half:])):
            self.send(
                "image",
                id=request["id"],
                index=index,
                seed=seed,
                format=request["format"],
                width=64,
                height=64,
                sha256=sha256 or hashlib.sha256(file).hexdigest(),
                size=len(file),
                offset=offset,
                data=data,
            )

    def done(self, request: Message) -> None:
        self.running.pop(request["id"], None)
        parameters = self.report() if request["prompt"] == "report" else {}
        self.send(
            "done",
            id=request["id"],
            model="starweave/tiny",
            parameters=parameters,
            timings={"total": 1},
            notices=[],
        )
        self.beat()

    def fail(self, id: str | None, kind: str, message: str) -> None:
        self.send("error", id=id, kind=kind, message=message, field=None, retryable=False)
        self.beat()

    def report(self) -> Message:
        return {
            "received": self.received,
            "environment": sorted(os.environ),
            "descriptors": [fd for fd in range(256) if is_open(fd)],
            "arguments": sys.argv[1:4],
            "generation": self.generation,
            "config": self.config,
        }

    # Heartbeats

    def beat_forever(self) -> None:
        while True:
            self.beat()
            time.sleep(self.interval_s)

    def beat(self) -> None:
        # Written as it was seen: an older view of what runs must not come after a younger one.
        with self._lock:
            running = [self.state_of(id) for id in list(self.running)]
            self.send(
                "heartbeat",
                seq=self._sequence,
                phase="busy" if running else self.phase,
                uptime_ms=int((time.monotonic() - self.started) * 1000),
                capacity=self.capacity,
                grant=max(0, self.capacity - len(running)),
                running=running,
                resident=[],
                device_memory=None,
                rss=1,
                counters={"accepted": 0, "done": 0, "failed": 0, "cancelled": 0},
                **self.work(),
            )
            self._sequence += 1

    def state_of(self, id: str) -> Message:
        return {"id": id, "phase": "denoising", "step": 1, "steps": 4, "step_age_ms": 0, "step_ms": 1}

    def work(self) -> Message:
        """What else a heartbeat may tell: the fields that came later."""
        return {}

    def age_ms(self, id: str) -> int:
        """Since the request was accepted; 0 for one that was not."""
        return int((time.monotonic() - self.accepted.get(id, time.monotonic())) * 1000)

    # Frames

    def send(self, type: str, **fields: Any) -> None:
        self.write(frame({"t": type, "g": self.generation, **fields}))

    def write(self, data: bytes) -> None:
        with self._lock:
            while data:
                data = data[os.write(FRAMES_OUT, data) :]

    def read(self) -> Message | None:
        header = read_exactly(4)
        body = header and read_exactly(struct.unpack(">I", header)[0])
        return unpack(body, 0)[0] if body else None

    def _connect_log(self, path: str) -> None:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        if null > 0:
            os.close(null)
        with socket.socket(socket.AF_UNIX) as log:
            log.connect(path)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        # As the real one does; the application may be quicker.
        with contextlib.suppress(OSError):
            os.unlink(path)
            os.rmdir(os.path.dirname(path))


def card(state: str) -> Message:
    return {
        "id": "starweave/tiny",
        "name": "Tiny",
        "description": "No model.",
        "aliases": [],
        "tasks": ["text_to_image"],
        "pipeline": "None",
        "source": "embedded",
        "revision": None,
        "licence": "Apache-2.0",
        "defaults": {"width": 64, "height": 64, "steps": 4, "guidance_scale": 1.0, "scheduler": None},
        "limits": {
            "min_size": 64,
            "max_size": 64,
            "multiple_of": 8,
            "max_steps": 4,
            "max_pixels": 4096,
            "max_guidance": 1.0,
        },
        "memory_bytes": 1,
        "state": state,
        "error": None,
    }


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def read_exactly(size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        chunk = os.read(FRAMES_IN, size - len(data))
        if not chunk:
            return None
        data += chunk
    return bytes(data)


def frame(message: Message) -> bytes:
    body = pack(message)
    return struct.pack(">I", len(body)) + body


def pack(value: Any) -> bytes:
    if value is None or value is True or value is False:
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return struct.pack(">BQ", 0xCF, value) if value >= 0 else struct.pack(">Bq", 0xD3, value)
    if isinstance(value, float):
        return struct.pack(">Bd", 0xCB, value)
    if isinstance(value, str):
        return struct.pack(">BI", 0xDB, len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return struct.pack(">BI", 0xC6, len(value)) + value
    if isinstance(value, list):
        return struct.pack(">BI", 0xDD, len(value)) + b"".join(map(pack, value))
    pairs = b"".join(pack(key) + pack(item) for key, item in value.items())
    return struct.pack(">BI", 0xDF, len(value)) + pairs


_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
# First byte: kind and the format of the length that follows.
_SIZED = {
    0xC4: ("bin", ">B"),
    0xC5: ("bin", ">H"),
    0xC6: ("bin", ">I"),
    0xD9: ("str", ">B"),
    0xDA: ("str", ">H"),
    0xDB: ("str", ">I"),
    0xDC: ("list", ">H"),
    0xDD: ("list", ">I"),
    0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}


def unpack(data: bytes, at: int) -> tuple[Any, int]:
    first = data[at]
    at += 1
    if first < 0x80:
        return first, at
    if first >= 0xE0:
        return first - 0x100, at
    if first in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[first], at
    if first in _NUMBERS:
        (value,) = struct.unpack_from(_NUMBERS[first], data, at)
        return value, at + struct.calcsize(_NUMBERS[first])
    if first < 0xC0:
        kind = "map" if first < 0x90 else "list" if first < 0xA0 else "str"
        size = first & (0x1F if kind == "str" else 0x0F)
    else:
        kind, format = _SIZED[first]
        (size,) = struct.unpack_from(format, data, at)
        at += struct.calcsize(format)
    if kind in ("bin", "str"):
        raw = data[at : at + size]
        return (raw.decode() if kind == "str" else raw), at + size
    items = []
    for _ in range(size * 2 if kind == "map" else size):
        item, at = unpack(data, at)
        items.append(item)
    return (dict(zip(items[::2], items[1::2], strict=True)) if kind == "map" else items), at


if __name__ == "__main__":
    Sidecar().run()
