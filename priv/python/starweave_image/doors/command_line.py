"""The commands `generate` and `models`: the engine in this process, without Elixir."""

from __future__ import annotations

import argparse
import os
import queue
import re
import sys
from contextlib import suppress
from typing import NoReturn

import msgspec
from tqdm import tqdm

from .. import schema
from ..errors import ImageError
from . import exits, output, switches

# One byte above the limit for a picture, so that a larger file is recognised as too large.
_MOST_READ = 12 * 1024 * 1024 + 1
_REQUEST_ID = "command-line"


def generate(args: argparse.Namespace) -> int:
    """Make the images, write them and print where they are; returns the exit code."""
    path = args.out
    try:
        config, request = _config(args), _request(args)
        plan = output.plan(path, request.num_images, bool(request.preview))
        # Messages on stdout would end up in the picture.
        said = sys.stderr if output.is_stdout(path) else sys.stdout
        images, done = _run(request, config, plan.preview)
        assert done.parameters is not None
        for path, data, seed in zip(plan.paths, images, done.parameters["seeds"], strict=True):
            output.write(path, data)
            print(path, file=said, flush=True)
            print(f"seed {seed}", file=sys.stderr)
        for notice in done.notices:
            print(f"Note: {notice}", file=sys.stderr)
    except ImageError as error:
        print(f"starweave-image: {error.message}", file=sys.stderr)
        return exits.code_of(error.kind)
    except OSError as error:
        print(f"starweave-image: {path} cannot be written: {error.strerror}", file=sys.stderr)
        return exits.FAILED
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    return exits.OK


def models(args: argparse.Namespace) -> int:
    """Print the catalog; returns the exit code."""
    from ..engine.engine import Engine

    try:
        cards = Engine(_config(args), lambda message: None, lambda: None).models()
    except ImageError as error:
        print(f"starweave-image: {error.message}", file=sys.stderr)
        return exits.code_of(error.kind)
    if args.json:
        print(msgspec.json.encode(cards).decode())
    else:
        for card in cards:
            print(f"{card.id:48} {card.state:10} {card.name}")
    return exits.OK


def _request(args: argparse.Namespace) -> schema.Request:
    fields = {
        "id": _REQUEST_ID,
        "prompt": args.prompt,
        "format": output.format_of(args.out) if args.format is None else args.format,
        **switches.given(args, switches.REQUEST),
    }
    if args.model and os.path.isdir(args.model):
        fields["model"] = _local_id(args.model)
    for name in fields.keys() & {field.name for field in switches.REQUEST if field.type == "image"}:
        fields[name] = _file(fields[name], name)
    if "images" in fields:
        fields["images"] = [_file(path, "images") for path in fields["images"]]
    return schema.read(schema.Request, fields)


def _file(path: str, field: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_MOST_READ)
    except OSError as error:
        raise ImageError("invalid_request", f"{field} cannot be read: {error.strerror}", field) from None


def _config(args: argparse.Namespace) -> schema.Config:
    """The configuration that the arguments ask for: a model named by hand may be loaded."""
    models = []
    model = getattr(args, "model", None)
    if model and os.path.isdir(model):
        if any("\ud800" <= letter <= "\udfff" for letter in os.path.abspath(model)):
            raise ImageError("invalid_request", "model must be a folder whose path is UTF-8", "model")
        models = [{"id": _local_id(model), "path": os.path.abspath(model)}]
    elif model and model.startswith((".", "/", "~")):
        raise ImageError(
            "invalid_request", f"model must be a model's id or a folder that exists, got {model}", "model"
        )
    elif model:
        models = [{"id": model}]
    given = switches.given(args, switches.ENGINE)
    return schema.read(schema.Config, {"models": models, "capacity": 1, **given})


def _local_id(folder: str) -> str:
    # The same name as in `mix image.gen`: each byte that is not allowed in an id becomes a hyphen.
    name = re.sub(rb"[^A-Za-z0-9._-]", b"-", os.fsencode(os.path.basename(os.path.abspath(folder))))
    return "local/" + (name.decode().lstrip(".")[:200] or "model")


def _run(request: schema.Request, config: schema.Config, preview: str) -> tuple[list[bytes], schema.Done]:
    """The images; while they are made, the file `preview` shows the latest preview if that was asked for."""
    from ..engine.engine import Engine

    events: queue.SimpleQueue[schema.Event] = queue.SimpleQueue()
    engine = Engine(config, events.put, lambda: None)
    engine.start()
    engine.generate(request)
    images: list[bytearray] = [bytearray() for _ in range(request.num_images)]
    previewed = False
    # Shown only on a terminal, and removed at the end.
    line = tqdm(disable=None, leave=False, bar_format="{desc} |{bar}| {elapsed}<{remaining}")
    try:
        while True:
            match events.get():
                case schema.Progress() as progress:
                    _show(line, progress)
                case schema.Preview() as latest:
                    # Failing to write a preview must not end the request: the image may still be written.
                    with suppress(OSError):
                        output.write(preview, latest.data)
                    if not previewed:
                        tqdm.write(f"Preview in {preview}, until the end", file=sys.stderr)
                    previewed = True
                case schema.ImagePart() as part:
                    images[part.index] += part.data
                case schema.Failed() as error:
                    raise ImageError(error.kind, error.message, error.field, error.retryable)
                case schema.Done() as done:
                    return [bytes(image) for image in images], done
    finally:
        line.close()
        if previewed:
            with suppress(OSError):
                os.unlink(preview)


def _show(line: tqdm[NoReturn], progress: schema.Progress) -> None:
    line.total, line.n = progress.steps or None, progress.step
    steps = f" {progress.step}/{progress.steps}" if progress.steps else ""
    line.set_description_str(f"{progress.phase}{steps}")
