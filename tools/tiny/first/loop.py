"""What both training loops share: schedule, seeded batches, checkpoints and the log."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn


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


def random_batch(count: int, size: int, rng: torch.Generator) -> torch.Tensor:
    """`size` row numbers out of `count`, with replacement."""
    return torch.randint(count, (size,), generator=rng)


def pick_device(name: str) -> torch.device:
    """`auto` takes the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def join_processes() -> None:
    """Joins the other processes of a `torchrun` launch; does nothing in a plain run.

    On a busy machine several processes with one thread each get far more done than one process
    with several threads, whose every operation waits for the slowest of them.
    """
    if "WORLD_SIZE" in os.environ and not distributed.is_initialized():
        # The others wait for process 0 to render the pool and train the autoencoder.
        distributed.init_process_group("gloo", timeout=timedelta(hours=24))


def place() -> tuple[int, int]:
    """Number of this process and how many there are; (0, 1) in a plain run."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@contextmanager
def first_process_first() -> Iterator[None]:
    """Lets process 0 through the block alone; the others follow and find its results on disk."""
    rank, count = place()
    if rank > 0:
        distributed.barrier()
    yield
    if rank == 0 and count > 1:
        distributed.barrier()


def average_gradients(model: nn.Module) -> None:
    """Gives every process the mean of all processes' gradients."""
    count = place()[1]
    if count == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    distributed.all_reduce(flat)
    flat /= count
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


class Ema:
    """Exponential moving average of a model's parameters, held in a second model.

    The decay rises from 0.1 to `limit` as (1 + n) / (10 + n), the rule of TensorFlow's
    ExponentialMovingAverage.
    """

    def __init__(self, average: nn.Module, limit: float = 0.998) -> None:
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
    """Adds a line to `folder`/train.log, with the time, from process 0 alone."""
    if place()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "train.log").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def progress(
    name: str, first: int, steps: int, folder: Path, every: int = 50
) -> Iterator[tuple[int, Callable[[float], None]]]:
    """Steps `first`..`steps` with a `report(loss)` for each.

    A progress bar on a terminal, otherwise one plain line every `every` steps, which the log in `folder` gets
    in any case.
    """
    if place()[0] > 0:
        yield from ((step, lambda loss: None) for step in range(first, steps))
        return
    bar: Any = None
    if sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(total=steps, initial=first, desc=name, unit="step")
    start, total, seen, at = time.monotonic(), 0.0, 0, first

    def report(loss: float) -> None:
        nonlocal total, seen
        total, seen = total + loss, seen + 1
        if bar is not None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
        if (at + 1) % every == 0 or at + 1 == steps:
            rate = (at + 1 - first) / (time.monotonic() - start)
            line = f"{name} {at + 1}/{steps} loss {total / seen:.4f} {rate:.2f} steps/s"
            total, seen = 0.0, 0
            log(folder, line)
            if bar is None:
                print(line, flush=True)

    for at in range(first, steps):
        yield at, report
    if bar is not None:
        bar.close()
