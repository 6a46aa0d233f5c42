"""The models in the hub's cache: which there are, whether they are intact, and deleting them.

The cache belongs to all tools of Hugging Face. What is in it besides models in diffusers layout is neither shown nor
counted nor deleted; and a model that a process of this library has loaded is not deleted (lease.py).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import stat
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ImageError
from . import lease, outside
from .catalog import ModelCard, shipped
from .hub import cache_folder, content_name, stated_licence
from .layout import INDEX, check_complete, read_layout

_logger = logging.getLogger(__name__)

ABANDONED_S = 24 * 3600.0
"""A download that received nothing for this many seconds counts as abandoned."""


@dataclass(frozen=True)
class Snapshot:
    """One revision of a model. `blobs` are its files' contents, which other revisions may share, and their bytes;
    `used` is when it was last loaded or fetched, in seconds since 1970."""

    repository: str
    revision: str
    folder: Path
    complete: bool
    blobs: dict[Path, int]
    used: float

    @property
    def bytes(self) -> int:
        return sum(self.blobs.values())

    @property
    def repository_folder(self) -> Path:
        return self.folder.parents[1]

    @property
    def in_use(self) -> bool:
        return lease.in_use(self.folder)


class InUse(ImageError):
    def __init__(self, id: str) -> None:
        why = "is in use and cannot be deleted now: end the process that has it loaded, or unload it there"
        super().__init__("invalid_request", f"{id} {why}", "model")


@dataclass(frozen=True)
class Damage:
    """A file with wrong content; `unchecked` if the cache has no checksum of it."""

    name: str
    state: Literal["missing", "damaged", "unchecked"]


def known(name: str) -> ModelCard | None:
    """The card that ships with the package for an id, an alias or a hub id."""
    return next((card for card in shipped() if name in (card.id, card.source, *card.aliases)), None)


def names(model: str) -> set[str]:
    """All hub ids that the model of an id or alias may have in the cache."""
    card = known(model)
    return {model, card.id, card.source, *card.aliases} if card else {model}


def snapshots(model: str | None = None, revision: str | None = None) -> list[Snapshot]:
    """The snapshots of one model, or of all, whose revision begins with `revision`; the longest unused come first."""
    repositories = names(model) if model else None
    found = [
        _read(folder)
        for folder in cache_folder().glob("models--*/snapshots/*")
        # The first file of a download, which even a broken one leaves.
        if os.path.lexists(folder / INDEX)
    ]
    return sorted(
        (
            snapshot
            for snapshot in found
            if (repositories is None or snapshot.repository in repositories)
            and snapshot.revision.startswith(revision or "")
        ),
        key=lambda snapshot: (snapshot.used, snapshot.repository),
    )


def partials(of: Iterable[Snapshot]) -> dict[Path, int]:
    """The incomplete files of broken downloads of these models, and their sizes in bytes."""
    folders = {snapshot.repository_folder / "blobs" for snapshot in of}
    parts = (path for folder in folders for path in folder.glob("*.incomplete"))
    return {path: found.st_size for path in parts for _, found in _content(path)}


def verify(snapshot: Snapshot) -> list[Damage]:
    """What is wrong with a snapshot's files, by their checksums.

    The cache calls a content by its checksum; on systems without symbolic links it does not.
    """
    found = []
    for file in _files(snapshot.folder):
        name = file.relative_to(snapshot.folder).as_posix()
        blob = _blob(file)
        if not os.path.isfile(file):
            found.append(Damage(name, "missing"))
        elif len(blob.name) not in (40, 64):
            found.append(Damage(name, "unchecked"))
        elif content_name(blob, blob.name) != blob.name:
            found.append(Damage(name, "damaged"))
    return found


def remove(snapshot: Snapshot) -> None:
    """Delete a revision, and those of its files that no other one shares.

    Raises `InUse`, and `internal` where the cache cannot be written.
    """
    from huggingface_hub import scan_cache_dir

    id = snapshot.repository
    try:
        with lease.alone(snapshot.folder) as free:
            if not free:
                raise InUse(id)
            # A dangling link would hide the whole repository from the scan.
            for file in _files(snapshot.folder):
                if not os.path.exists(file):
                    file.unlink()
            info = scan_cache_dir(cache_folder())
            # Only of this repository: a renamed one has the same revisions under both names.
            path = snapshot.repository_folder.resolve()
            repositories = frozenset(repo for repo in info.repos if repo.repo_path == path)
            dataclasses.replace(info, repos=repositories).delete_revisions(snapshot.revision).execute()
    except OSError as error:
        _logger.warning("deleting %s failed", snapshot.folder, exc_info=error)
    if snapshot.folder.exists():
        raise ImageError("internal", f"{id} could not be deleted: the cache cannot be written or is damaged")


def licence_in(folder: Path) -> str:
    """The licence in the model's own card, or `unknown`."""
    from huggingface_hub import ModelCard as Readme

    try:
        text = outside.read_bytes(folder / "README.md").decode("utf-8", "replace")
        return stated_licence(Readme(text, ignore_metadata_errors=True).data)
    except Exception:
        # There is no card, or it is malformed.
        return "unknown"


@dataclass(frozen=True)
class Pruning:
    """What was deleted, or would be: whole revisions and incomplete files; and how many bytes remain."""

    snapshots: list[Snapshot]
    partials: list[Path]
    before: int
    after: int


def prune(
    quota: int | None, keep: Collection[str] = (), dry_run: bool = False, most: int | None = None
) -> Pruning:
    """Delete the longest unused models until at most `quota` bytes are taken, and there are at most `most` models.

    First go the beginnings of abandoned downloads, whatever the quota. Models in use and those in `keep`, by id or
    alias, stay, even where that is more than the quota. With `dry_run` nothing is deleted.
    """
    left = snapshots()
    started = partials(left)

    def total() -> int:
        folders = {snapshot.repository_folder for snapshot in left}
        return taken(left) + sum(size for path, size in started.items() if path.parents[1] in folders)

    before = total()
    now = time.time()
    abandoned = [
        path for path in started for _, found in _content(path) if now - found.st_mtime > ABANDONED_S
    ]
    for path in abandoned:
        if not dry_run:
            path.unlink(missing_ok=True)
        del started[path]
    kept = {name for model in keep for name in names(model)}
    gone = []
    for snapshot in list(left):
        models = len({snapshot.repository for snapshot in left})
        if (quota is None or total() <= quota) and (most is None or models <= most):
            break
        if snapshot.repository in kept or snapshot.in_use:
            continue
        if not dry_run:
            try:
                remove(snapshot)
            except InUse:
                continue
        left.remove(snapshot)
        gone.append(snapshot)
    return Pruning(gone, abandoned, before, total())


def taken(of: Iterable[Snapshot]) -> int:
    """How many bytes the snapshots take together; shared files count once."""
    return sum({blob: size for snapshot in of for blob, size in snapshot.blobs.items()}.values())


def _read(folder: Path) -> Snapshot:
    repository = folder.parents[1].name.removeprefix("models--").replace("--", "/")
    files = _files(folder)
    blobs = {blob: found for file in files for blob, found in _content(file)}
    used = lease.last_used(folder)
    if used is None:
        used = max((found.st_mtime for found in blobs.values()), default=0.0)
    try:
        check_complete(folder, read_layout(folder, repository), repository)
        complete = len(blobs) > 0 and all(map(os.path.isfile, files))
    except ImageError:
        complete = False
    return Snapshot(
        repository,
        folder.name,
        folder,
        complete,
        {blob: found.st_size for blob, found in blobs.items()},
        used,
    )


def _content(file: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The blob of a file, with its stat; empty for anything but a regular file, and for one that was just deleted."""
    with suppress(OSError):
        found = file.stat()
        if stat.S_ISREG(found.st_mode):
            yield _blob(file), found


def _files(folder: Path) -> list[Path]:
    places = ((place, name) for place, _, names in os.walk(folder) for name in names)
    return sorted(Path(place, name) for place, name in places)


def _blob(file: Path) -> Path:
    # Only the first link is followed: the blob may be a link itself, into a store that several repositories share.
    return Path(os.path.abspath(file.parent / file.readlink())) if file.is_symlink() else file
