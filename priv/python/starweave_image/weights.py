"""Where a model's files are, and loading them.

Only ids that stand in the catalog or in the configuration are ever looked up, so no request can name a path or
start a download by itself. What is loaded has passed `inspect` (layout.py).
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from . import devices, hub, wire
from .catalog import ModelCard, find, shipped
from .devices import Choice
from .errors import ImageError, is_out_of_memory
from .layout import INDEX, check_complete, inspect, read_json, read_layout, unfit
from .lease import Lease, take

_logger = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)?")


def embedded_folder(id: str) -> Path:
    """The folder of an embedded model: package data when installed, else the source tree's priv/models."""
    here = Path(__file__).parent
    name = id.replace("/", "-")
    packaged = here / "models" / name
    return packaged if packaged.is_dir() else here.parents[1] / "models" / name


@dataclass(frozen=True)
class Source:
    """A model's files: a folder with a diffusers layout that has passed `inspect`."""

    folder: Path
    revision: str | None
    lease: Lease | None = field(default=None, repr=False, compare=False)

    @property
    def bytes(self) -> int:
        """Of its weights, which is about what they take in memory."""
        return sum(self._parts().values())

    @property
    def largest(self) -> int:
        """Bytes of its largest network."""
        return max(self._parts().values(), default=0)

    def _parts(self) -> dict[str, int]:
        parts: dict[str, int] = {}
        for file in self.folder.glob("*/*.safetensors"):
            parts[file.parent.name] = parts.get(file.parent.name, 0) + file.stat().st_size
        return parts


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
        config = read_json(source.folder / "scheduler/scheduler_config.json") or {}
        return components["scheduler"][1], config

    def obtain(self, card: ModelCard) -> Source:
        """The model's files, downloaded where the configuration allows, and not deleted while the source or a pipeline
        of it lives; raises `model_not_found` or `model_load_failed`."""
        source = self._local(card)
        if source is not None:
            source = replace(source, lease=take(source.folder))
        elif self.presence(card) == "remote":
            source = _download(card.source, card.revision)
        else:
            raise self._missing(card)
        # With the lease in hand: what was found may have been deleted meanwhile.
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
            return unfit(card.id, "is not where it should be: its folder does not exist")
        if card.id in self._configured:
            return unfit(card.id, "is not on this machine, and offline mode forbids to download it")
        why = "is not on this machine; add it to the configured models to have it downloaded"
        return ImageError("model_not_found", f"{card.id} {why}", "model")

    def _local(self, card: ModelCard) -> Source | None:
        folder = self._folders.get(card.id)
        if folder is None and card.source == "embedded":
            folder = embedded_folder(card.id)
        if folder is not None:
            return Source(folder, None) if folder.is_dir() else None
        return cached((card.source, *card.aliases), card.revision)

    def _card(self, entry: wire.ModelEntry) -> ModelCard:
        try:
            known = find(entry.id, self._cards.values())
        except ImageError:
            known = _unread(entry.id)
        source = known.source if entry.path is None else "local"
        fallbacks = known.fallbacks if entry.fallbacks is None else tuple(entry.fallbacks)
        return msgspec.structs.replace(
            known, source=source, revision=entry.revision or known.revision, fallbacks=fallbacks
        )

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
    denoiser = read_json(folder / "unet/config.json") or read_json(folder / "transformer/config.json") or {}
    vae = read_json(folder / "vae/config.json") or {}
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


# The hub


def cached(repositories: Sequence[str], revision: str | None) -> Source | None:
    """A complete snapshot in the hub cache under any of these names: a rename is no reason to fetch again."""
    from huggingface_hub import try_to_load_from_cache

    for repository in repositories:
        if not _ID.fullmatch(repository):
            continue
        index = try_to_load_from_cache(repository, INDEX, revision=revision)
        if isinstance(index, str):
            folder = Path(index).parent
            try:
                check_complete(folder, read_layout(folder, repository), repository)
            except ImageError:
                continue
            return Source(folder, folder.name)
    return None


def _download(repository: str, revision: str | None, weights: bool = True) -> Source:
    """Fetch a model, or its configuration only."""
    plan = hub.plan(repository, revision)
    lease = take(plan.folder)
    if weights:
        _logger.info("downloading %s", repository)
    return Source(hub.fetch(plan, weights=weights), plan.revision, lease)


# Loading


def import_libraries() -> None:
    """Import what diffusers and transformers would import piece by piece, when it is first asked for: the classes of all
    families, for all tasks.

    So that the first request finds all of it, and because several threads that import at once, as loads and requests
    would, may see each other's modules half done.
    """
    import diffusers
    import PIL.Image

    for name in (
        "AutoPipelineForText2Image",
        "AutoPipelineForImage2Image",
        "AutoPipelineForInpainting",
        *{card.pipeline for card in shipped()},
        *(name for name in dir(diffusers) if name.endswith("Scheduler")),
    ):
        try:
            getattr(diffusers, name)
        except Exception:
            # Those that need it will fail, and say so.
            _logger.warning("%s cannot be imported", name, exc_info=True)
    PIL.Image.init()


def quiet_libraries() -> None:
    """No progress bars of diffusers and transformers, and no warnings at each load about what nothing here needs."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def load_pipeline(
    source: Source,
    id: str,
    choice: Choice,
    alone: Callable[[], AbstractContextManager[None]],
    offload: str = "auto",
    compiled: bool = False,
) -> Any:
    """The stock pipeline with its weights on the chosen device, or offloaded as `devices.placement` says; raises
    `model_load_failed`.

    What `alone` gives is held while a network is constructed: nothing may compute then.
    """
    import torch
    from diffusers import DiffusionPipeline

    dtype = getattr(torch, choice.dtype)
    how = devices.placement(offload, source.bytes, source.largest, choice.free_bytes())
    try:
        with _LOADING, _constructing(torch, alone):
            pipeline = DiffusionPipeline.from_pretrained(
                str(source.folder), dtype=dtype, use_safetensors=True, local_files_only=True
            )
        _place(pipeline, choice, how)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # What a damaged or mismatched folder raises is anything at all; the log has it.
        _logger.exception("loading %s failed", id)
        raise unfit(id, "could not be loaded: its files are damaged or do not belong together") from None
    # Copies of the pipeline share it.
    pipeline.lease = source.lease
    pipeline.set_progress_bar_config(disable=True)
    if choice.device.kind == "cpu" and choice.dtype == "bfloat16":
        for name in ("unet", "vae"):
            network = getattr(pipeline, name, None)
            # There is no such format for the weights of what sees in three dimensions, as Qwen-Image's decoder does.
            if network is not None and all(weight.ndim < 5 for weight in network.parameters()):
                network.to(memory_format=torch.channels_last)
    if compiled:
        _compile(pipeline, id)
    return pipeline


def _compile(pipeline: Any, id: str) -> None:
    """Compile the blocks that a denoiser repeats, each kind once, when it is first used."""
    import torch._dynamo

    # What cannot be compiled runs as it is.
    torch._dynamo.config.suppress_errors = True
    for name in ("unet", "transformer"):
        if (denoiser := getattr(pipeline, name, None)) is not None:
            try:
                denoiser.compile_repeated_blocks()
            except ValueError:
                _logger.warning("%s has no blocks that diffusers knows how to compile", id)


# Bytes that a decode takes for each byte of its last and widest layer, measured with the autoencoders of Stable Diffusion.
_DECODE_FACTOR = 8


def divide(
    pipeline: Any, attention: str, vae: str, device: devices.Device, weights: int, pixels: int
) -> dict[str, str]:
    """Have networks of a loaded pipeline of `weights` bytes work part by part, `attention` head by head and `vae` tile by
    tile, as asked or, with "auto", as `devices.division` says of a picture of so many pixels; what was done, by option.

    It changes bits, and the networks are everybody's: so it is for the whole of a model's life.
    """
    done: dict[str, str] = {}
    decoder = getattr(pipeline, "vae", None)
    whole = 0
    if decoder is not None:
        config = decoder.config
        widths = config.get("block_out_channels") or config.get("decoder_block_out_channels")
        width = widths[0] if widths else config.get("base_dim", 128)
        whole = _DECODE_FACTOR * pixels * width * decoder.dtype.itemsize
    sliced, tiled = devices.division(attention, vae, device, weights, whole)
    if sliced and any(hasattr(part, "set_attention_slice") for part in pipeline.components.values()):
        pipeline.enable_attention_slicing()
        done["attention"] = "sliced"
    if tiled and decoder is not None and hasattr(decoder, "enable_tiling"):
        try:
            decoder.enable_tiling()
            done["vae"] = "tiled"
        except NotImplementedError:
            pass
    if done:
        _logger.info("to save memory: %s", ", ".join(f"{option} {how}" for option, how in done.items()))
    return done


def _place(pipeline: Any, choice: Choice, how: str) -> None:
    if choice.device.kind == "cpu" or how == "none":
        pipeline.to(choice.device.id)
    elif how == "model":
        pipeline.enable_model_cpu_offload(device=choice.device.id)
    else:
        pipeline.enable_sequential_cpu_offload(device=choice.device.id)
    if how != "none" and choice.device.kind != "cpu":
        _logger.info("offloading by %s: the weights do not fit on the device at once", how)
    # In half precision this decoder overflows; its pipelines widen it for each decode, which others would see.
    if choice.dtype == "float16" and hasattr(pipeline, "upcast_vae") and pipeline.vae.config.force_upcast:
        pipeline.upcast_vae()


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
