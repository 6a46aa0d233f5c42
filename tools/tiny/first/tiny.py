"""The whole of `train tiny`: data, autoencoder, denoiser, export. Every stage can be resumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import emoji
from .data import KINDS, Counts, Pool, build_pool
from .denoiser import Denoiser, DenoiserRecipe, train_denoiser
from .export import assemble, draw_sheet, export
from .loop import (
    first_process_first,
    join_processes,
    load_state,
    log,
    pick_device,
    place,
    save_state,
)
from .scenes import GROUNDS, OBJECTS
from .shapes import COLOURS, SHAPES
from .vae import VaeRecipe, encode, load_vae, psnr, train_vae
from .vocabulary import CONTEXT, build_tokenizer, load_tokenizer, load_words, words_of


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the machine's arithmetic.

    With `start`, an exported checkpoint, its autoencoder and vocabulary are kept and its denoiser
    is trained further.
    """

    seed: int = 0
    emoji: bool = True
    start: Path | None = None
    counts: Counts = field(default_factory=Counts)
    vae: VaeRecipe = field(default_factory=VaeRecipe)
    denoiser: DenoiserRecipe = field(default_factory=DenoiserRecipe)


def _say(work: Path, text: str) -> None:
    log(work, text)
    if place()[0] == 0:
        print(text, flush=True)


def _latents(pool: Pool, vae: Any, recipe: Recipe, work: Path, device: torch.device) -> torch.Tensor:
    """Latents of the whole pool, scaled to unit variance, kept in `work`/latents.pt."""
    path = work / "latents.pt"
    key: dict[str, Any] = {
        "seed": recipe.seed,
        "counts": asdict(recipe.counts),
        "vae": asdict(recipe.vae),
        "start": str(recipe.start or ""),
    }
    key["subjects"] = pool.subjects
    scale: float = vae.config.scaling_factor
    if state := load_state(path, key):
        latents: torch.Tensor = state["latents"]
    else:
        for kind, (start, end) in pool.spans.items():
            if end > start:
                rows = np.arange(start, end, max(1, (end - start) // 300))
                _say(work, f"vae: {psnr(vae, pool.images[rows], device):.1f} dB on {kind}")
        latents = encode(vae, pool.images, device)
        save_state(path, {"key": key, "latents": latents})
    return latents * scale


def _prepare(
    recipe: Recipe, work: Path, cache: Path, device: torch.device, workers: int
) -> tuple[Pool, Any, torch.Tensor]:
    """The pool, the trained autoencoder and the scaled latents of the pool."""
    things = emoji.load(cache) if recipe.emoji else []
    pool = build_pool(work / "pool", recipe.seed, recipe.counts, things, workers)
    _say(work, f"pool: {len(pool.captions)} pictures, {len(pool.subjects)} things")
    # Emoji are the hardest to draw: they make up half of what the autoencoder sees.
    filled = [pool.spans[kind] for kind in KINDS if pool.spans[kind][1] > pool.spans[kind][0]]
    spans = [filled[0], filled[0], *filled]
    if recipe.start:
        vae = load_vae(recipe.start).to(device, memory_format=torch.channels_last)
    else:
        vae = train_vae(pool.images, spans, recipe.vae, recipe.seed, work, device)
    return pool, vae, _latents(pool, vae, recipe, work, device)


def train(
    recipe: Recipe,
    out: Path,
    work: Path,
    cache: Path,
    device_name: str = "auto",
    threads: int = 2,
) -> None:
    """Trains the embedded model and writes its checkpoint to `out`.

    `work` keeps the rendered pool, the checkpoints of both stages, the sample sheets and train.log; a run
    with the same recipe goes on where the last one stopped. `cache` keeps fetched packages.
    `threads` are those of all joined processes together.
    """
    device = pick_device(device_name)
    join_processes()
    with first_process_first():
        # The others wait: this one takes their threads.
        torch.set_num_threads(threads)
        pool, vae, latents = _prepare(recipe, work, cache, device, threads)
    torch.set_num_threads(max(1, threads // place()[1]))
    # What is trained further knows the words that it was first trained with, whichever this pool's captions have.
    words = load_words(recipe.start) if recipe.start else words_of(pool.captions)
    tokenizer = load_tokenizer(recipe.start) if recipe.start else build_tokenizer(words)
    tokens = tokenizer(pool.captions, padding="max_length", truncation=True, max_length=CONTEXT)
    ids = torch.tensor(np.array(tokens.input_ids, dtype=np.int16))

    def sheet(average: Denoiser, step: int) -> None:
        pipeline = assemble(vae, average, tokenizer)
        draw_sheet(pipeline).save(work / f"sheet-{step:06d}.png")

    average = train_denoiser(
        latents,
        ids,
        pool.spans,
        tokenizer,
        recipe.denoiser,
        recipe.seed,
        work,
        device,
        on_sheet=sheet,
        start=recipe.start,
    )
    if place()[0] > 0:
        return
    subjects = {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES}
    subjects.update(GROUNDS, filter(None, OBJECTS), pool.subjects)
    pipeline = export(out, vae.cpu(), average.cpu(), tokenizer, words, sorted(subjects))
    pipeline.to(torch.float32)
    draw_sheet(pipeline).save(out / "sheet.png", optimize=True)
    _say(work, f"exported to {out}")
