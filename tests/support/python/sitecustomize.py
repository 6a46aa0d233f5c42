"""Misbehaviour of a sidecar, for tests that put this folder on PYTHONPATH.

STARWEAVE_TEST_MISBEHAVIOUR says which, as words NAME or NAME:SIGNAL: on that signal, SIGUSR1 unless given, whatever it is
at then; `die_of_poison` needs none. A line on descriptor 2 says that it has begun.
"""

import collections
import ctypes
import itertools
import os
import random
import signal
import sys
import threading
import time

_libc = ctypes.PyDLL(None)  # its calls keep the interpreter's lock
POISON = b"poison that ends its process"


def _hold_interpreter():
    os.write(2, b"holding\n")
    _libc.sleep(600)


def _spin_interpreter():
    os.write(2, b"spinning\n")
    collections.deque(itertools.repeat(None), maxlen=0)


def _never_end_a_pass():
    # What every network here computes with; the thread that does sleeps, and all others go on.
    if torch := sys.modules.get("torch"):
        torch.nn.functional.conv2d = lambda *_, **__: time.sleep(600)
        os.write(2, b"no pass ends\n")


def _hang_where_named():
    """From now on each request whose id names one of these places hangs in it, beyond the reach of a cancel."""
    import diffusers
    import PIL.Image
    import PIL.ImageFile
    import transformers

    places = {
        "decoding": (PIL.ImageFile.ImageFile, "load"),
        "tokenizing": (transformers.PreTrainedTokenizerBase, "__call__"),
        "stepping": (diffusers.DDIMScheduler, "step"),
        "encoding": (PIL.Image.Image, "save"),
    }
    for place, (owner, name) in places.items():
        setattr(owner, name, _hanging(place, getattr(owner, name)))
    os.write(2, b"hangs where it is told\n")


def _hanging(place, run):
    def hangs(*args, **kwargs):
        # Its thread has the name of the request.
        while place in threading.current_thread().name:
            if place == "stepping":
                sum(range(1000))
            else:
                time.sleep(600)
        return run(*args, **kwargs)

    return hangs


def _die_in_a_frame():
    writev = os.writev

    def dying_writev(fd, buffers):
        # An image: its head in one buffer, its data in another.
        if len(buffers) == 3 and b"sha256" in bytes(buffers[1]):
            frame = b"".join(buffers)
            os.write(fd, frame[: random.randrange(1, len(frame))])
            os.kill(os.getpid(), signal.SIGKILL)
        return writev(fd, buffers)

    os.writev = dying_writev
    os.write(2, b"dies in the next image\n")


def _die_of_poison():
    read = os.read

    def poisoned_read(fd, size):
        data = read(fd, size)
        if fd == 3 and POISON in data:
            end = threading.Timer(random.random() / 5, os.kill, (os.getpid(), signal.SIGKILL))
            end.daemon = True
            end.start()
        return data

    os.read = poisoned_read


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


_MISBEHAVIOURS = {
    "hold_interpreter": _hold_interpreter,
    "spin_interpreter": _spin_interpreter,
    "never_end_a_pass": _never_end_a_pass,
    "hang_where_named": _hang_where_named,
    "die_in_a_frame": _die_in_a_frame,
    "fork_in_c": _fork_in_c,
    "print": _print,
}


def _arrange(name, number="USR1"):
    if name == "die_of_poison":
        _die_of_poison()
    else:
        signal.signal(getattr(signal, f"SIG{number}"), lambda *_: _MISBEHAVIOURS[name]())


for _word in os.environ.get("STARWEAVE_TEST_MISBEHAVIOUR", "").split():
    _arrange(*_word.split(":"))
