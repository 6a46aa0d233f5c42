"""The commands `generate` and `models`: the engine in this process, without Elixir."""

from __future__ import annotations

import argparse
import os
import queue
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from . import wire
from .errors import ImageError, Kind

FAILED = 1
USAGE = 2
UNAVAILABLE = 69
INTERRUPTED = 130

_EXIT_CODES: dict[Kind, int] = {
    "invalid_request": USAGE,
    "model_not_found": USAGE,
    "unavailable": UNAVAILABLE,
}
_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_REQUEST_ID = "command-line"
_REQUEST_FIELDS = (
    "prompt",
    "negative_prompt",
    "model",
    "width",
    "height",
    "steps",
    "guidance_scale",
    "seed",
    "num_images",
    "scheduler",
    "style",
    "quality",
    "strength",
    "variation_strength",
    "variation_seed",
    "metadata",
    "preview",
)


def exit_code(error: ImageError) -> int:
    return _EXIT_CODES.get(error.kind, FAILED)


def generate(args: argparse.Namespace) -> int:
    """Make the images, write them and print where they are; returns the exit code."""
    out: Path = Path(args.out)
    try:
        request, config = _request(args, out), _config(args)
        images, done = _run(request, config, out.with_name(f"{out.stem}.preview.jpg"))
        assert done.parameters is not None
        for path, data, seed in zip(_paths(out, len(images)), images, done.parameters["seeds"], strict=True):
            _write(path, data)
            print(path, flush=True)
            print(f"seed {seed}", file=sys.stderr)
        for notice in done.notices:
            print(f"Note: {notice}", file=sys.stderr)
    except ImageError as error:
        print(f"starweave-image: {error.message}", file=sys.stderr)
        return exit_code(error)
    except OSError as error:
        print(f"starweave-image: {out} cannot be written: {error.strerror}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def models(args: argparse.Namespace) -> int:
    """Print the catalog; returns the exit code."""
    from .engine import Engine

    try:
        cards = Engine(_config(args), lambda message: None, lambda: None).models()
    except ImageError as error:
        print(f"starweave-image: {error.message}", file=sys.stderr)
        return exit_code(error)
    if args.json:
        print(msgspec.json.encode(cards).decode())
    else:
        for card in cards:
            print(f"{card.id:48} {card.state:10} {card.name}")
    return 0


def _request(args: argparse.Namespace, out: Path) -> wire.Generate:
    fields: dict[str, Any] = {name: getattr(args, name) for name in _REQUEST_FIELDS}
    fields["format"] = args.format or _FORMATS.get(out.suffix.lower())
    if args.model and os.path.isdir(args.model):
        fields["model"] = _local_id(args.model)
    fields["image"], fields["mask"] = _file(args.image, "image"), _file(args.mask, "mask")
    request = wire.parse({"t": "generate", "id": _REQUEST_ID, **fields})
    assert isinstance(request, wire.Generate)
    if not out.parent.is_dir():
        raise ImageError("invalid_request", f"out must be in a folder that exists, got {out}", "out")
    return request


def _file(path: str | None, field: str) -> bytes | None:
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise ImageError("invalid_request", f"{field} cannot be read: {error.strerror}", field) from None


def _config(args: argparse.Namespace) -> wire.Config:
    """The configuration that the arguments ask for: a model named by hand may be loaded."""
    models = []
    model = getattr(args, "model", None)
    if model and os.path.isdir(model):
        models = [{"id": _local_id(model), "path": os.path.abspath(model)}]
    elif model:
        models = [{"id": model}]
    config = {"models": models, "device": args.device, "dtype": args.dtype, "capacity": 1}
    try:
        hello = wire.parse({"t": "hello", "v": wire.VERSION, "g": 1, "config": config})
    except wire.InvalidMessage as error:
        raise ImageError(error.kind, error.message.removeprefix("config."), error.field) from None
    assert isinstance(hello, wire.Hello)
    return hello.config


def _local_id(folder: str) -> str:
    return "local/" + os.path.basename(os.path.abspath(folder)).lstrip(".")


def _run(request: wire.Generate, config: wire.Config, preview: Path) -> tuple[list[bytes], wire.Done]:
    """The images; while they are made, the file `preview` shows the latest preview if that was asked for."""
    from .engine import Engine

    events: queue.SimpleQueue[wire.Outgoing] = queue.SimpleQueue()
    engine = Engine(config, events.put, lambda: None)
    engine.start()
    engine.generate(request)
    images: list[bytearray] = [bytearray() for _ in range(request.num_images)]
    previewed = False
    try:
        while True:
            match events.get():
                case wire.Progress() as progress:
                    _show(progress)
                case wire.Preview() as latest:
                    # One that cannot be written is no reason to stop: the image may yet be.
                    with suppress(OSError):
                        _write(preview, latest.data)
                    if not previewed:
                        print_over("")
                        print(f"Preview in {preview}, until the end", file=sys.stderr)
                    previewed = True
                case wire.ImagePart() as part:
                    images[part.index] += part.data
                case wire.Error() as error:
                    raise ImageError(error.kind, error.message, error.field, error.retryable)
                case wire.Done() as done:
                    return [bytes(image) for image in images], done
    finally:
        print_over("")
        if previewed:
            preview.unlink(missing_ok=True)


def _show(progress: wire.Progress) -> None:
    steps = f" {progress.step}/{progress.steps}" if progress.steps else ""
    print_over(f"{progress.phase}{steps}")


def print_over(line: str) -> None:
    """Write over the one progress line of a terminal; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def _paths(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(1, count + 1)]


def _write(path: Path, data: bytes | memoryview) -> None:
    # Beside its place and renamed: whoever looks sees the whole file or none.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
