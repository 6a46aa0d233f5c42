"""Frames and messages of docs/protocol.md, without any I/O.

A frame is a 4-byte big-endian length and one msgpack map. Its content is defined in schema.py; the envelope (the type
`t`, the generation `g`) and the messages about the process itself are defined here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import msgpack
import msgspec
from msgspec import Meta, Struct

from .. import schema
from ..errors import ImageError, Kind

VERSION = 1
MAX_FRAME = 32 * 1024 * 1024
MAX_DEPTH = 32
MAX_VALUES = 131_072

_HEADER = 4


class FramingError(Exception):
    """A frame length of 0 or above the limit: the beginning of the next frame is then unknown."""


class InvalidMessage(ImageError):
    """A frame whose body is not a valid message; `id` is its request id and `type` its type, if these could be read."""

    def __init__(
        self,
        kind: Kind,
        message: str,
        field: str | None = None,
        id: str | None = None,
        type: str | None = None,
    ) -> None:
        super().__init__(kind, message, field)
        self.id = id
        self.type = type


class FrameDecoder:
    """Cuts a stream of bytes, received in pieces of any size, into frame bodies."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take `data` and iterate over the complete bodies; raises `FramingError` after the last valid one."""
        self._buffer += data
        return self._bodies()

    def _bodies(self) -> Iterator[bytes]:
        while len(self._buffer) >= _HEADER:
            length = int.from_bytes(self._buffer[:_HEADER], "big")
            if not 1 <= length <= self._limit:
                raise FramingError(f"a frame must have 1 to {self._limit} bytes, got {length}")
            if len(self._buffer) < _HEADER + length:
                return
            with memoryview(self._buffer) as view:
                body = bytes(view[_HEADER : _HEADER + length])
            del self._buffer[: _HEADER + length]
            yield body


# Messages to the sidecar. The content of a `generate` is a `schema.Request`.


class Hello(Struct, kw_only=True):
    v: Annotated[int, Meta(description=f"the integer {VERSION}")]
    g: Annotated[int, Meta(ge=1, le=schema.MAX_INT)]
    config: schema.Config


class Cancel(Struct, kw_only=True):
    id: schema.Id


class LoadModel(Struct, kw_only=True):
    id: schema.Id
    model: schema.ModelId


class UnloadModel(Struct, kw_only=True):
    id: schema.Id
    model: schema.ModelId


class ListModels(Struct, kw_only=True):
    id: schema.Id


class Shutdown(Struct, kw_only=True):
    grace_ms: Annotated[int, Meta(ge=0, le=600_000)] = 5000


Incoming: TypeAlias = Hello | schema.Request | Cancel | LoadModel | UnloadModel | ListModels | Shutdown
INCOMING: dict[str, type[Incoming]] = {
    "hello": Hello,
    "generate": schema.Request,
    "cancel": Cancel,
    "load_model": LoadModel,
    "unload_model": UnloadModel,
    "models": ListModels,
    "shutdown": Shutdown,
}


class Message(NamedTuple):
    """A decoded frame. `generation` is None if the sender did not give one."""

    generation: int | None
    content: Incoming


class _Generation(Struct):
    g: Annotated[int, Meta(ge=0, le=schema.MAX_INT)] | None = None


# Messages to the application: events, and


class Ready(schema.Facts, kw_only=True):
    v: int = VERSION
    pid: int


class Heartbeat(schema.Snapshot, kw_only=True):
    seq: int
    uptime_ms: int
    rss: int


class Log(Struct, kw_only=True):
    level: Literal["debug", "info", "warning", "error"]
    message: str
    id: str | None = None


Outgoing: TypeAlias = schema.Event | Ready | Heartbeat | Log
OUTGOING: dict[type[Outgoing], str] = {
    Ready: "ready",
    schema.Accepted: "accepted",
    schema.Progress: "progress",
    schema.Preview: "preview",
    schema.ImagePart: "image",
    schema.ResultPart: "result",
    schema.Done: "done",
    schema.Failed: "error",
    schema.Models: "models",
    Heartbeat: "heartbeat",
    Log: "log",
}


def encode(content: Outgoing, generation: int) -> list[bytes | memoryview]:
    """One complete frame as buffers to write in order; the data of an image is not copied."""
    fields = {"t": OUTGOING[type(content)], "g": generation, **msgspec.structs.asdict(content)}
    data = fields.pop("data", None)
    if data is not None:
        fields["data"] = b""
    # File names may be invalid UTF-8; messages that contain them must be sent all the same.
    head: bytes = msgpack.packb(fields, default=msgspec.structs.asdict, unicode_errors="replace")
    parts: list[bytes | memoryview] = [head]
    if data is not None:
        # The empty bin at the end (2 bytes) is replaced by the header of a bin32 and the data itself.
        parts = [head[:-2] + b"\xc6" + len(data).to_bytes(4, "big"), data]
    length = sum(map(len, parts))
    if length > MAX_FRAME:
        raise FramingError(f"a frame must have 1 to {MAX_FRAME} bytes, got {length}")
    return [length.to_bytes(_HEADER, "big"), *parts]


def decode(body: bytes) -> Message:
    """The message in a frame body; raises `InvalidMessage`."""
    _measure(body)
    try:
        fields = msgpack.unpackb(body, object_pairs_hook=_map)
    except ValueError:
        raise _malformed() from None
    return _parse(fields)


def _map(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """The map without null fields, which count as absent."""
    if not all(isinstance(key, str) for key, _ in pairs):
        raise InvalidMessage("invalid_frame", "the keys of a map must be strings")
    return {key: value for key, value in dict(pairs).items() if value is not None}


def _malformed() -> InvalidMessage:
    return InvalidMessage("invalid_frame", "a frame must hold exactly one msgpack map")


def _shapes() -> list[tuple[int, int, int]]:
    """For each first byte of a msgpack value: the number of its fixed bytes, how many of these, at the end, are a
    length, and what one unit of that length means: 0 for a byte, 1 for a list's value, 2 for a map's key and value."""
    shapes = [(1, 0, 0)] * 256
    for first, sizes, counts in (
        (0xC4, (1, 2, 4), 0),
        (0xD9, (1, 2, 4), 0),
        (0xDC, (2, 4), 1),
        (0xDE, (2, 4), 2),
    ):
        for byte, size in enumerate(sizes, first):
            shapes[byte] = (1 + size, size, counts)
    for byte, size in enumerate((4, 8, 1, 2, 4, 8, 1, 2, 4, 8), 0xCA):
        shapes[byte] = (1 + size, 0, 0)
    return shapes


_SHAPES = _shapes()
_EXTENSIONS = {*range(0xC7, 0xCA), *range(0xD4, 0xD9)}


def _measure(body: bytes) -> None:
    """Refuse a body that is truncated, too deeply nested, or contains too many values or an extension, before any
    object is made: an object takes up to a hundred times its bytes, and msgpack limits each list, but not all of them
    together."""
    at, room = 0, MAX_VALUES - 1
    # For each open container, the number of values still missing.
    lacking = [1]
    try:
        while lacking:
            byte = body[at]
            if byte in _EXTENSIONS:
                raise InvalidMessage("invalid_frame", "a message must hold no msgpack extension")
            fixed, size, counts = _SHAPES[byte]
            at += fixed
            count = int.from_bytes(body[at - size : at], "big") if size else 0
            if 0x80 <= byte < 0xA0:
                counts, count = (2 if byte < 0x90 else 1), byte & 0x0F
            elif 0xA0 <= byte < 0xC0:
                at += byte & 0x1F
            lacking[-1] -= 1
            if counts:
                if len(lacking) > MAX_DEPTH:
                    raise InvalidMessage("invalid_frame", f"a message must nest at most {MAX_DEPTH} deep")
                count *= counts
                if count > len(body) - at:
                    raise _malformed()
                if count > room:
                    raise InvalidMessage("invalid_frame", f"a message must hold at most {MAX_VALUES} values")
                room -= count
                lacking.append(count)
            else:
                at += count
            while lacking and not lacking[-1]:
                lacking.pop()
    except IndexError:
        raise _malformed() from None
    if at != len(body):
        raise _malformed()


def _parse(fields: Any) -> Message:
    """The message in an unpacked map; raises `InvalidMessage` for the first invalid field."""
    if not isinstance(fields, dict):
        raise _malformed()
    id = fields.get("id")
    try:
        id = msgspec.convert(id, schema.Id)
    except msgspec.ValidationError:
        id = None

    tag = fields.get("t")
    if not isinstance(tag, str):
        raise InvalidMessage("invalid_request", schema.refusal("t", "the type of the message", tag), "t", id)
    kind = INCOMING.get(tag)
    if kind is None:
        raise InvalidMessage("unknown_message", f"the message type {schema.shown(tag)} is not known", "t", id)
    if kind is Hello and type(fields.get("v")) is int and fields["v"] != VERSION:
        # Checked first: the rest of a `hello` of another version has no meaning here.
        message = f"the protocol version must be {VERSION}, got {schema.shown(fields['v'])}"
        raise InvalidMessage("unsupported_version", message, "v", type=tag)

    try:
        generation = None if kind is Hello else schema.read(_Generation, fields).g
        return Message(generation, schema.read(kind, fields))
    except ImageError as error:
        raise InvalidMessage(error.kind, error.message, error.field, id, tag) from None
