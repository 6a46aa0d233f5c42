"""What making the environment asks of the Python it is made from. Standard library only, and for Pythons too old
for anything else, so that they can be told so.

    bootstrap.py describe                       one "name value" line for each fact
    bootstrap.py torch KIND VERSION PLACE …     where that torch can be had: "version place", of the first folder or
                                                index that has it for this Python, machine and kind (cpu, cuda, rocm)
    bootstrap.py lock FILE                      "waiting" if another holds it, "locked", then holds it until stdin ends
"""

import fcntl
import os
import re
import sys
import sysconfig
import urllib.error
import urllib.request
from typing import List

TIMEOUT_S = 5.0
LABELS = {"cpu": "cpu", "cuda": r"cu\d+", "rocm": r"rocm[0-9.]+"}


def describe() -> None:
    print("version %d.%d" % sys.version_info[:2])
    print("executable " + os.path.realpath(sys.executable))
    print("system " + sys.platform)
    try:
        import ensurepip
        import venv

        print("venv " + venv.__name__ + " " + ensurepip.version())
    except ImportError:
        # Debian takes ensurepip out of python3 and puts it into python3-venv.
        pass


def torch(kind: str, version: str, places: List[str]) -> None:
    tag = "cp%d%d" % sys.version_info[:2]
    machine = sysconfig.get_platform().rsplit("-", 1)[-1]
    wheel = r"torch-(%s%s)-%s-%s-[a-z0-9_.]*%s\.whl"
    # A wheel without a label is the CPU's on macOS and CUDA's on Linux; one for AMD is always labelled.
    labels = [r"\+" + LABELS[kind]] + ([""] if kind != "rocm" else [])
    for place in places:
        try:
            names = listing(place)
        except urllib.error.HTTPError:
            continue  # the host is there and has no such index
        except (OSError, ValueError):
            if "://" in place:
                return  # the others are on the same host, and each may take the whole time-out
            continue
        for label in labels:
            found = re.search(wheel % (re.escape(version), label, tag, tag, re.escape(machine)), names)
            if found:
                print(found.group(1), place)
                return


def listing(place: str) -> str:
    if "://" not in place:
        return "\n".join(sorted(os.listdir(place)))
    with urllib.request.urlopen(place + "/torch/", timeout=TIMEOUT_S) as page:
        text: str = page.read().decode("utf-8", "replace")
    return text.replace("%2B", "+")


def lock(path: str) -> None:
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("waiting", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        print("locked", flush=True)
        # The kernel lets go of it when this process ends, however it ends.
        sys.stdin.read()


if __name__ == "__main__":
    command, arguments = sys.argv[1], sys.argv[2:]
    if command == "describe":
        describe()
    elif command == "torch":
        torch(arguments[0], arguments[1], arguments[2:])
    elif command == "lock":
        lock(arguments[0])
