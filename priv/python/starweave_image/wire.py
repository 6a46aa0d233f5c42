"""Frames and messages of docs/protocol.md, without any I/O.

A frame is a 4-byte big-endian length and one msgpack map. Each message is a struct; its ranges stand in the
types below, with the words that a person reads when a value is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from .errors import ImageError, Kind

VERSION = 1
MAX_FRAME = 32 * 1024 * 1024
MAX_DEPTH = 32
MAX_VALUES = 131_072
MAX_PART = 4 * 1024 * 1024
MAX_INT = 2**63 - 1
STRENGTH = 0.8

_HEADER = 4
_MAX_TEXT = 8192
_MAX_STYLE = 256
_IMAGE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


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


# Types of fields. A description completes the sentence "<field> must be …".

Id = Annotated[
    str,
    Meta(max_length=128, pattern=r"\A[A-Za-z0-9._:-]+\Z", description="1 to 128 of A-Z a-z 0-9 . _ : -"),
]
Generation = Annotated[int, Meta(ge=0, le=MAX_INT, description="an integer from 0 to 2^63 - 1")]
ModelId = Annotated[
    str,
    Meta(
        max_length=256,
        pattern=r"\A(?!\.)[A-Za-z0-9._-]+(/(?!\.)[A-Za-z0-9._-]+)?\Z",
        description="a model name or owner/name of at most 256 of A-Z a-z 0-9 . _ -, no part beginning with a dot",
    ),
]
Pixels = Annotated[int, Meta(ge=64, le=4096, multiple_of=8, description="a multiple of 8 from 64 to 4096")]
EncodedImage = Annotated[
    bytes,
    Meta(
        min_length=12, max_length=12 * 1024 * 1024, description="a PNG, JPEG or WebP file of at most 12 MiB"
    ),
]
Format = Annotated[Literal["png", "jpeg", "webp"], Meta(description="one of png, jpeg, webp")]
ModelIds = Annotated[list[ModelId], Meta(max_length=256, description="a list of at most 256 model names")]
Bytes = Annotated[int, Meta(ge=0, le=2**50, description="an integer of bytes from 0 to 2^50")]
Bool = Annotated[bool, Meta(description="true or false")]
Path = Annotated[
    str,
    Meta(
        min_length=1, max_length=4096, pattern=r"\A[^\0]+\Z", description="1 to 4096 characters without NUL"
    ),
]
Revision = Annotated[
    str,
    Meta(max_length=256, pattern=r"\A[A-Za-z0-9._/-]+\Z", description="1 to 256 of A-Z a-z 0-9 . _ / -"),
]

Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z", description="64 of 0-9 a-f")]


# Application → sidecar


class Incoming(Struct, tag_field="t", kw_only=True):
    """What every message to the sidecar has: `g` is absent where the sender does not care."""

    g: Generation | None = None


class ModelEntry(Struct, kw_only=True):
    """A model that may be loaded: a local folder where `path` is given, else a hub id. `fallbacks` take the place of those
    in the catalog. `sha256` pins weight files, by their names within the model."""

    id: ModelId
    path: Path | None = None
    revision: Revision | None = None
    sha256: (
        Annotated[
            dict[str, Sha256],
            Meta(max_length=4096, description="a map of file names to SHA-256 in hexadecimal"),
        ]
        | None
    ) = None
    fallbacks: ModelIds | None = None


class Config(Struct, kw_only=True):
    models: Annotated[
        list[ModelEntry],
        Meta(
            max_length=1024,
            description="a list of at most 1024 maps with id, path, revision, sha256 and fallbacks",
        ),
    ] = []
    default_model: ModelId = "starweave/tiny"
    device: Annotated[
        str,
        Meta(
            pattern=r"\A(auto|cpu|mps|xpu|cuda(:[0-9]{1,3})?)\Z",
            description="one of auto, cpu, cuda, cuda:N, mps, xpu",
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(description="one of auto, float32, bfloat16, float16"),
    ] = "auto"
    offline: Bool = False
    capacity: Annotated[int, Meta(ge=1, le=64, description="an integer from 1 to 64")] = 8
    preload: ModelIds = []
    pinned: ModelIds = []
    memory_budget: Bytes | None = None
    ram_budget: Bytes = 0
    disk_quota: Bytes | None = None
    max_models: Annotated[int, Meta(ge=1, le=10_000, description="an integer from 1 to 10000")] | None = None
    cleanup_interval_ms: Annotated[
        int, Meta(ge=1000, le=604_800_000, description="an integer from 1000 to 604800000")
    ] = 3_600_000
    offload: Annotated[
        Literal["auto", "none", "model", "sequential"],
        Meta(description="one of auto, none, model, sequential"),
    ] = "auto"
    attention: Annotated[Literal["auto", "none", "sliced"], Meta(description="one of auto, none, sliced")] = (
        "auto"
    )
    vae: Annotated[Literal["auto", "none", "tiled"], Meta(description="one of auto, none, tiled")] = "auto"
    compile: Annotated[Literal["none", "blocks"], Meta(description="one of none, blocks")] = "none"
    backend: Annotated[Literal["torch", "openvino"], Meta(description="one of torch, openvino")] = "torch"
    heartbeat_interval_ms: Annotated[
        int, Meta(ge=50, le=10_000, description="an integer from 50 to 10000")
    ] = 1000


class Hello(Incoming, tag="hello", kw_only=True):
    v: Annotated[int, Meta(description=f"the integer {VERSION}")]
    g: Annotated[int, Meta(ge=1, le=MAX_INT, description="an integer from 1 to 2^63 - 1")]
    config: Annotated[Config, Meta(description="a map")]


class Generate(Incoming, tag="generate", kw_only=True):
    id: Id
    prompt: Annotated[
        str,
        Meta(
            max_length=_MAX_TEXT,
            description=f"1 to {_MAX_TEXT} bytes of text, not only white space and without NUL",
        ),
    ]
    negative_prompt: Annotated[
        str, Meta(max_length=_MAX_TEXT, description=f"at most {_MAX_TEXT} bytes of text without NUL")
    ] = ""
    model: ModelId | None = None
    width: Pixels | None = None
    height: Pixels | None = None
    steps: Annotated[int, Meta(ge=1, le=200, description="an integer from 1 to 200")] | None = None
    guidance_scale: Annotated[float, Meta(ge=0, le=50, description="a number from 0 to 50")] | None = None
    seed: Annotated[int, Meta(ge=-1, le=MAX_INT, description="an integer from -1 to 2^63 - 1")] | None = None
    variation_strength: Annotated[float, Meta(ge=0, le=1, description="a number from 0 to 1")] | None = None
    variation_seed: (
        Annotated[int, Meta(ge=0, le=MAX_INT, description="an integer from 0 to 2^63 - 1")] | None
    ) = None
    num_images: Annotated[int, Meta(ge=1, le=16, description="an integer from 1 to 16")] = 1
    scheduler: (
        Annotated[
            str,
            Meta(
                max_length=64,
                pattern=r"\A[A-Za-z0-9_+.() -]+\Z",
                description="1 to 64 of A-Z a-z 0-9 _ + . ( ) - and space",
            ),
        ]
        | None
    ) = None
    style: Annotated[
        str, Meta(max_length=_MAX_STYLE, description=f"at most {_MAX_STYLE} bytes of text without NUL")
    ] = ""
    strength: Annotated[float, Meta(ge=0, le=1, description="a number from 0 to 1")] = STRENGTH
    image: EncodedImage | None = None
    mask: EncodedImage | None = None
    format: Format = "png"
    quality: Annotated[int, Meta(ge=1, le=100, description="an integer from 1 to 100")] = 90
    metadata: Bool = True
    reproducible: Bool = False
    preview: Bool = False
    timeout_ms: (
        Annotated[int, Meta(ge=1, le=86_400_000, description="an integer from 1 to 86400000")] | None
    ) = None

    def __post_init__(self) -> None:
        if not _is_text(self.prompt, _MAX_TEXT) or not _has_ink(self.prompt):
            raise _Refused("prompt")
        if not _is_text(self.negative_prompt, _MAX_TEXT):
            raise _Refused("negative_prompt")
        if not _is_text(self.style, _MAX_STYLE):
            raise _Refused("style")
        # Minus zero is within the bounds, and no zero to whoever reads it later.
        self.strength += 0.0
        for field in ("guidance_scale", "variation_strength"):
            if (number := getattr(self, field)) is not None:
                setattr(self, field, number + 0.0)
        for field, data in (("image", self.image), ("mask", self.mask)):
            if data is not None and not _is_image(data):
                raise _Refused(field)
        if self.mask is not None and self.image is None:
            raise _Refused("mask", "mask needs image")
        if self.variation_strength is not None and self.image is not None:
            raise _Refused(
                "variation_strength",
                "variation_strength is for pictures from text alone; with image, strength says how far to go",
            )
        if self.variation_seed is not None and self.variation_strength is None:
            raise _Refused("variation_seed", "variation_seed needs variation_strength")


class Cancel(Incoming, tag="cancel", kw_only=True):
    id: Id


class LoadModel(Incoming, tag="load_model", kw_only=True):
    id: Id
    model: ModelId


class UnloadModel(Incoming, tag="unload_model", kw_only=True):
    id: Id
    model: ModelId


class Models(Incoming, tag="models", kw_only=True):
    id: Id


class Stats(Incoming, tag="stats", kw_only=True):
    id: Id


class Shutdown(Incoming, tag="shutdown", kw_only=True):
    grace_ms: Annotated[int, Meta(ge=0, le=600_000, description="an integer from 0 to 600000")] = 5000


# Sidecar → application


class Outgoing(Struct, tag_field="t", kw_only=True):
    """What every message to the application has; the port fills in `g`."""

    g: int = 0


class Defaults(Struct, kw_only=True):
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str | None = None


class Limits(Struct, kw_only=True):
    min_size: int
    max_size: int
    multiple_of: int
    max_steps: int
    max_pixels: int
    max_guidance: float


class Card(Struct, kw_only=True):
    id: str
    name: str
    description: str
    aliases: list[str]
    tasks: list[str]
    pipeline: str
    source: str
    revision: str | None
    licence: str
    defaults: Defaults
    limits: Limits
    memory_bytes: int
    fallbacks: list[str] = []
    bytes: int | None = None
    parked: bool = False
    idle_ms: int | None = None
    load_ms: int | None = None
    state: Literal["loaded", "loading", "available", "remote", "absent", "failed"]
    error: str | None = None


class Ready(Outgoing, tag="ready", kw_only=True):
    v: int = VERSION
    pid: int
    versions: dict[str, str]
    device: str
    dtype: str
    device_name: str
    capacity: int
    default_model: str
    catalog: list[Card]


class Accepted(Outgoing, tag="accepted", kw_only=True):
    id: str
    model: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str
    seeds: list[int]
    format: str


class Progress(Outgoing, tag="progress", kw_only=True):
    id: str
    phase: Literal["loading", "denoising", "decoding", "encoding"]
    image: int = 0
    step: int = 0
    steps: int = 0
    elapsed_ms: int = 0


# `data` is the last field of the next two: `encode` relies on it.


class Preview(Outgoing, tag="preview", kw_only=True):
    id: str
    image: int
    step: int
    format: str
    width: int
    height: int
    data: bytes | memoryview


class ImagePart(Outgoing, tag="image", kw_only=True):
    id: str
    index: int
    seed: int
    format: str
    width: int
    height: int
    sha256: str
    size: int
    offset: int
    data: bytes | memoryview


class Done(Outgoing, tag="done", kw_only=True):
    id: str
    model: str | None = None
    parameters: dict[str, Any] | None = None
    timings: dict[str, int] | None = None
    notices: list[str] = []


class Error(Outgoing, tag="error", kw_only=True):
    id: str | None
    kind: Kind
    message: str
    field: str | None = None
    retryable: bool = False
    # False: what was refused is a message, and whatever runs by its id goes on.
    terminal: bool = True


class ModelsReply(Outgoing, tag="models", kw_only=True):
    id: str
    models: list[Card]


class Running(Struct, kw_only=True):
    id: str
    phase: str
    step: int = 0
    steps: int = 0
    step_age_ms: int = 0
    step_ms: int = 0
    waits: bool = False


class DeviceMemory(Struct, kw_only=True):
    used: int
    total: int


class DeviceWork(Struct, kw_only=True):
    age_ms: int
    usual_ms: int
    known: bool


class Load(Struct, kw_only=True):
    model: str
    age_ms: int


class Counters(Struct, kw_only=True):
    accepted: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0


class Snapshot(Struct, kw_only=True):
    """The engine's part of a heartbeat."""

    phase: Literal["starting", "loading", "ready", "busy", "draining"] = "starting"
    capacity: int = 0
    grant: int = 0
    running: list[Running] = []
    resident: list[str] = []
    device_memory: DeviceMemory | None = None
    device_work: DeviceWork | None = None
    loads: list[Load] = []
    counters: Counters = msgspec.field(default_factory=Counters)


class Vitals(Outgoing, kw_only=True):
    """`Snapshot` and what the process itself knows: the body of a heartbeat and of a `stats` reply."""

    seq: int
    phase: str
    uptime_ms: int
    capacity: int
    grant: int
    running: list[Running]
    resident: list[str]
    device_memory: DeviceMemory | None
    device_work: DeviceWork | None = None
    loads: list[Load] = []
    rss: int
    counters: Counters


class Heartbeat(Vitals, tag="heartbeat", kw_only=True):
    pass


class StatsReply(Vitals, tag="stats", kw_only=True):
    id: str


class Log(Outgoing, tag="log", kw_only=True):
    level: Literal["debug", "info", "warning", "error"]
    message: str
    id: str | None = None


_INCOMING: dict[str, type[Incoming]] = {
    "hello": Hello,
    "generate": Generate,
    "cancel": Cancel,
    "load_model": LoadModel,
    "unload_model": UnloadModel,
    "models": Models,
    "stats": Stats,
    "shutdown": Shutdown,
}

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder()


def encode(message: Outgoing | Incoming) -> list[bytes | memoryview]:
    """One whole frame as buffers to be written in order; the data of an image is not copied."""
    if isinstance(message, (ImagePart, Preview)):
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


def decode(body: bytes) -> Incoming:
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


def parse(fields: Any) -> Incoming:
    """The message in an already unpacked map; raises `InvalidMessage` with the first field at fault."""
    if not isinstance(fields, dict):
        raise InvalidMessage("invalid_frame", "a frame must hold exactly one msgpack map")
    fields = _without_nulls(fields, 1)
    id = fields.get("id")
    try:
        id = msgspec.convert(id, Id)
    except msgspec.ValidationError:
        id = None

    tag = fields.get("t")
    if not isinstance(tag, str):
        raise InvalidMessage("invalid_request", _refusal("t", "the type of the message", tag), "t", id)
    kind = _INCOMING.get(tag)
    if kind is None:
        raise InvalidMessage("unknown_message", f"the message type {_shown(tag)} is not known", "t", id)
    if kind is Hello and type(fields.get("v")) is int and fields["v"] != VERSION:
        # Before anything else: the rest of another version's hello means nothing here.
        message = f"the protocol version must be {VERSION}, got {_shown(fields['v'])}"
        raise InvalidMessage("unsupported_version", message, "v", type=tag)

    try:
        return msgspec.convert(fields, kind, builtin_types=(bytes,))
    except _Refused as refused:
        field, reason = refused.field, refused.message
    except msgspec.ValidationError as error:
        field, reason = _field_at_fault(str(error)), None
    raise InvalidMessage("invalid_request", reason or _describe(kind, field, fields), field, id, tag)


class _Refused(Exception):
    """Raised by a struct for what its types cannot say; without a message the field's description is used."""

    def __init__(self, field: str, message: str | None = None) -> None:
        super().__init__(field)
        self.field = field
        self.message = message


def _is_text(value: str, limit: int) -> bool:
    try:
        return "\0" not in value and len(value.encode()) <= limit
    except UnicodeEncodeError:
        return False


def _has_ink(value: str) -> bool:
    # str.isspace() takes U+001C–U+001F for white space; Unicode's White_Space, and so the Elixir side, does not.
    return any(not char.isspace() or "\x1c" <= char <= "\x1f" for char in value)


def _is_image(data: bytes) -> bool:
    return data.startswith(_IMAGE_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


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


def _describe(struct: type[Incoming], field: str, fields: dict[str, Any]) -> str:
    """The sentence about a refused `field`, such as "config.models[0].id", from the words of its type."""
    hint: Any = struct
    value: Any = fields
    allowed = ""
    for part in re.findall(r"\w+", field):
        if part.isdecimal():
            hint, value = get_args(hint)[0], value[int(part)]
        else:
            hint, value = get_type_hints(hint, include_extras=True)[part], value.get(part)
        if get_origin(hint) in (Union, UnionType):
            hint = get_args(hint)[0]
        allowed = "a map"
        if get_origin(hint) is Annotated:
            hint, meta = get_args(hint)
            allowed = meta.description
    return _refusal(field, allowed, value)


def _refusal(field: str, allowed: str, value: Any) -> str:
    return f"{field} is required" if value is None else f"{field} must be {allowed}, got {_shown(value)}"


def _shown(value: Any) -> str:
    """A refused value in a few words: text of users is not repeated at length."""
    if isinstance(value, (bool, int, float)):
        return str(value).lower()
    if isinstance(value, str):
        return (
            json.dumps(value) if len(value) <= 32 else f"{len(value.encode(errors='replace'))} bytes of text"
        )
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return "a map" if isinstance(value, dict) else "a list" if isinstance(value, list) else "an extension"
