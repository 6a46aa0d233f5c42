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

from .loop import (
    Ema,
    average_gradients,
    generator,
    learning_rate,
    load_state,
    place,
    progress,
    save_state,
)
from .vocabulary import CONTEXT

_STAGE, _CONTINUED_STAGE = 2, 3


@dataclass(frozen=True)
class DenoiserRecipe:
    """Sizes and schedule of the denoiser; `text` is the text encoder's width.

    `mix` gives the share of each kind of picture in a batch, in the order of `data.KINDS`.
    """

    channels: tuple[int, ...] = (96, 128, 160)
    heads: int = 4
    groups: int = 8
    text: int = 192
    text_layers: int = 4
    steps: int = 10_000
    batch: int = 64
    rate: float = 1e-3
    warmup: int = 100
    flat: float = 0.3
    dropout: float = 0.1
    ema: float = 0.998
    mix: tuple[float, ...] = (0.34, 0.12, 0.36, 0.18)
    checkpoint_every: int = 250
    sheet_every: int = 800


class Denoiser(nn.Module):
    """UNet and text encoder in one module, so that optimizer and average see one set of weights."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: torch.Tensor, steps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Predicted v (B, 4, 16, 16) for noisy latents, timesteps (B,) and token ids (B, 24)."""
        states = self.text_encoder(ids).last_hidden_state
        predicted: torch.Tensor = self.unet(noisy, steps, encoder_hidden_states=states).sample
        return predicted


def build_denoiser(recipe: DenoiserRecipe, tokenizer: Any) -> Denoiser:
    """A fresh `UNet2DConditionModel` with a `CLIPTextModel` for `tokenizer`."""
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
        in_channels=4,
        out_channels=4,
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


def load_weights(model: Denoiser, checkpoint: Path) -> None:
    """Fills `model` with the weights of an exported checkpoint of the same sizes."""
    import diffusers
    import transformers

    unet: Any = diffusers.UNet2DConditionModel
    text: Any = transformers.CLIPTextModel
    model.unet.load_state_dict(unet.from_pretrained(checkpoint / "unet").state_dict())
    model.text_encoder.load_state_dict(text.from_pretrained(checkpoint / "text_encoder").state_dict())


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
    latents: torch.Tensor,
    ids: torch.Tensor,
    spans: dict[str, tuple[int, int]],
    tokenizer: Any,
    recipe: DenoiserRecipe,
    seed: int,
    folder: Path,
    device: torch.device,
    on_sheet: Callable[[Denoiser, int], None] | None = None,
    start: Path | None = None,
) -> Denoiser:
    """Trains on scaled `latents` (N, 4, 16, 16) with token `ids` (N, 24); returns the average.

    `spans` gives the rows of each kind, in the order of `recipe.mix`. Continues from
    `folder`/denoiser.pt. `on_sheet` is called with the average every `sheet_every` steps.
    `start` is an exported checkpoint whose weights a new run begins with.
    Joined processes share each batch; process 0 writes the checkpoints and calls `on_sheet`.
    """
    torch.manual_seed(seed)
    model = build_denoiser(recipe, tokenizer)
    if start:
        load_weights(model, start)
    stage = _CONTINUED_STAGE if start else _STAGE
    model.to(device).train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(model)
    ema = Ema(average, recipe.ema)
    scheduler = build_scheduler()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    key = {"seed": seed, "vocabulary": len(tokenizer), "stage": stage, **asdict(recipe)}
    path = folder / "denoiser.pt"
    first = 0
    if state := load_state(path, key):
        model.load_state_dict(state["model"])
        average.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    filled = [(span, share) for span, share in zip(spans.values(), recipe.mix, strict=True)]
    filled = [(span, share) for span, share in filled if span[1] > span[0]]
    weights = torch.tensor([share for _, share in filled])
    starts = torch.tensor([span[0] for span, _ in filled])
    sizes = torch.tensor([span[1] - span[0] for span, _ in filled])
    rank, processes = place()
    empty = torch.tensor(tokenizer("", padding="max_length", max_length=CONTEXT).input_ids)

    for step, report in progress("denoiser", first, recipe.steps, folder):
        rng = generator(seed, stage, step)
        kinds = torch.multinomial(weights, recipe.batch, replacement=True, generator=rng)
        offsets = (torch.rand(recipe.batch, generator=rng) * sizes[kinds]).long()
        rows = starts[kinds] + offsets
        captions = ids[rows].long()
        captions[torch.rand(recipe.batch, generator=rng) < recipe.dropout] = empty
        clean = latents[rows].float()
        noise = torch.randn(clean.shape, generator=rng)
        times = stratified_timesteps(recipe.batch, rng)
        clean, captions, noise, times = (
            part[rank::processes].to(device) for part in (clean, captions, noise, times)
        )
        loss = v_prediction_loss(model, scheduler, clean, captions, noise, times)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps, recipe.rate, recipe.warmup, recipe.flat)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step)
        report(loss.item())
        done = step + 1
        if rank > 0:
            continue
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
        if on_sheet and done % recipe.sheet_every == 0:
            on_sheet(average, done)
    return average
