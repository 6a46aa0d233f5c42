"""Whether weights are unchanged: their SHA-256 is compared at the first load after a file has changed.

The right checksum is the one in the configuration, or the name that the hub's cache gave the content, or that of the first
load here. Computed checksums are kept in the user's cache folder with what shows a change of the file: size, time and
inode. So a start hashes nothing twice. Files without such a change are hashed again in the background, slowly, once in the
life of a process, because disks may lose data too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .. import paths
from ..errors import ImageError
from . import outside
from .layout import unfit
from .outside import Unreadable

_logger = logging.getLogger(__name__)

_BLOCK = 4 * 2**20
# Seconds of rest for each second of work in the background.
_REST = 3.0
_SHA256 = re.compile("[0-9a-f]{64}")


class Record(msgspec.Struct, frozen=True):
    """A file as it was when it was hashed; times in nanoseconds."""

    size: int
    mtime_ns: int
    inode: int
    sha256: str


@dataclass(frozen=True)
class _File:
    """A weight file: its name within the model, where it is, its right checksum if that is known, and what to say of a wrong
    one."""

    name: str
    path: Path
    should: str | None
    otherwise: str


class Check:
    """The comparison of a model's weight files. It begins at once, in a thread of its own, beside the load."""

    def __init__(self, id: str, weights: Mapping[str, Path], pins: Mapping[str, str]) -> None:
        self._id = id
        self._records = _read(paths.checksums())
        self._seen: dict[str, Record] = {}
        self._error: ImageError | None = None
        self._fresh: list[_File] = []
        self._old: list[_File] = []
        for name in pins:
            if name not in weights:
                raise unfit(id, f"has no {name}, whose checksum the configuration pins")
        for name, path in sorted(weights.items()):
            self._sort(name, path, pins.get(name))
        self._thread = threading.Thread(target=self._compare, name=f"checksums {id}", daemon=True)
        self._thread.start()

    def _sort(self, name: str, path: Path, pin: str | None) -> None:
        real = Path(os.path.realpath(path))
        record = self._records.get(str(real))
        if pin is not None:
            file = _File(name, real, pin, "is not the file that the configuration pins")
        elif _SHA256.fullmatch(real.name):
            why = "is damaged: `mix image.models verify --repair` fetches it again"
            file = _File(name, real, real.name, why)
        else:
            why = (
                "is not what it was when it was first loaded here: if it was meant to change, "
                "`mix image.models accept` takes it as it is"
            )
            file = _File(name, real, record.sha256 if record else None, why)
        if record is not None and file.should == record.sha256 and _matches(record, real):
            self._seen[name] = record
            self._old.append(file)
        else:
            self._fresh.append(file)

    def wait(self) -> str:
        """One digest over all weights, after they were compared; raises `model_load_failed` for the first file with a wrong
        checksum, and for one that changed during the load."""
        self._thread.join()
        if self._error is not None:
            raise ImageError(self._error.kind, self._error.message, retryable=self._error.retryable)
        for file in self._fresh + self._old:
            if not _matches(self._seen[file.name], file.path):
                why = f"could not be loaded: its {file.name} was changed meanwhile"
                raise ImageError("model_load_failed", f"{self._id} {why}", retryable=True)
        return _digest({name: record.sha256 for name, record in self._seen.items()})

    def _compare(self) -> None:
        try:
            for file in self._fresh:
                record = _hashed(file.path)
                if file.should not in (None, record.sha256):
                    self._error = unfit(self._id, f"cannot be loaded: its {file.name} {file.otherwise}")
                    return
                self._seen[file.name] = record
        except (OSError, Unreadable):
            _logger.warning("the weights of %s could not be read", self._id, exc_info=True)
            self._error = unfit(self._id, "cannot be loaded: its weights could not be read to their end")
            return
        if self._fresh:
            _keep({str(file.path): self._seen[file.name] for file in self._fresh})

    def again(self, damaged: Callable[[str], None]) -> None:
        """Hash in the background the files that were taken for unchanged; calls `damaged` with a sentence if one is not."""
        if self._old:
            threading.Thread(
                target=self._recheck, args=(damaged,), name=f"checksums {self._id}", daemon=True
            ).start()

    def _recheck(self, damaged: Callable[[str], None]) -> None:
        for file in self._old:
            try:
                record = _hashed(file.path, _REST)
            except (OSError, Unreadable):
                # It may be deleted, which does not affect a loaded model; the next load will tell.
                continue
            if record.sha256 == file.should:
                continue
            _logger.error("%s of a loaded model is not what it was: %s", file.path, self._id)
            # Noted with a size and time that no file has, so that the next load compares it again.
            _keep({str(file.path): Record(-1, -1, -1, file.should or "")})
            damaged(f"{self._id} cannot be used any more: its {file.name} {file.otherwise}")
            return


def checksum(folder: Path) -> str:
    """The digest that `Check.wait` returns for a folder's safetensors, computed again."""
    files = {f"{file.parent.name}/{file.name}": file for file in folder.glob("*/*.safetensors")}
    return _digest({name: _hashed(file).sha256 for name, file in files.items()})


def _digest(sums: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name, sha256 in sorted(sums.items()):
        digest.update(f"{name}\0{sha256}\n".encode())
    return digest.hexdigest()


def forget(folder: Path) -> int:
    """Forget the checksums of a folder's files, so that the next load accepts them; says how many were known."""
    within = os.path.realpath(folder) + os.sep
    records = _read(paths.checksums())
    kept = {path: record for path, record in records.items() if not path.startswith(within)}
    if len(kept) < len(records):
        _write(paths.checksums(), kept)
    return len(records) - len(kept)


def _matches(record: Record, path: Path) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns, found.st_ino) == (record.size, record.mtime_ns, record.inode)


def _hashed(path: Path, rest: float = 0.0) -> Record:
    outside.size_of(path)
    digest = hashlib.sha256()
    with path.open("rb") as content:
        # From before the hashing: a change during it then shows in them.
        found = os.fstat(content.fileno())
        begun = time.monotonic()
        while block := content.read(_BLOCK):
            digest.update(block)
            if rest:
                time.sleep(rest * (time.monotonic() - begun))
                begun = time.monotonic()
    return Record(found.st_size, found.st_mtime_ns, found.st_ino, digest.hexdigest())


# What is kept

_writing = threading.Lock()


def _read(book: Path) -> dict[str, Record]:
    try:
        return outside.read_json(book, dict[str, Record], outside.LARGE)
    except Unreadable:
        return {}


def _keep(records: Mapping[str, Record]) -> None:
    with _writing:
        # Other sidecars write the same file, so it is read again; deleted files are dropped.
        known = {path: record for path, record in _read(paths.checksums()).items() if os.path.exists(path)}
        _write(paths.checksums(), known | dict(records))


def _write(book: Path, records: Mapping[str, Record]) -> None:
    try:
        book.parent.mkdir(parents=True, exist_ok=True)
        fresh = book.with_name(f"{book.name}.{os.getpid()}")
        fresh.write_bytes(msgspec.json.encode(records))
        fresh.replace(book)
    except OSError as error:
        _logger.warning("the checksums of weights could not be kept: %s", error.strerror)
