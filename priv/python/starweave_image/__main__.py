"""The command `starweave-image`, also as `python -m starweave_image`. Light until a command needs more."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import NoReturn

from . import paths
from .doors import exits, streams
from .errors import missing_package


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
        args = _parser(argv[:1]).parse_args(argv)
        code: int = args.run(args)
    except SystemExit as exit:
        wrong = exit.code not in (None, 0)
        code = exits.OK if not wrong else exits.PORT_USAGE if argv[:1] == ["port"] else exits.USAGE
    except ImportError as error:
        print(f"starweave-image: {missing_package(error)}", file=sys.stderr)
        code = exits.UNAVAILABLE
    return code


def _parser(command: list[str]) -> argparse.ArgumentParser:
    """The parser of all commands, with the switches of this one: those come from the schema, and so from a package. A port
    must import none before it has forked its watchdog, and `doctor` may lack it."""
    parser = argparse.ArgumentParser(
        prog="starweave-image",
        description="Make images with diffusion models.",
        epilog="exit codes:\n" + "".join(f"  {code:<4} {why}\n" for code, why in exits.COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="make an image from a text")
    generate.set_defaults(run=_generate)
    generate.add_argument("prompt")
    generate.add_argument(
        "--out", default="image.png", help="file to write; several images are numbered (default: %(default)s)"
    )
    if command == ["generate"]:
        from .doors import switches

        switches.add(generate, switches.REQUEST, _HELPS)

    models = commands.add_parser(
        "models", help="list the models that can be used, or manage those on the disk"
    )
    models.set_defaults(run=_models)
    models.add_argument("--json", action="store_true")
    _add_models_commands(models)

    doctor = commands.add_parser("doctor", help="report what is installed and what is missing")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--json", action="store_true")

    for name, chosen in (("generate", generate), ("models", models), ("doctor", doctor)):
        if command == [name]:
            _add_engine_switches(chosen)

    port = commands.add_parser("port", help="serve an Elixir application on descriptors 3 and 4")
    port.set_defaults(run=_port)
    port.add_argument("--log-socket", metavar="PATH", help="unix socket that takes what libraries print")

    return parser


# What the fields of the schema are for on a command line.
_HELPS = {
    "format": "of the file: png, jpeg or webp (default: what --out ends in)",
    "preview": "show how the image forms in a file beside --out, such as image.preview.jpg, removed at the end",
    "model": "id or alias of a model, or a folder of your own (default: starweave/tiny)",
}


def _add_engine_switches(parser: argparse.ArgumentParser) -> None:
    try:
        from .doors import switches
    except ImportError:
        # `doctor` will say which package is missing, whatever it was asked.
        for name in ("--device", "--dtype"):
            parser.add_argument(name)
    else:
        switches.add(parser, switches.ENGINE)


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
        return exits.PORT_USAGE
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

    given = {"device": args.device, "dtype": args.dtype}
    report = doctor.examine(**{name: value for name, value in given.items() if value is not None})
    print(json.dumps(report) if args.json else doctor.describe(report))
    return exits.FAILED if report["problems"] else exits.OK


if __name__ == "__main__":
    main()
