"""A small classifier of landscapes, trained on rendered ones whenever it is needed: about a minute on two cores."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .scenes import GROUNDS, OBJECTS, TIMES, landscape
from .vae import to_pixels

FACTS: dict[str, tuple[str, ...]] = {
    "time": TIMES,
    "ground": GROUNDS,
    "snow": ("no", "yes"),
    "object": OBJECTS,
}
"""What it tells of a landscape, and the values of each."""


def rendered(seed: str, count: int) -> tuple[np.ndarray[Any, Any], list[dict[str, str]]]:
    """`count` landscapes (N, 64, 64, 3) uint8 and their facts."""
    samples = [landscape(random.Random(f"{seed}/{i}")) for i in range(count)]
    return np.stack([np.asarray(s.image) for s in samples]), [s.facts for s in samples]


class SceneJudge:
    """Tells time, ground, snow and object of landscapes (N, 64, 64, 3) uint8."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model.eval()

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray[Any, Any]) -> list[dict[str, str]]:
        told: list[dict[str, str]] = []
        for start in range(0, len(pictures), 100):
            scores = self._model(to_pixels(pictures[start : start + 100]))
            best = {
                fact: part.argmax(1).tolist()
                for (fact, _), part in zip(FACTS.items(), scores.split(_sizes(), 1), strict=True)
            }
            told += [
                {fact: FACTS[fact][row[i]] for fact, row in best.items()} for i in range(len(best["time"]))
            ]
        return told


def _sizes() -> list[int]:
    return [len(values) for values in FACTS.values()]


def train_scene_judge(seed: int = 0, count: int = 12_000, epochs: int = 8, batch: int = 64) -> SceneJudge:
    """A judge that has seen `count` rendered landscapes `epochs` times.

    They are blurred and made noisy at random, since what a model draws is less sharp than what is rendered.
    """
    torch.manual_seed(seed)
    pictures, facts = rendered(f"judge {seed}", count)
    pixels = to_pixels(pictures).contiguous(memory_format=torch.channels_last)
    wanted = torch.tensor([[values.index(f[fact]) for fact, values in FACTS.items()] for f in facts])
    widths = (3, 32, 64, 96, 128)
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
        ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(widths[-1] * 16, sum(_sizes())))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    steps = epochs * (count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        at = step % (count // batch)
        if at == 0:
            order = torch.randperm(count)
        rows = order[at * batch : (at + 1) * batch]
        seen = pixels[rows]
        seen = torch.lerp(seen, functional.avg_pool2d(seen, 3, 1, 1), torch.rand(batch, 1, 1, 1))
        seen = seen + 0.1 * torch.rand(batch, 1, 1, 1) * torch.randn_like(seen)
        parts = model(seen).split(_sizes(), 1)
        loss = sum(
            (functional.cross_entropy(part, wanted[rows, i]) for i, part in enumerate(parts)),
            torch.zeros(()),
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return SceneJudge(model)
