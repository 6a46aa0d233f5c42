"""Previews: cheap small pictures of an image that is still being drawn.

Latents are nearly a picture: a linear map of each with its eight neighbours gives a colour. That map is fitted to
the model's own autoencoder when it is first needed, so that it is right for every model, also for one that nobody
has heard of. What is mapped is not the noisy sample of a step but the picture that the step predicts.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import math
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL.Image import Image, fromarray

from .. import schema
from . import images

MAX_SIDE = 256
_MOST = 10
_INTERVAL_S = 0.1
_QUALITY = 80

_PICTURES = 3
_SHAPES = (4, 6, 8, 10, 12)
_MIN_SIDE = 128
_RIDGE = 1e-3
# A colour beyond this counts as saturated: the map may exceed it, since drawing clips it again.
_FULL = 0.98
_ROUNDS = 10

_logger = logging.getLogger(__name__)
_maps: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class Previews:
    """The previews of one request.

    `rendered` is the size at which the model draws and `size` the one asked for, both width and height in pixels;
    `send` gets each preview. Whatever fails here is logged once, and the request goes on without.
    """

    def __init__(
        self,
        id: str,
        pipeline: Any,
        rendered: tuple[int, int],
        size: tuple[int, int],
        send: Callable[[schema.Preview], None],
    ) -> None:
        self._id = id
        self._vae = getattr(pipeline, "vae", None)
        self._scale = int(getattr(pipeline, "vae_scale_factor", 8))
        self._rendered = rendered
        shrunk = min(1.0, MAX_SIDE / max(size))
        self._size = max(1, round(size[0] * shrunk)), max(1, round(size[1] * shrunk))
        self._send = send
        self._broken = self._vae is None

    @contextmanager
    def watch(self, pipeline: Any, image: int) -> Iterator[None]:
        """Within, steps of this pipeline's scheduler send previews of the image of this index."""
        scheduler, step, pace = pipeline.scheduler, pipeline.scheduler.step, Pace()
        parameters = inspect.signature(step)

        @functools.wraps(step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._broken and pace.due(len(scheduler.timesteps)):
                try:
                    seen = parameters.bind(*args, **kwargs).arguments
                    latents = predict(scheduler, seen["model_output"], seen["timestep"], seen["sample"])
                    self._show(image, pace.step, latents)
                except Exception:
                    self._broken = True
                    _logger.exception("request %s goes on without previews", self._id)
            return step(*args, **kwargs)

        scheduler.step = watched
        try:
            yield
        finally:
            vars(scheduler).pop("step", None)

    def _show(self, image: int, step: int, latents: Any) -> None:
        latents = unscale(self._vae, latents, *self._rendered, self._scale)
        picture = images.resize(draw(latents, fitted(self._vae, self._scale)), *self._size)
        self._send(
            schema.Preview(
                id=self._id,
                image=image,
                step=step,
                format="jpeg",
                width=picture.width,
                height=picture.height,
                data=images.encode(picture, "jpeg", _QUALITY, None),
            )
        )


class Pace:
    """Which steps of a picture are shown: at most ten, and none within 0.1 s of the one before."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.step = 0
        self._shown = 0
        self._clock = clock
        self._not_before = -math.inf

    def due(self, steps: int) -> bool:
        """Count one step of `steps`; says whether to show it."""
        self.step += 1
        now = self._clock()
        if now < self._not_before or self.step - self._shown < math.ceil(steps / _MOST):
            return False
        self._shown, self._not_before = self.step, now + _INTERVAL_S
        return True


def predict(scheduler: Any, model_output: Any, timestep: Any, sample: Any) -> Any:
    """The clean latents that a scheduler's step predicts, from what it is given and before it is called.

    A sample is a·x₀ + s·noise, where the scheduler itself says what a and s are at a timestep, and its
    `prediction_type` what the model's output is of the two. One of which neither is known gives its sample back.
    """
    import torch

    sample = sample[:1].float()
    # Some models give a variance behind their prediction.
    output = model_output[:1, : sample.shape[1]].float()
    at = torch.as_tensor(timestep, device=sample.device).reshape(1)
    one, none = sample.new_ones(1), sample.new_zeros(1)
    if hasattr(scheduler, "add_noise"):
        a, s = scheduler.add_noise(one, none, at), scheduler.add_noise(none, one, at)
    elif hasattr(scheduler, "scale_noise"):
        a, s = scheduler.scale_noise(one, at, none), scheduler.scale_noise(none, at, one)
    else:
        return sample
    if hasattr(scheduler, "precondition_outputs"):
        return scheduler.precondition_outputs(sample, output, s)
    match scheduler.config.get("prediction_type", "flow_prediction"):
        case "flow_prediction":
            return sample - s * output
        case "epsilon":
            return (sample - s * output) / a
        case "v_prediction":
            size = (a**2 + s**2) ** 0.5
            return (a * sample / size - s * output) / size
        case "sample" | "original_sample":
            return output
    return sample


def unscale(vae: Any, latents: Any, width: int, height: int, scale: int) -> Any:
    """One picture's latents as a pipeline's autoencoder takes them, shape (1, C, h, w), from those that its scheduler
    steps: scaled, and packed into tokens of 2×2 latents in the family of Flux.

    `width` and `height` are the picture's in pixels, `scale` pixels to a latent.
    """
    config, normed = vae.config, getattr(vae, "bn", None)
    if latents.dim() == 3:
        if normed is not None:
            deviation = (normed.running_var + config.batch_norm_eps).sqrt()
            latents = latents * deviation.to(latents) + normed.running_mean.to(latents)
        rows, columns = height // (2 * scale), width // (2 * scale)
        latents = latents.reshape(1, rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        latents = latents.reshape(1, -1, 2 * rows, 2 * columns)
    elif latents.dim() == 5:
        latents = latents[:, :, 0]
    if normed is not None:
        return latents
    scaling = config.get("scaling_factor") or 1.0
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None or deviation is None:
        return latents / scaling + (config.get("shift_factor") or 0.0)
    mean, deviation = (latents.new_tensor(each).view(1, -1, 1, 1) for each in (mean, deviation))
    return latents * deviation / scaling + mean


def draw(latents: Any, map: Any) -> Image:
    """The picture of latents as `unscale` gives them, a pixel to a latent, by a map as `fitted` gives it."""
    import torch

    colours = torch.nn.functional.conv2d(_with_ones(latents.float().cpu()), map, padding=1)[0]
    levels = ((colours.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return fromarray(levels.numpy())


def fitted(vae: Any, scale: int) -> Any:
    """The map of this autoencoder, fitted at the first call: the weights of a 3×3 convolution from the latents, and a
    channel of ones, to red, green and blue from -1 to 1; shape (3, C + 1, 3, 3).

    A few pictures of shapes are encoded, always the same ones, and the map is what leads from their latents back to them
    with the least squared error, where beyond white is white, and beyond black black.
    """
    import torch

    if (known := _maps.get(vae)) is not None:
        return known
    pictures = _pictures(max(_MIN_SIDE, 16 * scale))
    latents = _encode(vae, pictures).float().cpu()
    colours = torch.nn.functional.interpolate(pictures, latents.shape[-2:], mode="area")
    # The channel of ones ends at the border like the latents, so the map can recognise a border.
    seen = torch.nn.functional.unfold(_with_ones(latents), 3, padding=1)
    seen = seen.double().transpose(1, 2).flatten(0, 1)
    colours = wanted = colours.double().flatten(2).transpose(1, 2).flatten(0, 1)
    damped = seen.T @ seen + _RIDGE * len(seen) * torch.eye(seen.shape[1], dtype=torch.float64)
    inverse = torch.linalg.solve(damped, seen.T)
    for _ in range(_ROUNDS):
        weights = inverse @ wanted
        drawn = seen @ weights
        beyond = (drawn * colours.sign() > colours.abs()) & (colours.abs() > _FULL)
        wanted = torch.where(beyond, drawn, colours)
    map = weights.T.reshape(3, -1, 3, 3).float()
    if not map.isfinite().all():
        raise ValueError("the autoencoder gives no finite latents")
    _maps[vae] = map
    return map


def _encode(vae: Any, pictures: Any) -> Any:
    import torch

    # Several autoencoders overflow in half precision.
    if vae.dtype == torch.float16:
        vae = copy.deepcopy(vae).float()
    moving = any(weight.dim() == 5 for weight in vae.parameters())
    pictures = pictures.to(vae.device, vae.dtype)
    with torch.no_grad():
        encoded = vae.encode(pictures.unsqueeze(2) if moving else pictures)
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.mode()
    else:
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return latents[:, :, 0] if moving else latents


def _pictures(side: int) -> Any:
    """Shapes large and small one over another, each of one colour, from -1 to 1; shape (3, 3, side, side)."""
    import torch

    random = torch.Generator().manual_seed(0)
    # Spread evenly (the first point is a corner), then pushed outwards: full colours are common in pictures.
    sobol: Any = torch.quasirandom.SobolEngine
    colours = sobol(3).fast_forward(1).draw(_PICTURES * (1 + len(_SHAPES)))
    colours = (colours * 6 - 3).clamp(-1, 1)[torch.randperm(len(colours), generator=random)]
    ground, *inks = colours.reshape(-1, _PICTURES, 3, 1, 1)
    pictures = ground.expand(-1, -1, side, side)
    for cells, ink in zip(_SHAPES, inks, strict=True):
        hills = torch.randn(_PICTURES, 1, cells, cells, generator=random)
        hills = torch.nn.functional.interpolate(hills, (side, side), mode="bicubic")
        pictures = torch.where(hills > 0.3, ink, pictures)
    return pictures


def _with_ones(latents: Any) -> Any:
    import torch

    return torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
