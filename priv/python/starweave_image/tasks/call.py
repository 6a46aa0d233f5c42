"""The arguments of a stock pipeline's `__call__` that all tasks have in common.

Families take different arguments, as their pipelines' signatures say. For a setting that a pipeline does not take, the
caller gets a notice.
"""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from .. import schema

_MOST_QUOTED = 120


@dataclass(frozen=True)
class Text:
    """The fields of a request that all tasks have in common. Sizes are in pixels."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    guidance_asked: bool


@dataclass(frozen=True)
class Given:
    """The input of a task: RGB pictures, the first in the size to draw in, further ones in sizes of their own; a gray
    mask in the size to draw in; and how far to go from the picture, 0 to 1."""

    text: Text
    images: list[Image] = field(default_factory=list)
    mask: Image | None = None
    strength: float = schema.STRENGTH


@dataclass(frozen=True)
class Call:
    """Arguments for the pipeline, and sentences for the caller about settings that have no effect."""

    arguments: dict[str, Any]
    notices: list[str] = field(default_factory=list)

    def also(self, **arguments: Any) -> Call:
        return Call(self.arguments | arguments, self.notices)


def prepare(pipeline: Any, text: Text) -> Call:
    """The call for one result, without its generator; `pipeline` may be of any task."""
    takes = inspect.signature(pipeline.__call__).parameters
    notices: list[str] = []
    prompt, negative_prompt, guidance_scale = text.prompt, text.negative_prompt, text.guidance_scale
    arguments: dict[str, Any] = {
        "prompt": prompt,
        "width": text.width,
        "height": text.height,
        "num_inference_steps": text.steps,
    }
    # Without this, some families draw in the nearest of a few sizes of their own, and scale the result.
    arguments |= {
        "use_resolution_binning": False,
        "_auto_resize": False,
        "max_area": text.width * text.height,
    }
    # Some pipelines that start from an image take the size only from it.
    arguments = {name: value for name, value in arguments.items() if name in takes}
    # If a family has both scales, its classifier-free guidance is the one that is above 1 by default.
    true_guidance = takes.get("true_cfg_scale")
    guided_by = "true_cfg_scale" if true_guidance and (true_guidance.default or 0) > 1 else "guidance_scale"
    if guided_by in takes:
        arguments[guided_by] = guidance_scale
    contrasted = guided_by in takes and (guided_by == "true_cfg_scale" or not true_guidance)
    contrasted = contrasted and _contrasts(pipeline, math.inf)
    if text.guidance_asked and not contrasted and not (guided_by in takes and _is_told(pipeline)):
        notices.append("guidance_scale has no effect on this model.")

    contrasted = contrasted and "negative_prompt" in takes
    if contrasted and _contrasts(pipeline, guidance_scale):
        # Such a pipeline turns guidance off without a negative prompt, so even an empty one must be passed.
        if negative_prompt or guided_by == "true_cfg_scale":
            arguments["negative_prompt"] = negative_prompt or " "
    elif negative_prompt:
        why = "at a guidance_scale of 0" if _contrasts(pipeline, 1.0) else "at a guidance_scale of 1 or less"
        notices.append(f"negative_prompt has no effect {why if contrasted else 'on this model'}.")

    for name, said in (("prompt", prompt), ("negative_prompt", arguments.get("negative_prompt", ""))):
        if unread := _unread(pipeline, said, takes):
            shown = unread if len(unread) <= _MOST_QUOTED else f"{unread[:_MOST_QUOTED]}…"
            notices.append(f'{name} is longer than this model reads: "{shown}" was not used.')
        if said.strip() and _is_noise(pipeline, said):
            notices.append(f"This model understood nothing of {name}: it knows none of its characters.")
    return Call(arguments, notices)


def _contrasts(pipeline: Any, guidance_scale: float) -> bool:
    """Whether the pipeline uses classifier-free guidance at this scale: most do above 1, some above 0, and some
    few-step models never. Changes the pipeline, which must be the caller's own copy."""
    # The pipeline's call sets this attribute too; the property that is read then also depends on the networks.
    pipeline._guidance_scale = guidance_scale
    return bool(getattr(pipeline, "do_classifier_free_guidance", guidance_scale > 1))


def _is_told(pipeline: Any) -> bool:
    """Whether the denoiser takes the guidance scale as an input, as some distilled ones do."""
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    told = ("guidance_embeds", "time_cond_proj_dim")
    return any(getattr(denoiser, "config", {}).get(name) for name in told)


def _unread(pipeline: Any, text: str, takes: Any) -> str:
    """The end of `text` that even the pipeline's tokenizer with the longest limit cuts off, from a whole word on."""
    ends = []
    for tokenizer in _tokenizers(pipeline):
        limit = tokenizer.model_max_length
        if "max_sequence_length" in takes and not type(tokenizer).__name__.startswith("CLIP"):
            limit = takes["max_sequence_length"].default
        if not isinstance(limit, int):
            continue
        ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
        if len(ids) <= limit:
            return ""
        ends.append(_end(tokenizer, text, limit - tokenizer.num_special_tokens_to_add()))
    return min(ends, key=len, default="")


def _end(tokenizer: Any, text: str, kept: int) -> str:
    """The rest of `text` after `kept` tokens, special tokens not counted."""
    plain = {"add_special_tokens": False, "truncation": False, "verbose": False}
    if not tokenizer.is_fast:
        return str(tokenizer.decode(tokenizer(text, **plain)["input_ids"][kept:])).strip()
    offsets = tokenizer(text, return_offsets_mapping=True, **plain)["offset_mapping"]
    if kept >= len(offsets):
        return ""
    at: int = offsets[kept][0]
    # A word that is cut in two counts as cut off.
    begun = re.search(r"[A-Za-z]+$", text[:at]) if text[at : at + 1].isalpha() else None
    return text[begun.start() if begun else at :].strip()


def _is_noise(pipeline: Any, text: str) -> bool:
    """Whether all of the pipeline's tokenizers turn `text` into nothing but special tokens."""
    read = [
        set(tokenizer(text, truncation=False, verbose=False)["input_ids"]) <= set(tokenizer.all_special_ids)
        for tokenizer in _tokenizers(pipeline)
    ]
    return bool(read) and all(read)


def _tokenizers(pipeline: Any) -> list[Any]:
    found = (
        getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")
    )
    return [
        tokenizer for tokenizer in found if callable(tokenizer) and hasattr(tokenizer, "model_max_length")
    ]
