"""How calls of one network are stacked into one call, and its result is split again.

A call is what a pipeline passes to its denoiser. Its *rows* are the samples along the batch axis: two for one picture
with guidance. Calls with equal `key`s may be stacked. Their timesteps may differ, since each row has its own.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

# Denoisers whose rows are known to be independent, and whose arguments are known to be per row or shared. Decoders are
# left out: on a CPU they took longer per row when stacked, and they are a small part of the work.
_KNOWN = frozenset(
    {
        "UNet2DConditionModel",
        "SD3Transformer2DModel",
        "FluxTransformer2DModel",
        "Flux2Transformer2DModel",
        "QwenImageTransformer2DModel",
        "ZImageTransformer2DModel",
        "PixArtTransformer2DModel",
        "SanaTransformer2DModel",
    }
)
SAMPLES = ("sample", "hidden_states", "x")
"""The names that denoisers use for their main input."""
_TIMES = ("timestep", "t")
# Positions are the same for all rows; where they have a batch axis (Flux 2) only its first entry is read.
_SHARED = ("txt_ids", "img_ids")
# Networks whose captions differ in length: the argument with the captions, and the mask that hides their padding.
_RAGGED = {"QwenImageTransformer2DModel": ("encoder_hidden_states", "encoder_hidden_states_mask")}
_BUCKET = 32
"""Captions whose lengths in tokens round up to the same multiple of this are stacked."""


class Stackable:
    """One call with its arguments by name; raises `TypeError` for arguments that are not known to stack."""

    def __init__(self, kind: str, arguments: dict[str, Any]) -> None:
        self.kind = kind
        self.arguments = arguments
        sample = next((arguments[name] for name in SAMPLES if name in arguments), None)
        if kind not in _KNOWN or sample is None:
            raise TypeError(f"{kind} is not known to keep its rows apart")
        self.rows: int = len(sample)
        self.key: Hashable = self._key_of(arguments)

    def _key_of(self, arguments: dict[str, Any]) -> tuple[tuple[str, str], ...]:
        mask = _RAGGED[self.kind][1] if self.kind in _RAGGED else None
        return tuple((name, self._trait(name, arguments[name])) for name in sorted(arguments) if name != mask)

    def _trait(self, name: str, value: Any) -> str:
        """The part of an argument that must be equal in stacked calls."""
        if isinstance(value, torch.Tensor):
            if name in _TIMES:
                return "time"
            if self._is_common(name, value):
                return f"same {_fingerprint(value[0] if name in _SHARED and value.ndim == 3 else value)}"
            shape = list(value.shape[1:])
            if name == _RAGGED.get(self.kind, ("", ""))[0]:
                shape[0] = _rounded(shape[0])
            return f"rows {shape} {value.dtype} {value.device}"
        if isinstance(value, dict):
            return f"dict {self._key_of(value)}"
        if isinstance(value, (list, tuple)) and len(value) == self.rows and value:
            if all(isinstance(item, torch.Tensor) for item in value):
                longest = max(value, key=len)
                shape = [_rounded(len(longest)) if longest.ndim == 2 else len(longest), *longest.shape[1:]]
                return f"each {shape} {longest.dtype} {longest.device}"
            if all(item == value[0] for item in value):
                return f"each {value[0]!r}"
        if value is None or isinstance(value, (bool, int, float, str)):
            return repr(value)
        raise TypeError(f"{name} is a {type(value).__name__}, which is not known to stack")

    def _is_common(self, name: str, value: torch.Tensor) -> bool:
        return name in _SHARED or value.ndim == 0 or value.shape[0] != self.rows

    def cut(self, start: int, stop: int) -> Stackable:
        """The call with the rows from `start` to `stop` only."""

        def part(name: str, value: Any) -> Any:
            if isinstance(value, dict):
                return {inner: part(inner, item) for inner, item in value.items()}
            if isinstance(value, torch.Tensor):
                return value if self._is_common(name, value) else value[start:stop]
            if isinstance(value, (list, tuple)) and len(value) == self.rows:
                return value[start:stop]
            return value

        return Stackable(self.kind, {name: part(name, value) for name, value in self.arguments.items()})


def read(
    kind: str, forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> Stackable | None:
    """The call of `forward` of a network of class `kind`; None if it must run by itself."""
    if kind not in _KNOWN:
        return None
    names = inspect.signature(forward).parameters
    arguments = dict(zip(names, args, strict=False)) | kwargs
    try:
        return Stackable(kind, arguments)
    except TypeError:
        return None


def stack(calls: Sequence[Stackable]) -> dict[str, Any]:
    """The arguments of one call with the rows of all calls, in order."""
    first = calls[0]
    if len(calls) == 1:
        return first.arguments
    ragged = _RAGGED.get(first.kind, ())
    arguments = {
        name: _joined(calls, name, [call.arguments[name] for call in calls])
        for name in first.arguments
        if name not in ragged
    }
    if ragged:
        caption, mask = ragged
        captions = [(call.arguments[caption], call.arguments.get(mask)) for call in calls]
        arguments |= _filled_up(caption, mask, captions)
    return arguments


def _joined(calls: Sequence[Stackable], name: str, values: Sequence[Any]) -> Any:
    value = values[0]
    if isinstance(value, dict):
        return {inner: _joined(calls, inner, [each[inner] for each in values]) for inner in value}
    if isinstance(value, torch.Tensor):
        if name in _TIMES:
            return _times(calls, values)
        return value if calls[0]._is_common(name, value) else torch.cat(list(values))
    if isinstance(value, (list, tuple)) and len(value) == calls[0].rows:
        return [item for each in values for item in each]
    return value


def _times(calls: Sequence[Stackable], values: Sequence[torch.Tensor]) -> torch.Tensor:
    if len({value.dtype for value in values}) > 1:
        # Schedulers count in integers or in fractions; the networks read both as float32.
        values = [value.to(torch.float32) for value in values]
    return torch.cat([value.expand(call.rows) for call, value in zip(calls, values, strict=True)])


def _filled_up(
    caption: str, mask: str, captions: Sequence[tuple[torch.Tensor, torch.Tensor | None]]
) -> dict[str, Any]:
    longest = max(states.shape[1] for states, _ in captions)
    if all(states.shape[1] == longest and seen is None for states, seen in captions):
        return {caption: torch.cat([states for states, _ in captions]), mask: None}
    states_, masks = [], []
    for states, seen in captions:
        if seen is None:
            seen = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        gap = longest - states.shape[1]
        states_.append(torch.nn.functional.pad(states, (0, 0, 0, gap)))
        masks.append(torch.nn.functional.pad(seen.bool(), (0, gap)))
    return {caption: torch.cat(states_), mask: torch.cat(masks)}


def split(result: Any, rows: Sequence[int]) -> list[Any]:
    """Split the result of a stacked call into those of its calls, given their numbers of rows."""
    if isinstance(result, torch.Tensor):
        return list(torch.split(result, list(rows)))
    if isinstance(result, dict):
        fields = {name: split(value, rows) for name, value in result.items()}
        return [type(result)(**{name: parts[i] for name, parts in fields.items()}) for i in range(len(rows))]
    if isinstance(result, tuple):
        return list(zip(*(split(item, rows) for item in result), strict=True))
    starts = [sum(rows[:i]) for i in range(len(rows))]
    return [result[start : start + count] for start, count in zip(starts, rows, strict=True)]


def unite(results: Sequence[Any]) -> Any:
    """Join the results of a call's parts: the inverse of `split`."""
    first = results[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(results))
    if isinstance(first, dict):
        return type(first)(**{name: unite([each[name] for each in results]) for name in first})
    if isinstance(first, tuple):
        return tuple(unite(items) for items in zip(*results, strict=True))
    return [item for each in results for item in each]


_fingerprints: Any = WeakIdKeyDictionary()


def _fingerprint(value: torch.Tensor) -> str:
    """A digest of the contents. It is cached, since the same unchanged tensor is passed at each step."""
    known = _fingerprints.get(value)
    if known is None:
        data = value.detach().to("cpu").contiguous().flatten()
        digest = hashlib.sha256(data.view(torch.uint8).numpy().tobytes()).hexdigest()
        known = _fingerprints[value] = f"{list(value.shape)} {value.dtype} {value.device} {digest}"
    return str(known)


def _rounded(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET
