"""The layout of a diffusers model in a folder, and what of it may be loaded.

Only safetensors are read, and only classes of diffusers and transformers are made: a folder with pickled weights or
code of its own is refused before anything in it is opened.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ImageError

INDEX = "model_index.json"

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_CONFIGURATION = (".json", ".txt", ".model", ".jinja")
# Without the name of a variant in it, which would have to be asked for.
_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")
_SHARDS = re.compile(r"(diffusion_pytorch_)?model\.safetensors\.index\.json")


@dataclass(frozen=True)
class Layout:
    """What `model_index.json` says: the pipeline class, and the library and class of each component."""

    pipeline: str
    components: dict[str, tuple[str, str]] = field(default_factory=dict)

    def uses(self, name: str) -> bool:
        """Whether a file of the repository is needed: safetensors and configuration, and what states the licence."""
        folder, _, file = name.rpartition("/")
        if not folder:
            return file in (INDEX, "README.md") or file.upper().startswith("LICENSE")
        if folder not in self.components:
            return False
        if file.endswith(".safetensors"):
            return _WEIGHTS.fullmatch(file) is not None
        if ".index." in file:
            return _SHARDS.fullmatch(file) is not None
        return file.endswith(_CONFIGURATION)


def read_layout(folder: Path, id: str) -> Layout:
    """The layout of a folder; raises `model_load_failed` where it is none of diffusers or brings code."""
    index = read_json(folder / INDEX)
    if index is None:
        raise unfit(id, f"has no readable {INDEX}, so it is not a model in diffusers layout")
    return _parse_layout(index, id)


def _parse_layout(index: dict[str, Any], id: str) -> Layout:
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or not pipeline.isidentifier():
        # A list of two names is diffusers' form for a pipeline with code of its own.
        raise unfit(id, "needs a pipeline with code of its own, which is never run")
    components: dict[str, tuple[str, str]] = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or value[:2] == [None, None]:
            continue
        if (
            not all(isinstance(word, str) and word.isidentifier() for word in (name, *value))
            or len(value) != 2
        ):
            raise unfit(id, f"has a {name} with code of its own, which is never run")
        components[name] = (value[0], value[1])
    return Layout(pipeline, components)


def inspect(folder: Path, id: str) -> None:
    """Refuse what may not be loaded or is not all there; raises `model_load_failed`. Imports diffusers."""
    layout = read_layout(folder, id)
    check_classes(layout, id)
    check_complete(folder, layout, id)


def check_classes(layout: Layout, id: str) -> None:
    """Raise `model_load_failed` for a class that is none of diffusers or transformers, both of which it imports."""
    import diffusers

    pipeline = _class("diffusers", layout.pipeline)
    _check(
        layout, id, isinstance(pipeline, type) and issubclass(pipeline, diffusers.DiffusionPipeline), _class
    )


def check_names(layout: Layout, id: str) -> None:
    """Raise what `check_classes` would for a name that the libraries do not know. Imports transformers, but no torch,
    which takes seconds."""
    _check(layout, id, _knows("diffusers", layout.pipeline), _knows)


def _check(layout: Layout, id: str, pipeline: bool, has: Callable[[str, str], Any]) -> None:
    if not pipeline:
        raise unfit(id, f"needs the pipeline {layout.pipeline}, which the installed diffusers does not have")
    for name, (library, kind) in layout.components.items():
        if not has(library, kind):
            raise unfit(id, f"has a {name} that is no class of diffusers or transformers, and is never run")


def _class(library: str, kind: str) -> type | None:
    import diffusers
    import diffusers.pipelines
    import transformers

    # Parts that belong to one pipeline family, such as its safety checker, name that family's module.
    home = {"diffusers": diffusers, "transformers": transformers}.get(library) or getattr(
        diffusers.pipelines, library, None
    )
    found = getattr(home, kind, None)
    return found if isinstance(found, type) else None


def _knows(library: str, kind: str) -> bool:
    if library == "transformers":
        import transformers

        # To ask for what is listed would import it, and torch with it; what is not may be another name of a tokenizer.
        return kind in dir(transformers) or hasattr(transformers, kind)
    # diffusers imports torch with itself, but its sources name what it has.
    spec = importlib.util.find_spec("diffusers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(name="diffusers")
    root = Path(spec.origin).parent
    sources = (
        [root / "__init__.py"] if library == "diffusers" else (root / "pipelines" / library).glob("*.py")
    )
    word = re.compile(rf"\b{kind}\b")
    return any(word.search(source.read_text(encoding="utf-8")) for source in sources)


def check_files(layout: Layout, files: Collection[str], id: str) -> None:
    """Raise `model_load_failed` where a component has pickled weights only, or no weights; `files` are all that the
    model has, as `component/file`."""
    parts = {name: [file for file in files if file.startswith(f"{name}/")] for name in layout.components}
    for name, part in parts.items():
        safe = any(file.endswith(".safetensors") for file in part)
        if not safe and any(file.endswith(_PICKLES) for file in part):
            raise unfit(id, f"has its {name} as pickled weights only; only safetensors are loaded")
    for name, part in parts.items():
        names = {file.removeprefix(f"{name}/") for file in part}
        # What has a config.json is a network, and needs weights; the rest are tokenizers, schedulers and the like.
        if not names or ("config.json" in names and not any(map(_WEIGHTS.fullmatch, names))):
            raise _incomplete(id, name)


def check_complete(folder: Path, layout: Layout, id: str) -> None:
    """As `check_files` for a folder, of whose networks every part must be there."""
    parts = {
        name: {file.name for file in (folder / name).glob("*") if file.exists()} for name in layout.components
    }
    check_files(layout, [f"{name}/{file}" for name, files in parts.items() for file in files], id)
    for name, files in parts.items():
        shards = {
            str(shard)
            for index in files
            if index.endswith(".safetensors.index.json")
            for shard in (read_json(folder / name / index) or {}).get("weight_map", {}).values()
        }
        if not shards <= files:
            raise _incomplete(id, name)
        if not all(shard.endswith(".safetensors") for shard in shards):
            raise unfit(id, f"has its {name} in files that are not safetensors")


def _incomplete(id: str, name: str) -> ImageError:
    return unfit(id, f"is incomplete: its {name} is missing or lacks files")


def unfit(id: str, why: str) -> ImageError:
    return ImageError("model_load_failed", f"{id} {why}")


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
