"""Command line switches, generated from the fields of the schema."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .. import schema

REQUEST = tuple(field for field in schema.fields(schema.Request) if field.name not in ("id", "prompt"))
ENGINE = tuple(field for field in schema.fields(schema.Config) if field.name in ("device", "dtype"))

_METAVARS = {"integer": "N", "number": "X", "image": "FILE", "images": "FILE", "one_of": "NAME"}


def add(
    parser: argparse.ArgumentParser, fields: Iterable[schema.Field], helps: Mapping[str, str] | None = None
) -> None:
    """Add a switch for each field; `helps` has help texts that replace those of the fields. A switch that is not given
    is None."""
    for field in fields:
        name = field.name.replace("_", "-")
        help = (helps or {}).get(field.name)
        if field.type == "boolean":
            switch, about = (
                (f"--no-{name}", f"do not {field.help}") if field.default else (f"--{name}", field.help)
            )
            parser.add_argument(
                switch,
                dest=field.name,
                action="store_const",
                const=not field.default,
                help=_plain(help or about),
            )
            continue
        parser.add_argument(
            f"--{name}",
            dest=field.name,
            metavar=_METAVARS.get(field.type, "TEXT"),
            type=_READ.get(field.type, str),
            action="append" if field.type == "images" else "store",
            help=_plain(help or _about(field)),
        )


def given(args: argparse.Namespace, fields: Iterable[schema.Field]) -> dict[str, Any]:
    """The given fields with their values from the command line; for an image that is its file's name."""
    values = {field.name: getattr(args, field.name, None) for field in fields}
    return {name: value for name, value in values.items() if value is not None}


def _about(field: schema.Field) -> str:
    facts = [field.must_be] if field.type in ("integer", "number", "one_of", "device") else []
    facts += [f"default: {field.default}"] if field.default not in (None, "") else []
    return f"{field.help} ({'; '.join(facts)})" if facts else field.help


def _plain(help: str) -> str:
    return help.replace("`", "").replace("%", "%%")


def _number(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            # Not a number: validating the field then gives its own error.
            return text

    return read


_READ: dict[str, Callable[[str], Any]] = {"integer": _number(int), "number": _number(float)}
