"""Who uses a model in the hub's cache, and when it was last used, across all processes of this machine.

Each snapshot has an empty file among the cache's own locks. A process that uses the snapshot holds a shared `flock` on that
file, which the operating system releases however the process ends; to delete the snapshot an exclusive one is needed. The
file's time of modification is the last use, since many systems do not record access times.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Lease:
    """Keeps a snapshot from being deleted until it is released, collected, or the process ends."""

    def __init__(self, descriptor: int) -> None:
        self.release = weakref.finalize(self, os.close, descriptor)


def take(folder: Path) -> Lease | None:
    """Lease a snapshot of the cache and note its use. Returns None for a folder outside the cache, and in a cache that
    cannot be written: there nothing can be deleted. Waits while the snapshot is being deleted, so look for its files
    afterwards."""
    record = _record(folder)
    if record is None:
        return None
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(record, os.O_RDONLY | os.O_CREAT, 0o666)
    except OSError:
        return None
    # Not every file system has locks, and the file may be another user's.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    with suppress(OSError):
        os.utime(descriptor)
    return Lease(descriptor)


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Whether the snapshot is unused; if so, nobody can lease it before the block ends. Raises OSError if the cache cannot
    be written."""
    record = _record(folder)
    assert record is not None
    record.parent.mkdir(parents=True, exist_ok=True)
    # The file is never deleted: a process that waited for a deleted one would hold a lock that no other process sees.
    descriptor = os.open(record, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _locked_alone(descriptor)
    finally:
        os.close(descriptor)


def in_use(folder: Path) -> bool:
    """Whether a process holds a lease, or that cannot be known."""
    record = _record(folder)
    if record is None or not record.exists():
        return False
    try:
        # For writing: over NFS only such a descriptor can be locked alone.
        descriptor = os.open(record, os.O_RDWR)
    except OSError:
        return True
    try:
        return not _locked_alone(descriptor)
    finally:
        os.close(descriptor)


def last_used(folder: Path) -> float | None:
    """Seconds since 1970; None where no use was ever noted."""
    record = _record(folder)
    try:
        return record.stat().st_mtime if record else None
    except OSError:
        return None


def _locked_alone(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _record(folder: Path) -> Path | None:
    snapshots, repository = folder.parent, folder.parent.parent
    if snapshots.name != "snapshots" or not repository.name.startswith("models--"):
        return None
    # Below `.locks`, which all tools that read the cache pass over.
    return repository.parent / ".locks" / "starweave_image" / repository.name / folder.name
