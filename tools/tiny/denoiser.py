"""The denoiser and its text encoder, trained together on precomputed latents."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .loop import Ema, generator, learning_rate, load_state, progress, save_state
from .shards import Shards
from .words import CONTEXT

_STAGE = 2


@dataclass(frozen=True)
class DenoiserRecipe:
    """Sizes and schedule of the denoiser; `text` is the text encoder's width.

    Training begins with `first_shards` and gets one more every `shard_every` steps, up to `shards`. Batches are of pictures
    at half their size, a quarter of the work, with the chance `small_first` for `small_steps` and `small` after them: which
    words mean what is learned on them as well. `steps` may be changed until the rate falls, after `flat` of them.
    """

    channels: tuple[int, ...] = (96, 160, 208)
    heads: int = 4
    groups: int = 8
    text: int = 192
    text_layers: int = 4
    steps: int = 20_000
    batch: int = 64
    rate: float = 8e-4
    warmup: int = 300
    flat: float = 0.5
    dropout: float = 0.1
    ema: float = 0.9995
    first_shards: int = 6
    shard_every: int = 300
    shards: int = 44
    small_steps: int = 7_000
    small_first: float = 0.7
    small: float = 0.1
    checkpoint_every: int = 100
    sheet_every: int = 1000


class Denoiser(nn.Module):
    """UNet and text encoder in one module, so that optimizer and average see one set of weights."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: torch.Tensor, steps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Predicted v (B, C, H, W) for noisy latents, timesteps (B,) and token ids (B, CONTEXT)."""
        states = self.text_encoder(ids).last_hidden_state
        predicted: torch.Tensor = self.unet(noisy, steps, encoder_hidden_states=states).sample
        return predicted


def build_denoiser(recipe: DenoiserRecipe, latents: int, tokenizer: Any) -> Denoiser:
    """A fresh `UNet2DConditionModel` for `latents` channels, with a `CLIPTextModel` for `tokenizer`."""
    import diffusers
    import transformers
    from diffusers.models.attention_processor import AttnProcessor

    text_config: Any = transformers.CLIPTextConfig
    unet_model: Any = diffusers.UNet2DConditionModel
    config = text_config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text,
        intermediate_size=2 * recipe.text,
        projection_dim=recipe.text,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    unet = unet_model(
        sample_size=16,
        in_channels=latents,
        out_channels=latents,
        block_out_channels=recipe.channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        # The name is an old slip of diffusers: this is the number of heads.
        attention_head_dim=recipe.heads,
        norm_num_groups=recipe.groups,
        cross_attention_dim=recipe.text,
        addition_embed_type="text",
        addition_embed_type_num_heads=8,
    )
    # At 64 tokens and fewer the plain matrix products beat the fused kernel's backward on a CPU.
    unet.set_attn_processor(AttnProcessor())
    return Denoiser(unet, transformers.CLIPTextModel(config))


def build_scheduler() -> Any:
    """DDIM with v-prediction, zero terminal SNR and trailing timesteps (arXiv:2305.08891)."""
    import diffusers

    scheduler: Any = diffusers.DDIMScheduler
    return scheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def v_prediction_loss(
    model: Denoiser,
    scheduler: Any,
    latents: torch.Tensor,
    ids: torch.Tensor,
    noise: torch.Tensor,
    steps: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the predicted v = sqrt(a) noise - sqrt(1 - a) latents."""
    noisy = scheduler.add_noise(latents, noise, steps)
    target = scheduler.get_velocity(latents, noise, steps)
    with torch.autocast(latents.device.type, torch.bfloat16):
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        predicted = model(noisy, steps, ids)
    return functional.mse_loss(predicted.float(), target)


def stratified_timesteps(batch: int, rng: torch.Generator) -> torch.Tensor:
    """Timesteps (batch,) in 0..999, one from each of `batch` equal parts, in random order."""
    places = torch.randperm(batch, generator=rng)
    return ((places + torch.rand(batch, generator=rng)) * 1000 / batch).long().clamp_(max=999)


def train_denoiser(
    shards: Shards,
    make_shards: Callable[[int], None],
    vae: Any,
    tokenizer: Any,
    recipe: DenoiserRecipe,
    seed: int,
    folder: Path,
    device: torch.device,
    on_sheet: Callable[[Denoiser, int], None],
) -> Denoiser:
    """Trains, continuing from `folder`/denoiser.pt, and returns the average of the weights.

    `make_shards(n)` sees to it that `shards` has n. `on_sheet` is called with the average every `sheet_every` steps.
    """
    torch.manual_seed(seed)
    model = build_denoiser(recipe, vae.config.latent_channels, tokenizer)
    model.to(device).train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(model)
    ema = Ema(average, recipe.ema)
    scheduler = build_scheduler()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    key: dict[str, Any] = {"seed": seed, "vocabulary": len(tokenizer), **asdict(recipe)}
    for free in ("steps", "shards", "flat", "checkpoint_every", "sheet_every"):
        del key[free]
    path = folder / "denoiser.pt"
    first = 0
    if state := load_state(path, key):
        model.load_state_dict(state["model"])
        average.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    for step, report in progress("denoiser", first, recipe.steps, folder):
        make_shards(min(recipe.shards, recipe.first_shards + step // recipe.shard_every))
        rng = generator(seed, _STAGE, step)
        small = recipe.small_first if step < recipe.small_steps else recipe.small
        halves = torch.rand(1, generator=rng).item() < small
        clean, captions = shards.batch(recipe.batch, rng, small=halves)
        clean = clean * vae.config.scaling_factor
        dropped = torch.rand(recipe.batch, generator=rng) < recipe.dropout
        told = ["" if drop else caption for drop, caption in zip(dropped.tolist(), captions, strict=True)]
        ids = tokenizer(
            told, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
        ).input_ids
        noise = torch.randn(clean.shape, generator=rng)
        times = stratified_timesteps(recipe.batch, rng)
        clean, ids, noise, times = (part.to(device) for part in (clean, ids, noise, times))
        loss = v_prediction_loss(model, scheduler, clean, ids, noise, times)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps, recipe.rate, recipe.warmup, recipe.flat)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step)
        report(loss.item())
        done = step + 1
        if done % recipe.checkpoint_every == 0 or done == recipe.steps:
            save_state(
                path,
                {
                    "key": key,
                    "step": done,
                    "model": model.state_dict(),
                    "ema": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
            )
        if done % recipe.sheet_every == 0:
            on_sheet(average, done)
    return average
