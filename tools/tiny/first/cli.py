"""The commands `train tiny` and `evaluate`; importing this module loads no heavy library."""

from __future__ import annotations

import argparse
import json
import os
from datetime import date
from pathlib import Path
from typing import Any

from starweave_image.paths import cache_folder


def _shares(text: str) -> tuple[float, ...]:
    shares = tuple(float(part) for part in text.split(","))
    if len(shares) != 4 or min(shares) < 0 or sum(shares) <= 0:
        raise argparse.ArgumentTypeError("must be four numbers of 0 or more, not all 0")
    return shares


def add_commands(subparsers: Any) -> None:
    """Adds `train` and `evaluate` to what `ArgumentParser.add_subparsers()` returned.

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
    tiny.add_argument("--steps", type=int, default=10_000, help="steps of the denoiser")
    tiny.add_argument("--vae-steps", type=int, default=4500, help="steps of the autoencoder")
    tiny.add_argument("--batch", type=int, default=64, help="pictures a step of the denoiser")
    tiny.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of the denoiser")
    tiny.add_argument(
        "--continue-from",
        dest="start",
        type=Path,
        metavar="DIR",
        help="checkpoint to train further instead of a new model",
    )
    tiny.add_argument(
        "--mix",
        type=_shares,
        metavar="A,B,C,D",
        help="shares of things, shapes, pairs and landscapes in a batch of the denoiser (default: the recipe's)",
    )
    tiny.add_argument("--seed", type=int, default=0)
    tiny.add_argument("--no-emoji", action="store_true", help="shapes and landscapes only")
    _add_machine_options(tiny)
    tiny.set_defaults(run=_train_tiny)

    evaluate = subparsers.add_parser(
        "evaluate",
        help="score how well a checkpoint of `train tiny` draws what it is asked for",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    evaluate.add_argument("checkpoint", type=Path, metavar="DIR")
    evaluate.add_argument(
        "--prompts", type=int, default=200, help="of each kind; of things there is one each"
    )
    evaluate.add_argument("--seeds", type=int, default=3, help="pictures of each prompt")
    evaluate.add_argument("--steps", type=int, default=25)
    evaluate.add_argument("--guidance", type=float, default=4.0)
    evaluate.add_argument("--no-emoji", action="store_true", help="shapes and landscapes only")
    evaluate.add_argument(
        "--history", type=Path, metavar="FILE", help="add the scores to it, as a line of JSON"
    )
    _add_machine_options(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", type=Path, default=cache_folder() / "training", help="fetched packages")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of all processes together")


def _wait_without_spinning() -> None:
    # Threads that spin while they wait for each other lose tenfold when anyone else wants a core. Torch reads
    # this as it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _train_tiny(arguments: argparse.Namespace) -> int:
    _wait_without_spinning()
    from .denoiser import DenoiserRecipe
    from .tiny import Recipe, train
    from .vae import VaeRecipe

    out: Path = arguments.out
    recipe = Recipe(
        seed=arguments.seed,
        emoji=not arguments.no_emoji,
        start=arguments.start,
        vae=VaeRecipe(steps=arguments.vae_steps),
        denoiser=DenoiserRecipe(
            steps=arguments.steps,
            batch=arguments.batch,
            rate=arguments.rate,
            mix=arguments.mix or DenoiserRecipe.mix,
        ),
    )
    work = arguments.work or out.with_name(out.name + ".work")
    train(recipe, out, work, arguments.cache, arguments.device, arguments.threads)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    _wait_without_spinning()
    import torch
    from starweave_image.weights.integrity import checksum

    from .evaluation import GOALS, Line, evaluate

    torch.set_num_threads(arguments.threads)
    print(f"{'':16} {'':18} {'score':>6} {'goal':>6} {'judge on rendered pictures':>28}")

    def show(name: str, line: Line) -> None:
        for question, score in line.scores.items():
            goal = GOALS[name].get(question)
            aim = f"{goal:6.2f}" if goal else f"{'':6}"
            print(f"{name:16} {question:18} {score:6.3f} {aim} {line.judge[question]:28.3f}", flush=True)

    lines = evaluate(
        arguments.checkpoint,
        arguments.cache,
        arguments.device,
        arguments.prompts,
        arguments.seeds,
        arguments.steps,
        arguments.guidance,
        with_things=not arguments.no_emoji,
        report=show,
    )
    if arguments.history:
        entry = {
            "date": date.today().isoformat(),
            "weights": checksum(arguments.checkpoint),
            **{name: getattr(arguments, name) for name in ("prompts", "seeds", "steps", "guidance")},
            "scores": {
                name: {q: round(s, 4) for q, s in line.scores.items()} for name, line in lines.items()
            },
        }
        with arguments.history.open("a") as history:
            history.write(json.dumps(entry) + "\n")
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
