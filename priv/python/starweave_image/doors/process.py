"""What a sidecar process sets up before anything can print, block or fail: descriptors, process group, watchdog.

Standard library only, and nothing heavy of it: the watchdog must be forked before the first thread and the
first native import.
"""

from __future__ import annotations

import faulthandler
import fcntl
import io
import os
import socket
import sys
from contextlib import suppress

from . import watchdog

FRAMES_IN = 3
FRAMES_OUT = 4
# The prefix of the folder that an Elixir application creates for this one socket.
_SCRATCH = "starweave_image-"


class NotAPort(Exception):
    """The process was not started as a port: its descriptors or its command line are wrong."""


def prepare(log_socket: str | None) -> None:
    """Make this process a sidecar; raises `NotAPort`."""
    _require(FRAMES_IN, os.O_WRONLY, "read from")
    _require(FRAMES_OUT, os.O_RDONLY, "written to")
    _redirect(log_socket)
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    watchdog.fork(FRAMES_IN, FRAMES_OUT)
    os.register_at_fork(after_in_child=_close_frames)
    faulthandler.enable(file=2)


def _require(fd: int, wrong_mode: int, use: str) -> None:
    try:
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        raise NotAPort(
            f"descriptor {fd} is not open: this command is started by an Elixir application"
        ) from None
    if mode == wrong_mode:
        raise NotAPort(f"descriptor {fd} cannot be {use}")
    os.set_inheritable(fd, False)
    os.set_blocking(fd, True)


def _redirect(log_socket: str | None) -> None:
    # Done before the descriptors change: `reconfigure` may ask for the position of a stream that was opened on a file.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if null > 0:
        os.close(null)
    if log_socket is None:
        os.dup2(2, 1)
    else:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as log:
                log.connect(log_socket)
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
        except OSError as error:
            raise NotAPort(f"the log socket cannot be connected: {error.strerror}") from None
        finally:
            _forget(log_socket)


def _forget(log_socket: str) -> None:
    # The socket is not needed any more, and the application may be killed before it can remove it.
    folder = os.path.dirname(log_socket)
    if os.path.basename(folder).startswith(_SCRATCH):
        with suppress(OSError):
            os.unlink(log_socket)
        with suppress(OSError):
            os.rmdir(folder)


def _close_frames() -> None:
    # A forked child that held the frames would keep the application from seeing the sidecar's end.
    for fd in (FRAMES_IN, FRAMES_OUT):
        try:
            os.close(fd)
        except OSError:
            pass
