"""A live sidecar and its messages."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import psutil
import pytest
from conftest import PACKAGE, SUPPORT, Tracked, config
from sidecar import Sidecar

Start = Callable[..., Sidecar]


@pytest.fixture(scope="module")
def served() -> Iterator[Sidecar]:
    """A sidecar that is ready, for all who leave it as it was."""
    sidecar = Sidecar(("-m", "starweave_image", "port"), Tracked().env)
    sidecar.hello(**config())
    sidecar.expect("ready", timeout=180)
    yield sidecar
    sidecar.kill()


def test_the_first_sign_of_life_comes_before_anything_heavy(start: Start) -> None:
    sidecar = start()
    heartbeat = sidecar.receive()
    # Seconds since the process exists, by its own clock: a busy machine delays what this test measures.
    assert heartbeat["uptime_ms"] < 1000
    assert {name: heartbeat[name] for name in ("t", "g", "seq", "phase", "grant", "running", "resident")} == {
        "t": "heartbeat",
        "g": 0,
        "seq": 0,
        "phase": "starting",
        "grant": 0,
        "running": [],
        "resident": [],
    }
    assert heartbeat["rss"] > 1_000_000
    maps = Path(f"/proc/{sidecar.pid}/maps").read_text()
    assert "msgspec" in maps
    assert "torch" not in maps


@pytest.mark.slow
def test_nothing_is_left_to_import_once_it_is_ready() -> None:
    program = (
        "import sys\n"
        "from engines import Bench\n"
        "bench = Bench().start()\n"
        "before = set(sys.modules)\n"
        "bench.done(width=64, height=64, steps=2)\n"
        "image = bench.files('r1')[0]\n"
        "bench.done(width=64, height=64, steps=2, image=image, format='webp', preview=True)\n"
        "bench.done(width=64, height=64, steps=2, image=image, mask=image, scheduler='euler')\n"
        "print(*sorted(set(sys.modules) - before), sep='\\n')\n"
    )
    path = f"{Path(__file__).parent}:{PACKAGE}"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr
    late = result.stdout.split()
    costly = (
        "diffusers.pipelines",
        "diffusers.models",
        "diffusers.schedulers",
        "transformers",
        "torch",
        "PIL",
    )
    assert not [name for name in late if name.startswith(costly)]


def test_heartbeats_go_on_while_the_engine_starts(start: Start) -> None:
    sidecar = start()
    sidecar.hello(generation=42, heartbeat_interval_ms=50, **config())
    before = sidecar.collect_until("ready", timeout=180)
    ready = before.pop()
    heartbeats = [message for message in before if message["t"] == "heartbeat"]
    seqs = [heartbeat["seq"] for heartbeat in heartbeats]
    assert len(seqs) > 5
    assert seqs == list(range(len(seqs)))
    assert (42, "starting") in [(heartbeat["g"], heartbeat["phase"]) for heartbeat in heartbeats]
    assert (ready["g"], ready["v"]) == (42, 1)
    assert ready["pid"] == sidecar.pid == os.getpgid(sidecar.pid)
    assert {"starweave_image", "python", "torch", "diffusers", "transformers"} <= set(ready["versions"])
    assert ready["default_model"] in [card["id"] for card in ready["catalog"]]
    assert sidecar.expect("heartbeat", phase="ready")["grant"] == ready["capacity"]


def test_before_ready_requests_are_refused(start: Start) -> None:
    sidecar = start()
    sidecar.send({"t": "models", "id": "early"})
    error = sidecar.expect("error", id="early")
    assert (error["kind"], error["retryable"]) == ("unavailable", True)


def test_a_message_that_cannot_be_read_is_answered_and_the_next_is_taken(served: Sidecar) -> None:
    for body, kind, id, field in [
        (b"junk, by all accounts", "invalid_frame", None, None),
        (msgpack.packb([1, 2]), "invalid_frame", None, None),
        (msgpack.packb({"t": "models", "id": "x"}) + b"\0", "invalid_frame", None, None),
        (msgpack.packb({"t": "paint", "id": "r-1"}), "unknown_message", "r-1", "t"),
        (msgpack.packb({"id": "r-2"}), "invalid_request", "r-2", "t"),
        (msgpack.packb({"t": "models", "id": "r-3", "g": 99}), "wrong_generation", "r-3", "g"),
        (msgpack.packb({"t": "hello", "v": 1, "g": 1, "config": {}}), "invalid_request", None, None),
        (msgpack.packb({"t": "hello", "v": 9, "g": 1, "config": {}}), "unsupported_version", None, "v"),
        (
            msgpack.packb({"t": "generate", "id": "r-4", "prompt": "x", "width": 250}),
            "invalid_request",
            "r-4",
            "width",
        ),
    ]:
        served.send_body(body)
        error = served.expect("error", kind=kind)
        assert (error["id"], error["field"]) == (id, field)
    served.send({"t": "models", "id": "after", "g": 1})
    assert served.expect("models", id="after")["models"]
    assert served.expect("heartbeat")["phase"] == "ready"


def test_a_message_that_arrives_byte_by_byte_is_read(served: Sidecar) -> None:
    body = msgpack.packb({"t": "models", "id": "slow"})
    for byte in struct.pack(">I", len(body)) + body:
        served.send_bytes(bytes([byte]))
    assert served.expect("models", id="slow")["models"]


def test_a_request_ends_with_its_image(served: Sidecar) -> None:
    request = {"t": "generate", "id": "r-1", "prompt": "a red apple", "steps": 2, "num_images": 2, "seed": 5}
    served.send(request)
    seen = served.collect_until("done", "error", timeout=180, id="r-1")
    types = [message["t"] for message in seen]
    assert types[0] == "accepted"
    assert types[-1] == "done", seen[-1]
    assert seen[0]["seeds"] == [5, 6]
    for index in (0, 1):
        parts = [message for message in seen if message["t"] == "image" and message["index"] == index]
        data = b"".join(part["data"] for part in parts)
        assert hashlib.sha256(data).hexdigest() == parts[0]["sha256"]
        assert len(data) == parts[0]["size"]
        assert data.startswith(b"\x89PNG")


def test_models_are_told_during_a_generation_and_so_is_how_it_stands(served: Sidecar) -> None:
    served.send({"t": "generate", "id": "long", "prompt": "a red apple", "steps": 100, "num_images": 16})
    served.expect("progress", id="long", phase="denoising", timeout=180)
    served.send({"t": "models", "id": "m"})
    assert served.expect("models", id="m")["models"]
    beat = served.expect("heartbeat")
    assert (beat["phase"], [running["id"] for running in beat["running"]]) == ("busy", ["long"])
    served.send({"t": "cancel", "id": "long"})
    assert served.expect("error", id="long")["kind"] == "cancelled"


def test_an_engine_fault_is_answered_logged_and_survived(ready: Start) -> None:
    sidecar = ready(str(SUPPORT / "faulty_engine.py"), "port")
    sidecar.send({"t": "load_model", "id": "r-1", "model": "starweave/tiny"})
    log = sidecar.expect("log", level="error")
    assert log["id"] == "r-1"
    assert "ZeroDivisionError" in log["message"]
    error = sidecar.expect("error", id="r-1")
    assert error["kind"] == "internal"
    assert "Zero" not in error["message"]
    sidecar.send({"t": "models", "id": "r-2"})
    sidecar.expect("models", id="r-2")


def test_prints_disturb_no_frame_and_go_to_the_log_socket(ready: Start, tmp_path: Path) -> None:
    path = tmp_path / "log.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        sidecar = ready(
            "-m",
            "starweave_image",
            "port",
            "--log-socket",
            str(path),
            env={"STARWEAVE_TEST_MISBEHAVIOUR": "print"},
        )
        listener.settimeout(30)
        log, _ = listener.accept()
    with log, log.makefile("rb") as lines:
        log.settimeout(30)
        psutil.Process(sidecar.pid).send_signal(10)
        printed = b""
        while not printed.endswith(b"printed\n"):
            printed += lines.readline()
    assert b"a library prints from Python\n" in printed
    assert b"a library prints from C\n" in printed
    sidecar.send({"t": "models", "id": "after"})
    sidecar.expect("models", id="after")


# Starts that cannot succeed


def test_another_protocol_version(start: Start) -> None:
    sidecar = start()
    sidecar.send({"t": "hello", "v": 2, "g": 1, "config": {}})
    assert sidecar.expect("error")["kind"] == "unsupported_version"
    assert sidecar.wait() == 66


def test_no_hello(start: Start) -> None:
    program = (
        "import os; from starweave_image.doors import process; process.prepare(None);"
        "from starweave_image.doors.port import Port; os._exit(Port(hello_timeout_s=3).run())"
    )
    sidecar = start("-c", program)
    assert sidecar.expect("heartbeat")["phase"] == "starting"
    assert sidecar.wait() == 66


def test_a_hello_that_is_wrong_is_answered_and_not_waited_after(start: Start) -> None:
    sidecar = start()
    sidecar.send({"t": "hello", "v": 1, "g": 1, "config": {"models": [{"id": "a/b", "path": ""}]}})
    refused = sidecar.expect("error", id=None)
    assert (refused["kind"], refused["field"], refused["g"]) == (
        "invalid_request",
        "config.models[0].path",
        0,
    )
    assert sidecar.wait() == 66


@pytest.mark.parametrize("length", [0, 32 * 1024 * 1024 + 1, 2**32 - 1])
def test_lost_framing(start: Start, length: int) -> None:
    sidecar = start()
    sidecar.send_bytes(struct.pack(">I", length) + b"rest")
    error = sidecar.expect("error", id=None)
    assert error["kind"] == "invalid_frame"
    assert sidecar.wait() == 65


@pytest.mark.parametrize("package", ["msgspec", "torch", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_a_missing_package(start: Start, tmp_path: Path, package: str) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / f"{package}.py").write_text(f"raise ModuleNotFoundError('no', name={package!r})\n")
    sidecar = start(env={"PYTHONPATH": f"{blocked}:{PACKAGE}"})
    sentence = f"The Python package {package} is missing or cannot be imported; run mix image.setup."
    if package == "msgspec":
        assert sidecar.wait() == 69
        assert sentence in (tmp_path / "log").read_text()
    else:
        sidecar.hello()
        error = sidecar.expect("error", id=None, timeout=180)
        assert (error["kind"], error["message"]) == ("unavailable", sentence)
        assert sidecar.wait() == 69
