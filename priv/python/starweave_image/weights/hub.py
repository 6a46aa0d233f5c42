"""The hub: which files a model there has, and how they are fetched into the cache that all tools of the hub share.

A model that would be refused is refused before its weights are fetched, and only files that are loaded are fetched. The
cache has huggingface_hub's layout and links. Large files are received here, because huggingface_hub keeps nothing of a
download that ends with its process.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ImageError
from .layout import INDEX, check_names, parts_of, read_layout, unfit, wanted
from .lease import take

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class File:
    """A file of a repository: its size in bytes, and the cache's name for its content, which is the SHA-256 of a large file
    and git's SHA-1 of another; empty if the hub did not tell."""

    name: str
    size: int
    blob: str

    @property
    def large(self) -> bool:
        return re.fullmatch("[0-9a-f]{64}", self.blob) is not None


Report = Callable[[File, int], None]
"""Is called with a file and how many bytes of it are here."""


@dataclass(frozen=True)
class Plan:
    """The files of a model to fetch. `revision` is the commit that `asked`, a branch or a tag, means now."""

    repository: str
    asked: str | None
    revision: str
    licence: str
    gated: bool
    files: tuple[File, ...]

    @property
    def folder(self) -> Path:
        return repository_folder(self.repository) / "snapshots" / self.revision

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def missing(self) -> list[File]:
        return [file for file in self.files if not os.path.isfile(self.folder / file.name)]

    @property
    def bytes_missing(self) -> int:
        """The bytes that no earlier download has fetched."""
        return sum(file.size - self.bytes_here(file) for file in self.missing)

    def bytes_here(self, file: File) -> int:
        blob = self.blob(file)
        for path in (blob, partial(blob)):
            if file.blob and os.path.isfile(path):
                return min(path.stat().st_size, file.size)
        return 0

    def blob(self, file: File) -> Path:
        return repository_folder(self.repository) / "blobs" / file.blob


def cache_folder() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def repository_folder(repository: str) -> Path:
    return cache_folder() / f"models--{repository.replace('/', '--')}"


def partial(blob: Path) -> Path:
    """The file in which a blob is received."""
    return blob.with_name(f"{blob.name}.incomplete")


def plan(repository: str, revision: str | None = None) -> Plan:
    """Ask the hub which files a model has, and refuse a model that may not be loaded. Leaves nothing in the cache.

    Raises `model_not_found` or `model_load_failed`.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        assert info.sha is not None
        with tempfile.TemporaryDirectory() as scratch:
            hf_hub_download(repository, INDEX, revision=info.sha, local_dir=scratch)
            layout = read_layout(Path(scratch), repository)
    except ImageError:
        raise
    except Exception as error:
        raise hub_error(repository, error) from None
    siblings = info.siblings or []
    check_names(layout, repository)
    names = [sibling.rfilename for sibling in siblings]
    needed = wanted(layout, parts_of(layout, names, repository), names)
    files = [
        File(
            sibling.rfilename,
            (sibling.lfs.size if sibling.lfs else sibling.size) or 0,
            (sibling.lfs.sha256 if sibling.lfs else sibling.blob_id) or "",
        )
        for sibling in siblings
        if sibling.rfilename in needed
    ]
    return Plan(
        repository, revision, info.sha, stated_licence(info.card_data), bool(info.gated), tuple(files)
    )


def stated_licence(card: Any) -> str:
    """The licence by the metadata of a model's card, a mapping or None; else `unknown`."""
    stated = card or {}
    licence = stated.get("license_name") if stated.get("license") == "other" else stated.get("license")
    words = licence if isinstance(licence, list) else [licence]
    # A model's card is written by anybody, in YAML, and may hold any value.
    said = ", ".join(word for word in words if isinstance(word, str) and word.isprintable())
    return said[:200] or "unknown"


def fetch(
    plan: Plan, *, weights: bool = True, again: Collection[str] = (), report: Report = lambda file, size: None
) -> Path:
    """Fetch what is missing, or only the configuration of the components. Returns the folder of the snapshot.

    A file named in `again` is fetched although it exists, and replaces the old one once it is complete. Raises
    `model_load_failed`; what was received by then is kept, and the next call continues from there.
    """
    from huggingface_hub import constants, hf_hub_download

    missing = plan.missing
    wanted = [file for file in plan.files if file in missing or file.name in again]
    if not weights:
        wanted = [file for file in wanted if file.name.endswith((INDEX, "config.json"))]
    lent = take(plan.folder)
    try:
        _check_space(
            plan,
            sum(file.size if file.name in again else file.size - plan.bytes_here(file) for file in wanted),
        )
        # First the index, by which a model is recognised, then the smallest files: so a broken download lacks weights,
        # and counts as incomplete.
        for file in sorted(wanted, key=lambda file: (file.name != INDEX, file.size)):
            # Only huggingface_hub can fetch larger files.
            received = file.large and file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE
            if received:
                _receive(plan, file, file.name in again, report)
            forced = file.name in again and not received
            hf_hub_download(plan.repository, file.name, revision=plan.revision, force_download=forced)
            report(file, file.size)
        # The branch gets this commit only now, so that a broken download does not hide an older complete one.
        hf_hub_download(plan.repository, INDEX, revision=plan.asked)
    except ImageError:
        raise
    except Exception as error:
        raise hub_error(plan.repository, error) from None
    finally:
        if lent:
            lent.release()
    return plan.folder


def _check_space(plan: Plan, wanted: int) -> None:
    free = free_bytes(plan.folder)
    if wanted > free:
        why = f"needs {shown_bytes(wanted)} more on the disk, which has {shown_bytes(free)} left"
        raise unfit(plan.repository, f"cannot be downloaded: it {why}")


def free_bytes(folder: Path) -> int:
    """The free bytes of the disk that a folder is on, or will be."""
    place = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(place).free


def _receive(plan: Plan, file: File, again: bool, report: Report) -> None:
    """Put a large file into the cache's blobs, continuing where an earlier call ended."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    blob = plan.blob(file)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with _receiving(partial(blob), lambda size: report(file, size)) as part:
        if again or not blob.exists():
            if part.tell() > file.size:
                part.seek(0)
                part.truncate()
            http_get(
                hf_hub_url(plan.repository, file.name, revision=plan.revision),
                part,
                resume_size=part.tell(),
                headers=build_hf_headers(),
                expected_size=file.size,
            )
            if content_name(partial(blob), file.blob) != file.blob:
                partial(blob).unlink()
                why = f"could not be downloaded: its {file.name} arrived damaged"
                raise ImageError("model_load_failed", f"{plan.repository} {why}", retryable=True)
            partial(blob).replace(blob)
        else:
            partial(blob).unlink()


@contextmanager
def _receiving(path: Path, report: Callable[[int], None]) -> Iterator[io.FileIO]:
    """The file, for appending; two processes that receive the same take turns."""
    while True:
        with _Part(path, report) as part:
            fcntl.flock(part, fcntl.LOCK_EX)
            # The process that held it before may have moved it to its place or deleted it.
            if path.exists() and os.path.samestat(os.fstat(part.fileno()), path.stat()):
                yield part
                return


class _Part(io.FileIO):
    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(path, "ab")
        self._report = report

    def write(self, data: ReadableBuffer) -> int:
        rest = memoryview(data)
        while rest:
            rest = rest[super().write(rest) or 0 :]
        self._report(self.tell())
        return len(memoryview(data))


def content_name(path: Path, like: str) -> str:
    """The cache's name for this content, of the same kind as `like`: SHA-256, or SHA-1 over git's object."""
    if len(like) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def shown_bytes(count: int) -> str:
    """As a person reads it, such as `2.7 GB`: decimal units."""
    if count < 1000:
        return f"{count} B"
    size = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.5 or unit == "TB":
            break
    return f"{size:.3g} {unit}"


def hub_error(repository: str, error: Exception) -> ImageError:
    """One sentence that a person can act on for what went wrong with the hub; the log has the rest."""
    from huggingface_hub import errors, get_token

    _logger.warning("download of %s failed", repository, exc_info=error)
    if isinstance(error, errors.GatedRepoError):
        page = f"https://huggingface.co/{repository}"
        if get_token():
            why = f"and the account of HF_TOKEN has no access yet: accept its terms on {page}"
        else:
            why = f"so accept its terms on {page} while logged in there, and set HF_TOKEN to a token of that account"
        return unfit(repository, f"is gated, {why}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return unfit(repository, "cannot be downloaded: offline mode (HF_HUB_OFFLINE) is on")
    if isinstance(error, errors.RevisionNotFoundError):
        return ImageError("model_not_found", f"{repository} has no such revision on the hub", "model")
    if isinstance(
        error, (errors.RepositoryNotFoundError, errors.HFValidationError, errors.DisabledRepoError)
    ):
        why = "is not on the hub, or is private and HF_TOKEN does not open it"
        return ImageError("model_not_found", f"{repository} {why}", "model")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return unfit(repository, f"has no {INDEX}, so it is not a model in diffusers layout")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return unfit(repository, "could not be downloaded: there is no space left on the disk")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return unfit(repository, "could not be downloaded: the cache folder cannot be written")
    status = getattr(getattr(error, "response", None), "status_code", 0)
    # A retry helps only for these two.
    if 400 <= status < 500 and status not in (408, 429):
        return unfit(repository, f"could not be downloaded: the hub refuses it (HTTP {status})")
    return ImageError(
        "model_load_failed",
        f"{repository} could not be downloaded: the hub cannot be reached",
        retryable=True,
    )
