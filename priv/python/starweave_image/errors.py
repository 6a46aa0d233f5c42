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


ID_IN_USE = "a request or an operation with this id is running"


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


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "STATUS_ALLOC_FAILED")
# The cudaError_t of the CUDA runtime API after which its reference wants a new process, in the words of cudaGetErrorString.
_DEVICE_LOST = (
    "device-side assert triggered",
    "an illegal memory access was encountered",
    "an illegal instruction was encountered",
    "misaligned address",
    "unspecified launch failure",
    "uncorrectable ECC error encountered",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of any device ran out: most of torch's allocators say so only in the message."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def is_device_lost(error: BaseException) -> bool:
    """Whether the device does no more work for this process: after such an error CUDA and HIP fail every further call."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE_LOST)


def missing_package(error: ImportError) -> str:
    """One sentence for a person about an import that failed."""
    package = f"The Python package {error.name.partition('.')[0]}" if error.name else "A Python package"
    return f"{package} is missing or cannot be imported; run mix image.setup."
