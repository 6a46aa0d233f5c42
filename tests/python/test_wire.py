from __future__ import annotations

import math
import os
import struct
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starweave_image import schema
from starweave_image.doors import wire

PNG = b"\x89PNG\r\n\x1a\n" + bytes(16)

INCOMING: list[dict[str, Any]] = [
    {
        "t": "hello",
        "v": 1,
        "g": 7,
        "config": {
            "models": [
                {"id": "local/one", "path": "/models/one", "fallbacks": ["owner/two"]},
                {"id": "owner/two", "revision": "main", "sha256": {"unet/x.safetensors": "ab" * 32}},
            ],
            "default_model": "local/one",
            "device": "cuda:1",
            "dtype": "bfloat16",
            "offline": True,
            "capacity": 4,
            "preload": ["owner/two"],
            "pinned": ["local/one"],
            "memory_budget": 10**9,
            "ram_budget": 0,
            "disk_quota": 10**10,
            "max_models": 3,
            "cleanup_interval_ms": 60_000,
            "offload": "none",
            "attention": "sliced",
            "vae": "tiled",
            "compile": "blocks",
            "backend": "openvino",
            "heartbeat_interval_ms": 50,
        },
    },
    {
        "t": "generate",
        "g": 7,
        "id": "r-1",
        "prompt": "a red apple 🍎",
        "negative_prompt": "blurry",
        "model": "starweave/tiny",
        "width": 512,
        "height": 64,
        "steps": 20,
        "effort": "high",
        "guidance_scale": 7.5,
        "seed": 2**63 - 1,
        "num_images": 16,
        "scheduler": "euler",
        "style": "oil painting",
        "strength": 0.5,
        "variation_strength": None,
        "variation_seed": None,
        "task": "inpaint",
        "image": PNG,
        "images": None,
        "mask": PNG,
        "format": "webp",
        "quality": 100,
        "metadata": False,
        "reproducible": True,
        "preview": True,
        "timeout_ms": 86_400_000,
    },
    {"t": "cancel", "g": 7, "id": "r-1"},
    {"t": "load_model", "g": 7, "id": "r-1", "model": "starweave/tiny"},
    {"t": "unload_model", "g": 7, "id": "r-1", "model": "starweave/tiny"},
    {"t": "models", "g": 7, "id": "r-1"},
    {"t": "shutdown", "g": 7, "grace_ms": 0},
]

CARD = schema.Card(
    id="starweave/tiny",
    name="Tiny",
    description="small",
    aliases=[],
    tasks=["text_to_image"],
    pipeline="StableDiffusionPipeline",
    source="embedded",
    revision=None,
    licence="Apache-2.0",
    defaults=schema.Defaults(width=64, height=64, steps=20, guidance_scale=5.0),
    limits=schema.Limits(
        min_size=64, max_size=256, multiple_of=8, max_steps=100, max_pixels=65536, max_guidance=20.0
    ),
    memory_bytes=1,
    state="available",
)
VITALS: dict[str, Any] = {
    "seq": 0,
    "phase": "busy",
    "uptime_ms": 1,
    "capacity": 8,
    "grant": 7,
    "running": [schema.Running(id="r", phase="denoising", step=1, steps=2, step_age_ms=3, step_ms=4)],
    "resident": ["starweave/tiny"],
    "device_memory": schema.DeviceMemory(used=1, total=2),
    "rss": 3,
    "counters": schema.Counters(accepted=1),
}
OUTGOING: list[wire.Outgoing] = [
    wire.Ready(
        pid=1,
        versions={"python": "3"},
        device="cpu",
        dtype="float32",
        device_name="CPU",
        capacity=8,
        default_model="starweave/tiny",
        catalog=[CARD],
    ),
    schema.Accepted(
        id="r",
        model="m",
        width=64,
        height=64,
        steps=1,
        guidance_scale=1.5,
        scheduler="euler",
        seeds=[0, 2**63 - 1],
        format="png",
    ),
    schema.Progress(id="r", phase="denoising", step=1, steps=2, elapsed_ms=3),
    schema.Preview(id="r", image=0, step=1, format="jpeg", width=8, height=8, data=b"x"),
    schema.Done(
        id="r", model="m", parameters={"seed": 1, "prompt": "é"}, timings={"total": 1}, notices=["n"]
    ),
    schema.Failed(id=None, kind="invalid_frame", message="no"),
    schema.Models(id="r", models=[CARD]),
    wire.Heartbeat(**VITALS),
    wire.Log(level="info", message="hello"),
]


def name(value: Any) -> str:
    return value["t"] if isinstance(value, dict) else type(value).__name__


def plain(message: Any) -> Any:
    """What a peer without the structs must read: nested maps of plain values."""
    return msgpack.unpackb(msgpack.packb(message, default=_fields))


def _fields(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def framed(content: wire.Outgoing) -> bytes:
    return b"".join(wire.encode(content, 7))


@pytest.mark.parametrize("fields", INCOMING, ids=name)
def test_every_incoming_message_is_read_from_another_encoder(fields: dict[str, Any]) -> None:
    message = wire.decode(msgpack.packb(fields))
    assert message.generation == (None if fields["t"] == "hello" else 7)
    assert type(message.content) is wire.INCOMING[fields["t"]]
    read = plain(message.content)
    if fields["t"] == "hello":
        assert read["config"].pop("models") == [
            {
                "id": "local/one",
                "path": "/models/one",
                "revision": None,
                "sha256": None,
                "fallbacks": ["owner/two"],
            },
            {
                "id": "owner/two",
                "path": None,
                "revision": "main",
                "sha256": {"unet/x.safetensors": "ab" * 32},
                "fallbacks": None,
            },
        ]
        fields = {**fields, "config": {k: v for k, v in fields["config"].items() if k != "models"}}
    head = {"t"} if fields["t"] == "hello" else {"t", "g"}
    assert read == {key: value for key, value in fields.items() if key not in head}


@pytest.mark.parametrize("message", OUTGOING, ids=name)
def test_every_outgoing_message_is_read_by_another_decoder(message: wire.Outgoing) -> None:
    frame = framed(message)
    assert struct.unpack(">I", frame[:4]) == (len(frame) - 4,)
    assert msgpack.unpackb(frame[4:]) == {"t": wire.OUTGOING[type(message)], "g": 7, **plain(message)}


@pytest.mark.parametrize("size", [1, 255, 256, 65535, 65536, schema.MAX_PART])
def test_image_data_is_framed_without_a_copy(size: int) -> None:
    data = memoryview(bytes(size))
    part = schema.ImagePart(
        id="r", index=0, seed=1, format="png", width=8, height=8, sha256="0", size=size, offset=0, data=data
    )
    buffers = wire.encode(part, 7)
    assert buffers[-1] is data
    frame = b"".join(buffers)
    assert struct.unpack(">I", frame[:4]) == (len(frame) - 4,)
    assert msgpack.unpackb(frame[4:]) == {"t": "image", "g": 7, **plain(part), "data": bytes(data)}


def test_a_frame_above_the_limit_is_not_encoded() -> None:
    with pytest.raises(wire.FramingError):
        wire.encode(wire.Log(level="info", message="x" * wire.MAX_FRAME), 7)


# Framing


def frames(bodies: list[bytes]) -> bytes:
    return b"".join(struct.pack(">I", len(body)) + body for body in bodies)


@given(st.lists(st.binary(min_size=1, max_size=300)), st.lists(st.integers(0, 3000)))
def test_frames_come_out_however_the_stream_is_cut(bodies: list[bytes], cuts: list[int]) -> None:
    stream = frames(bodies)
    decoder = wire.FrameDecoder()
    points = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    out = []
    for start, end in zip(points, points[1:], strict=False):
        out += decoder.feed(stream[start:end])
    assert out == bodies


def test_frames_come_out_whole_and_byte_by_byte() -> None:
    bodies = [b"a", b"b" * 70000, b"c"]
    stream = frames(bodies)
    assert list(wire.FrameDecoder().feed(stream)) == bodies
    decoder = wire.FrameDecoder()
    assert [body for byte in stream for body in decoder.feed(bytes([byte]))] == bodies


@pytest.mark.parametrize("length", [0, wire.MAX_FRAME + 1, 2**32 - 1])
def test_an_impossible_length_is_refused_after_the_good_frames_before_it(length: int) -> None:
    bodies = wire.FrameDecoder().feed(frames([b"good"]) + struct.pack(">I", length))
    assert next(bodies) == b"good"
    with pytest.raises(wire.FramingError):
        next(bodies)


def test_the_largest_frame_is_taken() -> None:
    body = bytes(wire.MAX_FRAME)
    assert list(wire.FrameDecoder().feed(frames([body]))) == [body]


# Bad bodies


@pytest.mark.parametrize(
    "body",
    [
        b"\xc1",
        b"\x93\x01\x02\x03",
        b"\x81\xa1t",
        msgpack.packb({"t": "models", "id": "a"}) + b"\xc0",
        msgpack.packb({"t": "models", "id": "a", 5: 1}),
        b"\x81\xa1t\xa1\xff",
        b"\x81\xa1t\xdd\xff\xff\xff\xff",
        b"\x82\xa1t\xa6models\xa1x" + b"\x91" * 32 + b"\x01",
        b"\x82\xa1t\xa6models\xa1x" + b"\x91" * 100_000 + b"\x01",
    ],
    ids=lambda body: body[:12].hex(),
)
def test_a_body_that_is_no_map_is_an_invalid_frame(body: bytes) -> None:
    with pytest.raises(wire.InvalidMessage) as caught:
        wire.decode(body)
    assert (caught.value.kind, caught.value.id) == ("invalid_frame", None)


def test_nesting_of_32_is_taken() -> None:
    message = wire.decode(b"\x83\xa1t\xa6models\xa2id\xa1a\xa1x" + b"\x91" * 31 + b"\x01")
    assert message.content == wire.ListModels(id="a")


def test_too_many_values_are_refused_before_one_of_them_is_made() -> None:
    head, size = b"\x83\xa1t\xa6models\xa2id\xa1a\xa1x", wire.MAX_FRAME - 64
    for filled in (
        b"\xdd" + size.to_bytes(4, "big") + b"\x80" * size,
        b"\xdd" + (size // 16).to_bytes(4, "big") + (b"\x9f" + b"\x90" * 15) * (size // 16),
        b"\xdf" + (size // 4).to_bytes(4, "big") + b"\xa1y\xa1z" * (size // 4),
    ):
        body = head + filled
        tracemalloc.start()
        with pytest.raises(wire.InvalidMessage, match="at most 131072 values"):
            wire.decode(body)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 1_000_000


def test_bytes_and_text_count_once_however_long() -> None:
    files = {"image": PNG + bytes(12 * 1024 * 1024 - len(PNG)), "extra": ["x" * 70_000] * 100}
    body = msgpack.packb({"t": "generate", "id": "a", "prompt": "an apple", **files})
    assert isinstance(wire.decode(body).content, schema.Request)


def test_text_that_is_no_utf8_is_said_all_the_same() -> None:
    name = os.fsdecode(b"mod\xe8le")
    said = framed(schema.Failed(id=None, kind="internal", message=f"{name} is damaged"))
    assert msgpack.unpackb(said[4:])["message"] == "mod?le is damaged"
    done = schema.Done(id="a", parameters={"prompt": name, name: [name]}, notices=[name])
    said = framed(done)
    assert msgpack.unpackb(said[4:])["parameters"] == {"prompt": "mod?le", "mod?le": ["mod?le"]}


@pytest.mark.parametrize("field", ["guidance_scale", "strength", "variation_strength"])
def test_minus_zero_is_zero(field: str) -> None:
    message = wire.decode(msgpack.packb({"t": "generate", "id": "a", "prompt": "x", field: -0.0}))
    assert math.copysign(1, getattr(message.content, field)) == 1


@given(st.binary(max_size=200))
def test_no_body_raises_anything_else(body: bytes) -> None:
    try:
        wire.decode(body)
    except wire.InvalidMessage as error:
        assert len(error.message) < 250


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
field_names = sorted({key for fields in INCOMING for key in fields if key != "t"})


@given(
    st.sampled_from([fields["t"] for fields in INCOMING]),
    st.dictionaries(st.sampled_from(field_names), values, max_size=4),
)
def test_any_value_of_any_field_is_taken_or_refused_by_name(tag: str, fields: dict[str, Any]) -> None:
    try:
        message = wire.decode(msgpack.packb({**fields, "t": tag}))
    except wire.InvalidMessage as error:
        assert error.field is not None
        assert error.field in error.message or error.kind == "unsupported_version"
        assert len(error.message) < 250
    else:
        assert type(message.content) is wire.INCOMING[tag]


@given(
    prompt=st.text(min_size=1, max_size=200).filter(lambda text: text.strip() and "\0" not in text),
    seed=st.none() | st.integers(-1, 2**63 - 1),
    guidance=st.floats(0, 50),
    width=st.integers(8, 512).map(lambda n: n * 8),
)
def test_good_values_round_trip(prompt: str, seed: int | None, guidance: float, width: int) -> None:
    fields = {"t": "generate", "id": "r", "prompt": prompt, "seed": seed, "guidance_scale": guidance}
    request = wire.decode(msgpack.packb({**fields, "width": width})).content
    assert isinstance(request, schema.Request)
    assert (request.prompt, request.seed, request.width) == (prompt, seed, width)
    assert request.guidance_scale == guidance
    again = wire.decode(msgpack.packb({"t": "generate", **plain(request)}))
    assert again == wire.Message(None, request)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"width": 250}, "width", "width must be a multiple of 8 from 64 to 4096, got 250"),
    ({"width": 512.0}, "width", "width must be a multiple of 8 from 64 to 4096, got 512.0"),
    ({"steps": 0}, "steps", "steps must be an integer from 1 to 200, got 0"),
    ({"steps": True}, "steps", "steps must be an integer from 1 to 200, got true"),
    ({"guidance_scale": -1}, "guidance_scale", "guidance_scale must be a number from 0 to 50, got -1"),
    ({"guidance_scale": math.nan}, "guidance_scale", "guidance_scale must be a number from 0 to 50, got nan"),
    ({"strength": math.inf}, "strength", "strength must be a number from 0 to 1, got inf"),
    ({"seed": 2**63}, "seed", "seed must be an integer from -1 to 2^63 - 1, got 9223372036854775808"),
    ({"prompt": None}, "prompt", "prompt is required"),
    (
        {"prompt": "é" * 4097},
        "prompt",
        "prompt must be 1 to 8192 bytes of text, not only white space and without NUL, got 8194 bytes of text",
    ),
    ({"style": "a\0"}, "style", 'style must be at most 256 bytes of text without NUL, got "a\\u0000"'),
    ({"format": "gif"}, "format", 'format must be one of png, jpeg, webp, got "gif"'),
    ({"image": bytes(12)}, "image", "image must be a PNG, JPEG or WebP file of at most 12 MiB, got 12 bytes"),
    ({"mask": PNG}, "mask", "mask needs image"),
    ({"g": -1}, "g", "g must be an integer from 0 to 2^63 - 1, got -1"),
]


@pytest.mark.parametrize(("fields", "field", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_refusal_names_the_field_its_range_and_the_request(
    fields: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(wire.InvalidMessage) as caught:
        wire.decode(msgpack.packb({"t": "generate", "id": "r-1", "prompt": "an apple", **fields}))
    error = caught.value
    assert (error.kind, error.field, error.message, error.id) == ("invalid_request", field, message, "r-1")


@pytest.mark.parametrize("prompt", ["", " \t\n", "\u2003\u00a0", "a\0b"])
def test_a_prompt_without_text_is_refused(prompt: str) -> None:
    with pytest.raises(wire.InvalidMessage, match="prompt must be"):
        wire.decode(msgpack.packb({"t": "generate", "id": "r", "prompt": prompt}))


def test_a_field_deep_in_the_configuration_is_named() -> None:
    config = {"models": [{"id": "good"}, {"id": "../bad"}]}
    with pytest.raises(wire.InvalidMessage) as caught:
        wire.decode(msgpack.packb({"t": "hello", "v": 1, "g": 1, "config": config}))
    assert caught.value.field == "config.models[1].id"


def test_null_counts_as_absent() -> None:
    message = wire.decode(
        msgpack.packb({"t": "generate", "id": "r", "prompt": "x", "num_images": None, "g": None})
    )
    assert message == wire.Message(None, schema.Request(id="r", prompt="x"))


def test_another_version_is_told_from_a_bad_hello() -> None:
    with pytest.raises(wire.InvalidMessage) as caught:
        wire.decode(msgpack.packb({"t": "hello", "v": 2, "something": "else"}))
    assert (caught.value.kind, caught.value.field) == ("unsupported_version", "v")


def test_an_unknown_type_keeps_its_id() -> None:
    with pytest.raises(wire.InvalidMessage) as caught:
        wire.decode(msgpack.packb({"t": "paint", "id": "r-9"}))
    assert (caught.value.kind, caught.value.field, caught.value.id) == ("unknown_message", "t", "r-9")
