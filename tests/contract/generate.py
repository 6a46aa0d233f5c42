"""Writes requests.jsonl, frames.jsonl, outputs.jsonl, schema.json and the tables of docs/protocol.md that come from the
schema; with --check only says whether they are up to date.

The cases stand here because here they can be read in rows; the suites read the files alone.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

from contract import HERE, expand, frame, pack
from derived import PROTOCOL, REQUEST, schema_json, with_tables

Json = Any

PROMPT = "a red apple"


def data(value: bytes) -> Json:
    return {"$bytes": base64.b64encode(value).decode()}


def invalid_utf8(value: bytes) -> Json:
    return {"$invalid_utf8": base64.b64encode(value).decode()}


def repeat(value: Json, count: int) -> Json:
    return {"$repeat": [value, count]}


def concat(*values: Json) -> Json:
    return {"$concat": list(values)}


NAN, INF, MINUS_INF = ({"$float": text} for text in ("nan", "inf", "-inf"))
NOT_TEXT = data(b"\xff\xfe\x00binary")

# requests.jsonl

requests: list[dict[str, Json]] = []


def case(name: str, expect: Json, elixir: Json = None, **fields: Json) -> None:
    request = {"prompt": PROMPT, **fields}
    requests.append(
        {"name": name, "request": request, "expect": expect} | ({"elixir": elixir} if elixir else {})
    )


def good(name: str, **fields: Json) -> None:
    case(name, "ok", **fields)


def bad(field: str, name: str, value: Json, message: str | None = None, **others: Json) -> None:
    """`value` is refused for `field`, on both sides and, where `message` is given, in these words."""
    expect = {"kind": "invalid_request", "field": field} | ({"message": message} if message else {})
    case(f"{field}: {name}", expect, **others, **{field: value})


INTEGERS = {name: field.bounds for name, field in REQUEST.items() if field.type == "integer"}
NUMBERS = {name: field.bounds for name, field in REQUEST.items() if field.type == "number"}


def told(field: str, value: Json) -> str | None:
    """The whole sentence, where both languages write the value alike and the option has the field's name."""
    if field == "timeout_ms" or value in (NAN, INF, MINUS_INF) or "$bytes" in str(value):
        return None
    if isinstance(value, float) and abs(value) >= 1e15:
        return None
    shown = "a list" if isinstance(value, list) else "a map" if isinstance(value, dict) else json.dumps(value)
    return f"{field} must be {REQUEST[field].must_be}, got {shown}"


# What a field is refused without.
NEEDS = {"variation_seed": {"variation_strength": 0.5}}
TEXTS = {
    name: field.bounds["max_bytes"] for name, field in REQUEST.items() if field.type in ("prompt", "text")
}
NAMES = tuple(
    name for name, field in REQUEST.items() if field.type in ("id", "model_id", "scheduler", "one_of")
)
CHOICES = {name: field.bounds["values"] for name, field in REQUEST.items() if field.type == "one_of"}
BOOLEANS = tuple(name for name, field in REQUEST.items() if field.type == "boolean")
IMAGES = tuple(name for name, field in REQUEST.items() if field.type == "image")

PNG = b"\x89PNG\r\n\x1a\n"
PNG_1X1 = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)

good("a prompt and nothing else")
good(
    "every field",
    id="request-1",
    negative_prompt="blurry",
    model="starweave/tiny",
    width=64,
    height=128,
    steps=20,
    effort="high",
    guidance_scale=7.5,
    seed=42,
    num_images=2,
    scheduler="euler",
    style="watercolour",
    strength=0.5,
    image=data(PNG_1X1),
    mask=data(PNG_1X1),
    format="webp",
    quality=75,
    metadata=False,
    reproducible=True,
    preview=True,
    timeout_ms=60_000,
)

# Wrong types. A bool is no int, an int is a float, a float without a fraction is no int.

for field in (*TEXTS, *NAMES):
    for name, value in [
        ("a boolean", True),
        ("an integer", 1),
        ("a float", 1.5),
        ("a byte string", NOT_TEXT),
        ("a list", ["x"]),
        ("a map", {"x": "y"}),
    ]:
        bad(field, name, value)

for field in INTEGERS:
    for name, value in [
        ("true", True),
        ("false", False),
        ("a float without a fraction", 64.0),
        ("a float", 64.5),
        ("a float beyond a multiple of 8", 512.4),
        ("minus zero", -0.0),
        ("a float beyond all integers", 1e308),
        ("not a number", NAN),
        ("infinity", INF),
        ("minus infinity", MINUS_INF),
        ("text", "64"),
        ("empty text", ""),
        ("text with a fraction", "64.0"),
        ("a byte string", data(b"\x40")),
        ("a list", [64]),
        ("a map", {"value": 64}),
    ]:
        bad(field, name, value, told(field, value))

for field in NUMBERS:
    for name, value in [
        ("true", True),
        ("false", False),
        ("text in digits", "1"),
        ("empty text", ""),
        ("not a number", NAN),
        ("infinity", INF),
        ("minus infinity", MINUS_INF),
        ("text", "0.5"),
        ("a byte string", data(b"0.5")),
        ("a list", [0.5]),
        ("a map", {"value": 0.5}),
    ]:
        bad(field, name, value, told(field, value))

for field in BOOLEANS:
    for name, value in [
        ("0", 0),
        ("1", 1),
        ("a float", 1.0),
        ("text", "true"),
        ("a byte string", data(b"true")),
        ("a list", [True]),
        ("a map", {"value": True}),
    ]:
        bad(field, name, value)

for field in IMAGES:
    others = {"image": data(PNG_1X1)} if field == "mask" else {}
    for name, value in [
        ("a boolean", True),
        ("an integer", 1),
        ("a float", 1.5),
        ("text", "photo.png"),
        ("a list", [137, 80, 78, 71]),
        ("a map", {"data": "x"}),
    ]:
        bad(field, name, value, **others)

for field, values in CHOICES.items():
    for value in values:
        good(f"{field}: {value}", **{field: value})
    for name, value in [("unknown", "unheard-of"), ("empty", "")]:
        bad(field, name, value, told(field, value))

for count in (1, 2, 4):
    good(f"{count} images", images=[data(PNG_1X1)] * count)
good("images and a mask", images=[data(PNG_1X1)], mask=data(PNG_1X1))
for name, value in [
    ("no image", []),
    ("5 images", [data(PNG_1X1)] * 5),
    ("a file", data(PNG_1X1)),
    ("a map", {"0": data(PNG_1X1)}),
]:
    bad("images", name, value)
for name, value in [("11 bytes", data(PNG_1X1[:11])), ("a text", "photo.png"), ("null", None)]:
    case(
        f"images: {name} among them",
        {"kind": "invalid_request", "field": "images[1]"},
        elixir={"kind": "invalid_request", "field": "images"},
        images=[data(PNG_1X1), value],
    )
bad(
    "images",
    "beside image",
    [data(PNG_1X1)],
    image=data(PNG_1X1),
    message="images stands in place of image: only one of them may be given",
)
good("24 MiB of images", images=[concat(data(PNG), repeat(data(b"\0"), 2**23 - 8))] * 3)
bad(
    "images",
    "more than 24 MiB of them",
    [concat(data(PNG), repeat(data(b"\0"), 2**23 - 8))] * 3,
    mask=data(PNG_1X1),
    message="images and mask must have at most 24 MiB together",
)

# Null is absence.

for field in REQUEST:
    if field not in ("id", "prompt"):
        good(f"{field}: null", **{field: None})
bad("prompt", "null", None, message="prompt is required")
case("id: null", {"kind": "invalid_request", "field": "id"}, elixir="ok", id=None)

# What goes together.

good("variations", seed=7, variation_strength=0.3, num_images=4)
good("one of several variations alone", seed=7, variation_strength=0.3, variation_seed=9)
bad("variation_seed", "without a strength", 9, seed=7, message="variation_seed needs variation_strength")
for others in ({}, {"mask": data(PNG_1X1)}):
    bad(
        "variation_strength",
        f"with {' and '.join(['image', *others])}",
        0.3,
        image=data(PNG_1X1),
        message="variation_strength is for pictures from text alone; with image, strength says how far to go",
        **others,
    )

# Limits: below, at and above each.

for field, bounds in INTEGERS.items():
    low, high, step = bounds["min"], bounds["max"], bounds.get("multiple_of", 1)
    good(f"{field}: {low}, the least", **{field: low}, **NEEDS.get(field, {}))
    good(f"{field}: {low + step}, above the least", **{field: low + step}, **NEEDS.get(field, {}))
    good(f"{field}: {high - step}, below the most", **{field: high - step}, **NEEDS.get(field, {}))
    good(f"{field}: {high}, the most", **{field: high}, **NEEDS.get(field, {}))
    for value in sorted({low - step, high + step, -(2**63), 2**64 - 1}):
        bad(field, str(value), value, told(field, value), **NEEDS.get(field, {}))

for field in ("width", "height"):
    for value in (0, 1, 63, 65, 68, 100, 250, 1025, 4095, 2**31, -64):
        bad(field, str(value), value, message=f"{field} must be a multiple of 8 from 64 to 4096, got {value}")
good("width and height: not square", width=4096, height=64)

bad("steps", "zero", 0, message="steps must be an integer from 1 to 200, got 0")
bad("steps", "minus one", -1, message="steps must be an integer from 1 to 200, got -1")
bad("num_images", "minus one", -1, message="num_images must be an integer from 1 to 16, got -1")

for value in (0, 1, 42, 2**31 - 1, 2**31, 2**32, 2**53 + 1):
    good(f"seed: {value}", seed=value)
bad("seed", "minus two", -2, message="seed must be an integer from -1 to 2^63 - 1, got -2")
bad("seed", "least 32-bit integer", -(2**31))

for field, bounds in NUMBERS.items():
    low, high = bounds["min"], bounds["max"]
    for value in (low, float(low), -0.0, 5e-324, 0.5, high, float(high)):
        good(f"{field}: {value!r}", **{field: value})
    for value in (-5e-324, -0.01, -1, -1.0, high + 1e-9, high + 1, 1e308, -1e308, 2**63, -(2**63)):
        bad(field, repr(value), value)
good("guidance_scale: 7.5", guidance_scale=7.5)
good("guidance_scale: an integer", guidance_scale=7)
bad(
    "guidance_scale",
    "minus one, in words",
    -1,
    message="guidance_scale must be a number from 0 to 50, got -1",
)

for field, limit in TEXTS.items():
    good(f"{field}: one byte", **{field: "x"})
    good(f"{field}: {limit} bytes", **{field: repeat("x", limit)})
    bad(field, f"{limit + 1} bytes", repeat("x", limit + 1))
    good(f"{field}: {limit} bytes in characters of two", **{field: repeat("é", limit // 2)})
    bad(field, f"{limit + 1} bytes in characters of two", concat(repeat("é", limit // 2), "x"))
    good(f"{field}: {limit} bytes in characters of four", **{field: repeat("🍎", limit // 4)})
    bad(field, f"{limit + 4} bytes in characters of four", repeat("🍎", limit // 4 + 1))
    bad(field, "10 kB", repeat("an apple ", 1138))
    bad(field, "NUL at the end", "an apple\0")
    bad(field, "NUL in the middle", "an\0apple")
    bad(field, "only NUL", "\0")
    for name, bytes_ in [
        ("a lone continuation byte", b"an \x80 apple"),
        ("a character cut short", b"an appl\xc3"),
        ("an overlong NUL", b"an \xc0\x80 apple"),
        ("half a surrogate pair", b"an \xed\xa0\x80 apple"),
        ("above U+10FFFF", b"an \xf4\x90\x80\x80 apple"),
        ("Latin-1", "Äpfel".encode("latin-1")),
    ]:
        # Such a str spoils the whole frame on the wire; in an option it is that option that is wrong.
        case(
            f"{field}: {name}",
            {"kind": "invalid_frame", "field": None},
            elixir={"kind": "invalid_request", "field": field},
            **{field: invalid_utf8(bytes_)},
        )
    for name, text in [
        ("emoji", "🍎🍏🚀"),
        ("joined emoji", "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽"),
        ("right to left", "تفاحة حمراء"),
        ("combining marks", "Z͑ͫa̴l̵g̷o̸ apple"),
        ("control characters", "an\x01 \x7f apple\x1b[31m"),
        ("a template", "<%= System.halt(1) %> {{7*7}} ${HOME} %s {0}"),
        ("line breaks and tabs", "an apple\r\n\ton a table\n"),
        ("the last code point", "apple \U0010ffff \uffff"),
        ("a byte order mark", "\ufeffan apple"),
    ]:
        good(f"{field}: {name}", **{field: text})

for field in ("negative_prompt", "style"):
    good(f"{field}: empty", **{field: ""})
    good(f"{field}: only white space", **{field: " \t\n"})

bad("prompt", "empty", "")
for name, text in [
    ("a space", " "),
    ("ASCII white space", " \t\n\v\f\r"),
    ("a no-break space", "\u00a0"),
    ("an ideographic space", "\u3000\u3000"),
    ("a next line", "\u0085"),
    ("separators", "\u2028\u2029\u1680\u2000\u200a\u202f\u205f"),
]:
    bad("prompt", f"only {name}", text)
for name, text in [
    ("a zero width space", "\u200b"),
    ("an information separator", "\x1c\x1d\x1e\x1f"),
    ("a full stop", "."),
    ("an empty Braille pattern", "\u2800"),
    ("a combining mark after a space", " \u0301"),
]:
    good(f"prompt: only {name}", prompt=text)

# Unknown keys are ignored on the wire, so that it can grow, and an error as options, so that a slip is seen.

for key, value in [
    ("guidance", 7.5),
    ("prompt_strength", 0.5),
    ("Width", 64),
    ("widht", 64),
    ("num_inference_steps", 20),
    ("__class__", "x"),
    ("path", "/etc/passwd"),
]:
    case(f"unknown key {key}", "ok", elixir={"kind": "invalid_request", "field": key}, **{key: value})
case("unknown key with a null", "ok", elixir={"kind": "invalid_request", "field": "sampler"}, sampler=None)
case(
    "unknown key with a nested value",
    "ok",
    elixir={"kind": "invalid_request", "field": "extra"},
    extra={"a": [1, {"b": None}]},
)

# Models: what an id may look like is decided here, which ones exist later, by the catalog.

for name in (
    "nobody/nothing",
    "stable-diffusion-v9",
    "starweave/Tiny2",
    "a",
    "A.b_c-9/x..y",
    "a./b.",
    "-/_",
    "owner/con",
):
    case(f"model: {name}", {"kind": "model_not_found", "field": "model", "stage": "model"}, model=name)
for name in ("starweave/tiny", "runwayml/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1"):
    good(f"model: {name}", model=name)
case(
    "model: 256 bytes",
    {"kind": "model_not_found", "field": "model", "stage": "model"},
    model=concat("owner/", repeat("x", 250)),
)
bad("model", "257 bytes", concat("owner/", repeat("x", 251)))
for name in (
    "",
    ".",
    "..",
    "/",
    "../tiny",
    "starweave/..",
    "starweave/../../etc",
    "../../etc/passwd",
    "/etc/passwd",
    "a//b",
    "a/b/c",
    "a/",
    "/a",
    ".cache/model",
    "owner/.git",
    "C:\\models\\sd",
    "a\\..\\b",
    "a b",
    " a",
    "a\n",
    "\na",
    "a/b\n",
    "a\0",
    "%2e%2e/x",
    "~/models",
    "$HOME/x",
    "file:x",
    "https://example.org/x",
    "a@main",
    "modèle",
    "owner/模型",
    "．．/x",
    "🍎",
):
    bad("model", json.dumps(name, ensure_ascii=False), name)

for name in (
    "euler",
    "EulerDiscreteScheduler",
    "dpmpp_2m",
    "DPM++ 2M SDE Karras",
    "Euler a",
    "SA-Solver",
    "DPM-Solver++(2M)",
    "os.system",
    "x",
    "_",
    "9",
):
    good(f"scheduler: {name}", scheduler=name)
good("scheduler: 64 bytes", scheduler=repeat("x", 64))
bad("scheduler", "65 bytes", repeat("x", 65))
for name in (
    "",
    "a/b",
    "a\tb",
    "a\u00a0b",
    "a,b",
    "euler\n",
    "éuler",
    "a\0",
    "__import__('os')",
):
    bad("scheduler", json.dumps(name, ensure_ascii=False), name)

for name in ("a", "A-Z_a.z:09-", "..", "01HZX", "-"):
    good(f"id: {name}", id=name)
good("id: 128 bytes", id=repeat("x", 128))
bad("id", "129 bytes", repeat("x", 129))
for name in ("", " ", "a b", "a/b", "../a", "a\n", "\na", "é", "a\0", "a%00", "🍎"):
    bad("id", json.dumps(name, ensure_ascii=False), name)

for name in ("PNG", "jpg", "gif", "avif", "image/png", " png", "png\n", "png\0", "nil", "true"):
    bad("format", json.dumps(name, ensure_ascii=False), name)

# Images are known by their first bytes; whether the rest decodes is seen when it is decoded.

WEBP = b"RIFF\x04\0\0\0WEBP"
JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01"
MAX_IMAGE = 12 * 1024 * 1024

for field in IMAGES:
    others = {"image": data(PNG_1X1)} if field == "mask" else {}
    for name, value in [
        ("a PNG file", data(PNG_1X1)),
        ("the 12 first bytes of a PNG", data(PNG_1X1[:12])),
        ("the 12 first bytes of a JPEG", data(JPEG)),
        ("a JPEG without JFIF", data(b"\xff\xd8\xff\xdb" + bytes(8))),
        ("the 12 first bytes of a WebP", data(WEBP)),
        ("12 MiB", concat(data(PNG), repeat(data(b"\0"), MAX_IMAGE - 8))),
    ]:
        good(f"{field}: {name}", **(others | {field: value}))
    for name, value in [
        ("empty", data(b"")),
        ("11 bytes of a PNG", data(PNG_1X1[:11])),
        ("11 bytes of a WebP", data(WEBP[:11])),
        ("the magic of a PNG alone", data(PNG)),
        ("half the magic of a PNG", data(b"\x89PNG" + bytes(12))),
        ("a PNG with its line ends translated", data(b"\x89PNG\n\x1a\n" + bytes(12))),
        ("a PNG without its first bit", data(b"\x09PNG\r\n\x1a\n" + bytes(12))),
        ("a space before a PNG", data(b" " + PNG_1X1)),
        ("two bytes of a JPEG", data(b"\xff\xd8" + bytes(12))),
        ("a GIF", data(b"GIF89a\x01\0\x01\0\0\0\0;")),
        ("a BMP", data(b"BM" + bytes(60))),
        ("a TIFF", data(b"II*\0" + bytes(60))),
        ("an AVIF", data(b"\0\0\0 ftypavif" + bytes(20))),
        ("a WAV", data(b"RIFF\x24\0\0\0WAVEfmt ")),
        ("a WebP of other case", data(b"RIFF\x04\0\0\0webp")),
        ("an SVG", data(b"<svg xmlns='http://www.w3.org/2000/svg'/>")),
        ("a PDF", data(b"%PDF-1.7\n" + bytes(20))),
        ("a ZIP", data(b"PK\x03\x04" + bytes(30))),
        ("zeros", data(bytes(64))),
        ("above 12 MiB", concat(data(PNG), repeat(data(b"\0"), MAX_IMAGE - 7))),
    ]:
        bad(field, name, value, **others)

bad("mask", "without an image", data(PNG_1X1), message="mask needs image")
bad("mask", "with a null image", data(PNG_1X1), image=None)
good("strength without an image", strength=0.5)
good("quality with PNG", format="png", quality=1)

# Where Elixir cannot tell text from bytes.

case(
    "prompt: text in a byte string",
    {"kind": "invalid_request", "field": "prompt"},
    elixir="ok",
    prompt=data(b"apple"),
)
case(
    "model: text in a byte string",
    {"kind": "invalid_request", "field": "model"},
    elixir="ok",
    model=data(b"a/b"),
)
case("image: a WebP in text", {"kind": "invalid_request", "field": "image"}, elixir="ok", image=WEBP.decode())

# frames.jsonl

frames: list[dict[str, Json]] = []
OK = "ok"


def golden(name: str, value: dict[str, Json], **sides: Json) -> None:
    """A frame with the message that it means, for the side that is given."""
    bytes_ = frame(pack(expand(value)))
    # What is long is one part, many times: here it is zeros.
    head = bytes_.rstrip(b"\0") if len(bytes_) > 100_000 else bytes_
    hex = concat(head.hex(), repeat("00", len(bytes_) - len(head))) if len(head) < len(bytes_) else head.hex()
    frames.append({"name": name, "hex": hex, "value": value, **sides})


def to_sidecar(name: str, value: dict[str, Json], expect: Json = OK) -> None:
    golden(name, value, sidecar=expect)


def to_application(name: str, value: dict[str, Json], expect: Json = OK) -> None:
    golden(name, value, application=expect)


def many(name: str, header: bytes, item: bytes, count: int, **sides: Json) -> None:
    """A frame of a message whose unknown key `x` has `count` equal items behind the header of its container."""
    start = with_x(header)
    size = len(start) + len(item) * count
    hex = concat((size.to_bytes(4, "big") + start).hex(), repeat(item.hex(), count))
    frames.append({"name": name, "hex": hex, **sides})


def raw(name: str, bytes_: bytes, **sides: Json) -> None:
    frames.append({"name": name, "hex": bytes_.hex(), **sides})


def refused(kind: str, field: str | None = None, id: str | None = None, stage: str | None = None) -> Json:
    return {"kind": kind, "field": field, "id": id} | ({"stage": stage} if stage else {})


MALFORMED = refused("invalid_frame")
LOST = refused("invalid_frame") | {"exit": 65}

GENERATE = {"t": "generate", "g": 1, "id": "r1", "prompt": PROMPT}
CARD = {
    "id": "starweave/tiny",
    "name": "Starweave Tiny",
    "description": "The embedded model",
    "aliases": ["tiny"],
    "tasks": ["text_to_image"],
    "pipeline": "StableDiffusionPipeline",
    "source": "embedded",
    "revision": None,
    "licence": "apache-2.0",
    "defaults": {"width": 64, "height": 64, "steps": 20, "guidance_scale": 4.0, "scheduler": None},
    "limits": {
        "min_size": 64,
        "max_size": 128,
        "multiple_of": 8,
        "max_steps": 200,
        "max_pixels": 16384,
        "max_guidance": 20.0,
    },
    "memory_bytes": 30_000_000,
    "fallbacks": [],
    "bytes": None,
    "parked": False,
    "idle_ms": None,
    "load_ms": None,
    "state": "available",
    "error": None,
}
FAILED_CARD = CARD | {
    "id": "local/broken",
    "state": "failed",
    "error": "the weights are not safetensors",
    "revision": "a1b2",
    "fallbacks": ["local/loaded", "tiny"],
}
LOADED_CARD = CARD | {
    "id": "local/loaded",
    "state": "loaded",
    "bytes": 24_000_000,
    "parked": True,
    "idle_ms": 1500,
    "load_ms": 900,
}
VITALS = {
    "phase": "busy",
    "uptime_ms": 61_234,
    "capacity": 8,
    "grant": 7,
    "running": [
        {
            "id": "r1",
            "phase": "denoising",
            "step": 3,
            "steps": 20,
            "step_age_ms": 12,
            "step_ms": 40,
            "waits": True,
        }
    ],
    "resident": ["starweave/tiny"],
    "device_memory": {"used": 2**34, "total": 2**36},
    "device_work": {"age_ms": 11, "usual_ms": 38, "known": True},
    "loads": [{"model": "local/loaded", "age_ms": 700}],
    "rss": 731_000_832,
    "counters": {"accepted": 5, "done": 3, "failed": 1, "cancelled": 0},
}
IDLE = VITALS | {
    "phase": "starting",
    "capacity": 0,
    "grant": 0,
    "running": [],
    "resident": [],
    "device_memory": None,
    "device_work": None,
    "loads": [],
}

to_sidecar("hello with the least", {"t": "hello", "v": 1, "g": 1, "config": {}})
to_sidecar(
    "hello with everything",
    {
        "t": "hello",
        "v": 1,
        "g": 2**63 - 1,
        "config": {
            "models": [
                {"id": "owner/hub", "revision": "main", "sha256": {"unet/model.safetensors": "0f" * 32}},
                {"id": "local", "path": "/models/x", "fallbacks": ["tiny"]},
            ],
            "default_model": "starweave/tiny",
            "device": "cuda:1",
            "dtype": "bfloat16",
            "offline": True,
            "preload": ["starweave/tiny"],
            "pinned": ["owner/hub", "local"],
            "memory_budget": 2**50,
            "ram_budget": 2**33,
            "disk_quota": 2**40,
            "max_models": 10_000,
            "cleanup_interval_ms": 604_800_000,
            "offload": "model",
            "attention": "sliced",
            "vae": "tiled",
            "compile": "blocks",
            "backend": "openvino",
            "capacity": 4,
            "heartbeat_interval_ms": 250,
        },
    },
)
to_sidecar("generate with the least", GENERATE)
to_sidecar(
    "generate with everything",
    GENERATE | requests[1]["request"] | {"id": "r1", "seed": 2**63 - 1, "prompt": "🍎 pomme d'été"},
)
to_sidecar("generate without a generation", {"t": "generate", "id": "r1", "prompt": PROMPT})
to_sidecar("cancel", {"t": "cancel", "g": 1, "id": "r1"})
to_sidecar("load_model", {"t": "load_model", "g": 1, "id": "op-1", "model": "starweave/tiny"})
to_sidecar("unload_model", {"t": "unload_model", "g": 1, "id": "op-2", "model": "starweave/tiny"})
to_sidecar("models", {"t": "models", "g": 1, "id": "op-3"})
to_sidecar("shutdown", {"t": "shutdown", "g": 1})
to_sidecar("shutdown at once", {"t": "shutdown", "g": 1, "grace_ms": 0})

to_application(
    "ready",
    {
        "t": "ready",
        "g": 1,
        "v": 1,
        "pid": 4242,
        "versions": {
            "starweave_image": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0",
            "diffusers": "0.42.1",
            "transformers": "5.23.0",
        },
        "device": "cuda:0",
        "dtype": "bfloat16",
        "device_name": "NVIDIA H100",
        "capacity": 8,
        "default_model": "starweave/tiny",
        "catalog": [CARD, FAILED_CARD, LOADED_CARD],
    },
)
ACCEPTED = {
    "t": "accepted",
    "g": 1,
    "id": "r1",
    "model": "starweave/tiny",
    "width": 64,
    "height": 64,
    "steps": 20,
    "guidance_scale": 4.0,
    "scheduler": "DDIMScheduler",
    "seeds": [0, 2**63 - 1],
    "format": "png",
}
to_application("accepted", ACCEPTED)
to_application(
    "progress while loading",
    {
        "t": "progress",
        "g": 1,
        "id": "r1",
        "phase": "loading",
        "image": 0,
        "step": 0,
        "steps": 0,
        "elapsed_ms": 900,
    },
)
PROGRESS = {
    "t": "progress",
    "g": 1,
    "id": "r1",
    "phase": "denoising",
    "image": 1,
    "step": 3,
    "steps": 20,
    "elapsed_ms": 70,
}
to_application("progress while denoising", PROGRESS)
to_application(
    "preview",
    {
        "t": "preview",
        "g": 1,
        "id": "r1",
        "image": 0,
        "step": 3,
        "format": "jpeg",
        "width": 16,
        "height": 16,
        "data": data(JPEG),
    },
)
IMAGE = {
    "t": "image",
    "g": 1,
    "id": "r1",
    "index": 0,
    "seed": 2**63 - 1,
    "format": "png",
    "width": 1,
    "height": 1,
    "sha256": "0" * 64,
    "size": len(PNG_1X1),
    "offset": 0,
    "data": data(PNG_1X1),
}
to_application("image", IMAGE)
to_application(
    "the last part of the largest image", IMAGE | {"size": 2**27, "offset": 2**27 - 1, "data": data(b"\0")}
)
to_application("the last image of the most", IMAGE | {"index": 15, "seed": 0})
RESULT = {
    "t": "result",
    "g": 1,
    "id": "r1",
    "index": 0,
    "seed": 42,
    "kind": "text",
    "media_type": "text/plain",
    "facts": {"tags": ["round", "red"], "sure": 0.5},
    "sha256": "0" * 64,
    "size": 5,
    "offset": 0,
    "data": data(b"apple"),
}
for kind in ("text", "vector", "video", "mesh"):
    to_application(f"a result: {kind}", RESULT | {"kind": kind})
to_application("a result without facts", RESULT | {"facts": {}})
to_application(
    "done",
    {
        "t": "done",
        "g": 1,
        "id": "r1",
        "model": "starweave/tiny",
        "parameters": {"prompt": PROMPT, "seed": 7, "guidance_scale": 4.0, "scheduler": None},
        "timings": {"queue": 1, "load": 0, "denoise": 310, "decode": 20, "encode": 2, "total": 333},
        "notices": ["the size was rounded"],
    },
)
to_application(
    "done of a model operation",
    {"t": "done", "g": 1, "id": "op-1", "model": None, "parameters": None, "timings": None, "notices": []},
)
ERROR = {
    "t": "error",
    "g": 1,
    "id": "r1",
    "kind": "invalid_request",
    "message": "width must be a multiple of 8 from 64 to 4096, got 250",
    "field": "width",
    "retryable": False,
    "terminal": True,
}
to_application("error of a request", ERROR)
to_application(
    "error of a message by the id of a request that goes on",
    ERROR
    | {"field": "id", "message": "a request or an operation with this id is running", "terminal": False},
)
to_application(
    "error of a frame",
    ERROR
    | {
        "id": None,
        "kind": "invalid_frame",
        "message": "a frame must hold exactly one msgpack map",
        "field": None,
    },
)
to_application(
    "models reply", {"t": "models", "g": 1, "id": "op-3", "models": [CARD, FAILED_CARD, LOADED_CARD]}
)
to_application("no models", {"t": "models", "g": 1, "id": "op-3", "models": []})
to_application("heartbeat while starting", {"t": "heartbeat", "g": 0, "seq": 0, **IDLE})
HEARTBEAT = {"t": "heartbeat", "g": 1, "seq": 2**40, **VITALS}
to_application("heartbeat while busy", HEARTBEAT)
to_application("log", {"t": "log", "g": 1, "level": "warning", "message": "slow disk", "id": None})
to_application(
    "log of a request", {"t": "log", "g": 1, "level": "info", "message": "loaded in 2 s", "id": "r1"}
)

# Frames that are none.

raw("length 0", bytes(4), sidecar=LOST, application="kill")
raw(
    "length above the limit by one",
    (32 * 1024 * 1024 + 1).to_bytes(4, "big"),
    sidecar=LOST,
    application="kill",
)
raw("length of 4 GiB", b"\xff\xff\xff\xff", sidecar=LOST, application="kill")
raw("text in place of a frame", b"Traceback (most recent call last):\n", sidecar=LOST, application="kill")
raw("a part of a frame", frame(pack(GENERATE))[:-1], sidecar="more", application="more")
raw("a part of a length", b"\0\0\0", sidecar="more", application="more")
raw(
    "the greatest length and nothing else",
    (32 * 1024 * 1024).to_bytes(4, "big"),
    sidecar="more",
    application="more",
)


def nested(depth: int) -> bytes:
    """A message whose unknown key `x` makes it `depth` containers deep."""
    return b"\x83\xa1t\xa6cancel\xa2id\xa2r1\xa1x" + b"\x91" * (depth - 2) + b"\x90"


def with_x(encoded: bytes) -> bytes:
    """A message with the unknown key `x`, whose value is given in msgpack."""
    return b"\x83\xa1t\xa6cancel\xa2id\xa2r1\xa1x" + encoded


for name, body in [
    ("nil", b"\xc0"),
    ("an integer", b"\x01"),
    ("text", b"\xa5hello"),
    ("a list", b"\x93\x01\x02\x03"),
    ("two maps", pack(GENERATE) * 2),
    ("a byte after the map", pack(GENERATE) + b"\xc0"),
    ("zeros after the map", pack(GENERATE) + bytes(64)),
    ("a map cut short", pack(GENERATE)[:-1]),
    ("a map that lacks a value", b"\x82\xa1t\xa6cancel\xa2id"),
    ("a map that claims 2^32 - 1 pairs", b"\xdf\xff\xff\xff\xff\xa1t\xa6cancel"),
    ("a list that claims 2^32 - 1 items", with_x(b"\xdd\xff\xff\xff\xff\x01")),
    ("lists that claim 2^31 items each", with_x(b"\xdd\x7f\xff\xff\xff" * 20)),
    ("text that claims 2^32 - 1 bytes", with_x(b"\xdb\xff\xff\xff\xffx")),
    ("bytes that claim 2^32 - 1 bytes", with_x(b"\xc6\xff\xff\xff\xffx")),
    ("an extension that claims 2^32 - 1 bytes", with_x(b"\xc9\xff\xff\xff\xff\x05x")),
    ("the byte that msgpack never uses", with_x(b"\xc1")),
    ("text that is not UTF-8", with_x(b"\xa2\xc3\x28")),
    ("a key that is not UTF-8", b"\x82\xa1t\xa6cancel\xa1\xff\x01"),
    ("nested 33 deep", nested(33)),
    ("nested 33 deep in maps", b"\x81\xa1x" * 32 + b"\x80"),
    ("nested 5,000 deep", with_x(b"\x91" * 5_000 + b"\x90")),
    ("a timestamp of ten digits of nanoseconds", with_x(b"\xd7\xff" + b"\xff" * 8)),
    ("a timestamp of three bytes", with_x(b"\xc7\x03\xff" + bytes(3))),
    ("a timestamp beyond the year 9999", with_x(b"\xc7\x0c\xff" + bytes(4) + b"\x7f" + b"\xff" * 7)),
]:
    raw(name, frame(body), sidecar=MALFORMED, application="kill")

# The message itself, its three keys and two values count too.
MOST = 131_072 - 7
for name, header, item, count in [
    ("131,072 values", b"\xdd" + MOST.to_bytes(4, "big"), b"\x01", MOST),
    ("131,071 values in pairs", b"\xdf" + (MOST // 2).to_bytes(4, "big"), b"\xa1y\x80", MOST // 2),
    ("131,061 values in lists of 15", b"\xdd" + (8191).to_bytes(4, "big"), b"\x9f" + b"\x01" * 15, 8191),
]:
    many(name, header, item, count, sidecar=OK, application="ignore")
for name, header, item, count in [
    ("131,073 values", b"\xdd" + (MOST + 1).to_bytes(4, "big"), b"\x01", MOST + 1),
    ("131,073 empty maps", b"\xdd" + (MOST + 1).to_bytes(4, "big"), b"\x80", MOST + 1),
    ("131,073 values in pairs", b"\xdf" + (MOST // 2 + 1).to_bytes(4, "big"), b"\xa1y\x01", MOST // 2 + 1),
    ("131,077 values in lists of 15", b"\xdd" + (8192).to_bytes(4, "big"), b"\x9f" + b"\x01" * 15, 8192),
    ("a million nulls", b"\xdd" + (10**6).to_bytes(4, "big"), b"\xc0", 10**6),
]:
    many(name, header, item, count, sidecar=MALFORMED, application="kill")

raw("a key that is not text", frame(b"\x83\xa1t\xa6cancel\xa2id\xa2r1\x01\x02"), sidecar=MALFORMED)
raw("a key that is bytes", frame(b"\x83\xa1t\xa6cancel\xa2id\xa2r1\xc4\x01x\x02"), sidecar=MALFORMED)
raw("nested 32 deep", frame(nested(32)), sidecar=OK)
raw("the last of equal keys counts", frame(b"\x83\xa1t\xa6cancel\xa2id\xa2r0\xa2id\xa2r1"), sidecar=OK)
raw("a timestamp", frame(with_x(b"\xd6\xff\0\0\0\x01")), sidecar=MALFORMED, application="kill")
raw("another extension", frame(with_x(b"\xd4\x05\0")), sidecar=MALFORMED, application="kill")
raw(
    "an extension in place of the type",
    frame(b"\x81\xa1t\xd4\x05\0"),
    sidecar=MALFORMED,
    application="kill",
)

# Messages that are none.

for name, value, expect in [
    ("an empty map", {}, refused("invalid_request", "t")),
    ("no type", {"id": "r1"}, refused("invalid_request", "t", "r1")),
    ("a type that is null", {"t": None, "id": "r1"}, refused("invalid_request", "t", "r1")),
    ("a type that is a number", {"t": 1, "id": "r1"}, refused("invalid_request", "t", "r1")),
    ("an unknown type", {"t": "paint", "id": "r1"}, refused("unknown_message", "t", "r1")),
    ("a type in capitals", {"t": "Cancel", "id": "r1"}, refused("unknown_message", "t", "r1")),
    ("a type of the other direction", {"t": "heartbeat", "seq": 0}, refused("unknown_message", "t")),
    ("a wrong type with a wrong id", {"t": "paint", "id": "no good"}, refused("unknown_message", "t")),
    (
        "hello of version 2",
        {"t": "hello", "v": 2, "g": 1, "config": {}},
        refused("unsupported_version", "v") | {"exit": 66},
    ),
    ("hello without a version", {"t": "hello", "g": 1, "config": {}}, refused("invalid_request", "v")),
    ("hello without a generation", {"t": "hello", "v": 1, "config": {}}, refused("invalid_request", "g")),
    ("hello of generation 0", {"t": "hello", "v": 1, "g": 0, "config": {}}, refused("invalid_request", "g")),
    ("hello without a config", {"t": "hello", "v": 1, "g": 1}, refused("invalid_request", "config")),
    (
        "hello with a list for config",
        {"t": "hello", "v": 1, "g": 1, "config": []},
        refused("invalid_request", "config"),
    ),
    ("generation 2^63", GENERATE | {"g": 2**63}, refused("invalid_request", "g", "r1")),
    ("a negative generation", GENERATE | {"g": -1}, refused("invalid_request", "g", "r1")),
    ("a generation that is text", GENERATE | {"g": "1"}, refused("invalid_request", "g", "r1")),
    ("another generation", GENERATE | {"g": 99}, refused("wrong_generation", "g", "r1", stage="port")),
    ("cancel without an id", {"t": "cancel", "g": 1}, refused("invalid_request", "id")),
    ("cancel with a number for id", {"t": "cancel", "g": 1, "id": 7}, refused("invalid_request", "id")),
    (
        "generate without a prompt",
        {"t": "generate", "g": 1, "id": "r1"},
        refused("invalid_request", "prompt", "r1"),
    ),
    ("generate with 250 pixels", GENERATE | {"width": 250}, refused("invalid_request", "width", "r1")),
    (
        "load_model without a model",
        {"t": "load_model", "g": 1, "id": "r1"},
        refused("invalid_request", "model", "r1"),
    ),
    (
        "load_model with a path",
        {"t": "load_model", "g": 1, "id": "r1", "model": "../x"},
        refused("invalid_request", "model", "r1"),
    ),
    (
        "unload_model without a model",
        {"t": "unload_model", "g": 1, "id": "r1"},
        refused("invalid_request", "model", "r1"),
    ),
    (
        "shutdown with too long a grace",
        {"t": "shutdown", "g": 1, "grace_ms": 600_001},
        refused("invalid_request", "grace_ms"),
    ),
    (
        "shutdown with a negative grace",
        {"t": "shutdown", "g": 1, "grace_ms": -1},
        refused("invalid_request", "grace_ms"),
    ),
]:
    to_sidecar(name, value, expect)

HELLO = {"t": "hello", "v": 1, "g": 1}
for value, at in [
    ({}, ""),
    ("owner/hub", ""),
    ([{}], "[0].id"),
    (["owner/hub"], "[0]"),
    ([{"id": "../x"}], "[0].id"),
    ([{"id": "a", "path": 1}], "[0].path"),
    ([{"id": "a", "fallbacks": "tiny"}], "[0].fallbacks"),
    ([{"id": "a", "sha256": "ab"}], "[0].sha256"),
    ([{"id": "a", "sha256": {"unet/x.safetensors": "AB" * 32}}], "[0].sha256[...]"),
    ([{"id": "a", "fallbacks": ["../x"]}], "[0].fallbacks[0]"),
]:
    to_sidecar(
        f"hello with models {json.dumps(value)}",
        HELLO | {"config": {"models": value}},
        refused("invalid_request", f"config.models{at}"),
    )
for field, values in {
    "default_model": ["", "../x", 1],
    "device": ["gpu", "cuda:", "cuda:x", "CPU", "", 0],
    "dtype": ["fp16", "int8", "", 16],
    "offline": ["yes", 0],
    "preload": ["starweave/tiny", {}],
    "pinned": ["starweave/tiny", 1],
    "memory_budget": [-1, 2**50 + 1, "1GB", 1.5],
    "ram_budget": [-1, 2**50 + 1, "1GB"],
    "disk_quota": [-1, 2**50 + 1, "40GB", True],
    "max_models": [0, 10_001, "3"],
    "cleanup_interval_ms": [999, 604_800_001, 1.5],
    "offload": ["layers", "", True],
    "attention": ["tiled", "", True],
    "vae": ["sliced", "", True],
    "compile": ["all", "", True],
    "backend": ["onnx", "", True],
    "capacity": [0, 65, -1, 8.0, "8", True],
    "heartbeat_interval_ms": [49, 10_001, 1000.0, "1000"],
}.items():
    for value in values:
        to_sidecar(
            f"hello with {field} {json.dumps(value)}",
            HELLO | {"config": {field: value}},
            refused("invalid_request", f"config.{field}"),
        )
to_sidecar(
    "hello with 257 names to preload",
    HELLO | {"config": {"preload": ["a"] * 257}},
    refused("invalid_request", "config.preload"),
)
to_sidecar(
    "hello with 1,025 models",
    HELLO | {"config": {"models": [{"id": "a"}] * 1025}},
    refused("invalid_request", "config.models"),
)
for field, values in {
    "device": ["auto", "cpu", "mps", "xpu", "cuda", "cuda:0"],
    "dtype": ["auto", "float32", "float16"],
    "capacity": [1, 64],
    "preload": [[], ["starweave/tiny", "a/b"]],
    "memory_budget": [0, 2**50],
    "ram_budget": [0, 2**50],
    "disk_quota": [None, 0, 2**50],
    "max_models": [None, 1],
    "cleanup_interval_ms": [1000],
    "offload": ["auto", "none", "sequential"],
    "attention": ["auto", "none"],
    "vae": ["auto", "none"],
    "compile": ["none"],
    "backend": ["torch"],
    "heartbeat_interval_ms": [50, 10_000],
}.items():
    for value in values:
        to_sidecar(f"hello with {field} {json.dumps(value)}", HELLO | {"config": {field: value}})

for name, value, expect in [
    ("an empty map to the application", {}, "kill"),
    ("a number for a type to the application", {"t": 1}, "kill"),
    ("an unknown type to the application", {"t": "paint", "g": 1}, "ignore"),
    (
        "a later type to the application",
        {"t": "estimate", "g": 1, "id": "r1", "seconds": {"$float": "inf"}},
        "ignore",
    ),
    ("an unknown key to the application", ERROR | {"hint": {"a": [1, None]}}, OK),
    ("another generation to the application", ERROR | {"g": 99}, "drop"),
    ("a negative generation to the application", ERROR | {"g": -1}, "kill"),
    ("a generation that is text to the application", ERROR | {"g": "1"}, "kill"),
    ("ready without a version", {"t": "ready", "g": 1}, "kill"),
    ("progress with a negative step", PROGRESS | {"image": 0, "step": -1, "elapsed_ms": 0}, "kill"),
    (
        "progress of an unknown phase",
        PROGRESS | {"phase": "dreaming", "image": 0, "step": 1, "elapsed_ms": 0},
        "kill",
    ),
    ("image without data", {key: item for key, item in IMAGE.items() if key != "data"}, "kill"),
    ("image with a list for data", IMAGE | {"data": [1, 2, 3]}, "kill"),
    ("image with a float for its size", IMAGE | {"size": 69.0}, "kill"),
    ("image without bytes", IMAGE | {"data": data(b"")}, "kill"),
    ("result of no kind", {key: item for key, item in RESULT.items() if key != "kind"}, "kill"),
    ("result of a kind that nobody knows", RESULT | {"kind": "smell"}, "kill"),
    ("result with a list for its facts", RESULT | {"facts": [1]}, "kill"),
    (
        "result without a media type",
        {key: item for key, item in RESULT.items() if key != "media_type"},
        "kill",
    ),
    ("result with half a media type", RESULT | {"media_type": "text/"}, "kill"),
    ("result with a path for its media type", RESULT | {"media_type": "../text/plain"}, "kill"),
    ("result with a long media type", RESULT | {"media_type": "text/" + "x" * 124}, "kill"),
    ("result without bytes", RESULT | {"data": data(b"")}, "kill"),
    ("result of no size", RESULT | {"size": 0}, "kill"),
    ("result over 128 MiB", RESULT | {"size": 2**27 + 1}, "kill"),
    ("result 16 of at most 16", RESULT | {"index": 16}, "kill"),
    ("result with a negative seed", RESULT | {"seed": -1}, "kill"),
    ("result with a short checksum", RESULT | {"sha256": "0" * 63}, "kill"),
    ("image with a part over 4 MiB", IMAGE | {"size": 2**23, "data": repeat(data(b"\0"), 2**22 + 1)}, "kill"),
    ("image of no size", IMAGE | {"size": 0}, "kill"),
    ("image over 128 MiB", IMAGE | {"size": 2**27 + 1}, "kill"),
    ("image that begins behind its largest end", IMAGE | {"offset": 2**27}, "kill"),
    ("image with a negative index", IMAGE | {"index": -1}, "kill"),
    ("image 16 of at most 16", IMAGE | {"index": 16}, "kill"),
    ("image with a seed of 2^63", IMAGE | {"seed": 2**63}, "kill"),
    ("image with a negative seed", IMAGE | {"seed": -1}, "kill"),
    ("image with a float for its seed", IMAGE | {"seed": 7.0}, "kill"),
    ("image with a short checksum", IMAGE | {"sha256": "0" * 63}, "kill"),
    ("image with a checksum in capitals", IMAGE | {"sha256": "A" * 64}, "kill"),
    ("image with a checksum and a line break", IMAGE | {"sha256": "0" * 63 + "\n"}, "kill"),
    ("progress of image 16", PROGRESS | {"image": 16}, "kill"),
    ("accepted with a seed of 2^63", ACCEPTED | {"seeds": [0, 2**63]}, "kill"),
    ("accepted with a negative seed", ACCEPTED | {"seeds": [-1]}, "kill"),
    ("accepted with a number for its seeds", ACCEPTED | {"seeds": 7}, "kill"),
    ("error with a number for terminal", ERROR | {"terminal": 0}, "kill"),
    ("error without a kind", {"t": "error", "g": 1, "id": "r1", "message": "x"}, "kill"),
    ("error with a number for its message", ERROR | {"message": 7}, "kill"),
    (
        "heartbeat without counters",
        {key: item for key, item in (HEARTBEAT | {"seq": 1}).items() if key != "counters"},
        "kill",
    ),
    ("heartbeat with a number for its device work", HEARTBEAT | {"seq": 1, "device_work": 3}, "kill"),
    (
        "heartbeat with a load without an age",
        HEARTBEAT | {"seq": 1, "loads": [{"model": "local/loaded"}]},
        "kill",
    ),
    ("heartbeat with a map for running", HEARTBEAT | {"seq": 1, "running": {}}, "kill"),
    (
        "models with a card whose fallbacks are text",
        {"t": "models", "g": 1, "id": "op-3", "models": [CARD | {"fallbacks": "tiny"}]},
        "kill",
    ),
    (
        "models with a card that is text",
        {"t": "models", "g": 1, "id": "op-3", "models": ["starweave/tiny"]},
        "kill",
    ),
    ("log of an unknown level", {"t": "log", "g": 1, "level": "fatal", "message": "x", "id": None}, "kill"),
]:
    to_application(name, value, expect)


# outputs.jsonl

outputs: list[dict[str, Json]] = []

ENDINGS = "must end in .png, .jpg, .jpeg or .webp, got "

for out, wanted in {
    "apple.png": "png",
    "a/b.c/apple": "png",
    ".png": "png",
    "a.jpg/x": "png",
    "apple.JPG": "jpeg",
    "apple.Jpeg": "jpeg",
    "two words.été.webp": "webp",
    "-x.webp": "webp",
    "..png": "png",
    "apple.gif": ENDINGS + ".gif",
    "apple.": ENDINGS + ".",
    "apple.png.bak": ENDINGS + ".bak",
    "apple v1.5": ENDINGS + ".5",
}.items():
    outputs.append({"name": f"format: {out}", "out": out, "format": wanted})


def written(
    name: str,
    out: str = "x.png",
    before: dict[str, Json] | None = None,
    after: dict[str, Json] | None = None,
    refusal: str | None = None,
    **more: Json,
) -> None:
    """The entries of a folder before and after an image was written there; `after` says what differs then."""
    before = before or {}
    after = before if refusal else before | ({"x.png": "new"} if after is None else after)
    outputs.append(
        {"name": f"file: {name}", "out": out, "before": before, "after": after, "refusal": refusal} | more
    )


def link(to: str) -> Json:
    return {"link": to}


def text(content: str, mode: str) -> Json:
    return {"text": content, "mode": mode}


NO_FOLDER = "must be in a folder that exists, got FOLDER/"
written("a new one")
written("an older one is replaced", before={"x.png": "old"})
written("its mode stays", before={"x.png": text("old", "604")}, after={"x.png": text("new", "604")})
written("what has the same inode keeps what it had", before={"x.png": "old", "other": {"same": "x.png"}})
written(
    "a link stays, and what it leads to is written",
    before={"to.png": "old", "x.png": link("to.png")},
    after={"to.png": "new"},
)
written(
    "links to links, in folders",
    before={"a": {"folder": "755"}, "a/to": "old", "a/y": link("to"), "x.png": link("a/y")},
    after={"a/to": "new"},
)
written("a link to nothing makes that", before={"x.png": link("to.png")}, after={"to.png": "new"})
written(
    "a link through a linked folder",
    out="b/x.png",
    before={"a": {"folder": "755"}, "b": link("a"), "a/x.png": link("y"), "a/y": "old"},
    after={"a/y": "new"},
)
written("a name of 255 bytes", out="FULL.png", after={"FULL.png": "new"})
written("several", count=3, after={f"x-{number}.png": "new" for number in (1, 2, 3)})
written(
    "several without an ending",
    out="a.b/x",
    count=2,
    before={"a.b": {"folder": "755"}},
    after={"a.b/x-1": "new", "a.b/x-2": "new"},
)
written("several of a hidden name", out=".png", count=2, after={".png-1": "new", ".png-2": "new"})
written("a device is written into", out="/dev/null", after={})
written("a link to a device", before={"x.png": link("/dev/null")}, after={})
written("a pipe is written into", before={"x.png": "pipe"}, after={"x.png": "pipe"}, read="new")
written("no folder", out="a/x.png", refusal=NO_FOLDER + "a/x.png")
written("a file for a folder", out="a/x.png", before={"a": "old"}, refusal=NO_FOLDER + "a/x.png")
written("a link into no folder", before={"x.png": link("a/y")}, refusal=NO_FOLDER + "x.png")
written("a folder", before={"x.png": {"folder": "755"}}, refusal="must be a file, FOLDER/x.png is a folder")
written("a folder to be", out="x/", refusal=NO_FOLDER + "x/")
written(
    "a circle of links",
    before={"x.png": link("y"), "y": link("x.png")},
    refusal="cannot be written, too many levels of symbolic links: FOLDER/x.png",
)
written(
    "a name of 256 bytes", out="nFULL.png", refusal="cannot be written, file name too long: FOLDER/nFULL.png"
)
written(
    "a name that is too long with its number",
    out="FULL.png",
    count=2,
    refusal="cannot be written, file name too long: FOLDER/FULL-1.png",
)
written(
    "a preview whose name is too long",
    out="FULL.png",
    preview=True,
    refusal="cannot be written, file name too long: FOLDER/FULL.preview.jpg",
)
written(
    "several into a device",
    out="/dev/null",
    count=2,
    refusal="must be a file for several images or a preview, got /dev/null",
)
written(
    "a preview beside a device",
    out="/dev/null",
    preview=True,
    refusal="must be a file for several images or a preview, got /dev/null",
)
written("no name", out="-", refusal="must name a file, not -")

# As a user without privileges.
DENIED = "cannot be written, permission denied: FOLDER/"
written(
    "a closed folder",
    out="a/x.png",
    before={"a": {"folder": "555"}},
    refusal=DENIED + "a/x.png",
    plain_user=True,
)
written(
    "an open file in a closed folder is overwritten",
    out="a/x.png",
    before={"a": {"folder": "555"}, "a/x.png": text("a longer old one", "644")},
    after={"a/x.png": text("new", "644")},
    plain_user=True,
)
written("a closed file", before={"x.png": text("old", "444")}, refusal=DENIED + "x.png", plain_user=True)

# Where a file has room for so many bytes.
LARGE = "cannot be written, file too large: FOLDER/x.png"
written("no room for a new one", refusal=LARGE, room=1000)
written("no room instead of an older one", before={"x.png": "old"}, refusal=LARGE, room=1000)
written("a full device", out="/dev/full", after={}, error="enospc")
written("no room, and nobody could know", after={}, room=100_000, error="efbig")
written(
    "no room instead of an older one, and nobody could know",
    before={"x.png": "old"},
    after={},
    room=100_000,
    error="efbig",
)
written(
    "a socket",
    before={"x.png": "socket"},
    refusal="cannot be written, no such device or address: FOLDER/x.png",
)


def main() -> int:
    files = {
        HERE / "schema.json": schema_json(),
        PROTOCOL: with_tables(PROTOCOL.read_text(encoding="utf-8")),
    }
    for name, cases in (("requests.jsonl", requests), ("frames.jsonl", frames), ("outputs.jsonl", outputs)):
        names = [case["name"] for case in cases]
        assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]
        files[HERE / name] = "".join(json.dumps(case, ensure_ascii=False) + "\n" for case in cases)
    stale = [
        path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if sys.argv[1:] != ["--check"]:
        for path in stale:
            path.write_text(files[path], encoding="utf-8")
            print(f"{path.name} is written")
        return 0
    if stale:
        print("run tests/contract/generate.py, it changes " + " and ".join(path.name for path in stale))
    return len(stale)


if __name__ == "__main__":
    sys.exit(main())
