"""What is made of the schema: schema.json, the tables of docs/protocol.md, and the fields whose cases generate.py writes."""

from __future__ import annotations

import json
import sys
from typing import Any

from contract import HERE

sys.path.insert(0, str(HERE.parents[1] / "priv" / "python"))

from starweave_image import schema  # noqa: E402

PROTOCOL = HERE.parents[1] / "docs" / "protocol.md"
REQUEST = {field.name: field for field in schema.fields(schema.Request)}

_KINDS = {"request": schema.Request, "config": schema.Config}
# Of each type of field what it is on the wire; all others are str.
_WIRE = {
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "image": "bin",
    "images": "list",
    "list": "list",
    "models": "list",
}


def schema_json() -> str:
    fields = {
        name: {field.name: _facts(field) for field in schema.fields(kind)} for name, kind in _KINDS.items()
    }
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def _facts(field: schema.Field) -> dict[str, Any]:
    default = {} if field.default is None else {"default": field.default}
    required = {"required": True} if field.required else {}
    return {"type": field.type, **field.bounds, "must_be": field.must_be, **default, **required}


def with_tables(text: str) -> str:
    """The document with a row for each field between the marks for them."""
    for name, kind in _KINDS.items():
        begin, end = f"<!-- {name}: written by tests/contract/generate.py -->\n", f"<!-- {name}: end -->\n"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        table = "| Field | Type | Must be | Default | What it is for |\n|---|---|---|---|---|\n"
        text = head + begin + table + "".join(map(_row, schema.fields(kind))) + end + tail
    return text


def _row(field: schema.Field) -> str:
    default = "" if field.default is None else f"`{json.dumps(field.default)}`"
    cells = [
        f"`{field.name}`",
        _WIRE.get(field.type, "str"),
        field.must_be,
        "required" if field.required else default,
        field.help,
    ]
    return f"| {' | '.join(cells)} |\n"
