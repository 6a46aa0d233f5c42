"""The engine's input and output: requests, configurations, cards, events.

Each field of a request and of a configuration is defined once, below: its type, range, default and help text, and,
where the type does not give it, the text of the error for a refused value. The command line, docs/protocol.md and
tests/contract/schema.json are derived from what `fields` returns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec
from msgspec import NODEFAULT, Meta, Struct

from .errors import ImageError, Kind

MAX_INT = 2**63 - 1
MAX_PART = 4 * 1024 * 1024
MAX_PICTURES = 24 * 1024 * 1024
STRENGTH = 0.8

Task = Literal["text_to_image", "image_to_image", "edit", "inpaint"]
TASKS: tuple[Task, ...] = get_args(Task)
ResultKind = Literal["picture", "text", "vector", "video", "mesh"]

_MAX_PROMPT = 8192
_MAX_STYLE = 256
_IMAGE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


class Refused(Exception):
    """Raised by a struct for rules that its types cannot express; without a message, the field's own text is used."""

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
    # str.isspace() counts U+001C–U+001F as white space; Unicode's White_Space, and so the Elixir side, does not.
    return any(not char.isspace() or "\x1c" <= char <= "\x1f" for char in value)


def _is_image(data: bytes) -> bool:
    return data.startswith(_IMAGE_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


# Types of fields. A title names a type of text; a description completes the sentence "<field> must be …" if the bounds
# are not enough for that.

Id = Annotated[
    str,
    Meta(
        title="id",
        min_length=1,
        max_length=128,
        pattern=r"\A[A-Za-z0-9._:-]+\Z",
        description="1 to 128 of A-Z a-z 0-9 . _ : -",
    ),
]
ModelId = Annotated[
    str,
    Meta(
        title="model_id",
        min_length=1,
        max_length=256,
        pattern=r"\A(?!\.)[A-Za-z0-9._-]+(/(?!\.)[A-Za-z0-9._-]+)?\Z",
        description="a model name or owner/name of at most 256 of A-Z a-z 0-9 . _ -, no part beginning with a dot",
    ),
]
Scheduler = Annotated[
    str,
    Meta(
        title="scheduler",
        min_length=1,
        max_length=64,
        pattern=r"\A[A-Za-z0-9_+.() -]+\Z",
        description="1 to 64 of A-Z a-z 0-9 _ + . ( ) - and space",
    ),
]
Device = Annotated[
    str,
    Meta(
        title="device",
        pattern=r"\A(auto|cpu|mps|xpu|cuda(:[0-9]{1,3})?)\Z",
        description="one of auto, cpu, cuda, cuda:N, mps, xpu",
    ),
]
Prompt = Annotated[
    str,
    Meta(
        title="prompt",
        min_length=1,
        max_length=_MAX_PROMPT,
        description=f"1 to {_MAX_PROMPT} bytes of text, not only white space and without NUL",
    ),
]
EncodedImage = Annotated[
    bytes,
    Meta(
        min_length=12, max_length=12 * 1024 * 1024, description="a PNG, JPEG or WebP file of at most 12 MiB"
    ),
]
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
Pixels = Annotated[int, Meta(ge=64, le=4096, multiple_of=8)]
Bytes = Annotated[int, Meta(ge=0, le=2**50, description="an integer of bytes from 0 to 2^50")]
ModelIds = Annotated[list[ModelId], Meta(max_length=256, description="a list of at most 256 model names")]


def says(help: str) -> Meta:
    """The help text of a field, one short sentence of Markdown."""
    return Meta(extra={"help": help})


class ModelEntry(Struct, kw_only=True):
    """A model that may be loaded: a local folder if `path` is given, else a hub id. `fallbacks` replace those in the
    catalog. `sha256` pins weight files, by their names within the model."""

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
    """The configuration of an engine."""

    models: Annotated[
        list[ModelEntry],
        Meta(
            title="models",
            max_length=1024,
            description="a list of at most 1024 maps with id, path, revision, sha256 and fallbacks",
        ),
        says("the models that may be loaded besides those of the catalog that are here"),
    ] = []
    default_model: Annotated[ModelId, says("for a request that names none")] = "starweave/tiny"
    device: Annotated[Device, says("what computes")] = "auto"
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], says("the number format")] = "auto"
    offline: Annotated[bool, says("never ask the hub")] = False
    capacity: Annotated[int, Meta(ge=1, le=64), says("requests that may run at once")] = 8
    preload: Annotated[
        ModelIds,
        says("loaded one after the other once `ready` is said, which only heartbeats and `models` tell of"),
    ] = []
    pinned: Annotated[ModelIds, says("never leave memory to make room")] = []
    memory_budget: Annotated[
        Bytes | None,
        says("what loaded models may take on the device; 85 % of its memory unless given"),
    ] = None
    ram_budget: Annotated[
        Bytes,
        says("what models that left the device may take in main memory; without effect on a CPU"),
    ] = 0
    disk_quota: Annotated[Bytes | None, says("what models may take in the hub's cache")] = None
    max_models: Annotated[
        Annotated[int, Meta(ge=1, le=10_000)] | None,
        says("how many models may be in the hub's cache, likewise"),
    ] = None
    cleanup_interval_ms: Annotated[
        int, Meta(ge=1000, le=604_800_000), says("how often the hub's cache is looked through")
    ] = 3_600_000
    offload: Annotated[
        Literal["auto", "none", "model", "sequential"],
        says("whether weights wait in main memory and visit the device; without effect on a CPU"),
    ] = "auto"
    attention: Annotated[
        Literal["auto", "none", "sliced"],
        says("whether a UNet computes its attention in slices; `auto`: on a Mac's GPU below 64 GB"),
    ] = "auto"
    vae: Annotated[
        Literal["auto", "none", "tiled"],
        says("whether large pictures are decoded tile by tile; `auto`: where one would not fit whole"),
    ] = "auto"
    compile: Annotated[Literal["none", "blocks"], says("whether the denoiser's blocks are compiled")] = "none"
    backend: Annotated[
        Literal["torch", "openvino"],
        says("what computes the denoiser; `openvino` needs its package, a CPU, and no `compile`"),
    ] = "torch"
    heartbeat_interval_ms: Annotated[int, Meta(ge=50, le=10_000), says("time between two heartbeats")] = 1000


class Request(Struct, kw_only=True):
    """A request. The narrower limits of the model's card are checked later."""

    id: Annotated[Id, says("the name of the request; not one in use")]
    prompt: Annotated[Prompt, says("what the image shows")]
    negative_prompt: Annotated[str, Meta(max_length=_MAX_PROMPT), says("what the image should not show")] = ""
    model: Annotated[ModelId | None, says("`default_model` unless given")] = None
    width: Annotated[Pixels | None, says("pixels; the model has its own default and narrower limits")] = None
    height: Annotated[Pixels | None, says("pixels, as `width`")] = None
    steps: Annotated[
        Annotated[int, Meta(ge=1, le=200)] | None,
        says("denoise steps; the model has its own default and narrower limits"),
    ] = None
    effort: Annotated[
        Literal["draft", "standard", "high"],
        says("how many steps unless `steps` says: half, all or 1.6 times the model's default"),
    ] = "standard"
    guidance_scale: Annotated[
        Annotated[float, Meta(ge=0, le=50)] | None,
        says("how closely the prompt is followed; the model has its own default and narrower limits"),
    ] = None
    seed: Annotated[
        Annotated[int, Meta(ge=-1, le=MAX_INT)] | None,
        says("image k uses seed + k, modulo 2^63; -1 or none draws one below 2^53"),
    ] = None
    variation_strength: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        says("how far to go from the picture of `seed` (0) towards that of `variation_seed` (1)"),
    ] = None
    variation_seed: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_INT)] | None,
        says("with `variation_strength`; `seed` unless given"),
    ] = None
    num_images: Annotated[int, Meta(ge=1, le=16), says("how many images, of consecutive seeds")] = 1
    scheduler: Annotated[
        Scheduler | None,
        says("a sampler (`DPM++ 2M Karras`, `euler_a`) or a diffusers class; the model's own unless given"),
    ] = None
    style: Annotated[str, Meta(max_length=_MAX_STYLE), says("added to the prompt after a comma")] = ""
    strength: Annotated[
        float,
        Meta(ge=0, le=1),
        says("how far `image` may be left: that share of the steps is made, at least one"),
    ] = STRENGTH
    task: Annotated[
        Task | None, says("one of those of the model's card; follows from what is given unless named")
    ] = None
    image: Annotated[EncodedImage | None, says("a picture to start from")] = None
    images: Annotated[
        Annotated[
            list[EncodedImage],
            Meta(
                title="images",
                min_length=1,
                max_length=4,
                description="a list of 1 to 4 PNG, JPEG or WebP files of at most 12 MiB each",
            ),
        ]
        | None,
        says("in place of `image`: pictures to make one of, by a model whose task `edit` takes several"),
    ] = None
    mask: Annotated[EncodedImage | None, says("where `image` may change: white in it; needs `image`")] = None
    format: Annotated[Literal["png", "jpeg", "webp"], says("format of the file")] = "png"
    quality: Annotated[int, Meta(ge=1, le=100), says("how well a JPEG or WebP file keeps the image")] = 90
    metadata: Annotated[bool, says("write the parameters into the file")] = True
    reproducible: Annotated[
        bool, says("the same bytes for the same request, whatever else runs; slower in company")
    ] = False
    preview: Annotated[bool, says("show how the image forms")] = False
    timeout_ms: Annotated[
        Annotated[int, Meta(ge=1, le=86_400_000)] | None,
        says("time left from the moment of reading; without end unless given"),
    ] = None

    def __post_init__(self) -> None:
        if not _is_text(self.prompt, _MAX_PROMPT) or not _has_ink(self.prompt):
            raise Refused("prompt")
        if not _is_text(self.negative_prompt, _MAX_PROMPT):
            raise Refused("negative_prompt")
        if not _is_text(self.style, _MAX_STYLE):
            raise Refused("style")
        # Normalises -0.0, which is within the bounds, to 0.0, for later readers of the value.
        self.strength += 0.0
        for field in ("guidance_scale", "variation_strength"):
            if (number := getattr(self, field)) is not None:
                setattr(self, field, number + 0.0)
        for field, data in self._files():
            if not _is_image(data):
                raise Refused(field)
        if self.image is not None and self.images is not None:
            raise Refused("images", "images stands in place of image: only one of them may be given")
        if sum(len(data) for _, data in self._files()) > MAX_PICTURES:
            raise Refused("images", "images and mask must have at most 24 MiB together")
        if self.mask is not None and not self.pictures:
            raise Refused("mask", "mask needs image")
        if self.variation_strength is not None and self.pictures:
            raise Refused(
                "variation_strength",
                "variation_strength is for pictures from text alone; with image, strength says how far to go",
            )
        if self.variation_seed is not None and self.variation_strength is None:
            raise Refused("variation_seed", "variation_seed needs variation_strength")

    @property
    def pictures(self) -> list[bytes]:
        """The input pictures' files: `images`, or `image` alone."""
        return self.images or [] if self.image is None else [self.image]

    def _files(self) -> list[tuple[str, bytes]]:
        named = [("image", self.image), ("mask", self.mask)]
        named += [(f"images[{index}]", data) for index, data in enumerate(self.images or ())]
        return [(field, data) for field, data in named if data is not None]


# Facts about the engine and its models.


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
    phase: Literal["starting", "loading", "ready", "busy", "draining"] = "starting"
    capacity: int = 0
    grant: int = 0
    running: list[Running] = []
    resident: list[str] = []
    device_memory: DeviceMemory | None = None
    device_work: DeviceWork | None = None
    loads: list[Load] = []
    counters: Counters = msgspec.field(default_factory=Counters)


class Facts(Struct, kw_only=True):
    """The facts that are known once the engine has started."""

    versions: dict[str, str]
    device: str
    dtype: str
    device_name: str
    capacity: int
    default_model: str
    catalog: list[Card]


# Events of a request, or of an operation on a model.


class Accepted(Struct, kw_only=True):
    id: str
    model: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str
    seeds: list[int]
    format: str


class Progress(Struct, kw_only=True):
    id: str
    phase: Literal["loading", "denoising", "decoding", "encoding"]
    image: int = 0
    step: int = 0
    steps: int = 0
    elapsed_ms: int = 0


class Preview(Struct, kw_only=True):
    id: str
    image: int
    step: int
    format: str
    width: int
    height: int
    data: bytes | memoryview


class ImagePart(Struct, kw_only=True):
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


class ResultPart(Struct, kw_only=True):
    """A part of a result that is not a picture. `facts` are further facts about the result, as JSON values."""

    id: str
    index: int
    seed: int
    kind: ResultKind
    media_type: str
    facts: dict[str, Any]
    sha256: str
    size: int
    offset: int
    data: bytes | memoryview


class Models(Struct, kw_only=True):
    id: str
    models: list[Card]


class Done(Struct, kw_only=True):
    id: str
    model: str | None = None
    parameters: dict[str, Any] | None = None
    timings: dict[str, int] | None = None
    notices: list[str] = []


class Failed(Struct, kw_only=True):
    """The failure of a request or an operation; without `id`, of the sidecar itself or of an unreadable message."""

    id: str | None
    kind: Kind
    message: str
    field: str | None = None
    retryable: bool = False
    # False: only a message was refused, and a request that runs under its id goes on.
    terminal: bool = True


Event: TypeAlias = Accepted | Progress | Preview | ImagePart | ResultPart | Models | Done | Failed


# Reading values, and the errors for those that are refused.

Asked = TypeVar("Asked", bound=Struct)


def read(kind: type[Asked], values: Mapping[str, Any]) -> Asked:
    """A value of `kind` from a map without nulls, whose unknown keys are ignored; raises `invalid_request` with the
    first invalid field, such as "models[0].id"."""
    try:
        return msgspec.convert(values, kind, builtin_types=(bytes,))
    except Refused as refused:
        field, reason = refused.field, refused.message
    except msgspec.ValidationError as error:
        field, reason = _field_at_fault(str(error)), None
    raise ImageError("invalid_request", reason or _sentence(kind, field, values), field)


def _field_at_fault(error: str) -> str:
    path = re.search(r"at `\$\.?(.*)`$", error)
    missing = re.match(r"Object missing required field `(.*?)`", error)
    return ".".join([*filter(None, path.groups() if path else ()), *(missing.groups() if missing else ())])


def _sentence(kind: type[Struct], path: str, value: Any) -> str:
    """The error for the value at `path`, from the text of its type."""
    hint: Any = kind
    for part in re.findall(r"\w+", path):
        if part.isdecimal():
            hint, value = get_args(hint)[0], value[int(part)]
        else:
            hint, value = get_type_hints(hint, include_extras=True)[part], value.get(part)
        hint, said = _bare(hint)
    return refusal(path, _must_be(hint, said), value)


def refusal(field: str, allowed: str, value: Any) -> str:
    return f"{field} is required" if value is None else f"{field} must be {allowed}, got {shown(value)}"


def shown(value: Any) -> str:
    """A refused value, for a message; long text from users is shortened."""
    if isinstance(value, (bool, int, float)):
        return str(value).lower()
    if isinstance(value, str):
        return (
            json.dumps(value) if len(value) <= 32 else f"{len(value.encode(errors='replace'))} bytes of text"
        )
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return "a map" if isinstance(value, dict) else "a list"


# The schema as values.


class Field(NamedTuple):
    """One field: `type` is integer, number, boolean, one_of, image, list, text, or the name of a kind of text."""

    name: str
    type: str
    must_be: str
    help: str
    required: bool
    default: Any
    # Those of min, max, multiple_of, min_bytes, max_bytes, max_items and values that apply to the field.
    bounds: dict[str, Any]


@cache
def fields(kind: type[Struct]) -> tuple[Field, ...]:
    """The fields of `Request` or `Config`, in order."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(_field(field, *_bare(hints[field.name])) for field in msgspec.structs.fields(kind))


def _field(field: msgspec.structs.FieldInfo, hint: Any, said: dict[str, Any]) -> Field:
    default = field.default_factory() if callable(field.default_factory) else field.default
    lengths = "items" if get_origin(hint) is list else "bytes"
    bounds = {
        "min": said.get("ge"),
        "max": said.get("le"),
        "multiple_of": said.get("multiple_of"),
        f"min_{lengths}": said.get("min_length"),
        f"max_{lengths}": said.get("max_length"),
        "values": list(get_args(hint)) if get_origin(hint) is Literal else None,
    }
    return Field(
        name=field.name,
        type=said.get("title") or _TYPES[get_origin(hint) or hint],
        must_be=_must_be(hint, said),
        help=said["extra"]["help"],
        required=field.required,
        default=None if default is NODEFAULT else default,
        bounds={name: bound for name, bound in bounds.items() if bound is not None},
    )


_TYPES: dict[Any, str] = {
    int: "integer",
    float: "number",
    bool: "boolean",
    str: "text",
    bytes: "image",
    list: "list",
    Literal: "one_of",
}


_SAID = ("ge", "le", "multiple_of", "min_length", "max_length", "title", "description", "extra")


def _bare(hint: Any) -> tuple[Any, dict[str, Any]]:
    """Split a hint into the type, without null and annotations, and the annotations: bounds, title, description,
    help."""
    said: dict[str, Any] = {}
    while True:
        if get_origin(hint) is Annotated:
            hint, *metas = get_args(hint)
            for meta in metas:
                said |= {name: value for name in _SAID if (value := getattr(meta, name)) is not None}
        elif get_origin(hint) in (Union, UnionType):
            hint = next(each for each in get_args(hint) if each is not NoneType)
        else:
            return hint, said


def _must_be(hint: Any, said: Mapping[str, Any]) -> str:
    """The end of the sentence "<field> must be …"."""
    if "description" in said:
        return str(said["description"])
    if hint is str:
        return f"at most {said['max_length']} bytes of text without NUL"
    if hint in (int, float):
        high = "2^63 - 1" if said["le"] == MAX_INT else said["le"]
        number = f"a multiple of {said['multiple_of']}" if "multiple_of" in said else f"{_A[hint]}"
        return f"{number} from {said['ge']} to {high}"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return "true or false" if hint is bool else "a map"


_A = {int: "an integer", float: "a number"}
