"""The command `doctor`: what is installed, what is missing. Imports only the standard library until the packages are
checked."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import Any

from .. import __version__, paths
from ..errors import ImageError, missing_package

_PACKAGES = (
    "msgpack",
    "msgspec",
    "psutil",
    "tqdm",
    "numpy",
    "pillow",
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    # Some tokenizers are SentencePiece models, which transformers reads with these two.
    "sentencepiece",
    "protobuf",
)
_EMBEDDED = "starweave/tiny"


def examine(**config: str) -> dict[str, Any]:
    """A report, as JSON values, on an engine with this configuration; `problems` is a list of sentences, empty if
    images can be made."""
    packages = {name: _version(name) for name in _PACKAGES}
    report: dict[str, Any] = {
        "starweave_image": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": packages,
        "device": None,
        "device_name": None,
        "dtype": None,
        "reason": None,
        "models": {},
        "hub_cache": str(paths.hub_cache()),
        "problems": [
            f"The Python package {name} is missing." for name, version in packages.items() if not version
        ],
    }
    if report["problems"]:
        report["problems"].append("Run mix image.setup, or pip install starweave-image.")
        return report
    try:
        _ask_engine(report, config)
    except ImageError as error:
        report["problems"].append(error.message)
    except ImportError as error:
        report["problems"].append(missing_package(error))
    else:
        if report["models"].get(_EMBEDDED) not in ("available", "loaded"):
            report["problems"].append("The embedded model is missing from this installation.")
    return report


def describe(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    device = report["device"] and f"{report['device']} ({report['device_name']})"
    dtype = report["dtype"] and f"{report['dtype']}: {report['reason']}"
    local = [id for id, state in report["models"].items() if state in ("available", "loaded")]
    rows = [
        ("starweave_image", report["starweave_image"]),
        ("python", f"{report['python']} ({report['executable']})"),
        *((name, version or "missing") for name, version in report["packages"].items()),
        ("device", device or "unknown"),
        ("dtype", dtype or "unknown"),
        ("models here", ", ".join(local) or "none"),
        ("hub cache", report["hub_cache"]),
    ]
    lines = [f"{name:16} {value}" for name, value in rows]
    return "\n".join([*lines, "", *(report["problems"] or ["Everything needed is here."])])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ask_engine(report: dict[str, Any], given: dict[str, str]) -> None:
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    from .. import schema
    from ..device import devices
    from ..engine.engine import Engine

    config = schema.read(schema.Config, given)
    choice = devices.choose(config)
    report["device"], report["device_name"] = choice.device.id, choice.device.name
    report["dtype"], report["reason"] = choice.dtype, choice.reason
    cards = Engine(config, lambda message: None, lambda: None).models()
    report["models"] = {card.id: card.state for card in cards}
