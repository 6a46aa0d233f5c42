"""The layout of a diffusers model, and which of its files are needed: safetensors and the configuration beside them.

This module needs only file names, sizes and `model_index.json`, and no torch, so it works for a model on the hub as
well as for a folder. screening.py decides which files of a folder the libraries get.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ImageError
from . import outside
from .outside import Unreadable

INDEX = "model_index.json"

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
_CODE = (".py", ".pyc", ".pyd", ".so", ".dylib")
_CONFIGURATION = (".json", ".txt", ".model", ".jinja")
# A variant, such as fp16, is written before or after the number of a shard.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_)?model(?:\.(?P<first>\w+))?(?P<shard>-\d+-of-\d+)?(?:\.(?P<last>\w+))?\.safetensors"
)
_SHARDS = re.compile(r"(?:diffusion_pytorch_)?model\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
# The best first; any other variant comes after these.
_VARIANTS = (None, "fp16", "bf16")
# No network has more files, and a folder with endlessly many is not read to its end.
_MOST_FILES = 10_000


@dataclass(frozen=True)
class Layout:
    """The content of `model_index.json`: the pipeline class, the library and class of each component, and the
    pipeline's other arguments."""

    pipeline: str
    components: dict[str, tuple[str, str]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """The needed files of a component: its weights in one file or in shards with their index, of a `variant` if there
    are no plain ones; and its configuration."""

    weights: tuple[str, ...]
    index: str | None
    variant: str | None
    configuration: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.weights, *((self.index,) if self.index else ()), *self.configuration)


def read_layout(folder: Path, id: str) -> Layout:
    """The layout of a folder; raises `model_load_failed` if it is not a diffusers model or brings code."""
    try:
        index = outside.read_json(folder / INDEX, dict[str, Any])
    except Unreadable as error:
        raise unfit(id, f"is not a model in diffusers layout: its {INDEX} {error}") from None
    return _parse_layout(index, id)


def _parse_layout(index: dict[str, Any], id: str) -> Layout:
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or not pipeline.isidentifier():
        # In diffusers, a list of two names means a pipeline with code of its own.
        raise unfit(id, "needs a pipeline with code of its own, which is never run")
    components: dict[str, tuple[str, str]] = {}
    options: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        # Some pipelines have lists of numbers, or of options, as arguments.
        if not isinstance(value, list) or not any(isinstance(word, str) for word in value):
            if not (isinstance(value, list) and value[:2] == [None, None]):
                options[name] = value
        elif len(value) != 2 or not all(
            isinstance(word, str) and word.isidentifier() for word in (name, *value)
        ):
            raise unfit(id, f"has a {_shown(name)} with code of its own, which is never run")
        elif value[1].endswith("Pipeline"):
            raise unfit(id, f"has a pipeline of its own as its {_shown(name)}, which is not loaded")
        else:
            components[name] = (value[0], value[1])
    return Layout(pipeline, components, options)


def spellings(kind: str) -> Iterator[str]:
    """The names of a class of transformers: this one, and its older and newer ones."""
    yield kind
    slow = kind.removesuffix("Fast")
    yield slow
    if slow.endswith("FeatureExtractor"):
        yield slow.removesuffix("FeatureExtractor") + "ImageProcessor"
    if slow.endswith("Tokenizer"):
        yield f"{slow}Fast"


def check_names(layout: Layout, id: str) -> None:
    """Raise `model_load_failed` for a class whose name the libraries do not know. Imports transformers, but not torch,
    which takes seconds."""
    if not _knows("diffusers", layout.pipeline):
        raise no_pipeline(layout, id)
    for name, (library, kind) in layout.components.items():
        if not _knows(library, kind):
            raise no_class(layout, name, id)


def no_pipeline(layout: Layout, id: str) -> ImageError:
    return unfit(id, f"needs the pipeline {layout.pipeline}, which the installed diffusers does not have")


def no_class(layout: Layout, name: str, id: str) -> ImageError:
    library, kind = layout.components[name]
    why = f"has a {name} that is no class of diffusers or transformers, and is never run"
    return unfit(id, f"{why}: {library}.{kind}"[:300])


def _knows(library: str, kind: str) -> bool:
    if library == "transformers":
        import transformers

        # `getattr` for a listed name would import it, and torch with it. An unlisted name may be an alias of a
        # tokenizer.
        names = set(dir(transformers))
        return any(name in names for name in spellings(kind)) or hasattr(transformers, kind)
    # Importing diffusers imports torch, so look for the names in its source instead.
    spec = importlib.util.find_spec("diffusers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(name="diffusers")
    root = Path(spec.origin).parent
    sources = (
        [root / "__init__.py"] if library == "diffusers" else (root / "pipelines" / library).glob("*.py")
    )
    word = re.compile(rf"\b{kind}\b")
    return any(word.search(source.read_text(encoding="utf-8")) for source in sources)


def parts_of(layout: Layout, files: Collection[str], id: str) -> dict[str, Part]:
    """The needed files of each component, given all files of the model, as `component/file`.

    Raises `model_load_failed` if a component brings code or a model of its own, has only pickled weights, or lacks
    weights.
    """
    within: dict[str, list[str]] = {name: [] for name in layout.components}
    for file in files:
        folder, _, rest = file.partition("/")
        if folder in within:
            within[folder].append(rest)
    return {name: _part(name, names, id) for name, names in within.items()}


def _part(name: str, files: list[str], id: str) -> Part:
    if any(file.lower().endswith(_CODE) for file in files):
        raise unfit(id, f"has a {name} with code of its own, which is never run")
    # Operating systems leave files behind whose names begin with a dot; files in deeper folders are not used.
    names = sorted(file for file in files if "/" not in file and not file.startswith("."))
    for file, what in ((INDEX, "a pipeline"), ("adapter_config.json", "an adapter")):
        if file in names:
            raise unfit(id, f"has {what} of its own in its {name}, which is not loaded")
    weights, index, variant = _weights_among(names)
    none = not weights and index is None
    if none and any(file.lower().endswith(_PICKLES) for file in names):
        raise unfit(id, f"has its {name} as pickled weights only; only safetensors are loaded")
    # A component with a config.json is a network, and needs weights; others are tokenizers, schedulers and the like.
    if not names or ("config.json" in names and none):
        raise incomplete(id, name)
    configuration = [
        file for file in names if file.endswith(_CONFIGURATION) and ".safetensors.index." not in file
    ]
    return Part(weights, index, variant, tuple(configuration))


def _weights_among(names: Iterable[str]) -> tuple[tuple[str, ...], str | None, str | None]:
    """The plain weights, or else those of the best variant: their files, the index of the shards, and the variant."""
    whole: dict[str | None, str] = {}
    shards: dict[str | None, list[str]] = {}
    indexes: dict[str | None, str] = {}
    for name in names:
        if found := _WEIGHTS.fullmatch(name):
            variant = found["first"] or found["last"]
            if found["shard"]:
                shards.setdefault(variant, []).append(name)
            else:
                whole.setdefault(variant, name)
        elif found := _SHARDS.fullmatch(name):
            indexes.setdefault(found["variant"], name)

    def rank(variant: str | None) -> tuple[int, str]:
        return (_VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS), variant or "")

    # An index may give its shards any names, so these are checked only when the index is read.
    for variant in sorted({*whole, *indexes}, key=rank):
        # If there is both an index and a single file, the libraries prefer the index too.
        if variant in indexes:
            return tuple(shards.get(variant, [])), indexes[variant], variant
        return (whole[variant],), None, variant
    return (), None, None


def wanted(layout: Layout, parts: dict[str, Part], files: Iterable[str]) -> set[str]:
    """The needed files of a repository: weights, configuration, and those that state the licence."""
    own = {file for file in files if file in (INDEX, "README.md") or _is_licence(file)}
    return own | {f"{name}/{file}" for name, part in parts.items() for file in part.files}


def _is_licence(file: str) -> bool:
    return "/" not in file and file.upper().startswith("LICENSE")


def files_in(folder: Path, layout: Layout) -> list[str]:
    """The files of the components in a folder, as `component/file`; only regular files are included."""
    found: list[str] = []
    for name in layout.components:
        for place, folders, files in os.walk(folder / name):
            folders[:] = [each for each in folders if not each.startswith(".")]
            within = os.path.relpath(place, folder)
            found += [f"{within}/{file}" for file in files if os.path.isfile(os.path.join(place, file))]
            if len(found) > _MOST_FILES:
                break
    return found


def check_complete(folder: Path, layout: Layout, id: str) -> dict[str, Part]:
    """The parts of a folder that has all needed files; raises as `parts_of`, and if a shard is missing or its name is
    that of a file that is never loaded."""
    parts = parts_of(layout, files_in(folder, layout), id)
    return {name: _with_shards(folder, name, part, id) for name, part in parts.items()}


def _with_shards(folder: Path, name: str, part: Part, id: str) -> Part:
    if part.index is None:
        return part
    try:
        index = outside.read_json(folder / name / part.index, dict[str, Any], outside.LARGE)
    except Unreadable as error:
        raise unfit(id, f"cannot be loaded: its {name}/{part.index} {error}") from None
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(s, str) for s in placed.values()):
        raise unfit(id, f"cannot be loaded: its {name}/{part.index} does not say where the weights are")
    shards = sorted(set(placed.values()))
    if not all(shard.endswith(".safetensors") for shard in shards):
        raise unfit(id, f"has its {name} in files that are not safetensors")
    if any("/" in shard or shard.startswith(".") for shard in shards):
        raise unfit(id, f"has its {name} in files of another folder")
    if not all(os.path.isfile(folder / name / shard) for shard in shards):
        raise incomplete(id, name)
    return Part(tuple(shards), part.index, part.variant, part.configuration)


def incomplete(id: str, name: str) -> ImageError:
    return unfit(id, f"is incomplete: its {name} is missing or lacks files")


def unfit(id: str, why: str) -> ImageError:
    return ImageError("model_load_failed", f"{id} {why}")


def _shown(name: str) -> str:
    """A name from outside, short and printable."""
    return name[:60] if name.isprintable() else ascii(name)[:60]
