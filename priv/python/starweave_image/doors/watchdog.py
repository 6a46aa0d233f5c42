"""A tiny process that ends the sidecar when nobody is left to talk to.

A thread cannot do this while native code holds the interpreter, and a signal on the parent's death reaches
the sidecar but not its children. So: a process of its own, forked before any thread exists, that needs nothing
of the sidecar to be working.
"""

from __future__ import annotations

import os
import select
import signal

_POLL_MS = 250
_GRACE_POLLS = 6


def fork(frames_in: int, frames_out: int) -> None:
    """Watch over this process and its group, of which it must be the leader."""
    sidecar = os.getpid()
    if os.fork() == 0:
        try:
            _prepare(frames_out)
            _watch(sidecar, frames_in)
        finally:
            os._exit(0)


def _prepare(frames_out: int) -> None:
    # A group of its own: what stops or kills the sidecar's group leaves the watchdog able to finish it off.
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # An open write end would hide the sidecar's end from the application; so would its log.
    os.close(frames_out)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (1, 2):
        os.dup2(null, fd)


def _watch(sidecar: int, frames_in: int) -> None:
    application = select.poll()
    application.register(frames_in, 0)
    # The parent's id is asked rather than a pipe: a child forked in C would hold that pipe open.
    while os.getppid() == sidecar and not application.poll(_POLL_MS):
        pass
    nobody = select.poll()
    for _ in range(_GRACE_POLLS):
        if os.getppid() != sidecar:
            break
        nobody.poll(_POLL_MS)
    try:
        os.killpg(sidecar, signal.SIGKILL)
    except ProcessLookupError:
        pass
