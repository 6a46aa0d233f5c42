"""Who uses a model in the hub's cache, and when it was last used, across all processes of this machine.

Each snapshot has an empty file among the cache's own locks. Whoever uses the snapshot holds a shared `flock` on that
file, which the operating system gives back however the process ends; whoever deletes it needs the file alone. The
file's time of modification is the last use: the access times of the model's files are off on many systems.
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
    """A lease on a snapshot of the cache, and a note of its use. None for a folder outside the cache, which nothing
    deletes, and in a cache that cannot be written, where nothing can be deleted. Waits while the snapshot is being
    deleted: look for its files afterwards."""
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
    """Whether nobody uses the snapshot; if so, nobody begins to before the block ends. Raises OSError where the cache
    cannot be written."""
    record = _record(folder)
    assert record is not None
    record.parent.mkdir(parents=True, exist_ok=True)
    # The file is never deleted: who waited for a deleted one would hold a lock that nobody else sees.
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
