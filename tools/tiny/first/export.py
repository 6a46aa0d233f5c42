"""Export: a folder in plain diffusers layout, and the sheet of pictures beside it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from .denoiser import Denoiser, build_scheduler

STEPS = 25
GUIDANCE = 4.0

SHEET_PROMPTS: tuple[str, ...] = (
    "a red apple",
    "a green apple",
    "a cat",
    "a dog",
    "a tiger",
    "a house",
    "a car",
    "a tree",
    "a sunflower",
    "a pizza",
    "a banana on a blue background",
    "a rocket",
    "a penguin",
    "a butterfly",
    "a guitar",
    "an umbrella",
    "a red circle",
    "a blue square on a yellow background",
    "a large green star",
    "a small pink heart on a black background",
    "a purple star",
    "a brown circle",
    "a red circle to the left of a blue square",
    "a yellow star above a green triangle",
    "mountains at sunset",
    "a cabin in a snowy forest at night",
    "a house on green hills",
    "a boat on the sea at sunset",
    "the desert at night with the moon",
    "a forest in the rain",
)
"""The prompts of the sheet in the model card; prompt `i` is drawn with seed `i`."""


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


def draw_sheet(
    pipeline: Any, prompts: tuple[str, ...] = SHEET_PROMPTS, columns: int = 6, scale: int = 2
) -> Image.Image:
    """A sheet with one picture a prompt, enlarged `scale` times, its prompt written below."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    pictures = pipeline(
        list(prompts),
        height=64,
        width=64,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=generators,
    ).images
    edge, margin, text = 64 * scale, 6, 26
    wide, high = edge + 2 * margin, edge + margin + text
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (wide * columns, high * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        x, y = (i % columns) * wide + margin, (i // columns) * high + margin
        sheet.paste(picture.resize((edge, edge), Image.Resampling.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + edge, y + edge), outline=(200, 200, 200))
        for k, line in enumerate(_wrapped(prompt, 24)[:2]):
            draw.text((x, y + edge + 1 + 12 * k), line, fill=(40, 40, 40))
    return sheet


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def export(
    out: Path,
    vae: Any,
    denoiser: Denoiser,
    tokenizer: Any,
    words: list[str],
    subjects: list[str],
) -> Any:
    """Writes the checkpoint in fp16 to `out`; returns the pipeline that was written.

    `vocabulary.json` lists the `words` of the captions and the trained `subjects`.
    """
    pipeline = assemble(copy.deepcopy(vae), copy.deepcopy(denoiser), tokenizer)
    pipeline.to(torch.float16)
    out.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(out, safe_serialization=True)
    # transformers loads a model in the dtype its config names, diffusers in float32: without this
    # a bare from_pretrained() would mix the two and fail.
    _edit_config(out / "text_encoder" / "config.json", dtype="float32")
    # The folder that a continued run came from is nobody else's business, and diffusers warns of what it derives itself.
    _edit_config(out / "vae" / "config.json", _name_or_path=None, block_out_channels=None)
    plain = [w for w in words if re.fullmatch("[a-z0-9]+", w)]
    vocabulary = {"words": plain, "subjects": sorted(subjects)}
    (out / "vocabulary.json").write_text(json.dumps(vocabulary, indent=1) + "\n")
    # safetensors creates its files for their owner alone; a checkpoint is there to be shared.
    for weights in out.glob("*/*.safetensors"):
        weights.chmod(0o644)
    return pipeline


def _edit_config(path: Path, **changes: str | None) -> None:
    config = json.loads(path.read_text()) | changes
    kept = {name: value for name, value in config.items() if name not in changes or value is not None}
    path.write_text(json.dumps(kept, indent=2) + "\n")
