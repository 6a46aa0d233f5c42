"""What the training loops share: schedule, seeded batches, checkpoints and the log."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn


def learning_rate(step: int, steps: int, peak: float, warmup: int, flat: float) -> float:
    """Warm-up, a flat part ending at the fraction `flat` of `steps`, then cosine to 3 % of `peak`.

    `step` counts from 0. Nearly all of the gain in detail comes during the decay.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    start = max(flat * steps, float(warmup))
    if step < start:
        return peak
    done = (step - start) / max(1.0, steps - start)
    return peak * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def generator(seed: int, stage: int, step: int) -> torch.Generator:
    """The random source of one step, so that a resumed run draws what an unbroken one would."""
    return torch.Generator().manual_seed((seed * 16 + stage) * 2**32 + step)


class Ema:
    """Exponential moving average of a model's parameters, held in a second model.

    The decay rises from 0.1 to `limit` as (1 + n) / (10 + n), the rule of TensorFlow's
    ExponentialMovingAverage.
    """

    def __init__(self, average: nn.Module, limit: float) -> None:
        self.average = average.requires_grad_(False).eval()
        self.limit = limit

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.limit, (1 + step) / (10 + step))
        mine: list[torch.Tensor] = list(self.average.parameters())
        new: list[torch.Tensor] = list(model.parameters())
        torch._foreach_lerp_(mine, new, 1.0 - decay)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint so that an interruption leaves the previous one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_state(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint at `path`, or None. Raises `ValueError` if it belongs to another recipe."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state["key"] != key:
        raise ValueError(f"{path} was made with other settings: remove it or choose another --work")
    return state


def log(folder: Path, line: str) -> None:
    """Prints a line and adds it, with the time, to `folder`/train.log."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.log").open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
    print(line, flush=True)


def progress(
    name: str, first: int, steps: int, folder: Path, every: int = 50
) -> Iterator[tuple[int, Callable[[float], None]]]:
    """Steps `first`..`steps` with a `report(loss)` for each; the log gets a line every `every` steps."""
    start, total, seen, at = time.monotonic(), 0.0, 0, first

    def report(loss: float) -> None:
        nonlocal total, seen
        total, seen = total + loss, seen + 1
        if (at + 1) % every == 0 or at + 1 == steps:
            rate = (at + 1 - first) / (time.monotonic() - start)
            log(folder, f"{name} {at + 1}/{steps} loss {total / seen:.4f} {rate:.2f} steps/s")
            total, seen = 0.0, 0

    for at in range(first, steps):
        yield at, report
