"""The sidecar's own log as `log` frames; what libraries print goes to descriptors 1 and 2."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from ..device.lanes import request_id
from . import wire

_MAX_MESSAGE = 64 * 1024


class FrameHandler(logging.Handler):
    def __init__(self, send: Callable[[wire.Outgoing], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        message = self.format(record)[:_MAX_MESSAGE]
        self._send(wire.Log(level=_level(record.levelno), message=message, id=request_id.get()))


def install(send: Callable[[wire.Outgoing], None]) -> None:
    """Send this package's log messages of level info and above through `send`."""
    logger = logging.getLogger("starweave_image")
    logger.addHandler(FrameHandler(send))
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _level(number: int) -> Literal["debug", "info", "warning", "error"]:
    if number >= logging.ERROR:
        return "error"
    if number >= logging.WARNING:
        return "warning"
    return "info" if number >= logging.INFO else "debug"
