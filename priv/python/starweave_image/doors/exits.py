"""The exit codes of docs/protocol.md and `starweave-image --help`. Standard library only."""

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
"""The codes of the commands that people call; only the port uses the others."""

_KINDS: dict[Kind, int] = {
    "invalid_request": USAGE,
    "model_not_found": USAGE,
    "unavailable": UNAVAILABLE,
}


def code_of(kind: Kind) -> int:
    """The exit code of a command that fails with an error of this kind."""
    return _KINDS.get(kind, FAILED)
