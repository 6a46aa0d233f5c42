"""A bound on what models take on the disk, kept while a sidecar runs: before each download, and from time to time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection

from .. import schema
from ..errors import ImageError
from . import disk
from .hub import Plan, shown_bytes
from .layout import unfit

_logger = logging.getLogger(__name__)


class Upkeep:
    """Keeps the hub's cache within the configuration's `disk_quota` bytes and `max_models` models. It deletes the longest
    unused models, but none in `keep`, by id or alias, and none that any process has loaded."""

    def __init__(self, config: schema.Config, keep: Collection[str]) -> None:
        self._quota = config.disk_quota
        self._most = config.max_models
        self._interval_s = config.cleanup_interval_ms / 1000
        self._keep = frozenset(keep)
        self._ended = threading.Event()

    def begin(self) -> None:
        """Clean up at intervals, in the background, if there is a bound."""
        if self._quota is not None or self._most is not None:
            threading.Thread(target=self._run, name="upkeep", daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def make_room(self, plan: Plan) -> None:
        """Make room for a download; raises `model_load_failed` if it cannot fit beside the models that must stay."""
        new = plan.repository not in {snapshot.repository for snapshot in disk.snapshots()}
        wanted = plan.bytes_missing
        quota = None if self._quota is None else self._quota - wanted
        most = None if self._most is None else self._most - new
        pruning = self._prune(quota, most, {*self._keep, plan.repository})
        if pruning is None or not wanted:
            return
        if self._quota is not None and pruning.after + wanted > self._quota:
            left = max(0, self._quota - pruning.after)
            why = f"needs {shown_bytes(wanted)} more on the disk, and disk_quota leaves {shown_bytes(left)}"
            raise unfit(plan.repository, f"cannot be downloaded: it {why}")
        if most is not None and len({snapshot.repository for snapshot in disk.snapshots()}) > most:
            why = f"there are {self._most} models already, which is max_models, and all of them have to stay"
            raise unfit(plan.repository, f"cannot be downloaded: {why}")

    def _run(self) -> None:
        while True:
            try:
                self._prune(self._quota, self._most, self._keep)
            except Exception:
                # Other programs may change the cache at the same time: the next round looks again.
                _logger.warning("cleaning up the models on the disk failed", exc_info=True)
            if self._ended.wait(self._interval_s):
                return

    def _prune(self, quota: int | None, most: int | None, keep: Collection[str]) -> disk.Pruning | None:
        if quota is None and most is None:
            return None
        try:
            pruning = disk.prune(quota, keep, most=most)
        except (OSError, ImageError):
            _logger.warning("the models on the disk could not be cleaned up", exc_info=True)
            return None
        for snapshot in pruning.snapshots:
            size = shown_bytes(snapshot.bytes)
            _logger.info(
                "%s was deleted to keep within the bounds of the disk, %s", snapshot.repository, size
            )
        return pruning
