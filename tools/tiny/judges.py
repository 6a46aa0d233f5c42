"""Judges of pictures: what thing, what colour, how many, and what stands where?

They look at pixels alone and never at the prompt. Each is checked against drawn pictures before its word counts
(`evaluate.py`). Pictures are arrays (H, W, 3) uint8.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from .colours import COLOURS, Floats, lab_of, recolour
from .icons import Pixels
from .pictures import PLAIN, SOFT, Studio, several
from .shapes import SHAPES, shape_icon
from .things import Thing

_CELL = 24
_NAMES = tuple(COLOURS)
_PALETTE: Floats = np.stack([lab_of(colour) for colour in COLOURS.values()])


def nearest_colour(lab: Floats) -> str:
    """The palette's colour nearest to an OKLab colour (3,)."""
    return _NAMES[int(np.square(_PALETTE - lab).sum(1).argmin())]


def background(picture: Pixels) -> Floats:
    """Median colour (3,) of the outermost three pixels."""
    edge = np.ones(picture.shape[:2], bool)
    edge[3:-3, 3:-3] = False
    return np.asarray(np.median(picture[edge].astype(np.float32), axis=0))


def _normal(picture: Pixels, ground: Floats) -> Floats | None:
    """What stands on `ground`, brought to one size and place and its ground made gray: (_CELL * _CELL * 4,).

    The fourth value tells how much of a cell is not ground. None where nothing stands.
    """
    mask = np.abs(picture.astype(np.float32) - ground).max(-1) > 24
    rows, columns = np.flatnonzero(mask.sum(1) > 1), np.flatnonzero(mask.sum(0) > 1)
    if len(rows) < 4 or len(columns) < 4:
        return None
    top, low, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    high, wide = low - top, right - left
    side = max(high, wide)
    canvas = np.full((side, side, 4), (128, 128, 128, 0), np.uint8)
    y, x = (side - high) // 2, (side - wide) // 2
    piece = mask[top:low, left:right]
    canvas[y : y + high, x : x + wide][piece, :3] = picture[top:low, left:right][piece]
    canvas[y : y + high, x : x + wide, 3] = piece * np.uint8(255)
    small = Image.fromarray(canvas, "RGBX").resize((_CELL, _CELL), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel() / np.float32(255)


@dataclass(frozen=True)
class Seen:
    """What a picture of one thing is taken for: names from the nearest down, its colour, and how far the nearest is."""

    names: tuple[str, ...] = ()
    colour: str = ""
    error: float = float(_CELL * _CELL)


class ThingJudge:
    """Compares what stands in a picture with things and shapes as the training draws them.

    Before the comparison both are brought to one size and place, so neither counts. It knows all shapes and of things
    those that are given, without `coloured` in their own colours alone.
    """

    def __init__(self, studio: Studio, things: Iterable[Thing], coloured: bool, style: str = PLAIN) -> None:
        self._names: list[str] = []
        self._colours: list[str] = []
        cells: list[Floats] = []

        def know(name: str, colour: str, cutout: Pixels, ground: Sequence[int]) -> None:
            alpha = cutout[..., 3:].astype(np.float32) / 255
            paper = np.array(ground, np.float32)
            drawn = np.asarray(cutout[..., :3] * alpha + paper * (1 - alpha), np.uint8)
            cell = _normal(drawn, paper)
            if cell is not None:
                self._names.append(name)
                self._colours.append(colour)
                cells.append(cell)

        for thing in things:
            key = thing.key(style)
            if key is None:
                continue
            icon, body = np.asarray(studio.icons[style, key]), studio.body(style, key)
            know(thing.names[0], nearest_colour(body.lab), icon, (255, 255, 255))
            for colour in COLOURS if coloured and studio.colourable(thing, style) else ():
                ground = SOFT if colour == "white" else (255, 255, 255)
                know(thing.names[0], colour, recolour(icon, body, colour), ground)
        for shape in SHAPES:
            for colour, ink in COLOURS.items():
                know(shape, colour, shape_icon(shape, ink), SOFT if colour == "white" else (255, 255, 255))
        self._cells = np.stack(cells)
        self._squares = np.square(self._cells).sum(1)

    def __call__(self, picture: Pixels, ground: Floats | None = None) -> Seen:
        cell = _normal(picture, background(picture) if ground is None else ground)
        if cell is None:
            return Seen()
        errors = self._squares - 2.0 * self._cells @ cell + np.square(cell).sum()
        order = errors.argsort()
        names = tuple(dict.fromkeys(self._names[k] for k in order[:200]))
        return Seen(names, self._colours[order[0]], float(errors[order[0]]))


@dataclass(frozen=True)
class Pair:
    """Two things as they stand: `beside` (left, right) or `stacked` (upper, lower)."""

    stand: str
    first: Seen
    second: Seen


def see_pair(picture: Pixels, judge: ThingJudge) -> Pair:
    """Cuts the picture in two where both parts are most like things, and tells what they are.

    Beside each other things have a gap. Stacked ones may overlap by a little, so the upper one may end below where the lower
    one begins.
    """
    ground = background(picture)
    filled = np.abs(picture.astype(np.float32) - ground).max(-1) > 24
    middle = range(int(len(picture) * 0.3), int(len(picture) * 0.74), 2)
    gaps = [cut for cut in middle if filled[:, cut].sum() == 0]
    if gaps:
        cut = gaps[len(gaps) // 2]
        beside = Pair("beside", judge(picture[:, :cut], ground), judge(picture[:, cut:], ground))
        if beside.first.names and beside.second.names:
            return beside
    upper = [judge(picture[:cut], ground) for cut in middle]
    lower = [judge(picture[cut:], ground) for cut in middle]
    near = range(6)
    pairs = [(one, lower[k - by]) for k, one in enumerate(upper) for by in near if 0 <= k - by < len(lower)]
    return Pair("stacked", *min(pairs, key=lambda pair: pair[0].error + pair[1].error))


class CountJudge:
    """A small network that tells how many of the same stand in a picture, 1 to 4."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model.eval()

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Pixels]) -> list[int]:
        seen = torch.stack([_silhouette(picture) for picture in pictures])
        return [int(k) + 1 for k in self._model(seen).argmax(1)]


def _silhouette(picture: Pixels) -> torch.Tensor:
    """(1, 48, 48): how far pixels are from the background; colours and things tell nothing of a number."""
    away = np.abs(picture.astype(np.float32) - background(picture)).max(-1) / 255
    return functional.interpolate(torch.from_numpy(away)[None, None], (48, 48), mode="area")[0]


def train_count_judge(studio: Studio, pictures: int = 6000, epochs: int = 12) -> CountJudge:
    """Trains on drawn pictures of one to four of the same."""
    from .pictures import one, shape

    makers = (several, several, several, one, shape)
    drawn: list[torch.Tensor] = []
    wanted: list[int] = []
    for k in range(pictures):
        sample = makers[k % len(makers)](studio, random.Random(f"count judge/{k}"))
        drawn.append(_silhouette(np.asarray(sample.image)))
        wanted.append(sample.facts.count - 1)
    seen, goals = torch.stack(drawn), torch.tensor(wanted)
    torch.manual_seed(0)
    model = nn.Sequential()
    for wide, channels in ((1, 24), (24, 48), (48, 64)):
        model.append(nn.Conv2d(wide, channels, 3, 1, 1))
        model.append(nn.BatchNorm2d(channels))
        model.append(nn.ReLU())
        model.append(nn.MaxPool2d(2))
    model.append(nn.Flatten())
    model.append(nn.Linear(64 * 6 * 6, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    steps = epochs * pictures // 100
    schedule: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        rows = torch.randint(pictures, (100,))
        batch = seen[rows] * torch.empty(100, 1, 1, 1).uniform_(0.6, 1.0) + 0.03 * torch.randn(100, 1, 48, 48)
        loss = functional.cross_entropy(model(batch), goals[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return CountJudge(model)
