"""The standard streams of a command: whoever loses what is printed loses no work by it."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any


class _Lossy(io.RawIOBase):
    """Writes to a descriptor until that fails, and then nowhere."""

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
    """Let prints of this process fail unseen: to a reader that is gone, a full disk, a stream that was never open."""
    # Else the next file that is opened would be printed into.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout, sys.stderr = _stream(sys.stdout, 1), _stream(sys.stderr, 2)


def _stream(old: Any, fd: int) -> io.TextIOWrapper:
    encoding = getattr(old, "encoding", None) or "utf-8"
    # The names of files are printed as the bytes that they are.
    errors = "surrogateescape" if encoding.lower().replace("-", "") == "utf8" else "backslashreplace"
    raw = _Lossy(fd)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=fd == 2 or raw.isatty())


def finish() -> None:
    """Write what is left; says on stderr what was lost, unless its reader went away, which is a reader's right."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):
            stream.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Lossy) and raw.lost is not None and raw.lost.errno != errno.EPIPE:
        print(f"starweave-image: what was printed is lost: {raw.lost.strerror}", file=sys.stderr)
        sys.stderr.flush()
