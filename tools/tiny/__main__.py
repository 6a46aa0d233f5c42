"""The command line: `python -m tiny train`, `look`, `prompts` and `evaluate`."""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .checkpoint import draw_prompts, sheet
from .evaluate import GOALS, Line, evaluate
from .icons import EDGE
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
    judging = commands.add_parser(
        "evaluate", help="draw held-out captions with a checkpoint and judge the pictures"
    )
    judging.add_argument("checkpoint", type=Path)
    judging.add_argument("--count", type=int, default=200, help="prompts of a line; of things one each")
    judging.add_argument("--seeds", type=int, default=3)
    judging.add_argument("--only", nargs="*", default=[], choices=GOALS, help="lines")
    prompting = commands.add_parser(
        "prompts", help="draw a sheet of prompts from a file, number i with seed i"
    )
    prompting.add_argument("checkpoint", type=Path)
    prompting.add_argument("prompts", type=Path)
    prompting.add_argument("file", type=Path)
    prompting.add_argument("--edge", type=int, default=EDGE)
    return parser


def _report(line: Line) -> None:
    print(f"{line.name}: {line.prompts} prompts, {line.pictures} pictures")
    for question, score in line.scores.items():
        goal = GOALS[line.name].get(question)
        print(
            f"  {question} {score:.3f} (judge {line.judge[question]:.3f}{f', meant {goal:.2f}' if goal else ''})",
            flush=True,
        )


def _draw_prompts(checkpoint: Path, prompts: Path, edge: int) -> Image.Image:
    import diffusers

    stable_diffusion: Any = diffusers.StableDiffusionPipeline
    pipeline = stable_diffusion.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    lines = prompts.read_text().splitlines()
    return sheet(draw_prompts(pipeline, lines, range(len(lines)), edge), lines, 10)


def main() -> None:
    """Runs the command that is named on the command line."""
    args = _parser().parse_args()
    if args.command == "train":
        torch.set_num_threads(args.threads)
        recipe = Recipe(seed=args.seed)
        if args.steps:
            recipe = replace(recipe, denoiser=replace(recipe.denoiser, steps=args.steps))
        train(recipe, args.out, args.work, args.cache, torch.device(args.device), args.threads)
    elif args.command == "evaluate":
        evaluate(args.checkpoint, args.cache, args.count, args.seeds, args.only, _report)
    elif args.command == "prompts":
        _draw_prompts(args.checkpoint, args.prompts, args.edge).save(args.file)
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
