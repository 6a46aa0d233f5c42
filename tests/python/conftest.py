from __future__ import annotations

import functools
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "priv" / "python"
SUPPORT = ROOT / "tests" / "support" / "python"
NO_HUB_CACHE = "/nonexistent/hub"
sys.path[:0] = [str(PACKAGE), str(SUPPORT), str(ROOT / "tests" / "contract")]

from sidecar import Sidecar  # noqa: E402

# Machines that run the tests may be slow and busy: time is no reason to fail.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured in a test stays in it, and what models this machine has is nothing to it."""
    monkeypatch.setenv("STARWEAVE_IMAGE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", NO_HUB_CACHE)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Path], Path]], Path]:
    """Gives the folder of a checkpoint, made once; nobody changes it."""
    return functools.cache(lambda make: make(tmp_path_factory.mktemp("checkpoints") / "model"))


def config() -> dict[str, Any]:
    """The sidecar's configuration with the embedded model, or with the checkpoint in STARWEAVE_TEST_MODEL."""
    if path := os.environ.get("STARWEAVE_TEST_MODEL"):
        return {"models": [{"id": "local/test", "path": path}], "default_model": "local/test"}
    return {}


class Tracked:
    """The environment of a test's processes, and a mark in it by which every one of them is found again."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.env = {
            **os.environ,
            "PYTHONPATH": f"{SUPPORT}:{PACKAGE}",
            "STARWEAVE_TEST_MARK": self.mark,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": NO_HUB_CACHE,
        }

    def alive(self) -> set[int]:
        pids = set()
        for process in psutil.process_iter():
            try:
                if process.environ().get("STARWEAVE_TEST_MARK") == self.mark:
                    pids.add(process.pid)
            except psutil.Error:
                pass
        return pids

    def gone(self, timeout: float = 5.0) -> bool:
        """Whether nothing is left before `timeout` seconds have passed."""
        deadline = time.monotonic() + timeout
        while left := self.alive():
            if time.monotonic() > deadline:
                print("left:", left)
                return False
            time.sleep(0.05)
        return True


@pytest.fixture
def tracked() -> Iterator[Tracked]:
    tracked = Tracked()
    yield tracked
    for pid in tracked.alive():
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            pass


@pytest.fixture
def start(tracked: Tracked, tmp_path: Path) -> Iterator[Callable[..., Sidecar]]:
    """Starts sidecars; what one prints is in the file `log` of the test's folder."""
    sidecars: list[Sidecar] = []

    def start(*arguments: str, env: dict[str, str] | None = None) -> Sidecar:
        with (tmp_path / "log").open("ab") as log:
            sidecar = Sidecar(
                arguments or ("-m", "starweave_image", "port"), {**tracked.env, **(env or {})}, log.fileno()
            )
        sidecars.append(sidecar)
        return sidecar

    yield start
    for sidecar in sidecars:
        sidecar.kill()


@pytest.fixture
def ready(start: Callable[..., Sidecar]) -> Callable[..., Sidecar]:
    """Starts sidecars and greets them."""

    def ready(*arguments: str, env: dict[str, str] | None = None, **config: Any) -> Sidecar:
        sidecar = start(*arguments, env=env)
        sidecar.hello(**config)
        sidecar.expect("ready", timeout=180)
        return sidecar

    return ready
