"""What the denoiser learns from: latents of drawn pictures with their captions, in shards on disk.

Shard `n` is a function of the seed, `n` and the autoencoder alone, so shards are made when they are needed and kept.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .icons import Pixels
from .loop import log
from .pictures import Studio, draw, open_studio
from .vae import encode, halved

SIZE = 4096
"""Pictures of a shard; half of them are there at half their size besides."""

_SMALL = SIZE // 2
_PIECE = 32

Latents = np.ndarray[Any, np.dtype[np.float16]]


_studio: list[Studio] = []


def _start_worker(cache: Path) -> None:
    _studio[:] = [open_studio(cache)]


def _draw_piece(piece: tuple[str, int]) -> tuple[Pixels, list[str]]:
    seed, start = piece
    studio = _studio[0]
    samples = [draw(studio, f"{seed}/{k}") for k in range(start, start + _PIECE)]
    return np.stack([np.asarray(sample.image) for sample in samples]), [sample.caption for sample in samples]


@dataclass
class Shards:
    """The shards in `folder`, made with the icons of `cache` by so many `workers`.

    Each has `full` (SIZE, C, 16, 16) and `small` (SIZE / 2, C, 8, 8) latents, unscaled.
    """

    folder: Path
    cache: Path
    workers: int = 1
    full: list[Latents] = field(default_factory=list)
    small: list[Latents] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.captions)

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"{number:03d}.{kind}"

    def extend(self, upto: int, vae: Any, seed: int, device: torch.device) -> None:
        """Opens or makes shards until there are `upto`."""
        for number in range(len(self), upto):
            if not self._path(number, "json").exists():
                self._make(number, vae, seed, device)
            self.captions.append(json.loads(self._path(number, "json").read_text()))
            self.full.append(np.load(self._path(number, "npy"), mmap_mode="r"))
            self.small.append(np.load(self._path(number, "small.npy"), mmap_mode="r"))

    def _make(self, number: int, vae: Any, seed: int, device: torch.device) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        captions: list[str] = []
        full, small = [], []
        pieces = [(f"train/{seed}/{number}", start) for start in range(0, SIZE, _PIECE)]
        with ExitStack() as stack:
            drawn: Iterable[tuple[Pixels, list[str]]]
            if self.workers > 1:
                # Spawned, because a fork would inherit whatever threads torch has started.
                context = multiprocessing.get_context("spawn")
                pool = stack.enter_context(context.Pool(self.workers, _start_worker, (self.cache,)))
                drawn = pool.imap(_draw_piece, pieces)
            else:
                if not _studio:
                    _start_worker(self.cache)
                drawn = map(_draw_piece, pieces)
            for pictures, words in drawn:
                if len(captions) < _SMALL:
                    small.append(
                        encode(vae, np.stack([halved(picture) for picture in pictures]), device).numpy()
                    )
                captions += words
                full.append(encode(vae, pictures, device).numpy())
        np.save(self._path(number, "npy"), np.concatenate(full))
        np.save(self._path(number, "small.npy"), np.concatenate(small))
        # The captions are written last: they are what says that the shard is whole.
        self._path(number, "json").write_text(json.dumps(captions))
        log(self.folder.parent, f"shard {number}: {SIZE} pictures")

    def batch(self, size: int, rng: torch.Generator, small: bool) -> tuple[torch.Tensor, list[str]]:
        """`size` latents (size, C, H, W) float32, all of one size, and their captions."""
        shards = torch.randint(len(self), (size,), generator=rng).tolist()
        rows = torch.randint(_SMALL if small else SIZE, (size,), generator=rng).tolist()
        source = self.small if small else self.full
        latents = np.stack([source[s][r] for s, r in zip(shards, rows, strict=True)])
        captions = [self.captions[s][r] for s, r in zip(shards, rows, strict=True)]
        return torch.from_numpy(latents.astype(np.float32)), captions
