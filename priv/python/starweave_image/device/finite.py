"""Numbers that are none: what damaged weights give, or a format that is too narrow for a network.

Each answer of a denoiser and of an autoencoder is looked at when its pass is over. Whatever text encoders or schedulers
spoil is seen in the next of these; which of them it was is only looked for then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..errors import ImageError

_FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_finite(value: Any) -> bool:
    """Whether no number in `value`, tensors and what holds them, is NaN or infinite. Waits for the device."""
    return all(
        _all_finite(tensor) for tensor in _tensors(value) if tensor.dtype in _FORMATS and tensor.numel()
    )


def _all_finite(tensor: torch.Tensor) -> bool:
    if tensor.device.type not in ("cpu", "cuda"):
        return bool(torch.isfinite(tensor).all())
    # Twenty times faster, and without a copy of the tensor: NaN comes through in both.
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
    # The distribution that an autoencoder encodes to: all else in it is made of these.
    elif isinstance(parameters := getattr(value, "parameters", None), torch.Tensor):
        yield parameters


def error(role: str, kind: str, dtype: str, sample: bool, others: Sequence[bool]) -> ImageError:
    """The end of a request for which the network `role` of class `kind` gave numbers that are none, in the format `dtype`.
    Says whose they are, given whether the `sample` it worked on and its other inputs were finite."""
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
