"""Where a model's files are, and what they say about it.

Only ids in the catalog or the configuration are looked up, so no request can name a path or start a download by itself.
Files that are loaded have passed `screen` (screening.py).
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from .. import schema
from ..errors import ImageError
from . import hub, outside
from .catalog import ModelCard, State, find, shipped
from .layout import INDEX, check_complete, read_layout, unfit
from .lease import Lease, take
from .outside import Unreadable
from .screening import Network, Offered, Screened, screen, survey

_logger = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)?")
_COMMIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def embedded_folder(id: str) -> Path:
    """The folder of an embedded model: package data when installed, else the source tree's priv/models."""
    here = Path(__file__).parents[1]
    name = id.replace("/", "-")
    packaged = here / "models" / name
    return packaged if packaged.is_dir() else here.parents[1] / "models" / name


@dataclass(frozen=True)
class Source:
    """A model's files, which have passed `screen`, and its `revision` if it is from the hub."""

    folder: Path
    revision: str | None
    screened: Screened = field(repr=False, compare=False)
    lease: Lease | None = field(default=None, repr=False, compare=False)

    @property
    def bytes(self) -> int:
        """The size of its weights, about what they take in memory."""
        return sum(self._parts().values())

    @property
    def largest(self) -> int:
        """Bytes of its largest network."""
        return max(self._parts().values(), default=0)

    def _parts(self) -> dict[str, int]:
        parts: dict[str, int] = {}
        for name, file in self.screened.weights.items():
            part = name.partition("/")[0]
            parts[part] = parts.get(part, 0) + file.stat().st_size
        return parts


@dataclass(frozen=True)
class Place:
    """A folder that a model is in, and its revision on the hub."""

    folder: Path
    revision: str | None


class Weights:
    """The models of this machine and of the configuration. All methods may be called from any thread."""

    def __init__(
        self,
        entries: Sequence[schema.ModelEntry],
        offline: bool,
        offered: Offered,
        make_room: Callable[[hub.Plan], None] = lambda plan: None,
    ) -> None:
        """`offered` tells the tasks of a model; `make_room` is called before the weights of one travel."""
        self._offline = offline
        self._offered = offered
        self._make_room = make_room
        self._lock = threading.Lock()
        self._cards = {card.id: card for card in shipped()}
        self._folders: dict[str, Path] = {}
        self._pins: dict[str, dict[str, str]] = {}
        self._configured: set[str] = set()
        # Whose card has been read from their own files.
        self._read: set[str] = set()
        for entry in entries:
            if not _ID.fullmatch(entry.id):
                raise ImageError("unavailable", f"the configured model id {entry.id} is not a valid model id")
            card = self._card(entry)
            self._cards[card.id] = card
            self._pins[card.id] = entry.sha256 or {}
            if entry.path is None:
                self._configured.add(card.id)
            else:
                self._folders[card.id] = _expanded(entry.path)

    def cards(self) -> list[ModelCard]:
        with self._lock:
            known = list(self._cards.values())
        return [self._described(card) for card in known]

    def card(self, name: str, fetch: bool = True) -> ModelCard:
        """The card of an id or alias. If the catalog has none, it is read from the model's own files; with `fetch` these may
        come from the hub, and faults in them are raised."""
        with self._lock:
            known = list(self._cards.values())
        return self._described(find(name, known), fetch)

    def state(self, card: ModelCard) -> tuple[State, str | None]:
        """`available` on this machine; `failed` with the reason if the files here cannot be used; `remote` if it may be
        downloaded; else `absent`."""
        try:
            return ("available" if self._find(card) else self._elsewhere(card)), None
        except ImageError as error:
            return "failed", error.message

    def scheduler(self, card: ModelCard) -> tuple[str | None, dict[str, Any]]:
        """The class name of the model's scheduler and its configuration, if the files are on this machine and sound; never
        asks the hub."""
        try:
            place = self._find(card)
            components = read_layout(place.folder, card.id).components if place else {}
            if place is None or "scheduler" not in components:
                return None, {}
            config = outside.read_json(place.folder / "scheduler/scheduler_config.json", dict[str, Any])
        except (ImageError, Unreadable):
            return None, {}
        return components["scheduler"][1], config

    def obtain(self, card: ModelCard) -> Source:
        """The model's files, downloaded where the configuration allows, and not deleted while the source or a pipeline
        of it lives; raises `model_not_found` or `model_load_failed`."""
        place = self._find(card)
        if place is not None:
            lease = take(place.folder)
        elif self._elsewhere(card) == "remote":
            place, lease = self._download(card)
        else:
            raise self._missing(card)
        # With the lease in hand: what was found may have been deleted meanwhile.
        return Source(place.folder, place.revision, screen(place.folder, card.id, self._offered), lease)

    def pins(self, card: ModelCard) -> dict[str, str]:
        """The configured SHA-256 of weight files, by their names within the model."""
        return self._pins.get(card.id, {})

    def require(self, card: ModelCard) -> None:
        """Raise what `obtain` would raise at once, for a model that is neither usable here nor may be downloaded."""
        if self._find(card) is None and self._elsewhere(card) == "absent":
            raise self._missing(card)

    def _missing(self, card: ModelCard) -> ImageError:
        if card.id in self._folders or card.source == "embedded":
            return unfit(card.id, "is not where it should be: its folder does not exist")
        if card.id in self._configured:
            return unfit(card.id, "is not on this machine, and offline mode forbids to download it")
        why = "is not on this machine; add it to the configured models to have it downloaded"
        return ImageError("model_not_found", f"{card.id} {why}", "model")

    def _elsewhere(self, card: ModelCard) -> State:
        return "remote" if card.id in self._configured and not self._offline else "absent"

    def _download(self, card: ModelCard, weights: bool = True) -> tuple[Place, Lease | None]:
        """Fetch a model, or its configuration only."""
        plan = hub.plan(card.source, card.revision)
        lease = take(plan.folder)
        if weights:
            self._make_room(plan)
            _logger.info("downloading %s", card.source)
        return Place(hub.fetch(plan, weights=weights), plan.revision), lease

    def _find(self, card: ModelCard) -> Place | None:
        """Where the model is on this machine, checked without its weights; raises `model_load_failed` for one that cannot be
        used and that no download would repair. Nothing else is raised, whatever its files hold."""
        folder = self._folders.get(card.id)
        if folder is None and card.source == "embedded":
            folder = embedded_folder(card.id)
        try:
            if folder is None:
                return self._find_cached(card)
            if not os.path.isdir(folder):
                if os.path.lexists(folder):
                    raise unfit(
                        card.id, "is no folder, or a link to nothing: a model is a folder in diffusers layout"
                    )
                return None
            if card.source == "embedded":
                # What is ours needs no look by the libraries, which may not be imported yet.
                check_complete(folder, read_layout(folder, card.id), card.id)
            else:
                survey(folder, card.id, self._offered)
            return Place(folder, None)
        except ImageError:
            raise
        except Exception:
            # No model keeps the others from being told.
            _logger.exception("looking at the files of %s failed", card.id)
            raise unfit(card.id, "cannot be used: its files could not be looked at") from None

    def _find_cached(self, card: ModelCard) -> Place | None:
        faults: list[ImageError] = []
        for repository in (card.source, *card.aliases):
            folder = snapshot_folder(repository, card.revision)
            if folder is None:
                continue
            try:
                check_complete(folder, read_layout(folder, card.id), card.id)
            except ImageError as error:
                faults.append(error)
                continue
            return Place(folder, folder.name)
        # What is not all there is fetched, if it may be; what is there and is wrong stays so.
        if faults and self._elsewhere(card) == "absent":
            raise faults[0]
        return None

    def _card(self, entry: schema.ModelEntry) -> ModelCard:
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
        """A card completed from the model's own files, if the catalog does not know the model or it has a folder of its own;
        read as soon as the files are here or may be fetched."""
        with self._lock:
            if card.id in self._read or (card.pipeline and card.source != "local"):
                return card
        try:
            place = self._find(card)
            if place is None and fetch and self._elsewhere(card) == "remote":
                place, _ = self._download(card, weights=False)
                card = describe(card, place.folder, self._offered, whole=False)
            elif place is not None:
                card = describe(card, place.folder, self._offered)
            else:
                return card
        except ImageError:
            if fetch:
                raise
            # Whoever asks for it is told why.
            return card
        except Exception:
            _logger.exception("reading the card of %s failed", card.id)
            return card
        with self._lock:
            self._cards[card.id] = card
            self._read.add(card.id)
        return card


def _unread(id: str) -> ModelCard:
    return ModelCard(
        id=id,
        name=id.rpartition("/")[2],
        description="A model of the configuration.",
        pipeline="",
        source=id,
        licence="unknown",
        tasks=(),
        defaults=schema.Defaults(width=512, height=512, steps=30, guidance_scale=5.0),
        limits=schema.Limits(
            min_size=64,
            max_size=2048,
            multiple_of=8,
            max_steps=200,
            max_pixels=2048 * 2048,
            max_guidance=50.0,
        ),
        memory_bytes=0,
    )


def describe(card: ModelCard, folder: Path, offered: Offered, whole: bool = True) -> ModelCard:
    """Fill a card from the model's own files: its tasks, native size, the multiple for sizes, its bytes. A model in the
    catalog keeps its settings. Raises `model_load_failed`."""
    found = survey(folder, card.id, offered, whole)
    held = sum(os.path.getsize(folder / file) for file in found.weights)
    known = msgspec.structs.replace(
        card, pipeline=found.kind.__name__, tasks=found.tasks, memory_bytes=held or card.memory_bytes
    )
    if card.pipeline:
        return known
    denoiser = found.networks.get("unet") or found.networks.get("transformer") or Network()
    vae = found.networks.get("vae") or Network()
    blocks = vae.block_out_channels or vae.encoder_block_out_channels
    scale = 2 ** (len(blocks) - 1) if blocks else 8
    sample = denoiser.sample_size
    if isinstance(sample, list):
        sample = sample[0] if sample else None
    convolutional = "unet" in found.layout.components
    if sample is None:
        sample = 512 // scale if convolutional else 1024 // scale
    # Transformers cut the latents into patches, 2 by 2 in all families so far that do not say.
    patch = denoiser.patch_size if isinstance(denoiser.patch_size, int) and denoiser.patch_size > 1 else 2
    multiple = max(8, scale * (1 if convolutional else patch))
    size = min(max(64, sample * scale // multiple * multiple), 2048)
    longest = min(2 * size, 4096)
    return msgspec.structs.replace(
        known,
        defaults=schema.Defaults(
            width=size, height=size, steps=30, guidance_scale=7.5 if convolutional else 4.5
        ),
        limits=schema.Limits(
            min_size=64,
            max_size=longest,
            multiple_of=multiple,
            max_steps=200,
            max_pixels=longest * longest,
            max_guidance=50.0,
        ),
    )


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        # Nobody's home is known here.
        return Path(path)


# The hub


def snapshot_folder(repository: str, revision: str | None) -> Path | None:
    """The folder of a repository's revision, by default that of `main`, in the hub's cache; None if it has no index
    there."""
    if not _ID.fullmatch(repository):
        return None
    folder = hub.repository_folder(repository)
    commit = revision or "main"
    try:
        # What a branch or tag stands for; a commit stands for itself.
        commit = outside.read_bytes(folder / "refs" / commit, 1024).decode("ascii", "replace").strip()
    except Unreadable:
        pass
    if not _COMMIT.fullmatch(commit):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if os.path.lexists(snapshot / INDEX) else None


def cached(repositories: Sequence[str], revision: str | None) -> Place | None:
    """A complete snapshot in the hub cache under any of these names: a rename is no reason to fetch again."""
    for repository in repositories:
        folder = snapshot_folder(repository, revision)
        if folder is None:
            continue
        try:
            check_complete(folder, read_layout(folder, repository), repository)
        except ImageError:
            continue
        return Place(folder, folder.name)
    return None
