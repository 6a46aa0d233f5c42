"""A tiny process that ends the sidecar when the application is gone.

A thread cannot do this while native code holds the interpreter, and a signal on the parent's death reaches the sidecar
but not its children. So it is a process of its own, forked before any thread exists, and works even if the sidecar
hangs.
"""

from __future__ import annotations

import os
import select
import signal

_POLL_MS = 250
_GRACE_POLLS = 6


def fork(frames_in: int, frames_out: int) -> None:
    """Watch over this process, which must be the leader of its process group, and that group."""
    sidecar = os.getpid()
    if os.fork() == 0:
        try:
            _prepare(frames_out)
            _watch(sidecar, frames_in)
        finally:
            os._exit(0)


def _prepare(frames_out: int) -> None:
    # A group of its own: a signal that stops or kills the sidecar's group must not reach the watchdog.
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # If these stayed open here, the application would not see the end of the sidecar: neither of its frames nor its
    # log.
    os.close(frames_out)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (1, 2):
        os.dup2(null, fd)


def _watch(sidecar: int, frames_in: int) -> None:
    application = select.poll()
    application.register(frames_in, 0)
    # Polls the parent's id rather than a pipe: a child forked in C would keep the pipe open.
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
