"""The other end of tests/elixir/round_trip_test.exs: PyPI's msgpack, and msgspec, over a port.

["echo", bytes] is answered by what each of the two makes of them: [bytes, description] of the value that it read.
["draw", seed] is answered by a hundred values drawn at random, again as [bytes, description].
["generate", bytes] is answered by the message that the sidecar reads there.
Frames have Erlang's {:packet, 4}, on stdin and stdout.
"""

from __future__ import annotations

import math
import random
import struct
import sys
from collections.abc import Iterator
from typing import Any

import msgpack
import msgspec


def describe(value: Any) -> str:
    """The value in words that Elixir finds on its own: floats by their bits, text and bytes, which it does not tell
    apart, in hex."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "nil")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return "nan" if math.isnan(value) else "f" + struct.pack(">d", value).hex()
    if isinstance(value, str):
        return "x" + value.encode().hex()
    if isinstance(value, bytes):
        return "x" + value.hex()
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(map(describe, value)) + "]"
    return "{" + " ".join(sorted(f"{describe(key)}:{describe(item)}" for key, item in value.items())) + "}"


def echo(packed: bytes) -> list[list[Any]]:
    value = msgpack.unpackb(packed, strict_map_key=False)
    other = msgspec.msgpack.decode(packed)
    return [
        [msgpack.packb(value), describe(value)],
        [msgspec.msgpack.encode(other), describe(other)],
    ]


def draw(rng: random.Random, depth: int = 0) -> Any:
    kinds = [scalar] * 3 if depth > 4 else [scalar, scalar, array, table]
    return rng.choice(kinds)(rng, depth)


def scalar(rng: random.Random, _depth: int = 0) -> Any:
    return rng.choice(
        [
            lambda: None,
            lambda: rng.random() < 0.5,
            lambda: integer(rng),
            lambda: struct.unpack(">d", rng.randbytes(8))[0],
            lambda: rng.choice([0.0, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan]),
            lambda: text(rng),
            lambda: rng.randbytes(size(rng)),
        ]
    )()


def integer(rng: random.Random) -> int:
    near = rng.choice([0, 2**7, 2**8, 2**15, 2**16, 2**31, 2**32, 2**63, 2**64]) + rng.randrange(-40, 40)
    return max(-(2**63), min(2**64 - 1, rng.choice([near, -near, rng.randrange(-(2**63), 2**64)])))


def size(rng: random.Random) -> int:
    return rng.choice(
        [0, 1, 15, 16, 31, 32, 33, 255, 256, rng.randrange(40)] + [65_535, 65_536] * (rng.random() < 0.01)
    )


def text(rng: random.Random) -> str:
    alphabet = rng.choice(["az", "\0\x1f ~", "éß\u0301", "\u2028\ufeff\uffff", "🍎👩\u200d🚀\U0010ffff"])
    return "".join(rng.choice(alphabet) for _ in range(size(rng)))


def array(rng: random.Random, depth: int) -> list[Any]:
    return [draw(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 5, 16]))]


def table(rng: random.Random, depth: int) -> dict[Any, Any]:
    return {text(rng): draw(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 5, 16]))}


def frames() -> Iterator[bytes]:
    while header := sys.stdin.buffer.read(4):
        yield sys.stdin.buffer.read(int.from_bytes(header, "big"))


def main() -> None:
    for frame in frames():
        match msgpack.unpackb(frame):
            case ["echo", packed]:
                answer: Any = echo(packed)
            case ["draw", seed]:
                rng = random.Random(seed)
                values = [draw(rng) for _ in range(100)]
                answer = [[msgpack.packb(value), describe(value)] for value in values]
            case ["generate", packed]:
                answer = generate(packed)
        body = msgpack.packb(answer)
        sys.stdout.buffer.write(len(body).to_bytes(4, "big") + body)
        sys.stdout.buffer.flush()


def generate(packed: bytes) -> Any:
    """What the sidecar makes of a `generate` message: its fields, or the error that it would send."""
    from starweave_image.doors import wire

    try:
        request = wire.decode(packed).content
        return {"t": "generate", **msgspec.to_builtins(request, builtin_types=(bytes,))}
    except wire.InvalidMessage as error:
        return {"error": str(error), "field": error.field}


if __name__ == "__main__":
    main()
