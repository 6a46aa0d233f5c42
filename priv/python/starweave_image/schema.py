"""What is asked of the engine and what it tells: requests, configurations, cards, events.

Their ranges stand in the types below, with the words that a person reads when a value is refused.
"""

from __future__ import annotations

import json
import re
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from .errors import Kind

VERSION = 1
MAX_INT = 2**63 - 1
MAX_PART = 4 * 1024 * 1024
STRENGTH = 0.8

_MAX_TEXT = 8192
_MAX_STYLE = 256
_IMAGE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


class Refused(Exception):
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
            raise Refused("prompt")
        if not _is_text(self.negative_prompt, _MAX_TEXT):
            raise Refused("negative_prompt")
        if not _is_text(self.style, _MAX_STYLE):
            raise Refused("style")
        # Minus zero is within the bounds, and no zero to whoever reads it later.
        self.strength += 0.0
        for field in ("guidance_scale", "variation_strength"):
            if (number := getattr(self, field)) is not None:
                setattr(self, field, number + 0.0)
        for field, data in (("image", self.image), ("mask", self.mask)):
            if data is not None and not _is_image(data):
                raise Refused(field)
        if self.mask is not None and self.image is None:
            raise Refused("mask", "mask needs image")
        if self.variation_strength is not None and self.image is not None:
            raise Refused(
                "variation_strength",
                "variation_strength is for pictures from text alone; with image, strength says how far to go",
            )
        if self.variation_seed is not None and self.variation_strength is None:
            raise Refused("variation_seed", "variation_seed needs variation_strength")


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


def describe(struct: type[Incoming], field: str, fields: dict[str, Any]) -> str:
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
    return refusal(field, allowed, value)


def refusal(field: str, allowed: str, value: Any) -> str:
    return f"{field} is required" if value is None else f"{field} must be {allowed}, got {shown(value)}"


def shown(value: Any) -> str:
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
