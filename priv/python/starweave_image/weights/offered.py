"""Which tasks a model is for: read from the `__call__` of its pipeline and the channels of its networks."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args

Task = Literal["text_to_image", "image_to_image", "edit", "inpaint"]

TASKS: tuple[Task, ...] = get_args(Task)

_GIVEN = {"self", "prompt", "image", "mask_image"}
# What is drawn after such a thing, or is no single picture.
_OTHER_INPUTS = ("controlnet", "control_image", "control_guidance", "adapter")
_OTHER_RESULTS = ("num_frames", "video_length", "layers")


def offered(kind: type, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[Task, ...]:
    """The tasks of a model whose pipeline is `kind`, given the configurations of its UNet and autoencoder, empty where it
    has none. Imports diffusers."""
    return tuple(task for task in TASKS if class_for(kind, task) and _fits(task, unet, vae))


def class_for(kind: type, task: Task) -> type | None:
    """The stock pipeline that does a task over the parts of `kind`: itself, or its relative in diffusers' own tables."""
    from diffusers.pipelines import auto_pipeline

    if _does(kind, task):
        return kind
    relative = auto_pipeline._get_task_class(_table(task), kind.__name__, throw_error_if_not_exist=False)
    return relative if relative is not None and _does(relative, task) else None


def derive(pipeline: Any, task: Task) -> Any:
    """The stock pipeline of a task over the parts of `pipeline`; milliseconds, the same weights."""
    import diffusers

    if class_for(type(pipeline), task) is type(pipeline):
        return pipeline
    auto = {
        "text_to_image": diffusers.AutoPipelineForText2Image,
        "inpaint": diffusers.AutoPipelineForInpainting,
    }.get(task, diffusers.AutoPipelineForImage2Image)
    derived: Any = auto.from_pipe(pipeline)
    derived.set_progress_bar_config(disable=True)
    return derived


def _table(task: Task) -> Mapping[str, type]:
    from diffusers.pipelines import auto_pipeline as auto

    tables: dict[Task, Mapping[str, type]] = {
        "text_to_image": auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        "image_to_image": auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        "edit": auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        "inpaint": auto.AUTO_INPAINT_PIPELINES_MAPPING,
    }
    return tables[task]


def _does(kind: type, task: Task) -> bool:
    takes = inspect.signature(kind.__call__).parameters
    made_with = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    required = {
        name
        for name, parameter in takes.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    if (
        "prompt" not in takes
        or required - _GIVEN
        or any(name.startswith(_OTHER_INPUTS) for name in (*takes, *made_with))
        or any(name in takes for name in _OTHER_RESULTS)
        or not _gives_pictures(kind)
    ):
        return False
    if "mask_image" in takes:
        return task == "inpaint" and "image" in takes
    if "strength" in takes:
        return task == "image_to_image" and "image" in takes
    # Whether an image that may be left out is what is edited, or what all is about, the signature does not say.
    if task == "text_to_image":
        return "image" not in takes or kind in _table(task).values()
    edits = "image_guidance_scale" in takes or kind in _table(task).values()
    return task == "edit" and "image" in takes and edits


def _gives_pictures(kind: type) -> bool:
    from diffusers.utils import BaseOutput

    results = [
        thing
        for thing in vars(sys.modules[kind.__module__]).values()
        if isinstance(thing, type) and issubclass(thing, BaseOutput)
    ]
    return any("images" in getattr(result, "__dataclass_fields__", {}) for result in results)


def _fits(task: Task, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> bool:
    """Whether the UNet takes what the task gives it: latents; for an edit, the image's beside them; for inpainting, also
    the masked image's and the mask."""
    channels, latents = unet.get("in_channels"), vae.get("latent_channels", 4)
    if not vae or not isinstance(channels, int) or not isinstance(latents, int):
        return True
    takes = {"edit": (2 * latents,), "inpaint": (latents, 2 * latents + 1)}
    return channels in takes.get(task, (latents,))
