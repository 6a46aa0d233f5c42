"""The command `train tiny`; importing this module loads no heavy library."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "starweave_image" / "training"


def add_commands(subparsers: Any) -> None:
    """Adds `train` to what `ArgumentParser.add_subparsers()` returned.

    The parsed arguments carry `run`: a function of them that returns the exit status.
    """
    train = subparsers.add_parser("train", help="train a model")
    recipes = train.add_subparsers(dest="recipe", required=True, metavar="RECIPE")
    tiny = recipes.add_parser(
        "tiny",
        help="train the embedded model from rendered shapes, landscapes and emoji",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    tiny.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    tiny.add_argument("--work", type=Path, help="folder to resume from (default: OUT.work)")
    tiny.add_argument("--cache", type=Path, default=_default_cache(), help="fetched packages")
    tiny.add_argument("--steps", type=int, default=8000, help="steps of the denoiser")
    tiny.add_argument("--vae-steps", type=int, default=3400, help="steps of the autoencoder")
    tiny.add_argument("--batch", type=int, default=40, help="pictures a step of the denoiser")
    tiny.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of the denoiser")
    tiny.add_argument(
        "--continue-from",
        dest="start",
        type=Path,
        metavar="DIR",
        help="checkpoint to train further instead of a new model",
    )
    tiny.add_argument("--seed", type=int, default=0)
    tiny.add_argument("--no-emoji", action="store_true", help="shapes and landscapes only")
    tiny.add_argument("--device", default="auto", help="auto, cpu or cuda")
    tiny.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    tiny.set_defaults(run=_train_tiny)


def _train_tiny(arguments: argparse.Namespace) -> int:
    import torch

    from .denoiser import DenoiserRecipe
    from .tiny import Recipe, train
    from .vae import VaeRecipe

    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    recipe = Recipe(
        seed=arguments.seed,
        emoji=not arguments.no_emoji,
        start=arguments.start,
        vae=VaeRecipe(steps=arguments.vae_steps),
        denoiser=DenoiserRecipe(steps=arguments.steps, batch=arguments.batch, rate=arguments.rate),
    )
    work = arguments.work or out.with_name(out.name + ".work")
    train(recipe, out, work, arguments.cache, arguments.device, arguments.threads)
    return 0


def main() -> int:
    """The command line with nothing but training, for `python -m` of this module."""
    parser = argparse.ArgumentParser(prog="starweave-image")
    add_commands(parser.add_subparsers(dest="command", required=True))
    arguments = parser.parse_args()
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
