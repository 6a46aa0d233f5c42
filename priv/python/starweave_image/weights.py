"""Where a model's files are, and whether they may be loaded.

Only ids that stand in the catalog or in the configuration are ever looked up, so no request can name a path or
start a download by itself. Only safetensors are read, and only classes of diffusers and transformers are made: a
folder with pickled weights or code of its own is refused before anything in it is opened.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from . import wire
from .catalog import ModelCard, find, shipped
from .devices import Choice
from .errors import ImageError, is_out_of_memory

_logger = logging.getLogger(__name__)

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# Without the name of a variant in it, which would have to be asked for.
_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)?")


def embedded_folder(id: str) -> Path:
    """The folder of an embedded model: package data when installed, else the source tree's priv/models."""
    here = Path(__file__).parent
    name = id.replace("/", "-")
    packaged = here / "models" / name
    return packaged if packaged.is_dir() else here.parents[1] / "models" / name


@dataclass(frozen=True)
class Layout:
    """What `model_index.json` says: the pipeline class, and the library and class of each component."""

    pipeline: str
    components: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A model's files: a folder with a diffusers layout that has passed `inspect`."""

    folder: Path
    revision: str | None

    @property
    def bytes(self) -> int:
        """Of its weights, which is about what they take in memory."""
        return sum(file.stat().st_size for file in self.folder.glob("*/*.safetensors"))


class Weights:
    """The models of this machine and of the configuration. All methods may be called from any thread."""

    def __init__(self, entries: Sequence[wire.ModelEntry], offline: bool) -> None:
        self._offline = offline
        self._lock = threading.Lock()
        self._cards = {card.id: card for card in shipped()}
        self._folders: dict[str, Path] = {}
        self._configured: set[str] = set()
        for entry in entries:
            if not _ID.fullmatch(entry.id):
                raise ImageError("unavailable", f"the configured model id {entry.id} is not a valid model id")
            card = self._card(entry)
            self._cards[card.id] = card
            if entry.path is None:
                self._configured.add(card.id)
            else:
                self._folders[card.id] = Path(entry.path).expanduser()

    def cards(self) -> list[ModelCard]:
        with self._lock:
            known = list(self._cards.values())
        return [self._described(card) for card in known]

    def card(self, name: str, fetch: bool = True) -> ModelCard:
        """The card of an id or alias, read from the model's own files where the catalog has none; with `fetch` these may
        come from the hub."""
        with self._lock:
            known = list(self._cards.values())
        return self._described(find(name, known), fetch)

    def presence(self, card: ModelCard) -> str:
        """`available` on this machine, `remote` when it may be downloaded, else `absent`."""
        if self._local(card) is not None:
            return "available"
        return "remote" if card.id in self._configured and not self._offline else "absent"

    def scheduler(self, card: ModelCard) -> tuple[str | None, dict[str, Any]]:
        """The class name of the model's scheduler and what it is made with, where the files are on this machine and sound;
        never asks the hub."""
        source = self._local(card)
        try:
            components = read_layout(source.folder, card.id).components if source else {}
        except ImageError:
            components = {}
        if source is None or "scheduler" not in components:
            return None, {}
        config = _read_json(source.folder / "scheduler/scheduler_config.json") or {}
        return components["scheduler"][1], config

    def obtain(self, card: ModelCard) -> Source:
        """The model's files, downloaded where the configuration allows; raises `model_not_found` or
        `model_load_failed`."""
        source = self._local(card)
        if source is None and self.presence(card) == "remote":
            source = _download(card.source, card.revision)
        if source is None:
            raise self._missing(card)
        inspect(source.folder, card.id)
        return source

    def check_folder(self, card: ModelCard) -> None:
        """Raise `model_load_failed` for a model of a folder of its own that is not there or is no model. Cheap: the
        weights are not looked at."""
        if card.source in ("local", "embedded"):
            self.require(card)
            source = self._local(card)
            assert source is not None
            read_layout(source.folder, card.id)

    def require(self, card: ModelCard) -> None:
        """Raise what `obtain` would raise at once for a model that is neither here nor to be had."""
        if self.presence(card) == "absent":
            raise self._missing(card)

    def _missing(self, card: ModelCard) -> ImageError:
        if card.id in self._folders or card.source == "embedded":
            return _unfit(card.id, "is not where it should be: its folder does not exist")
        if card.id in self._configured:
            return _unfit(card.id, "is not on this machine, and offline mode forbids to download it")
        why = "is not on this machine; add it to the configured models to have it downloaded"
        return ImageError("model_not_found", f"{card.id} {why}", "model")

    def _local(self, card: ModelCard) -> Source | None:
        folder = self._folders.get(card.id)
        if folder is None and card.source == "embedded":
            folder = embedded_folder(card.id)
        if folder is not None:
            return Source(folder, None) if folder.is_dir() else None
        return _cached((card.source, *card.aliases), card.revision)

    def _card(self, entry: wire.ModelEntry) -> ModelCard:
        try:
            known = find(entry.id, self._cards.values())
        except ImageError:
            known = _unread(entry.id)
        source = known.source if entry.path is None else "local"
        return msgspec.structs.replace(known, source=source, revision=entry.revision or known.revision)

    def _described(self, card: ModelCard, fetch: bool = False) -> ModelCard:
        """A card that was not read yet, read now if its files are here or may be fetched; else a later call tries."""
        if card.pipeline:
            return card
        source = self._local(card)
        if source is None and fetch and self.presence(card) == "remote":
            source = _download(card.source, card.revision, weights=False)
        if source is None:
            return card
        try:
            card = _describe(card, source.folder)
        except ImageError:
            return card
        with self._lock:
            self._cards[card.id] = card
        return card


def _unread(id: str) -> ModelCard:
    return ModelCard(
        id=id,
        name=id.rpartition("/")[2],
        description="A model of the configuration.",
        pipeline="",
        source=id,
        licence="unknown",
        defaults=wire.Defaults(width=512, height=512, steps=30, guidance_scale=5.0),
        limits=wire.Limits(
            min_size=64,
            max_size=2048,
            multiple_of=8,
            max_steps=200,
            max_pixels=2048 * 2048,
            max_guidance=50.0,
        ),
        memory_bytes=0,
    )


def _describe(card: ModelCard, folder: Path) -> ModelCard:
    """Fill a card from the model's own files: its native size, what sizes are a multiple of, its bytes."""
    layout = read_layout(folder, card.id)
    denoiser = _read_json(folder / "unet/config.json") or _read_json(folder / "transformer/config.json") or {}
    vae = _read_json(folder / "vae/config.json") or {}
    blocks = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    scale = 2 ** (len(blocks) - 1) if isinstance(blocks, list) else 8
    sample = denoiser.get("sample_size")
    if isinstance(sample, list):
        sample = sample[0]
    convolutional = "unet" in layout.components
    if not isinstance(sample, int):
        sample = 512 // scale if convolutional else 1024 // scale
    # Transformers cut the latents into patches, 2 by 2 in all families so far that do not say.
    patch = 1 if convolutional else denoiser.get("patch_size", 2)
    multiple = max(8, scale * (patch if isinstance(patch, int) and patch > 1 else 1 if convolutional else 2))
    size = min(max(64, sample * scale // multiple * multiple), 2048)
    longest = min(2 * size, 4096)
    return msgspec.structs.replace(
        card,
        pipeline=layout.pipeline,
        defaults=wire.Defaults(
            width=size, height=size, steps=30, guidance_scale=7.5 if convolutional else 4.5
        ),
        limits=wire.Limits(
            min_size=64,
            max_size=longest,
            multiple_of=multiple,
            max_steps=200,
            max_pixels=longest * longest,
            max_guidance=50.0,
        ),
        memory_bytes=Source(folder, None).bytes,
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


# What may be loaded


def read_layout(folder: Path, id: str) -> Layout:
    """The layout of a folder; raises `model_load_failed` where it is none of diffusers or brings code."""
    index = _read_json(folder / "model_index.json")
    if index is None:
        raise _unfit(id, "has no readable model_index.json, so it is not a model in diffusers layout")
    return _parse_layout(index, id)


def _parse_layout(index: dict[str, Any], id: str) -> Layout:
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or not pipeline.isidentifier():
        # A list of two names is diffusers' form for a pipeline with code of its own.
        raise _unfit(id, "needs a pipeline with code of its own, which is never run")
    components: dict[str, tuple[str, str]] = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or value[:2] == [None, None]:
            continue
        if (
            not all(isinstance(word, str) and word.isidentifier() for word in (name, *value))
            or len(value) != 2
        ):
            raise _unfit(id, f"has a {name} with code of its own, which is never run")
        components[name] = (value[0], value[1])
    return Layout(pipeline, components)


def inspect(folder: Path, id: str) -> None:
    """Refuse what may not be loaded or is not all there; raises `model_load_failed`. Imports diffusers."""
    layout = read_layout(folder, id)
    _check_classes(layout, id)
    for name in layout.components:
        _check_pickles(id, name, [file.name for file in (folder / name).glob("*")])
    _check_complete(folder, layout, id)


def _check_classes(layout: Layout, id: str) -> None:
    import diffusers
    import diffusers.pipelines
    import transformers

    pipeline = getattr(diffusers, layout.pipeline, None)
    if not (isinstance(pipeline, type) and issubclass(pipeline, diffusers.DiffusionPipeline)):
        raise _unfit(id, f"needs the pipeline {layout.pipeline}, which the installed diffusers does not have")
    for name, (library, kind) in layout.components.items():
        # Parts that belong to one pipeline family, such as its safety checker, name that family's module.
        home = {"diffusers": diffusers, "transformers": transformers}.get(library) or getattr(
            diffusers.pipelines, library, None
        )
        if not isinstance(getattr(home, kind, None), type):
            raise _unfit(id, f"has a {name} that is no class of diffusers or transformers, and is never run")


def _check_pickles(id: str, name: str, files: Sequence[str]) -> None:
    pickled = any(file.endswith(_PICKLES) for file in files)
    if pickled and not any(file.endswith(".safetensors") for file in files):
        raise _unfit(id, f"has its {name} as pickled weights only; only safetensors are loaded")


def _check_complete(folder: Path, layout: Layout, id: str) -> None:
    for name in layout.components:
        part = folder / name
        names = {file.name for file in part.glob("*")}
        shards = {
            str(shard)
            for index in part.glob("*.safetensors.index.json")
            for shard in (_read_json(index) or {}).get("weight_map", {}).values()
        }
        # What has a config.json is a network, and needs weights; the rest are tokenizers, schedulers and the like.
        weights = "config.json" not in names or any(map(_WEIGHTS.fullmatch, names))
        if not names or not weights or not shards <= names:
            raise _unfit(id, f"is incomplete: its {name} is missing or lacks files")
        if not all(shard.endswith(".safetensors") for shard in shards):
            raise _unfit(id, f"has its {name} in files that are not safetensors")


def _unfit(id: str, why: str) -> ImageError:
    return ImageError("model_load_failed", f"{id} {why}")


# The hub


def _cached(repositories: Sequence[str], revision: str | None) -> Source | None:
    """A complete snapshot in the hub cache under any of these names: a rename is no reason to fetch again."""
    from huggingface_hub import try_to_load_from_cache

    for repository in repositories:
        if not _ID.fullmatch(repository):
            continue
        index = try_to_load_from_cache(repository, "model_index.json", revision=revision)
        if isinstance(index, str):
            folder = Path(index).parent
            try:
                _check_complete(folder, read_layout(folder, repository), repository)
            except ImageError:
                continue
            return Source(folder, folder.name)
    return None


def _download(repository: str, revision: str | None, weights: bool = True) -> Source:
    """Fetch a model, or its configuration only. What would be refused is refused before its weights travel."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        info = HfApi().model_info(repository, revision=revision)
        # By the name that was asked for, which the hub's cache then remembers for a start without the hub.
        index = Path(hf_hub_download(repository, "model_index.json", revision=revision))
        layout = read_layout(index.parent, repository)
        _check_classes(layout, repository)
        names = [sibling.rfilename for sibling in info.siblings or []]
        for name in layout.components:
            _check_pickles(repository, name, [file for file in names if file.startswith(f"{name}/")])
        if weights:
            _logger.info("downloading %s", repository)
            folder = DiffusionPipeline.download(repository, revision=info.sha, use_safetensors=True)
        else:
            folder = snapshot_download(repository, revision=info.sha, allow_patterns="*/*config.json")
    except ImageError:
        raise
    except Exception as error:
        _logger.warning("download of %s failed", repository, exc_info=True)
        raise hub_error(repository, error) from None
    return Source(Path(folder), info.sha)


def hub_error(repository: str, error: Exception) -> ImageError:
    """One sentence that a person can act on for what went wrong with the hub."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        why = "asks for consent on its hub page first; give it there and set HF_TOKEN"
        return ImageError("model_load_failed", f"{repository} {why}")
    if isinstance(error, errors.RevisionNotFoundError):
        return ImageError("model_not_found", f"{repository} has no such revision on the hub", "model")
    if isinstance(
        error, (errors.RepositoryNotFoundError, errors.HFValidationError, errors.DisabledRepoError)
    ):
        why = "is not on the hub, or is private and HF_TOKEN does not open it"
        return ImageError("model_not_found", f"{repository} {why}", "model")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return _unfit(repository, "has no model_index.json, so it is not a model in diffusers layout")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ImageError("model_load_failed", f"there is no space left on the disk to download {repository}")
    return ImageError(
        "model_load_failed",
        f"{repository} could not be downloaded: the hub cannot be reached",
        retryable=True,
    )


# Loading


def quiet_libraries() -> None:
    """No progress bars of diffusers and transformers, and no warnings at each load about what nothing here needs."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def load_pipeline(
    source: Source, id: str, choice: Choice, alone: Callable[[], AbstractContextManager[None]]
) -> Any:
    """The stock pipeline with its weights on the chosen device; raises `model_load_failed`.

    What `alone` gives is held while a network is constructed: nothing may compute then.
    """
    import torch
    from diffusers import DiffusionPipeline

    dtype = getattr(torch, choice.dtype)
    try:
        with _LOADING, _constructing(torch, alone):
            pipeline = DiffusionPipeline.from_pretrained(
                str(source.folder), dtype=dtype, use_safetensors=True, local_files_only=True
            )
        pipeline.to(choice.device.id)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # What a damaged or mismatched folder raises is anything at all; the log has it.
        _logger.exception("loading %s failed", id)
        raise _unfit(id, "could not be loaded: its files are damaged or do not belong together") from None
    pipeline.set_progress_bar_config(disable=True)
    if choice.device.kind == "cpu" and choice.dtype == "bfloat16":
        for name in ("unet", "vae"):
            network = getattr(pipeline, name, None)
            # There is no such format for the weights of what sees in three dimensions, as Qwen-Image's decoder does.
            if network is not None and all(weight.ndim < 5 for weight in network.parameters()):
                network.to(memory_format=torch.channels_last)
    return pipeline


# accelerate swaps a method of torch.nn.Module while it loads: two loads that overlap leave the wrong one behind.
_LOADING = threading.Lock()


@contextmanager
def _constructing(torch: Any, alone: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Hold what `alone` gives whenever the calling thread has changed torch's default dtype.

    The libraries do so while they construct a network, for the whole process: a scheduler that works at that moment
    would compute in the wrong precision. And a construction that fails leaves the default changed.
    """
    original, usual = torch.set_default_dtype, torch.get_default_dtype()
    loader = threading.get_ident()
    with ExitStack() as held:

        def set_default_dtype(dtype: Any) -> None:
            if threading.get_ident() == loader and dtype != torch.get_default_dtype() == usual:
                held.enter_context(alone())
            original(dtype)
            if threading.get_ident() == loader and dtype == usual:
                held.close()

        torch.set_default_dtype = set_default_dtype
        try:
            yield
        finally:
            torch.set_default_dtype = original
            original(usual)


def checksum(folder: Path) -> str:
    """SHA-256 over the names and contents of the weight files: tells two local models with one name apart."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*/*.safetensors")):
        digest.update(f"{file.parent.name}/{file.name}\0".encode())
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
