"""The whole training: icons, autoencoder, shards of latents, denoiser, export. Every stage can be resumed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .checkpoint import SHEET_PROMPTS, assemble, draw_prompts, export, sheet
from .denoiser import Denoiser, DenoiserRecipe, train_denoiser
from .icons import EDGE
from .loop import log
from .pictures import Studio, draw, open_studio
from .scenes import GROUNDS
from .shapes import SHAPES
from .shards import Shards
from .vae import VaeRecipe, test_pictures, to_pixels, train_vae
from .words import build_tokenizer, words_of

_CAPTIONS = 4_000
"""Captions that are drawn for the words around names; the names themselves are listed."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the machine's arithmetic."""

    seed: int = 0
    vae: VaeRecipe = field(default_factory=VaeRecipe)
    denoiser: DenoiserRecipe = field(default_factory=DenoiserRecipe)


def vocabulary(studio: Studio, work: Path) -> list[str]:
    """The words that captions have, kept in `work`/words.json."""
    path = work / "words.json"
    if not path.exists():
        drawn = (draw(studio, f"words/{k}").caption for k in range(_CAPTIONS))
        words = words_of([*drawn, *studio.phrases()])
        path.write_text(json.dumps(words))
    found: list[str] = json.loads(path.read_text())
    return found


@torch.no_grad()
def reconstructions(studio: Studio, vae: Any, device: torch.device) -> Image.Image:
    """A sheet of test pictures, each above what the autoencoder makes of it."""
    pictures = torch.cat([to_pixels(found[:9]) for found in test_pictures(studio, 9).values()]).to(device)
    decoded = vae.decode(vae.encode(pictures).latents).sample.contiguous()
    both = torch.stack([pictures.view(-1, 9, 3, EDGE, EDGE), decoded.view(-1, 9, 3, EDGE, EDGE)], 1).flatten(
        0, 2
    )
    array = both.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return sheet([Image.fromarray(a) for a in array], [""] * len(array))


def train(recipe: Recipe, out: Path, work: Path, cache: Path, device: torch.device, workers: int = 1) -> None:
    """Trains the embedded model and writes its checkpoint to `out`.

    `work` keeps the checkpoints of all stages, the latents, the sample sheets and train.log; a run with the same recipe
    goes on where the last one stopped. `cache` keeps fetched packages and rendered icons. So many
    `workers` draw the pictures of shards.
    """
    work.mkdir(parents=True, exist_ok=True)
    studio = open_studio(cache)
    log(work, f"{len(studio.things)} things")
    words = vocabulary(studio, work)
    tokenizer = build_tokenizer(words)
    log(work, f"{len(words)} words, {len(tokenizer)} tokens")
    vae = train_vae(studio, recipe.vae, recipe.seed, work, device)
    reconstructions(studio, vae, device).save(work / "vae.png")
    shards = Shards(work / "shards", cache, workers)

    def draw_sheet(average: Denoiser, step: int) -> None:
        pipeline = assemble(vae, average, tokenizer)
        pictures = draw_prompts(pipeline, SHEET_PROMPTS, range(len(SHEET_PROMPTS)))
        sheet(pictures, SHEET_PROMPTS).save(work / f"sheet-{step:06d}.png")
        export(work / "latest", vae, average, tokenizer, words, subjects)

    subjects = sorted({thing.names[0] for thing in studio.things} | set(SHAPES) | set(GROUNDS))
    average = train_denoiser(
        shards,
        lambda count: shards.extend(count, vae, recipe.seed, device),
        vae,
        tokenizer,
        recipe.denoiser,
        recipe.seed,
        work,
        device,
        draw_sheet,
    )
    export(out, vae.cpu(), average.cpu(), tokenizer, words, subjects)
    log(work, f"exported to {out}")
