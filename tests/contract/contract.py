"""Reads the contract's files: one JSON value a line, with tags for what JSON cannot say (README.md)."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgpack

HERE = Path(__file__).parent


def load(name: str) -> list[dict[str, Any]]:
    with (HERE / name).open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def expand(value: Any) -> Any:
    """`value` with its tags replaced; text that is not UTF-8 has surrogate escapes, as in `os.fsdecode`."""
    if isinstance(value, list):
        return [expand(item) for item in value]
    if not isinstance(value, dict):
        return value
    match next(iter(value.items()), None):
        case "$float", text:
            return float(text)
        case "$bytes", text:
            return base64.b64decode(text)
        case "$invalid_utf8", text:
            return base64.b64decode(text).decode("utf-8", "surrogateescape")
        case "$repeat", [item, count]:
            return expand(item) * count
        case "$concat", [first, *others]:
            whole = expand(first)
            for other in others:
                whole += expand(other)
            return whole
    return {key: expand(item) for key, item in value.items()}


def pack(value: Any) -> bytes:
    """An expanded value as msgpack, invalid text included."""
    packed: bytes = msgpack.packb(value, unicode_errors="surrogateescape")
    return packed


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body
