"""All tasks: which of them a model can do, which one a request needs, and how a pipeline is called for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from .. import schema
from ..errors import ImageError
from . import edit, image_to_image, inpaint, text_to_image
from .call import Call, Given
from .task import Signature, Task

TASKS: dict[schema.Task, Task] = {
    task.name: task for task in (text_to_image.TASK, image_to_image.TASK, edit.TASK, inpaint.TASK)
}

_GIVEN = {"prompt", "image", "mask_image"}
# Pipelines with these inputs or results are for none of the tasks.
_OTHER_INPUTS = ("controlnet", "control_image", "control_guidance", "adapter")
_OTHER_RESULTS = {"num_frames", "video_length", "layers"}


# Of a model


def offered(kind: type, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[schema.Task, ...]:
    """The tasks of a model whose pipeline is `kind`, given the configurations of its UNet and autoencoder, each empty
    if it has none. Imports diffusers."""
    return tuple(name for name, task in TASKS.items() if class_for(kind, name) and _fits(task, unet, vae))


@functools.lru_cache(maxsize=1024)
def class_for(kind: type, name: schema.Task) -> type | None:
    """The stock pipeline class that does a task with the parts of `kind`: itself, or one from diffusers' own tables."""
    from diffusers.pipelines import auto_pipeline

    task = TASKS[name]
    if _does(kind, task):
        return kind
    relative = auto_pipeline._get_task_class(task.listed(), kind.__name__, throw_error_if_not_exist=False)
    return relative if relative is not None and _does(relative, task) else None


def _does(kind: type, task: Task) -> bool:
    signature = Signature(kind)
    return (
        "prompt" in signature.takes
        and not signature.needs - _GIVEN
        and not any(name.startswith(_OTHER_INPUTS) for name in signature.takes | signature.made_with)
        and not signature.takes & _OTHER_RESULTS
        and "images" in signature.gives
        and task.offered(signature, kind in task.listed().values())
    )


def _fits(task: Task, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> bool:
    """Whether the UNet has the input channels that the task needs."""
    channels, latents = unet.get("in_channels"), vae.get("latent_channels", 4)
    if not vae or not isinstance(channels, int) or not isinstance(latents, int):
        return True
    return channels in task.channels(latents)


# Of a request


def asked(request: schema.Request, model: str, tasks: Collection[schema.Task]) -> Task:
    """The task of a request to a model that can do `tasks`: the one that the request names, or the first one for its
    pictures. Raises `invalid_request` if the model cannot do the task, or if the pictures do not fit the task."""
    brings = {"image"} if request.pictures else set()
    brings |= {"mask"} if request.mask is not None else set()
    offers = [TASKS[name] for name in TASKS if name in tasks]
    draws = f"it draws {' or '.join(dict.fromkeys(task.said for task in offers))}"
    if request.task is not None:
        return _named(TASKS[request.task], brings, model, offers)
    # With an image, an editing model edits it; another model starts from it, as far away as `strength` says.
    if (found := next((task for task in offers if task.fields == brings), None)) is not None:
        return found
    field = "mask" if "mask" in brings else "image"
    if brings:
        raise ImageError("invalid_request", f"{model} takes no {field}: {draws}", field)
    raise ImageError("invalid_request", f"{model} needs an image: {draws}", field)


def _named(task: Task, brings: set[str], model: str, offers: list[Task]) -> Task:
    for field in sorted(task.fields - brings):
        raise ImageError("invalid_request", f"task {task.name} needs {field}", field)
    for field in sorted(brings - task.fields):
        raise ImageError("invalid_request", f"task {task.name} takes no {field}", field)
    if task not in offers:
        known = ", ".join(offer.name for offer in offers)
        raise ImageError(
            "invalid_request", f"task must be one of {known} for {model}, got {task.name}", "task"
        )
    return task


def takes_several(pipeline: str, task: Task) -> bool:
    """Whether a model with this class of pipeline can combine several pictures into one. Imports diffusers."""
    import diffusers

    kind = class_for(getattr(diffusers, pipeline), task.name)
    return kind is not None and Signature(kind).takes_several


# Of a pipeline


def derive(pipeline: Any, task: Task) -> Any:
    """The stock pipeline of a task over the parts of `pipeline`. It shares the weights, so this takes only
    milliseconds."""
    import diffusers

    kind: type = type(pipeline)
    if class_for(kind, task.name) is kind:
        return pipeline
    derived: Any = getattr(diffusers, task.derived).from_pipe(pipeline)
    derived.set_progress_bar_config(disable=True)
    return derived


def prepare(pipeline: Any, task: Task, given: Given) -> Call:
    """The call of a pipeline that `derive` gave for the task, with only the arguments that it accepts."""
    call = task.call(pipeline, given)
    takes = inspect.signature(pipeline.__call__).parameters
    notices = list(call.notices)
    if given.images and "strength" not in takes and given.strength != schema.STRENGTH:
        notices.append("strength has no effect on this model.")
    return Call({name: value for name, value in call.arguments.items() if name in takes}, notices)
