"""With which code a process ends, as docs/protocol.md and `starweave-image --help` say. Standard library only."""

from __future__ import annotations

from ..errors import Kind

OK = 0
FAILED = 1
USAGE = 2
CONSENT = 3
PORT_USAGE = 64
FRAMING_LOST = 65
NO_HELLO = 66
UNAVAILABLE = 69
INTERNAL = 70
INTERRUPTED = 130

COMMANDS = {
    OK: "done",
    FAILED: "the image could not be made, or something is missing or damaged",
    USAGE: "wrong arguments",
    CONSENT: "nothing was fetched without consent",
    UNAVAILABLE: "a Python package is missing or cannot be imported",
    INTERRUPTED: "interrupted",
}
"""Those of the commands that people call; the others are of the port alone."""

_KINDS: dict[Kind, int] = {
    "invalid_request": USAGE,
    "model_not_found": USAGE,
    "unavailable": UNAVAILABLE,
}


def code_of(kind: Kind) -> int:
    """The code of a command that ends with an error of this kind."""
    return _KINDS.get(kind, FAILED)
