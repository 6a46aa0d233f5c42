"""The standard streams of a command: failing to print must not lose any work."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any


class _Lossy(io.RawIOBase):
    """Writes to a descriptor until that fails, and then discards all output."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.lost: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: Any) -> int:
        if self.lost is None:
            try:
                return os.write(self._fd, data)
            except OSError as error:
                self.lost = error
        return len(data)


def prepare() -> None:
    """Ignore failures of prints: to a reader that is gone, to a full disk, to a stream that was never open."""
    # Without open descriptors 0 to 2, the next opened file would get one of them, and be printed into.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout, sys.stderr = _stream(sys.stdout, 1), _stream(sys.stderr, 2)


def _stream(old: Any, fd: int) -> io.TextIOWrapper:
    encoding = getattr(old, "encoding", None) or "utf-8"
    # File names are printed as their original bytes.
    errors = "surrogateescape" if encoding.lower().replace("-", "") == "utf8" else "backslashreplace"
    raw = _Lossy(fd)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=fd == 2 or raw.isatty())


def finish() -> None:
    """Flush the streams. Lost output is reported on stderr, unless it was lost because the reader closed the pipe."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):
            stream.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Lossy) and raw.lost is not None and raw.lost.errno != errno.EPIPE:
        print(f"starweave-image: what was printed is lost: {raw.lost.strerror}", file=sys.stderr)
        sys.stderr.flush()
