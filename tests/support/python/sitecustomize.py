"""Misbehaviour of a sidecar on SIGUSR1, for tests that put this folder on PYTHONPATH.

STARWEAVE_TEST_MISBEHAVIOUR says which; a line on descriptor 2 says that it has begun.
"""

import ctypes
import os
import signal

_libc = ctypes.PyDLL(None)  # its calls keep the interpreter's lock


def _hold_interpreter():
    os.write(2, b"holding\n")
    _libc.sleep(600)


def _fork_in_c():
    child = _libc.fork()
    if child == 0:
        _libc.sleep(600)
        os._exit(0)
    os.write(2, b"forked\n")


def _print():
    print("a library prints from Python")
    _libc.puts(b"a library prints from C")
    _libc.fflush(None)
    os.write(1, b"\x00\x00\x00\x05junk!\n")
    os.write(2, b"printed\n")


_MISBEHAVIOURS = {"hold_interpreter": _hold_interpreter, "fork_in_c": _fork_in_c, "print": _print}

if "STARWEAVE_TEST_MISBEHAVIOUR" in os.environ:
    _misbehave = _MISBEHAVIOURS[os.environ["STARWEAVE_TEST_MISBEHAVIOUR"]]
    signal.signal(signal.SIGUSR1, lambda *_: _misbehave())
