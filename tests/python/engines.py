"""An engine in the test's own process, and what it said."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from starweave_image import schema
from starweave_image.engine.engine import Engine

PATIENCE_S = 180.0


def picture_of(data: bytes) -> np.ndarray[Any, Any]:
    """The pixels (height, width, 3) of an image file, as numbers that may be subtracted."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16)


def difference(some: list[bytes], others: list[bytes]) -> int:
    """The largest difference of any two pixels, 0 to 255."""
    pairs = zip(some, others, strict=True)
    return max(int(np.abs(picture_of(a) - picture_of(b)).max()) for a, b in pairs)


class Bench:
    """Starts an engine and keeps all it emits, in order. `on` maps a request id to what to do at each of its messages,
    in the thread that emits it."""

    def __init__(self, **config: Any) -> None:
        self.said: list[Any] = []
        self.on: dict[str, Callable[[Any], None]] = {}
        self._news = threading.Condition()
        self._count = 0
        self.engine = Engine(schema.Config(**config), self._emit, self._changed)

    def start(self) -> Bench:
        self.ready = self.engine.start()
        return self

    def submit(self, id: str = "", **fields: Any) -> str:
        self._count += 1
        id = id or f"r{self._count}"
        self.engine.generate(schema.Request(id=id, **({"prompt": "a red apple"} | fields)))
        return id

    def generate(self, **fields: Any) -> schema.Done | schema.Failed:
        return self.end(self.submit(**fields))

    def end(self, id: str) -> schema.Done | schema.Failed:
        """Wait for the message that ends a request."""
        end: schema.Done | schema.Failed = self.wait_for(
            lambda: next(iter(self.of(id, schema.Done, schema.Failed)), None)
        )
        return end

    def done(self, **fields: Any) -> tuple[schema.Done, list[bytes]]:
        """Run a request that must succeed; its last message and its files."""
        id = self.submit(**fields)
        end = self.end(id)
        assert isinstance(end, schema.Done), end
        return end, self.files(id)

    def wait_for(self, found: Callable[[], Any]) -> Any:
        with self._news:
            assert self._news.wait_for(lambda: found() is not None, PATIENCE_S), self.said
            return found()

    def of(self, id: str, *kinds: type[Any]) -> list[Any]:
        return [m for m in list(self.said) if getattr(m, "id", None) == id and isinstance(m, kinds or object)]

    def files(self, id: str) -> list[bytes]:
        files: dict[int, bytes] = {}
        for part in self.of(id, schema.ImagePart):
            assert part.offset == len(files.get(part.index, b""))
            files[part.index] = files.get(part.index, b"") + bytes(part.data)
        return [files[index] for index in sorted(files)]

    def _changed(self) -> None:
        with self._news:
            self._news.notify_all()

    def _emit(self, message: schema.Event) -> None:
        with self._news:
            self.said.append(message)
            self._news.notify_all()
        if act := self.on.get(getattr(message, "id", None) or ""):
            act(message)
