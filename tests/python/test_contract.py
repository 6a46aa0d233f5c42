"""The contract's requests and frames, as the sidecar's side of the wire sees them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgpack
import msgspec
import pytest
from contract import HERE, expand, load, pack
from starweave_image import schema
from starweave_image.doors import wire

REQUESTS = load("requests.jsonl")
FRAMES = load("frames.jsonl")
OUTGOING: dict[str, Any] = {type: struct for struct, type in wire.OUTGOING.items()}


def named(cases: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


def test_the_files_are_what_generate_py_writes() -> None:
    check = [sys.executable, str(HERE / "generate.py"), "--check"]
    result = subprocess.run(check, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


@named(REQUESTS)
def test_request(case: dict[str, Any]) -> None:
    request = expand(case["request"])
    expect = case["expect"]
    body = pack({"t": "generate", "id": "case", **request})
    if expect == "ok" or "stage" in expect:
        read = wire.decode(body).content
        assert isinstance(read, schema.Request)
        for field, value in request.items():
            if value is not None and field in read.__struct_fields__:
                assert getattr(read, field) == value
        return
    with pytest.raises(wire.InvalidMessage) as raised:
        wire.decode(body)
    error = raised.value
    assert (error.kind, error.field) == (expect["kind"], expect["field"])
    assert error.id == (None if expect["field"] in (None, "id") else "case")
    assert 0 < len(error.message) < 250
    if "message" in expect:
        assert error.message == expect["message"]


@named([case for case in FRAMES if "sidecar" in case])
def test_frame_to_the_sidecar(case: dict[str, Any]) -> None:
    expect = case["sidecar"]
    decoder = wire.FrameDecoder()
    bodies = decoder.feed(bytes.fromhex(expand(case["hex"])))
    if expect == "more":
        assert list(bodies) == []
    elif expect == "ok" or "stage" in expect:
        [body] = bodies
        message = wire.decode(body)
        if "value" in case:
            read = msgspec.to_builtins(message.content, builtin_types=(bytes,))
            type = next(type for type, kind in wire.INCOMING.items() if kind is message.content.__class__)
            assert_holds({"t": type, "g": message.generation, **read}, expand(case["value"]))
        else:
            assert message == wire.Message(None, wire.Cancel(id="r1"))
    elif expect["kind"] == "invalid_frame" and expect.get("exit") == 65:
        with pytest.raises(wire.FramingError):
            list(bodies)
    else:
        [body] = bodies
        with pytest.raises(wire.InvalidMessage) as raised:
            wire.decode(body)
        error = raised.value
        assert {"kind": error.kind, "field": error.field, "id": error.id}.items() <= expect.items()


@named([case for case in FRAMES if case.get("application") == "ok"])
def test_frame_to_the_application_can_be_said(case: dict[str, Any]) -> None:
    value = expand(case["value"])
    struct = OUTGOING[value["t"]]
    if "data" in value:  # msgspec converts no memoryview
        message = struct(**{key: item for key, item in value.items() if key not in ("t", "g")})
    else:
        message = msgspec.convert(value, struct)
    said = b"".join(wire.encode(message, value["g"]))
    assert int.from_bytes(said[:4], "big") == len(said) - 4
    sent = msgpack.unpackb(said[4:])
    assert sent == {key: item for key, item in value.items() if key in (*struct.__struct_fields__, "t", "g")}


def test_every_message_has_a_golden_frame() -> None:
    said = {case["value"]["t"] for case in FRAMES if case.get("sidecar") == "ok" and "value" in case}
    heard = {case["value"]["t"] for case in FRAMES if case.get("application") == "ok"}
    assert said == set(wire.INCOMING)
    assert heard == set(OUTGOING)


def assert_holds(message: Any, sent: Any) -> None:
    """`message` says all that was sent; what else it says are defaults."""
    if isinstance(sent, dict):
        for key, value in sent.items():
            assert_holds(message[key], value)
    elif isinstance(sent, list):
        assert len(message) == len(sent)
        for item, value in zip(message, sent, strict=True):
            assert_holds(item, value)
    else:
        assert message == sent
