"""Files that somebody else wrote: those of a model's folder, and of a cache that other tools share.

To open a FIFO may wait for ever, a device has no end, and a file may have any size, its JSON any shape and any depth. So
such files are read here alone: regular ones, up to a size, and as the type that is asked for.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

SMALL = 2**20
"""Bytes that a configuration has at most."""
LARGE = 2**26
"""Bytes that a list has at most: the tensors of a file, the files of a network, the words of a tokenizer."""


class Unreadable(Exception):
    """A file is not there or not what it should be; the words complete the sentence `its FILE …`."""


def size_of(path: Path) -> int:
    """Bytes of a regular file, whatever links lead to it; raises `Unreadable`."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable("is no regular file")
    return found.st_size


def read_bytes(path: Path, limit: int = SMALL) -> bytes:
    """A whole regular file of at most `limit` bytes; raises `Unreadable`."""
    size = size_of(path)
    if size > limit:
        raise Unreadable(f"has {size} bytes, and may have {limit}")
    data = read_start(path, limit + 1)
    if len(data) > limit:
        raise Unreadable(f"has more than {limit} bytes")
    return data


def read_start(path: Path, count: int) -> bytes:
    """At most the first `count` bytes of a regular file; raises `Unreadable`."""
    size_of(path)
    try:
        # It may have become something else since; without waiting, whatever it is now.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Unreadable("is no regular file")
            return file.read(count)
    except OSError as error:
        raise _unreadable(path, error) from None


def read_json(path: Path, type: type[T], limit: int = SMALL) -> T:
    """What a JSON file holds, as `type`; raises `Unreadable`."""
    return parse_json(read_bytes(path, limit), type)


def parse_json(data: bytes, type: type[T]) -> T:
    """As `read_json` for what was read."""
    try:
        value: Any = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise Unreadable("is nested too deeply") from None
    except UnicodeDecodeError:
        raise Unreadable("is no text in UTF-8") from None
    except ValueError:
        begin = " (it begins with a byte order mark)" if data.startswith(b"\xef\xbb\xbf") else ""
        raise Unreadable(f"is no JSON{begin}") from None
    try:
        return msgspec.convert(value, type)
    except (msgspec.ValidationError, RecursionError) as error:
        raise Unreadable(f"has the wrong shape: {str(error)[:200]}") from None


def _unreadable(path: Path, error: Exception) -> Unreadable:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOENT:
        return Unreadable("is a link to nothing" if os.path.islink(path) else "is missing")
    if number == errno.ELOOP:
        return Unreadable("is a link that leads in a circle")
    if number in (errno.EACCES, errno.EPERM):
        return Unreadable("may not be read by this user")
    return Unreadable("cannot be read")
