"""Which files of a model's folder the libraries get, and what is refused before they open anything.

diffusers and transformers do what a folder says: they run code in it, unpickle weights, and load adapters and attention
kernels from the hub by names in a configuration. Their safeguards differ between versions. So they never get the folder
itself, but a view of it: links to checked weights and word lists, copies of checked configurations, and an index that
this module writes.
"""

from __future__ import annotations

import fcntl
import inspect
import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from .. import paths, schema
from ..errors import ImageError
from . import outside
from .layout import INDEX, Layout, Part, check_complete, no_class, no_pipeline, read_layout, spellings, unfit
from .outside import Unreadable

_logger = logging.getLogger(__name__)

# The files that the libraries read besides weights: settings, which are copied, and word lists, which are linked.
_SETTINGS = frozenset(
    {
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "scheduler_config.json",
        "special_tokens_map.json",
        "tokenizer_config.json",
    }
)
_WORDS = frozenset({"added_tokens.json", "tokenizer.json", "vocab.json"})
_WORD_ENDINGS = (".txt", ".model", ".jinja")

# Settings that can name foreign code, and the values with which they name none.
_CODE_KEYS: dict[str, tuple[Any, ...]] = {
    "auto_map": (None, {}),
    "custom_pipelines": (None, {}),
    "custom_pipeline": (None,),
    "custom_generate": (None,),
    "trust_remote_code": (None, False),
}
_ATTENTION_KEYS = ("attn_implementation", "experts_implementation", "attention_backend")
_ATTENTION = (None, "eager", "sdpa", "native")

# A tokenizer's length above this means "no limit", and texts cannot be padded to it.
_LONGEST = 10**6


Offered = Callable[[type, Mapping[str, Any], Mapping[str, Any]], tuple[schema.Task, ...]]
"""The tasks of a model, from the class of its pipeline and the configurations of its UNet and autoencoder."""


@dataclass(frozen=True)
class Screened:
    """A model's folder that has passed all checks: `kind` is its pipeline's class, `weights` its weight files by their
    names within the model; `links` and `texts` are the content of the view, by their names in it."""

    layout: Layout
    kind: type
    weights: dict[str, Path]
    links: dict[str, Path]
    texts: dict[str, bytes]


def screen(folder: Path, id: str, offered: Offered) -> Screened:
    """Check a folder as far as possible without loading the model; raises `model_load_failed` with the reason. Imports
    diffusers."""
    layout = read_layout(folder, id)
    kind, classes = _classes(layout, id)
    parts = check_complete(folder, _only(layout, classes), id)
    weights: dict[str, Path] = {}
    links: dict[str, Path] = {}
    texts: dict[str, bytes] = {}
    settings: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        _read_settings(folder, name, part, settings, texts, links, id)
    for name, part in parts.items():
        _take_weights(folder, name, part, classes[name], weights, links, texts, id)
        if "Tokenizer" in classes[name].__name__:
            _bound_tokenizer(name, settings, texts)
    texts[INDEX] = _index(layout, kind, classes)
    _tasks(kind, settings, id, offered)
    return Screened(layout, kind, weights, links, texts)


_Count = Annotated[int, Meta(ge=1, le=2**16)]


class Network(msgspec.Struct, frozen=True):
    """The sizes in the configurations of denoisers and autoencoders, in latents, and their numbers of halvings."""

    sample_size: _Count | list[_Count] | None = None
    patch_size: _Count | list[_Count] | None = None
    block_out_channels: Annotated[list[Any], Meta(max_length=16)] | None = None
    encoder_block_out_channels: Annotated[list[Any], Meta(max_length=16)] | None = None


@dataclass(frozen=True)
class Survey:
    """The description of a model by its folder: `weights` are the names of its weight files within the model, and
    `networks` the sizes of its denoisers and autoencoders, by component."""

    layout: Layout
    kind: type
    tasks: tuple[schema.Task, ...]
    weights: list[str]
    networks: dict[str, Network]


def survey(folder: Path, id: str, offered: Offered, whole: bool = True) -> Survey:
    """Examine a folder without opening its weights; raises `model_load_failed` for an invalid model and, with `whole`,
    for an incomplete one. Imports diffusers."""
    layout = read_layout(folder, id)
    kind, classes = _classes(layout, id)
    parts = check_complete(folder, _only(layout, classes), id) if whole else {}
    settings = {
        path: _settings(folder, path, id)
        for name in classes
        if os.path.lexists(folder / (path := f"{name}/config.json"))
    }
    return Survey(
        layout,
        kind,
        _tasks(kind, settings, id, offered),
        [f"{name}/{file}" for name, part in parts.items() for file in part.weights],
        _networks(settings, id),
    )


def _networks(settings: Mapping[str, dict[str, Any]], id: str) -> dict[str, Network]:
    networks = {}
    for name in ("unet", "transformer", "vae"):
        path = f"{name}/config.json"
        if path in settings:
            try:
                networks[name] = msgspec.convert(settings[path], Network)
            except msgspec.ValidationError as error:
                raise _faulty(id, path, Unreadable(f"has the wrong shape: {error}")) from None
    return networks


def _tasks(
    kind: type, settings: Mapping[str, dict[str, Any]], id: str, offered: Offered
) -> tuple[schema.Task, ...]:
    """The tasks of a model; raises `model_load_failed` for one that has none."""
    unet = settings.get("unet/config.json", {})
    tasks = offered(kind, unet, settings.get("vae/config.json", {}))
    if not tasks:
        channels = f" and its unet takes {unet['in_channels']} channels" if "in_channels" in unet else ""
        of = ", ".join(task.replace("_", " ") for task in schema.TASKS)
        raise unfit(
            id, f"does none of the tasks here ({of}): its pipeline is {kind.__name__}{channels}"[:300]
        )
    return tasks


# Classes


def _classes(layout: Layout, id: str) -> tuple[type, dict[str, type]]:
    """The class of the pipeline, and of each component that it needs."""
    import diffusers

    kind = _class("diffusers", layout.pipeline)
    if (
        kind is None
        or not issubclass(kind, diffusers.DiffusionPipeline)
        or kind is diffusers.DiffusionPipeline
    ):
        raise no_pipeline(layout, id)
    takes = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    may_lack = set(getattr(kind, "_optional_components", []))
    classes: dict[str, type] = {}
    for name in layout.components:
        if name not in takes:
            continue
        found = _class(*layout.components[name])
        if found is not None and _loads(found):
            classes[name] = found
        elif name not in may_lack or name == "safety_checker":
            # A safety checker that the model names must never be left out silently.
            raise no_class(layout, name, id)
    for name, parameter in takes.items():
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if required and name != "self" and name not in classes and name not in may_lack | set(layout.options):
            raise unfit(id, f"has no {name}, which its pipeline {kind.__name__} needs")
    return kind, classes


def _class(library: str, kind: str) -> type | None:
    import diffusers
    import diffusers.pipelines
    import transformers

    # For a part that belongs to one pipeline family, such as a safety checker, the index names that family's module.
    home = {"diffusers": diffusers, "transformers": transformers}.get(library) or getattr(
        diffusers.pipelines, library, None
    )
    names = spellings(kind) if library == "transformers" else (kind,)
    found = next((thing for name in names if (thing := getattr(home, name, None)) is not None), None)
    return found if isinstance(found, type) else None


def _loads(kind: type) -> bool:
    """Whether the class is a part of a pipeline, and not a pipeline itself."""
    import diffusers

    return hasattr(kind, "from_pretrained") and not issubclass(kind, diffusers.DiffusionPipeline)


def _only(layout: Layout, classes: Mapping[str, type]) -> Layout:
    needed = {name: layout.components[name] for name in classes}
    return Layout(layout.pipeline, needed, layout.options)


def _index(layout: Layout, kind: type, classes: Mapping[str, type]) -> bytes:
    import diffusers

    takes = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    index: dict[str, Any] = {"_class_name": kind.__name__, "_diffusers_version": diffusers.__version__}
    index |= {name: value for name, value in layout.options.items() if name in takes}
    for name, found in classes.items():
        index[name] = [layout.components[name][0], found.__name__]
    for name in getattr(kind, "_optional_components", []):
        index.setdefault(name, [None, None])
    return json.dumps(index).encode()


# Files


def _read_settings(
    folder: Path,
    name: str,
    part: Part,
    settings: dict[str, dict[str, Any]],
    texts: dict[str, bytes],
    links: dict[str, Path],
    id: str,
) -> None:
    for file in part.configuration:
        path = f"{name}/{file}"
        if file in _SETTINGS:
            settings[path] = found = _settings(folder, path, id)
            texts[path] = json.dumps(found).encode()
            _refuse_code(found, path, id)
        elif file in _WORDS or file.endswith(_WORD_ENDINGS):
            try:
                size = outside.size_of(folder / path)
            except Unreadable as error:
                raise _faulty(id, path, error) from None
            if size > outside.LARGE:
                raise _faulty(id, path, Unreadable(f"has {size} bytes, and may have {outside.LARGE}"))
            links[path] = folder / path


def _settings(folder: Path, path: str, id: str) -> dict[str, Any]:
    try:
        return outside.read_json(folder / path, dict[str, Any])
    except Unreadable as error:
        raise _faulty(id, path, error) from None


def _refuse_code(settings: Mapping[str, Any], path: str, id: str) -> None:
    """Raise for settings that name foreign code, a kernel or a quantization, at any depth."""
    left: list[Any] = [settings]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        if not isinstance(value, dict):
            continue
        for key, inner in value.items():
            if key in _CODE_KEYS and inner not in _CODE_KEYS[key]:
                raise unfit(id, f"needs code of its own, which is never run: {key} in its {path}")
            if key == "quantization_config" and inner:
                raise unfit(id, f"is quantized in a way that is not supported: {key} in its {path}")
            if key.strip("_").removesuffix("_internal") in _ATTENTION_KEYS and not _is_plain(inner):
                raise unfit(
                    id, f"asks for attention or experts that are not the libraries' own: {key} in its {path}"
                )
            left.append(inner)


def _is_plain(attention: Any) -> bool:
    if isinstance(attention, dict):
        return all(_is_plain(each) for each in attention.values())
    return attention is None or (isinstance(attention, str) and attention in _ATTENTION)


def _take_weights(
    folder: Path,
    name: str,
    part: Part,
    kind: type,
    weights: dict[str, Path],
    links: dict[str, Path],
    texts: dict[str, bytes],
    id: str,
) -> None:
    import diffusers

    for file in part.weights:
        path = f"{name}/{file}"
        try:
            check_safetensors(folder / path)
        except Unreadable as error:
            raise _faulty(id, path, error) from None
        weights[path] = folder / path
    stem = "diffusion_pytorch_model" if issubclass(kind, diffusers.ModelMixin) else "model"
    if part.index is None:
        # Linked under the plain name, because the libraries would else need the variant of each part as an argument.
        links |= {f"{name}/{stem}.safetensors": folder / name / file for file in part.weights}
        return
    index = outside.read_json(folder / name / part.index, dict[str, Any], outside.LARGE)
    texts[f"{name}/{stem}.safetensors.index.json"] = json.dumps({"metadata": {}, **index}).encode()
    links |= {f"{name}/{file}": folder / name / file for file in part.weights}


def check_safetensors(path: Path) -> None:
    """Check by its header that a file is safetensors and complete; raises `Unreadable` with what it is instead."""
    size = outside.size_of(path)
    head = outside.read_start(path, 200)
    for begin, what in (
        (
            b"version https://git-lfs",
            "is a pointer of Git LFS and not the weights: `git lfs pull` fetches them",
        ),
        (b"\x80", "is a pickle under another name"),
        (b"PK\x03\x04", "is a pickle under another name"),
        (b"GGUF", "is a GGUF file under another name"),
    ):
        if head.startswith(begin):
            # The length of a safetensors header may begin with this byte too.
            if begin != b"\x80" or head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[8:9] != b"{":
                raise Unreadable(what)
    if not head:
        raise Unreadable("is empty")
    if head.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"<":
        raise Unreadable(
            "is a web page and not the weights: somebody was asked to log in when it was fetched"
        )
    length = int.from_bytes(head[:8], "little")
    if size < 10 or not 2 <= length <= outside.LARGE or head[8:9] != b"{":
        raise Unreadable("is no safetensors file")
    if size < 8 + length:
        raise Unreadable("is cut short")
    header = outside.parse_json(outside.read_start(path, 8 + length)[8:], dict[str, Any])
    ends = [0]
    for tensor, said in header.items():
        if tensor == "__metadata__":
            continue
        offsets = said.get("data_offsets") if isinstance(said, dict) else None
        if (
            not isinstance(offsets, list)
            or not all(isinstance(at, int) for at in offsets)
            or len(offsets) != 2
        ):
            raise Unreadable("is damaged: its header does not say where its tensors are")
        ends.append(offsets[1])
    missing = 8 + length + max(ends) - size
    if missing > 0:
        raise Unreadable(f"is cut short: {missing} bytes are missing")
    if missing < 0:
        raise Unreadable(f"is damaged: it has {-missing} bytes too many")


def _bound_tokenizer(name: str, settings: Mapping[str, dict[str, Any]], texts: dict[str, bytes]) -> None:
    """Set a tokenizer's maximum length if it has none, to what its encoder reads. Pipelines pad to this length."""
    path = f"{name}/tokenizer_config.json"
    own = settings.get(path, {})
    encoder = settings.get(f"{name.replace('tokenizer', 'text_encoder')}/config.json", {})
    text_config = encoder.get("text_config")
    reads = encoder.get("max_position_embeddings") or (
        text_config.get("max_position_embeddings") if isinstance(text_config, dict) else None
    )
    if not isinstance(reads, int) or reads <= 0:
        return
    given = own.get("model_max_length")
    # A CLIP encoder cannot read more positions than it was made with; other tokenizers may have a smaller limit of
    # their own.
    longest = reads if "CLIP" in str(own.get("tokenizer_class", "CLIP")) else _LONGEST
    if not isinstance(given, int) or not 0 < given <= longest:
        texts[path] = json.dumps({**own, "model_max_length": reads}).encode()


def _faulty(id: str, path: str, error: Unreadable) -> ImageError:
    return unfit(id, f"cannot be loaded: its {path} {error}")


# The view


class View:
    """A temporary folder with only the files that passed; it exists as long as this object."""

    def __init__(self, screened: Screened) -> None:
        base = paths.views()
        try:
            base.mkdir(parents=True, exist_ok=True)
            with open(base / "lock", "a") as lock:
                # Locked, so that no other process sweeps a folder between its creation and the lock on it.
                fcntl.flock(lock, fcntl.LOCK_EX)
                _sweep(base)
                self.folder, held = _held_folder(base)
        except OSError:
            # The cache folder cannot be written, or its file system has no locks.
            self.folder, held = _held_folder(None)
        self.release = weakref.finalize(self, _remove, self.folder, held)
        for path in {*screened.links, *screened.texts}:
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        for path, text in screened.texts.items():
            (self.folder / path).write_bytes(text)
        for path, target in screened.links.items():
            (self.folder / path).symlink_to(os.path.abspath(target))


def _held_folder(base: Path | None) -> tuple[Path, int]:
    folder = Path(tempfile.mkdtemp(prefix="view-", dir=base))
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return folder, descriptor


def _sweep(base: Path) -> None:
    """Remove the views that killed processes left behind."""
    for folder in base.glob("view-*"):
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _remove(folder: Path, descriptor: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)
