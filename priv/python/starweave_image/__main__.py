"""The command `starweave-image`, also as `python -m starweave_image`. Light until a command needs more."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import NoReturn

from . import paths
from .doors import streams
from .errors import missing_package

FAILED = 1
USAGE = 2
PORT_USAGE = 64
UNAVAILABLE = 69

_EXIT_CODES = """\
exit codes:
  0    done
  1    the image could not be made, or something is missing or damaged
  2    wrong arguments
  3    nothing was fetched without consent
  69   a Python package is missing or cannot be imported
  130  interrupted
"""


def main() -> NoReturn:
    argv = sys.argv[1:]
    # A sidecar has descriptors of its own.
    if argv[:1] != ["port"]:
        streams.prepare()
    code = _main(argv)
    streams.finish()
    # Finalisation would wait for, or crash in, native threads of the engine.
    os._exit(code)


def _main(argv: list[str]) -> int:
    paths.settle()
    try:
        args = _parser().parse_args(argv)
    except SystemExit as exit:
        wrong = exit.code not in (None, 0)
        return 0 if not wrong else PORT_USAGE if argv[:1] == ["port"] else USAGE
    try:
        code: int = args.run(args)
    except ImportError as error:
        print(f"starweave-image: {missing_package(error)}", file=sys.stderr)
        code = UNAVAILABLE
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="starweave-image",
        description="Make images with diffusion models.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="make an image from a text")
    generate.set_defaults(run=_generate)
    generate.add_argument("prompt")
    generate.add_argument(
        "--out", default="image.png", help="file to write; several images are numbered (default: %(default)s)"
    )
    for name, kind in (
        ("--model", str),
        ("--negative-prompt", str),
        ("--width", int),
        ("--height", int),
        ("--steps", int),
        ("--guidance-scale", float),
        ("--seed", int),
        ("--num-images", int),
        ("--scheduler", str),
        ("--style", str),
        ("--quality", int),
        ("--strength", float),
        ("--variation-strength", float),
        ("--variation-seed", int),
    ):
        generate.add_argument(name, type=kind)
    generate.add_argument("--image", metavar="FILE", help="picture to start from")
    generate.add_argument("--mask", metavar="FILE", help="where the picture may change: white in it")
    generate.add_argument("--format", help="png, jpeg or webp (default: what --out ends in)")
    generate.add_argument("--no-metadata", dest="metadata", action="store_false", default=None)
    generate.add_argument(
        "--preview",
        action="store_true",
        default=None,
        help="show how the image forms in a file beside --out, such as image.preview.jpg, removed at the end",
    )
    _add_engine_options(generate)

    models = commands.add_parser(
        "models", help="list the models that can be used, or manage those on the disk"
    )
    models.set_defaults(run=_models)
    models.add_argument("--json", action="store_true")
    _add_engine_options(models)
    _add_models_commands(models)

    doctor = commands.add_parser("doctor", help="report what is installed and what is missing")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--json", action="store_true")
    _add_engine_options(doctor)

    port = commands.add_parser("port", help="serve an Elixir application on descriptors 3 and 4")
    port.set_defaults(run=_port)
    port.add_argument("--log-socket", metavar="PATH", help="unix socket that takes what libraries print")

    return parser


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps or xpu")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")


def _add_models_commands(models: argparse.ArgumentParser) -> None:
    commands = models.add_subparsers(title="commands", metavar="COMMAND", dest="action")
    model, offline = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    model.add_argument("model", help="id or alias")
    offline.add_argument(
        "--offline", action="store_true", help="do not ask the hub, as HF_HUB_OFFLINE=1 says"
    )

    listing = commands.add_parser("list", help="list the models on this machine")
    listing.add_argument("--json", action="store_true")
    listing.add_argument(
        "--local", metavar="ID=FOLDER", action="append", default=[], help="and this folder's"
    )

    pull = commands.add_parser(
        "pull",
        parents=[model, offline],
        help="fetch a model from the hub, after its size and licence are shown",
    )
    pull.add_argument("--revision", help="branch, tag or commit (default: the catalog's, else main)")
    pull.add_argument("--yes", action="store_true", help="do not ask for consent")
    pull.add_argument(
        "--dry-run", action="store_true", help="fetch nothing; exit code 3 if there is something"
    )
    # For a parent that has called it with --dry-run before.
    pull.add_argument("--shown", action="store_true", help=argparse.SUPPRESS)

    verify = commands.add_parser("verify", parents=[offline], help="compare the files with their checksums")
    verify.add_argument("model", nargs="?", help="id or alias (default: all)")
    verify.add_argument("--repair", action="store_true", help="fetch again what is missing or damaged")

    accept = commands.add_parser(
        "accept", help="take the weights in a folder of your own as they are now, though they have changed"
    )
    accept.add_argument("folder")

    remove = commands.add_parser("rm", parents=[model], help="delete a model, unless a process uses it")
    for parser in (verify, remove):
        parser.add_argument("--revision", help="a commit, or the beginning of one (default: all)")

    prune = commands.add_parser(
        "prune",
        help="delete the longest unused models until the rest fits",
        description="Delete the longest unused models of the hub's cache until the rest fits. Those in use stay, and"
        " embedded ones and those in folders of their own are no part of the cache.",
    )
    prune.add_argument("--quota", required=True, metavar="SIZE", help="what may stay, such as 40GB")
    prune.add_argument(
        "--keep", metavar="MODEL", action="append", default=[], help="not this one; repeatable"
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would be deleted")

    for parser in (listing, pull, verify, accept, remove, prune):
        parser.set_defaults(run=_disk)
        # For a parent that cannot end its children: the command ends with its standard input.
        parser.add_argument("--attached", action="store_true", help=argparse.SUPPRESS)


def _port(args: argparse.Namespace) -> int:
    from .doors import process

    try:
        process.prepare(args.log_socket)
    except process.NotAPort as error:
        print(f"starweave-image port: {error}", file=sys.stderr)
        return PORT_USAGE
    from .doors.port import Port

    return Port().run()


def _generate(args: argparse.Namespace) -> int:
    from .doors import command_line as cli

    return cli.generate(args)


def _models(args: argparse.Namespace) -> int:
    from .doors import command_line as cli

    return cli.models(args)


def _disk(args: argparse.Namespace) -> int:
    from .doors import models as models_cli

    return models_cli.run(args)


def _doctor(args: argparse.Namespace) -> int:
    from .doors import doctor

    report = doctor.examine(args.device, args.dtype)
    print(json.dumps(report) if args.json else doctor.describe(report))
    return FAILED if report["problems"] else 0


if __name__ == "__main__":
    main()
