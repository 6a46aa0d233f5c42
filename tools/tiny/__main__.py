"""The command line: `python -m tiny train`, `look` and `evaluate`."""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path

import torch

from .checkpoint import sheet
from .pictures import MAKERS, open_studio
from .train import Recipe, train


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tiny", description="What makes the embedded model.")
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder of fetched packages and rendered icons"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train, or go on where the last run stopped")
    training.add_argument(
        "--work", type=Path, required=True, help="folder of checkpoints, latents, sheets and the log"
    )
    training.add_argument(
        "--out", type=Path, required=True, help="folder that the finished checkpoint is written to"
    )
    training.add_argument("--device", default="cpu")
    training.add_argument("--threads", type=int, default=1)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--steps", type=int, help="steps of the denoiser")
    looking = commands.add_parser("look", help="draw a sheet of training pictures with their captions")
    looking.add_argument("file", type=Path)
    looking.add_argument("--kinds", default=",".join(MAKERS))
    looking.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    """Runs the command that is named on the command line."""
    args = _parser().parse_args()
    if args.command == "train":
        torch.set_num_threads(args.threads)
        recipe = Recipe(seed=args.seed)
        if args.steps:
            recipe = replace(recipe, denoiser=replace(recipe.denoiser, steps=args.steps))
        train(recipe, args.out, args.work, args.cache, torch.device(args.device), args.threads)
    else:
        studio = open_studio(args.cache)
        kinds = args.kinds.split(",")
        samples = [
            MAKERS[kinds[k % len(kinds)]][0](studio, random.Random(f"look/{args.seed}/{k}"))
            for k in range(72)
        ]
        sheet([s.image for s in samples], [s.caption for s in samples]).save(args.file)


if __name__ == "__main__":
    main()
