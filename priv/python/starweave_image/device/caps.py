"""How many rows one forward pass may have: measured for each network, shape and device, and kept between runs.

A cap starts small and at most doubles with each size that has worked, as long as the memory model predicts that the
next size fits and no pass gets too long. The model is a line, bytes = base + slope * rows, through the measured peaks;
with only one measured size, the line goes through zero.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

_logger = logging.getLogger(__name__)

FIRST_ROWS = 4
MOST_ROWS = 64
ENOUGH = 3
"""How many measurements of one size are enough."""
LONGEST_S = 5.0
"""No calls are added to a pass beyond this duration, since a cancel waits for the pass to end."""
_MARGIN = 0.9
_SAVE_S = 5.0
_REFRESH_S = 1.0


class Size(msgspec.Struct):
    """The measurements of passes with one number of rows: the shortest time and the highest peak."""

    seconds: float
    bytes: int = 0
    count: int = 1


class Profile(msgspec.Struct):
    """The measurements of one key. `overflow` is (rows, free bytes) of the last pass that ran out of memory."""

    sizes: dict[int, Size] = {}
    overflow: tuple[int, int] | None = None

    def record(self, rows: int, seconds: float, bytes: int) -> None:
        size = self.sizes.get(rows)
        if size is None:
            self.sizes[rows] = Size(seconds, bytes)
        else:
            size.seconds = min(size.seconds, seconds)
            size.bytes = max(size.bytes, bytes)
            size.count += 1

    def line(self) -> tuple[float, float]:
        """Base and slope, in bytes and bytes per row; zeros where no memory was measured."""
        points = [(rows, size.bytes) for rows, size in self.sizes.items() if size.bytes > 0]
        if not points:
            return 0.0, 0.0
        mean_rows = sum(rows for rows, _ in points) / len(points)
        mean_bytes = sum(bytes for _, bytes in points) / len(points)
        spread = sum((rows - mean_rows) ** 2 for rows, _ in points)
        slope = (
            sum((rows - mean_rows) * (bytes - mean_bytes) for rows, bytes in points) / spread
            if spread
            else 0.0
        )
        if slope <= 0:
            # One size, or peaks without a usable slope: assume the most that a row can have taken.
            return 0.0, max(bytes / rows for rows, bytes in points)
        return mean_bytes - slope * mean_rows, slope

    def most(self, free: int) -> int:
        """The most rows for the next pass, with so many bytes free; at least 1."""
        most = min(2 * max(self.sizes), MOST_ROWS) if self.sizes else FIRST_ROWS
        if self.sizes:
            largest = max(self.sizes)
            in_time = int(LONGEST_S / max(self.sizes[largest].seconds, 1e-9) * largest)
            most = min(most, max(min(self.sizes), in_time))
        return min(most, self.ceiling(free))

    def ceiling(self, free: int) -> int:
        """The most rows that fit, as far as is known; at least 1."""
        most = MOST_ROWS
        base, slope = self.line()
        if slope > 0:
            most = min(most, int((free * _MARGIN - base) / slope))
        if self.overflow and free < 1.1 * self.overflow[1]:
            most = min(most, self.overflow[0] - 1)
        return max(1, most)


class Caps:
    """The profiles of this machine, kept in the file `path`; `free` gives the bytes free on the device. All methods may
    be called from any thread, except `refresh`, which queries the device."""

    def __init__(self, path: Path | None, free: Callable[[], int]) -> None:
        self._path = path
        self._ask = free
        self._free = free()
        self._asked = time.monotonic()
        self._lock = threading.Lock()
        self._profiles = _read(path) if path else {}
        self._changed: set[str] = set()
        self._refused = False
        self._saved = time.monotonic()

    def refresh(self) -> None:
        """Update the number of free bytes, at most once a second."""
        now = time.monotonic()
        if now - self._asked >= _REFRESH_S:
            self._free, self._asked = self._ask(), now

    def rows(self, key: str) -> int:
        """The most rows for the next pass."""
        with self._lock:
            return self._profiles.get(key, Profile()).most(self._free)

    def ceiling(self, key: str) -> int:
        """The most rows that should fit, whether that many were tried yet or not."""
        with self._lock:
            return self._profiles.get(key, Profile()).ceiling(self._free)

    def wants(self, key: str, rows: int) -> bool:
        """Whether a pass of this size is worth measuring."""
        with self._lock:
            profile = self._profiles.get(key)
            return profile is None or rows not in profile.sizes or profile.sizes[rows].count < ENOUGH

    def record(self, key: str, rows: int, seconds: float, bytes: int) -> None:
        with self._lock:
            self._profiles.setdefault(key, Profile()).record(rows, seconds, bytes)
            self._changed.add(key)
        self._save(_SAVE_S)

    def overflow(self, key: str, rows: int) -> None:
        """A pass of so many rows ran out of memory."""
        self._free, self._asked = self._ask(), time.monotonic()
        with self._lock:
            self._profiles.setdefault(key, Profile()).overflow = (rows, self._free)
            self._changed.add(key)
        self._save(0.0)

    def save(self) -> None:
        self._save(0.0)

    def _save(self, at_least_s: float) -> None:
        with self._lock:
            if self._path is None or not self._changed or time.monotonic() - self._saved < at_least_s:
                return
            # Other sidecars write the same file: only the profiles measured here replace theirs.
            profiles = _read(self._path) | {key: self._profiles[key] for key in self._changed}
            self._saved = time.monotonic()
            self._changed.clear()
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
                fresh.write_bytes(msgspec.json.encode(profiles))
                fresh.replace(self._path)
            except OSError:
                # Warn once, not at each try.
                level = logging.DEBUG if self._refused else logging.WARNING
                _logger.log(level, "the measured caps could not be kept", exc_info=True)
                self._refused = True
            else:
                self._refused = False


def _read(path: Path) -> dict[str, Profile]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Profile])
    except (OSError, msgspec.DecodeError):
        return {}
