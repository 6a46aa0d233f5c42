"""Frames and messages of docs/protocol.md, without any I/O.

A frame is a 4-byte big-endian length and one msgpack map, whose fields stand in schema.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from .. import schema
from ..errors import ImageError, Kind

MAX_FRAME = 32 * 1024 * 1024
MAX_DEPTH = 32
MAX_VALUES = 131_072

_HEADER = 4


class FramingError(Exception):
    """A frame length of 0 or above the limit: what follows cannot be told apart any more."""


class InvalidMessage(ImageError):
    """A frame whose body is no acceptable message; `id` is its request id and `type` its type where these could be
    read."""

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
    """Cuts a stream of bytes into frame bodies, however the stream is divided."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take `data` and iterate over the bodies complete by now; raises `FramingError` after the last good one."""
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


_INCOMING: dict[str, type[schema.Incoming]] = {
    "hello": schema.Hello,
    "generate": schema.Generate,
    "cancel": schema.Cancel,
    "load_model": schema.LoadModel,
    "unload_model": schema.UnloadModel,
    "models": schema.Models,
    "stats": schema.Stats,
    "shutdown": schema.Shutdown,
}

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder()


def encode(message: schema.Outgoing | schema.Incoming) -> list[bytes | memoryview]:
    """One whole frame as buffers to be written in order; the data of an image is not copied."""
    if isinstance(message, (schema.ImagePart, schema.Preview)):
        head = _encoder.encode(msgspec.structs.replace(message, data=b""))
        # The empty bin at the end (2 bytes) gives way to the header of a bin32 and the data itself.
        size = len(message.data)
        parts: list[bytes | memoryview] = [head[:-2] + b"\xc6" + size.to_bytes(4, "big"), message.data]
    else:
        try:
            parts = [_encoder.encode(message)]
        except UnicodeEncodeError:
            # A name of the file system that is no UTF-8, most likely, in something that is to be told all the same.
            parts = [_encoder.encode(_as_text(msgspec.to_builtins(message, builtin_types=(bytes,))))]
    length = sum(map(len, parts))
    if length > MAX_FRAME:
        raise FramingError(f"a frame must have 1 to {MAX_FRAME} bytes, got {length}")
    return [length.to_bytes(_HEADER, "big"), *parts]


def _as_text(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    if isinstance(value, dict):
        return {_as_text(key): _as_text(item) for key, item in value.items()}
    return value


def decode(body: bytes) -> schema.Incoming:
    """The message in a frame body; raises `InvalidMessage`."""
    _measure(body)
    try:
        fields = _decoder.decode(body)
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError):
        raise InvalidMessage("invalid_frame", "a frame must hold exactly one msgpack map") from None
    return parse(fields)


def _shapes() -> list[tuple[int, int, int]]:
    """Of each first byte of a msgpack value: how many bytes of it are fixed, how many of these at its end are a length, and
    how much that counts: 0 for bytes, 1 for a list's values, 2 for a map's."""
    shapes = [(1, 0, 0)] * 256
    for first, sizes, counts in (
        (0xC4, (1, 2, 4), 0),
        (0xC7, (1, 2, 4), 0),
        (0xD9, (1, 2, 4), 0),
        (0xDC, (2, 4), 1),
        (0xDE, (2, 4), 2),
    ):
        for byte, size in enumerate(sizes, first):
            shapes[byte] = (1 + size, size, counts)
    for byte, size in zip(range(0xCA, 0xD9), (4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 2, 3, 5, 9, 17), strict=True):
        shapes[byte] = (1 + size, 0, 0)
    return shapes


_SHAPES = _shapes()
_EXTENSIONS = range(0xC7, 0xCA)


def _measure(body: bytes) -> None:
    """Refuse what nests too deep or holds too many values before one of them becomes an object: an object takes up to a
    hundred times its byte. What is no msgpack at all is left to the decoder."""
    at, room = 0, MAX_VALUES - 1
    # Of each open container, how many values it still lacks.
    lacking = [1]
    try:
        while lacking:
            byte = body[at]
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
                    return
                if count > room:
                    raise InvalidMessage("invalid_frame", f"a message must hold at most {MAX_VALUES} values")
                room -= count
                lacking.append(count)
            else:
                at += count + (byte in _EXTENSIONS)
            while lacking and not lacking[-1]:
                lacking.pop()
    except IndexError:
        return


def parse(fields: Any) -> schema.Incoming:
    """The message in an already unpacked map; raises `InvalidMessage` with the first field at fault."""
    if not isinstance(fields, dict):
        raise InvalidMessage("invalid_frame", "a frame must hold exactly one msgpack map")
    fields = _without_nulls(fields, 1)
    id = fields.get("id")
    try:
        id = msgspec.convert(id, schema.Id)
    except msgspec.ValidationError:
        id = None

    tag = fields.get("t")
    if not isinstance(tag, str):
        raise InvalidMessage("invalid_request", schema.refusal("t", "the type of the message", tag), "t", id)
    kind = _INCOMING.get(tag)
    if kind is None:
        raise InvalidMessage("unknown_message", f"the message type {schema.shown(tag)} is not known", "t", id)
    if kind is schema.Hello and type(fields.get("v")) is int and fields["v"] != schema.VERSION:
        # Before anything else: the rest of another version's hello means nothing here.
        message = f"the protocol version must be {schema.VERSION}, got {schema.shown(fields['v'])}"
        raise InvalidMessage("unsupported_version", message, "v", type=tag)

    try:
        return msgspec.convert(fields, kind, builtin_types=(bytes,))
    except schema.Refused as refused:
        field, reason = refused.field, refused.message
    except msgspec.ValidationError as error:
        field, reason = _field_at_fault(str(error)), None
    raise InvalidMessage("invalid_request", reason or schema.describe(kind, field, fields), field, id, tag)


def _without_nulls(value: Any, depth: int) -> Any:
    """`value` without the null fields of its maps; refuses what nests too deep and keys that are not str."""
    if not isinstance(value, (dict, list)):
        return value
    if depth > MAX_DEPTH:
        raise InvalidMessage("invalid_frame", f"a message must nest at most {MAX_DEPTH} deep")
    if isinstance(value, list):
        return [_without_nulls(item, depth + 1) for item in value]
    if not all(isinstance(key, str) for key in value):
        raise InvalidMessage("invalid_frame", "the keys of a map must be strings")
    return {key: _without_nulls(item, depth + 1) for key, item in value.items() if item is not None}


def _field_at_fault(error: str) -> str:
    path = re.search(r"at `\$\.?(.*)`$", error)
    missing = re.match(r"Object missing required field `(.*?)`", error)
    return ".".join([*filter(None, path.groups() if path else ()), *(missing.groups() if missing else ())])
