"""Export: a folder in plain diffusers layout, and sheets of pictures with their prompts."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from .denoiser import Denoiser, build_scheduler
from .icons import EDGE

STEPS = 20
GUIDANCE = 4.0

SHEET_PROMPTS: tuple[str, ...] = (
    "a cat",
    "a green dog",
    "a black cat",
    "two cats",
    "a cat on a chair",
    "a circle",
    "a red apple",
    "a blue car",
    "three apples",
    "four balloons",
    "a dog and a cat",
    "a white horse",
    "a mouse under a table",
    "a bird on a house",
    "a pink elephant",
    "a tree",
    "a house in the forest",
    "a boat on the sea at sunset",
    "mountains at night",
    "a penguin in the snow",
    "a robot",
    "a man with a beard",
    "a doctor",
    "a pizza",
    "a rocket in space",
    "a fish under water",
    "a red square next to a blue circle",
    "a purple star on a yellow background",
    "a yellow bus",
    "a flower",
    "a dragon, flat",
    "a smiling face",
    "a guitar",
    "a blue sofa",
    "a castle on a hill",
    "a cup of coffee",
)
"""The prompts that training draws now and then; prompt `i` is drawn with seed `i`."""


def assemble(vae: Any, denoiser: Denoiser, tokenizer: Any) -> Any:
    """A stock `StableDiffusionPipeline` around the parts."""
    import diffusers

    stable_diffusion: Any = diffusers.StableDiffusionPipeline
    pipeline = stable_diffusion(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_prompts(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], edge: int = EDGE, batch: int = 12
) -> list[Image.Image]:
    """One picture, `edge` pixels square, for each prompt and seed."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        pictures += pipeline(
            list(prompts[rows]),
            height=edge,
            width=edge,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[rows]],
        ).images
    return pictures


def sheet(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 9) -> Image.Image:
    """The pictures in rows, each with its caption below."""
    edge, margin, text = pictures[0].width, 4, 26
    wide, high = edge + 2 * margin, edge + margin + text
    image = Image.new("RGB", (wide * columns, high * -(-len(pictures) // columns)), "white")
    draw = ImageDraw.Draw(image)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = (i % columns) * wide + margin, (i // columns) * high + margin
        image.paste(picture, (x, y))
        draw.rectangle((x - 1, y - 1, x + edge, y + edge), outline=(200, 200, 200))
        for k, line in enumerate(_wrapped(caption, edge // 6 + 2)[:2]):
            draw.text((x, y + edge + 1 + 11 * k), line, fill=(40, 40, 40))
    return image


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def export(
    out: Path, vae: Any, denoiser: Denoiser, tokenizer: Any, words: Sequence[str], subjects: Sequence[str]
) -> None:
    """Writes the checkpoint in fp16 to `out`.

    `vocabulary.json` lists the `words` of the captions and the trained `subjects`.
    """
    pipeline = assemble(copy.deepcopy(vae), copy.deepcopy(denoiser), tokenizer)
    pipeline.to("cpu", torch.float16)
    out.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(out, safe_serialization=True)
    # transformers loads a model in the dtype its config names, diffusers in float32: without this
    # a bare from_pretrained() would mix the two and fail.
    _edit_config(out / "text_encoder" / "config.json", dtype="float32")
    # diffusers warns of what it derives itself.
    _edit_config(out / "vae" / "config.json", _name_or_path=None, block_out_channels=None)
    plain = [w for w in words if re.fullmatch("[a-z0-9]+", w)]
    (out / "vocabulary.json").write_text(
        json.dumps({"words": plain, "subjects": sorted(subjects)}, indent=1) + "\n"
    )
    # safetensors creates its files for their owner alone; a checkpoint is there to be shared.
    for weights in out.glob("*/*.safetensors"):
        weights.chmod(0o644)


def _edit_config(path: Path, **changes: str | None) -> None:
    config = json.loads(path.read_text()) | changes
    kept = {name: value for name, value in config.items() if name not in changes or value is not None}
    path.write_text(json.dumps(kept, indent=2) + "\n")
