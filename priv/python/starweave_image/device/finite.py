"""Results that are NaN or infinite: from damaged weights, or from a format that is too narrow for a network.

Each result of a denoiser or an autoencoder is checked after its pass. Bad numbers from a text encoder or a scheduler
show in the next of these results; only then is their source looked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..errors import ImageError

_FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_finite(value: Any) -> bool:
    """Whether all numbers in `value`, a tensor or a container of tensors, are finite. Waits for the device."""
    return all(
        _all_finite(tensor) for tensor in _tensors(value) if tensor.dtype in _FORMATS and tensor.numel()
    )


def _all_finite(tensor: torch.Tensor) -> bool:
    if tensor.device.type not in ("cpu", "cuda"):
        return bool(torch.isfinite(tensor).all())
    # Twenty times faster than `isfinite().all()`, and without a copy of the tensor; a NaN appears in both results.
    least, most = torch.aminmax(tensor)
    return bool(torch.isfinite(least) & torch.isfinite(most))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    # The distribution that an autoencoder encodes to; everything in it is computed from its parameters.
    elif isinstance(parameters := getattr(value, "parameters", None), torch.Tensor):
        yield parameters


def error(role: str, kind: str, dtype: str, sample: bool, others: Sequence[bool]) -> ImageError:
    """The error for a request whose network `role`, of class `kind`, gave NaN or infinity in the format `dtype`. Names
    the source, given whether the network's `sample` and its other inputs were finite."""
    if not sample:
        whose = f"what the scheduler made of the denoiser's answers, before {role} ({kind}) worked on it,"
    elif not all(others):
        whose = f"what the text encoder told {role} ({kind})"
    else:
        whose = f"the answer of {role} ({kind})"
    return ImageError(
        "internal",
        f"{whose} has numbers in {dtype} that are NaN or infinite: "
        "the model's weights are damaged, or overflow in this format",
        "model",
    )
