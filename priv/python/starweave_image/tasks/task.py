"""The description of a task. Each task has a file in this folder, and registry.py lists them all."""

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
    """The arguments and results of a stock pipeline class, as its `__call__` declares them."""

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
        # A type that allows lists of tensors means a batch; one with lists of pictures only means several inputs.
        image = parameters["image"].annotation if "image" in parameters else None
        listed = {typing.get_args(choice) for choice in typing.get_args(image) if _is_list(choice)}
        self.takes_several = listed == {(Image,)}

    @functools.cached_property
    def gives(self) -> frozenset[str]:
        """The names of its results: `images`, `frames`, …"""
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
    """A result that is not a picture, and further facts about it, as JSON values."""

    media_type: str
    data: bytes
    facts: dict[str, Any] = field(default_factory=dict)


def _picture(output: Any) -> Image:
    picture: Image = output.images[0]
    return picture


@dataclass(frozen=True)
class Task:
    """`fields` are the request's picture fields that the task needs, `said` says in words what it draws from, and
    `kind` is the kind of its result. `offered` tells from a pipeline's signature whether it does the task; the second
    argument is whether diffusers lists that class for the task. `table` is the name of that list in diffusers, and
    `derived` that of the class that derives one of its pipelines from another pipeline of the family; if they are
    empty, a pipeline of another class cannot do the task. With `takes_strength`, the request's `strength` sets which
    part of the steps is made. `channels` gives the numbers of input channels that a UNet may have for the task, given
    those of the latents. `call` makes the call of a pipeline, and `result` extracts the one requested result from the
    pipeline's output.
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
