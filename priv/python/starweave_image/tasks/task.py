"""What a task is. Each has a file beside this one, and registry.py knows them all."""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from .. import schema
from .call import Call, Given


class Signature:
    """What a stock pipeline of this class takes and gives, as its `__call__` says."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        parameters = inspect.signature(kind.__call__).parameters
        self.takes = frozenset(parameters)
        self.needs = frozenset(
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        ) - {"self"}
        self.made_with = frozenset(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]
        # A list of tensors is a batch wherever there are tensors; one of pictures alone belongs together.
        image = parameters["image"].annotation if "image" in parameters else None
        listed = {typing.get_args(choice) for choice in typing.get_args(image) if _is_list(choice)}
        self.takes_several = listed == {(Image,)}

    @functools.cached_property
    def gives(self) -> frozenset[str]:
        """The names of what it gives: `images`, `frames`, …"""
        from diffusers.utils import BaseOutput

        results = [
            thing
            for thing in vars(sys.modules[self.kind.__module__]).values()
            if isinstance(thing, type) and issubclass(thing, BaseOutput)
        ]
        return frozenset(name for result in results for name in getattr(result, "__dataclass_fields__", {}))


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) is list


@dataclass(frozen=True)
class File:
    """A result that is no picture, and what besides is known of it, as JSON has it."""

    media_type: str
    data: bytes
    facts: dict[str, Any] = field(default_factory=dict)


def _picture(output: Any) -> Image:
    picture: Image = output.images[0]
    return picture


@dataclass(frozen=True)
class Task:
    """`fields` are the pictures of a request that it is for, `said` what it draws from, as a person says it, and `kind`
    what its result is. `offered` tells from its signature whether a pipeline does it; the second argument is whether
    diffusers lists that class among those for the task. `table` is the name of that list, and `derived` of what derives
    one of them from another pipeline of its family; where they are empty, a pipeline of another class never does.
    With `takes_strength` only a part of the steps is made, as the request's `strength` says.
    `channels` are those of the inputs that a UNet may take for the task, given those of the latents. `call` makes the
    call of a pipeline, and `result` takes from what that gave the one thing that was asked for.
    """

    name: schema.Task
    fields: frozenset[str]
    said: str
    offered: Callable[[Signature, bool], bool]
    call: Callable[[Any, Given], Call]
    table: str = ""
    derived: str = ""
    takes_strength: bool = False
    channels: Callable[[int], Collection[int]] = field(default=lambda latents: (latents,))
    kind: schema.ResultKind = "picture"
    result: Callable[[Any], Image | File] = _picture

    def listed(self) -> Mapping[str, type]:
        from diffusers.pipelines import auto_pipeline

        return getattr(auto_pipeline, self.table) if self.table else {}
