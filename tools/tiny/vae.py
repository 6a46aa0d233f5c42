"""The autoencoder: pictures to latents of an eighth of their edge, and back."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from .icons import EDGE, Pixels
from .loop import generator, learning_rate, load_state, log, progress, save_state
from .pictures import MAKERS, Studio, draw

_STAGE = 1
_FLAT = 0.4
FACTOR = 8
"""How many pixels of an edge one latent stands for."""


@dataclass(frozen=True)
class VaeRecipe:
    """Size and schedule of the autoencoder; `width` is its number of channels.

    It learns on `crop` x `crop` pieces: of the pictures, or of pictures at half their size with the chance `halves`, since
    the denoiser knows both sizes. `noise` is added to the latents, whose spread is 1, before they are decoded: it makes
    the decoder forgive what the denoiser leaves behind, at the cost of some of the finest detail. `fresh` pictures are
    drawn for each step, and the last `kept` ones are cropped from. `steps` may be changed until the rate falls.
    """

    width: int = 48
    latents: int = 10
    encoder_blocks: tuple[int, ...] = (0, 1, 3, 4)
    decoder_blocks: tuple[int, ...] = (5, 5, 2, 0)
    steps: int = 10_000
    batch: int = 16
    crop: int = 64
    halves: float = 0.12
    rate: float = 1.2e-3
    noise: float = 0.1
    fresh: int = 4
    kept: int = 600
    checkpoint_every: int = 200


def build_vae(recipe: VaeRecipe) -> Any:
    """A fresh `AutoencoderTiny` of diffusers."""
    import diffusers

    widths = (recipe.width,) * len(recipe.encoder_blocks)
    autoencoder: Any = diffusers.AutoencoderTiny
    return autoencoder(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=recipe.encoder_blocks,
        num_decoder_blocks=recipe.decoder_blocks,
        latent_channels=recipe.latents,
    )


def to_pixels(images: Pixels) -> torch.Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float in -1..1."""
    return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2).div_(127.5).sub_(1.0)


def vae_loss(pixels: torch.Tensor, decoded: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Reconstruction, edges, and latents held near zero mean and unit variance.

    The edge term compares horizontal and vertical differences: it keeps outlines sharp where
    the squared error alone would blur them.
    """
    error = decoded - pixels
    plain = error.abs().mean() + 2.0 * error.square().mean()
    edges = (error[..., 1:] - error[..., :-1]).abs().mean()
    edges = edges + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    mean = latents.mean((0, 2, 3))
    spread = latents.std((0, 2, 3))
    tame = mean.square().mean() + (spread - 1.0).square().mean()
    return plain + 0.5 * edges + 0.05 * tame


class _Pictures:
    """The latest pictures of an endless row; the same at a step whether or not the run was broken before it."""

    def __init__(self, studio: Studio, recipe: VaeRecipe, seed: int) -> None:
        self._studio, self._recipe, self._seed = studio, recipe, seed
        self._kept: dict[int, Pixels] = {}

    def crops(self, step: int, rng: random.Random) -> Pixels:
        last = step * self._recipe.fresh + self._recipe.kept
        first = last - self._recipe.kept
        for number in [n for n in self._kept if n < first]:
            del self._kept[number]
        for number in range(first, last):
            if number not in self._kept:
                self._kept[number] = np.asarray(draw(self._studio, f"vae/{self._seed}/{number}").image)
        return np.stack(
            [self._crop(self._kept[rng.randrange(first, last)], rng) for _ in range(self._recipe.batch)]
        )

    def _crop(self, picture: Pixels, rng: random.Random) -> Pixels:
        edge = self._recipe.crop
        if rng.random() < self._recipe.halves:
            return halved(picture)[:edge, :edge]
        found = []
        for _ in range(3):
            x, y = rng.randrange(EDGE - edge + 1), rng.randrange(EDGE - edge + 1)
            found.append(picture[y : y + edge, x : x + edge])
        # Of three places the one with most to see: much of many pictures is empty.
        return max(found, key=lambda piece: float(piece[::4, ::4].std()))


def halved(picture: Pixels) -> Pixels:
    """The picture at half its size."""
    return np.asarray(Image.fromarray(picture).reduce(2))


def train_vae(studio: Studio, recipe: VaeRecipe, seed: int, folder: Path, device: torch.device) -> Any:
    """Trains, continuing from `folder`/vae.pt; the model's `scaling_factor` makes the latents' spread 1."""
    torch.manual_seed(seed)
    model = build_vae(recipe).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.98))
    key: dict[str, Any] = {"seed": seed, **asdict(recipe)}
    for free in ("steps", "checkpoint_every"):
        del key[free]
    path = folder / "vae.pt"
    first = 0
    if state := load_state(path, key):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    pictures = _Pictures(studio, recipe, seed)
    checked = test_pictures(studio)
    for step, report in progress("vae", first, recipe.steps, folder):
        rng = generator(seed, _STAGE, step)
        pixels = to_pixels(pictures.crops(step, random.Random(f"crops/{seed}/{step}"))).to(device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            latents = model.encode(pixels).latents
            noise = torch.randn(latents.shape, generator=rng).to(device)
            decoded = model.decode(latents + recipe.noise * noise).sample
        loss = vae_loss(pixels, decoded.float(), latents.float())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps, recipe.rate, 100, _FLAT)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(loss.item())
        done = step + 1
        if done % recipe.checkpoint_every == 0 or done == recipe.steps:
            state = {
                "key": key,
                "step": done,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            save_state(path, state)
        if done % (5 * recipe.checkpoint_every) == 0 or done == recipe.steps:
            told = ", ".join(f"{psnr(model, found, device):.1f} {kind}" for kind, found in checked.items())
            log(folder, f"vae {done}: dB {told}")
    model.eval()
    latents = encode(model, np.concatenate(list(checked.values())), device).float()
    model.register_to_config(scaling_factor=1.0 / latents.std().item())
    return model


def test_pictures(studio: Studio, count: int = 60) -> dict[str, Pixels]:
    """Pictures of each kind that no step trains on; "halves" are at half their size, centred on white."""
    found = {}
    for kind, (make, _) in MAKERS.items():
        samples = [make(studio, random.Random(f"test/{kind}/{k}")) for k in range(count)]
        found[kind] = np.stack([np.asarray(sample.image) for sample in samples])
    return found


@torch.no_grad()
def encode(model: Any, images: Pixels, device: torch.device, batch: int = 16) -> torch.Tensor:
    """Raw latents (N, C, H/8, W/8) float16 on the CPU of pictures (N, H, W, 3)."""
    parts = []
    for start in range(0, len(images), batch):
        pixels = to_pixels(images[start : start + batch]).to(device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            parts.append(model.encode(pixels).latents.half().cpu())
    return torch.cat(parts)


@torch.no_grad()
def decode(model: Any, latents: torch.Tensor) -> Sequence[Image.Image]:
    """Pictures of raw latents."""
    decoded = model.decode(latents).sample.clamp(-1, 1).add(1).mul(127.5).round().byte()
    return [Image.fromarray(p) for p in decoded.permute(0, 2, 3, 1).cpu().numpy()]


@torch.no_grad()
def psnr(model: Any, images: Pixels, device: torch.device) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB of the reconstruction, pixels clipped to their range."""
    ratios = []
    for start in range(0, len(images), 20):
        pixels = to_pixels(images[start : start + 20]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            decoded = model.decode(model.encode(pixels).latents).sample
        error = functional.mse_loss(decoded.float().clamp(-1, 1), pixels, reduction="none").mean((1, 2, 3))
        ratios += (10 * torch.log10(4.0 / error.clamp(min=1e-6))).tolist()
    return float(np.mean(ratios))
