"""Where images are written. lib/starweave_image/output.ex has the same rules; tests/contract/outputs.jsonl tests both.

A regular file is replaced atomically and keeps its mode and owner: a reader sees either the old picture or the new one,
and if the disk is full the old one stays. For a link, this applies to its target. If no file can be created in the
folder, or the owner could not be kept, the file is overwritten in place. Anything else (a device, a pipe) is opened and
written to.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass

from ..errors import ImageError

_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_LINKS = 40
# Written as a test, so that a full disk is noticed before anything is drawn.
_PROBE = bytes(64 * 1024)
# The errors of a folder in which no file can be created, though a file in it may be writable.
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Plan:
    """The files for the images, in order, and for a preview."""

    paths: list[str]
    preview: str


def format_of(out: str) -> str:
    """The format for a file name's ending, PNG without one; raises `invalid_request` for an unknown ending."""
    ending = _ending(out).lower()
    if ending and ending not in _FORMATS:
        *others, last = _FORMATS
        raise _refused(f"must end in {', '.join(others)} or {last}, got {ending}")
    return _FORMATS.get(ending, "png")


def plan(out: str, count: int, preview: bool) -> Plan:
    """The files for `count` images; raises `invalid_request` unless all of them can be written.

    This is called before anything is drawn, so it must not open a pipe, which would wait for a reader.
    """
    root, ending = _split(out)
    paths = [out] if count == 1 else [f"{root}-{number}{ending}" for number in range(1, count + 1)]
    names = Plan(paths, f"{root}.preview.jpg")
    if out == "-":
        raise _refused("must name a file, not -")
    # No further files must be created next to a device or a pipe.
    if (count > 1 or preview) and _is_written_into(out):
        raise _refused(f"must be a file for several images or a preview, got {out}")
    for path in [names.preview, *paths] if preview else paths:
        try:
            check(path)
        except OSError as error:
            raise _refused(_sentence(error, path)) from None
    return names


def check(path: str) -> None:
    """Raises OSError if a file cannot be written, as far as that can be known without writing it."""
    path, found = _target(path)
    if found is not None:
        _writable(path)
    if found is None or stat.S_ISREG(found.st_mode):
        try:
            _probe(path)
        except OSError as error:
            if found is None or error.errno not in _CLOSED:
                raise


def write(path: str, data: bytes | memoryview) -> None:
    """Writes a file, raises OSError; a pipe waits for its reader."""
    path, found = _target(path)
    if found is None:
        _replace(path, None, data)
    elif not stat.S_ISREG(found.st_mode):
        # Append: if stdout is redirected to a file, its earlier content must stay.
        _fill(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY), data, sync=False)
    else:
        _writable(path)
        try:
            _replace(path, found, data)
        except OSError as error:
            if error.errno not in _CLOSED:
                raise
            _overwrite(path, data)


def is_stdout(path: str) -> bool:
    """Whether this path leads to the standard output of this process."""
    try:
        return _is_written_into(path) and os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:
        return False


def _is_written_into(path: str) -> bool:
    try:
        found = _target(path)[1]
    except OSError:
        return False
    return found is not None and not stat.S_ISREG(found.st_mode)


# Stands for an open file of a process, whose own name may not exist any more; treated like a device.
_OPEN_FILE = os.stat_result((stat.S_IFCHR,) + (0,) * 9)


def _target(path: str) -> tuple[str, os.stat_result | None]:
    """The path at the end of all links, and the status of the file there, or None if there is none."""
    for _ in range(_LINKS):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            if not path or path.endswith("/"):
                raise
            return path, None
        if stat.S_ISDIR(found.st_mode):
            raise _os_error(errno.EISDIR)
        if stat.S_ISSOCK(found.st_mode):
            raise _os_error(errno.ENXIO)
        if not stat.S_ISLNK(found.st_mode):
            return path, found
        if path.startswith(("/proc/", "/dev/fd/")):
            return path, _OPEN_FILE
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    raise _os_error(errno.ELOOP)


def _writable(path: str) -> None:
    if not os.access(path, os.W_OK):
        raise _os_error(errno.EACCES)


def _probe(path: str) -> None:
    part, file = _create_beside(path)
    try:
        _fill(file, _PROBE, sync=False)
    finally:
        os.unlink(part)


def _replace(path: str, found: os.stat_result | None, data: bytes | memoryview) -> None:
    part, file = _create_beside(path)
    try:
        try:
            if found is not None:
                _make_alike(file, found)
        except OSError:
            os.close(file)
            raise
        _fill(file, data, sync=True)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise


def _make_alike(file: int, found: os.stat_result) -> None:
    own = os.fstat(file)
    # The owner first, because changing it clears some bits of the mode.
    if (own.st_uid, own.st_gid) != (found.st_uid, found.st_gid):
        os.fchown(file, found.st_uid, found.st_gid)
    os.fchmod(file, stat.S_IMODE(found.st_mode))


def _overwrite(path: str, data: bytes | memoryview) -> None:
    file = os.open(path, os.O_WRONLY)
    try:
        os.ftruncate(file, len(data))
    except OSError:
        os.close(file)
        raise
    _fill(file, data, sync=True)


def _fill(file: int, data: bytes | memoryview, sync: bool) -> None:
    with os.fdopen(file, "wb", buffering=0) as stream:
        left = memoryview(data)
        while left:
            left = left[stream.write(left) :]
        if sync:
            os.fsync(file)


def _create_beside(path: str) -> tuple[str, int]:
    # The name is short, so that it is allowed even if that of the image has 255 bytes, and not guessable. The file must
    # be new, so that no link prepared there is followed.
    part = os.path.join(os.path.dirname(path), f".{secrets.token_urlsafe(12)}.part")
    return part, os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _split(out: str) -> tuple[str, str]:
    ending = _ending(out)
    return out[: len(out) - len(ending)], ending


def _ending(out: str) -> str:
    """The part of the name from its last dot, unless that is its first character."""
    name = out.rpartition("/")[2]
    at = name.rfind(".")
    return name[at:] if at > 0 else ""


def _sentence(error: OSError, path: str) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"must be in a folder that exists, got {path}"
    if error.errno == errno.EISDIR:
        return f"must be a file, {path} is a folder"
    return f"cannot be written, {(error.strerror or 'unknown error').lower()}: {path}"


def _refused(sentence: str) -> ImageError:
    return ImageError("invalid_request", f"out {sentence}", "out")


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
