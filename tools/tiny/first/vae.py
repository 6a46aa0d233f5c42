"""The autoencoder: 64 x 64 x 3 pictures to 16 x 16 x 4 latents and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from .loop import (
    generator,
    learning_rate,
    load_state,
    progress,
    random_batch,
    save_state,
)

_STAGE = 1


@dataclass(frozen=True)
class VaeRecipe:
    """Size and schedule of the autoencoder; `width` is its number of channels.

    `noise` is added to the latents, whose spread is 1, before they are decoded: it makes the decoder forgive
    what the denoiser leaves behind, at the cost of some of the finest detail.
    """

    width: int = 40
    encoder_blocks: tuple[int, ...] = (1, 2, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 1)
    steps: int = 4500
    batch: int = 16
    rate: float = 1.5e-3
    noise: float = 0.12
    checkpoint_every: int = 500


def build_vae(recipe: VaeRecipe) -> Any:
    """A fresh `AutoencoderTiny` of diffusers."""
    import diffusers

    widths = (recipe.width,) * 3
    autoencoder: Any = diffusers.AutoencoderTiny
    return autoencoder(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=recipe.encoder_blocks,
        num_decoder_blocks=recipe.decoder_blocks,
        latent_channels=4,
    )


def load_vae(checkpoint: Path) -> Any:
    """The autoencoder of an exported checkpoint, in float32."""
    import diffusers

    autoencoder: Any = diffusers.AutoencoderTiny
    return autoencoder.from_pretrained(checkpoint / "vae").eval()


def to_pixels(images: np.ndarray[Any, Any]) -> torch.Tensor:
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


def train_vae(
    images: np.ndarray[Any, Any],
    pools: list[tuple[int, int]],
    recipe: VaeRecipe,
    seed: int,
    folder: Path,
    device: torch.device,
) -> Any:
    """Trains on `images` (N, 64, 64, 3); each span of rows in `pools` gets an equal share.

    Continues from `folder`/vae.pt. The returned model's `scaling_factor` makes the latents'
    standard deviation 1.
    """
    torch.manual_seed(seed)
    model = build_vae(recipe).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.98))
    key = {"seed": seed, **asdict(recipe)}
    path = folder / "vae.pt"
    first = 0
    if state := load_state(path, key):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    def save(step: int) -> None:
        save_state(
            path,
            {
                "key": key,
                "step": step,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
        )

    for step, report in progress("vae", first, recipe.steps, folder):
        rng = generator(seed, _STAGE, step)
        shares = [recipe.batch * (k + 1) // len(pools) for k in range(len(pools))]
        rows = [
            random_batch(b - a, size, rng) + a
            for (a, b), size in zip(pools, np.diff([0, *shares]).tolist(), strict=True)
        ]
        pixels = to_pixels(images[torch.cat(rows).numpy()]).to(device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            latents = model.encode(pixels).latents
            noise = torch.randn(latents.shape, generator=rng).to(device)
            decoded = model.decode(latents + recipe.noise * noise).sample
        loss = vae_loss(pixels, decoded.float(), latents.float())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps, recipe.rate, 100, 0.3)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(loss.item())
        if (step + 1) % recipe.checkpoint_every == 0 and step + 1 < recipe.steps:
            save(step + 1)
    if first < recipe.steps:
        save(recipe.steps)

    model.eval()
    rows = [torch.arange(a, b, max(1, (b - a) // 200)) for a, b in pools]
    latents = encode(model, images[torch.cat(rows).numpy()], device).float()
    model.register_to_config(scaling_factor=1.0 / latents.std().item())
    return model


@torch.no_grad()
def encode(model: Any, images: np.ndarray[Any, Any], device: torch.device, batch: int = 32) -> torch.Tensor:
    """Raw latents (N, 4, 16, 16) float16 on the CPU of pictures (N, 64, 64, 3)."""
    parts = []
    for start in range(0, len(images), batch):
        pixels = to_pixels(images[start : start + batch]).to(device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            parts.append(model.encode(pixels).latents.half().cpu())
    return torch.cat(parts)


@torch.no_grad()
def psnr(model: Any, images: np.ndarray[Any, Any], device: torch.device) -> float:
    """Peak signal-to-noise ratio in dB of the reconstruction, pixels clipped to their range."""
    total = 0.0
    for start in range(0, len(images), 100):
        pixels = to_pixels(images[start : start + 100]).to(device)
        decoded = model.decode(model.encode(pixels).latents).sample.clamp(-1, 1)
        total += functional.mse_loss(decoded, pixels).item() * len(pixels)
    return float(10 * np.log10(4.0 / (total / len(images))))
