"""The one exception that reaches a person, and its closed set of kinds (docs/protocol.md, `error`)."""

from __future__ import annotations

from typing import Literal

Kind = Literal[
    "invalid_request",
    "model_not_found",
    "model_load_failed",
    "overloaded",
    "timeout",
    "cancelled",
    "out_of_memory",
    "unavailable",
    "unsafe_content",
    "internal",
    # The rest concern a frame or the connection rather than a request.
    "invalid_frame",
    "unknown_message",
    "unsupported_version",
    "wrong_generation",
]


class ImageError(Exception):
    """A request, or the sidecar itself, cannot go on.

    `message` is one sentence for a person: no path, no traceback, no secret. `field` names the offending
    field of the message, where there is one. `retryable` says that the same request may succeed later, here or in
    another sidecar, without anyone changing anything.
    """

    def __init__(self, kind: Kind, message: str, field: str | None = None, retryable: bool = False) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.message = message
        self.field = field
        self.retryable = retryable


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of whatever device: most allocators of torch say so in words only."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("out of memory", "can't allocate memory", "bad_alloc"))
    )


def missing_package(error: ImportError) -> str:
    """One sentence for a person about an import that failed."""
    package = f"The Python package {error.name.partition('.')[0]}" if error.name else "A Python package"
    return f"{package} is missing or cannot be imported; run mix image.setup."
