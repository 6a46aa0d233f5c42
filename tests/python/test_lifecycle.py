"""Who dies and who survives, by process id."""

from __future__ import annotations

import io
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest
from conftest import SUPPORT, Tracked, config
from PIL import Image
from sidecar import Sidecar

Start = Callable[..., Sidecar]
LONG = {"t": "generate", "id": "long", "prompt": "a red apple", "steps": 20, "num_images": 16}


# Ends that were asked for


def test_the_end_of_the_input_ends_it(start: Start, tracked: Tracked) -> None:
    sidecar = start()
    sidecar.expect("heartbeat")
    sidecar.close_input()
    assert sidecar.wait() == 0
    assert tracked.gone()


def test_the_end_of_the_input_ends_it_in_the_middle_of_a_generation(ready: Start, tracked: Tracked) -> None:
    sidecar = ready(**config())
    sidecar.send(LONG)
    sidecar.expect("progress", id="long", phase="denoising", timeout=180)
    sidecar.close_input()
    sidecar.wait(5)
    assert tracked.gone()


def test_a_reader_that_is_gone_ends_it(start: Start, tracked: Tracked) -> None:
    sidecar = start()
    sidecar.expect("heartbeat")
    sidecar.close_output()
    assert sidecar.wait() == 0
    assert tracked.gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_an_idle_one(ready: Start, tracked: Tracked, number: int) -> None:
    sidecar = ready()
    sidecar.signal(number)
    assert sidecar.wait() == 0
    assert tracked.gone()


def test_a_signal_ends_one_that_is_starting(start: Start, tracked: Tracked) -> None:
    sidecar = start()
    sidecar.hello()
    sidecar.expect("heartbeat", g=1)
    sidecar.signal(signal.SIGTERM)
    assert sidecar.wait() == 0
    assert tracked.gone()


def test_a_signal_drains(ready: Start, tracked: Tracked) -> None:
    sidecar = ready(**config())
    sidecar.send(LONG)
    sidecar.expect("progress", id="long", phase="denoising", timeout=180)
    sidecar.signal(signal.SIGTERM)
    [end] = [message for message in sidecar.drain_frames() if message["t"] in ("done", "error")]
    assert end["id"] == "long" and (end["t"] == "done" or end["kind"] == "cancelled")
    assert sidecar.wait() == 0
    assert tracked.gone()


def let_it_block(sidecar: Sidecar) -> None:
    """Make the process answer more than fits into its descriptor 4, which nobody reads from now on."""
    for index in range(40):
        sidecar.send({"t": "models", "g": 1, "id": f"models-{index}"})
    wait_until(sidecar.output_is_full)


def test_a_signal_ends_one_whose_answers_nobody_reads(ready: Start, tracked: Tracked) -> None:
    sidecar = ready()
    let_it_block(sidecar)
    sidecar.signal(signal.SIGTERM)
    assert sidecar.wait(30) == 0
    assert tracked.gone()


@pytest.mark.slow
def test_a_signal_ends_one_at_work_whose_answers_nobody_reads(ready: Start, tracked: Tracked) -> None:
    sidecar = ready(**config())
    sidecar.send({**LONG, "steps": 100})
    sidecar.expect("progress", id="long", phase="denoising", timeout=180)
    let_it_block(sidecar)
    sidecar.signal(signal.SIGINT)
    assert sidecar.wait(60) == 0
    assert tracked.gone()


@pytest.mark.slow
def test_a_shutdown_ends_one_whose_last_words_nobody_reads(ready: Start, tracked: Tracked) -> None:
    sidecar = ready(heartbeat_interval_ms=50)
    wait_until(sidecar.output_is_full)
    sidecar.send({"t": "shutdown", "grace_ms": 100})
    assert sidecar.wait(30) == 0
    assert tracked.gone()


def test_a_sidecar_that_drains_takes_no_more(ready: Start, tracked: Tracked) -> None:
    sidecar = ready(**config())
    sidecar.send({**LONG, "steps": 100})
    sidecar.expect("progress", id="long", phase="denoising", timeout=180)
    # Its grace outlasts the test, which ends what runs itself: a signal's would be over before a slow machine is here.
    sidecar.send({"t": "shutdown", "grace_ms": 600_000})
    sidecar.expect("heartbeat", phase="draining")
    sidecar.send({"t": "generate", "id": "late", "prompt": "x"})
    assert sidecar.expect("error", id="late")["kind"] == "unavailable"
    sidecar.send({"t": "cancel", "id": "long"})
    assert sidecar.expect("error", id="long")["kind"] == "cancelled"
    assert sidecar.wait() == 0
    assert tracked.gone()


@pytest.mark.slow
def test_what_is_reproducible_is_the_same_in_company_and_after_a_kill(ready: Start) -> None:
    def drawn(sidecar: Sidecar, id: str) -> bytes:
        parts = sidecar.collect_until("done", "error", id=id)
        assert parts[-1]["t"] == "done"
        return b"".join(part["data"] for part in parts if part["t"] == "image")

    def draw(sidecar: Sidecar, id: str, **fields: Any) -> None:
        fields = {"prompt": "a red apple", "steps": 8} | fields
        sidecar.send({"t": "generate", "g": 1, "id": id} | fields)

    exact = {"seed": 11, "reproducible": True}
    sidecar = ready()
    draw(sidecar, "alone", **exact)
    alone = drawn(sidecar, "alone")
    for index in range(5):
        draw(sidecar, f"other-{index}", prompt="a blue square", steps=30)
    draw(sidecar, "accompanied", **exact)
    assert drawn(sidecar, "accompanied") == alone
    draw(sidecar, "killed", steps=100, **exact)
    sidecar.expect("progress", id="killed", phase="denoising")
    sidecar.signal(signal.SIGKILL)
    assert sidecar.wait() == -signal.SIGKILL

    sidecar = ready()
    draw(sidecar, "again", **exact)
    assert drawn(sidecar, "again") == alone


@pytest.mark.slow
def test_a_pause_of_the_process_does_not_count_as_time_without_progress(ready: Start) -> None:
    sidecar = ready(heartbeat_interval_ms=100, **config())
    sidecar.send(LONG)
    sidecar.expect("progress", id="long", phase="denoising", timeout=180)
    sidecar.signal(signal.SIGSTOP)
    wait_until(lambda: psutil.Process(sidecar.pid).status() == psutil.STATUS_STOPPED)
    time.sleep(4)
    sidecar.signal(signal.SIGCONT)
    ages = []
    # What was on its way before the pause comes first, and a second of progress after it is enough.
    stopped_ms = sidecar.expect("heartbeat")["uptime_ms"]
    while (beat := sidecar.expect("heartbeat"))["uptime_ms"] < stopped_ms + 5_000:
        ages += [entry["step_age_ms"] for entry in beat["running"]]
        ages += [work["age_ms"] for work in [beat["device_work"]] if work]
    assert ages and max(ages) < 3_000
    sidecar.send({"t": "cancel", "id": "long"})


@pytest.mark.slow
def test_who_hangs_beyond_the_reach_of_a_cancel_is_seen_to_work_and_not_to_wait(
    ready: Start, tmp_path: Path
) -> None:
    sidecar = ready(heartbeat_interval_ms=100, env={"STARWEAVE_TEST_MISBEHAVIOUR": "hang_where_named"})
    request = {"t": "generate", "prompt": "a red apple", "steps": 2, "width": 64, "height": 64}
    sidecar.send({**request, "id": "first"})
    sidecar.expect("done", id="first", timeout=180)
    sidecar.signal(signal.SIGUSR1)
    wait_until(lambda: b"hangs where it is told" in (tmp_path / "log").read_bytes())
    image = io.BytesIO()
    Image.new("RGB", (64, 64)).save(image, "PNG")
    places = {"decoding", "tokenizing", "stepping", "encoding"}
    for place in places:
        given = {"image": image.getvalue()} if place == "decoding" else {}
        sidecar.send({**request, **given, "id": place})

    def at_work() -> set[str]:
        beat = sidecar.expect("heartbeat")
        return {e["id"] for e in beat["running"] if not e["waits"] and e["step_age_ms"] > 2_000}

    wait_until(lambda: at_work() == places, 180)
    for place in places:
        sidecar.send({"t": "cancel", "id": place})
    # Whoever works beside them is done, and they are not.
    sidecar.send({**request, "id": "other"})
    sidecar.expect("done", id="other", timeout=180)
    assert at_work() == places


def test_shutdown_lets_what_runs_end(ready: Start, tracked: Tracked) -> None:
    sidecar = ready(**config())
    sidecar.send({"t": "generate", "id": "short", "prompt": "a red apple", "steps": 2})
    sidecar.expect("accepted", id="short")
    sidecar.send({"t": "shutdown", "grace_ms": 120_000})
    answers = [message["t"] for message in sidecar.drain_frames(180) if message.get("id") == "short"]
    assert answers[-1] == "done"
    assert sidecar.wait() == 0
    assert tracked.gone()


# Ends that were not


def test_what_it_forked_ends_with_it(start: Start, tracked: Tracked) -> None:
    sidecar = start(env={"STARWEAVE_TEST_MISBEHAVIOUR": "fork_in_c"})
    sidecar.expect("heartbeat")
    before = tracked.alive()
    sidecar.signal(signal.SIGUSR1)
    wait_until(lambda: len(tracked.alive()) > len(before))
    sidecar.signal(signal.SIGKILL)
    assert sidecar.wait() == -signal.SIGKILL
    assert tracked.gone()
    # The grandchild held the write end too; with it gone the application sees the end.
    sidecar.drain_frames(5)


def test_a_forked_python_child_holds_no_frames(start: Start) -> None:
    program = (
        "import os; from starweave_image.doors import process; process.prepare(None)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(sum(os.path.exists(f'/proc/self/fd/{fd}') for fd in (3, 4)))\n"
        "os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert start("-c", program).wait() == 0


class Application:
    """Another process that owns a sidecar, so that it can be killed as the BEAM can."""

    def __init__(self, env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "application.py"), "-m", "starweave_image", "port"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._in, self._out, self._log = self._process.stdin, self._process.stdout, self._process.stderr
        self.sidecar = int(self._line(self._out))

    def send(self, message: dict[str, Any]) -> None:
        self._in.write(msgpack.packb(message).hex().encode() + b"\n")
        self._in.flush()

    def expect(self, type: str, **fields: Any) -> None:
        deadline = time.monotonic() + 180
        while True:
            assert time.monotonic() < deadline, f"no {type} in time"
            message = msgpack.unpackb(bytes.fromhex(self._line(self._out).decode()))
            if message["t"] == type and all(message[name] == value for name, value in fields.items()):
                return

    def expect_log(self, line: bytes) -> None:
        while self._line(self._log) != line:
            pass

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)
        for pipe in (self._in, self._out, self._log):
            pipe.close()

    def _line(self, pipe: Any) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            line = b""
            while not line.endswith(b"\n"):
                assert selector.select(180), "nothing more was written in time"
                byte = os.read(pipe.fileno(), 1)
                assert byte, "the application ended"
                line += byte
        return bytes(line[:-1])


@pytest.fixture
def application(tracked: Tracked) -> Iterator[Callable[..., Application]]:
    applications: list[Application] = []

    def start(**env: str) -> Application:
        applications.append(Application({**tracked.env, **env}))
        return applications[-1]

    yield start
    for application in applications:
        application.kill()


def starting(application: Application) -> None:
    application.expect("heartbeat", phase="starting")


def loading(application: Application) -> None:
    starting(application)
    application.send({"t": "hello", "v": 1, "g": 1, "config": config()})
    application.expect("heartbeat", g=1)


def ready_(application: Application) -> None:
    loading(application)
    application.expect("ready")


def busy(application: Application) -> None:
    ready_(application)
    application.send(LONG)
    application.expect("progress", phase="denoising")


PHASES = [starting, *(pytest.param(phase, marks=pytest.mark.slow) for phase in (loading, ready_)), busy]


@pytest.mark.parametrize("phase", PHASES)
def test_an_application_that_is_killed_leaves_nothing(
    application: Callable[..., Application], tracked: Tracked, phase: Callable[[Application], None]
) -> None:
    victim = application()
    phase(victim)
    assert victim.sidecar in tracked.alive()
    victim.kill()
    assert tracked.gone(5)


@pytest.mark.parametrize("phase", PHASES)
def test_nor_with_the_interpreter_held_by_native_code(
    application: Callable[..., Application], tracked: Tracked, phase: Callable[[Application], None]
) -> None:
    victim = application(STARWEAVE_TEST_MISBEHAVIOUR="hold_interpreter")
    phase(victim)
    os.kill(victim.sidecar, signal.SIGUSR1)
    victim.expect_log(b"holding")
    victim.kill()
    assert tracked.gone(5)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("stop", [os.kill, pytest.param(os.killpg, marks=pytest.mark.slow)])
def test_nor_with_a_stopped_sidecar(
    application: Callable[..., Application],
    tracked: Tracked,
    phase: Callable[[Application], None],
    stop: Callable[[int, int], None],
) -> None:
    victim = application()
    phase(victim)
    stop(victim.sidecar, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(victim.sidecar).status() == psutil.STATUS_STOPPED)
    victim.kill()
    assert tracked.gone(5)


def test_nor_a_grandchild_forked_in_c(application: Callable[..., Application], tracked: Tracked) -> None:
    victim = application(STARWEAVE_TEST_MISBEHAVIOUR="fork_in_c")
    starting(victim)
    os.kill(victim.sidecar, signal.SIGUSR1)
    victim.expect_log(b"forked")
    victim.kill()
    assert tracked.gone(5)


def wait_until(condition: Callable[[], bool], timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


# Wrong starts


def run_port(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "starweave_image", "port", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def test_without_the_descriptors(tracked: Tracked) -> None:
    result = run_port(env=tracked.env)
    assert result.returncode == 64
    assert result.stderr == (
        "starweave-image port: descriptor 3 is not open: this command is started by an Elixir application\n"
    )


def test_with_a_wrong_option(tracked: Tracked) -> None:
    result = run_port("--colour", env=tracked.env)
    assert result.returncode == 64
    assert "--colour" in result.stderr


def test_with_a_log_socket_that_is_not_there(start: Start, tmp_path: Path, tracked: Tracked) -> None:
    sidecar = start("-m", "starweave_image", "port", "--log-socket", str(tmp_path / "none"))
    assert sidecar.wait() == 64
    assert "log socket" in (tmp_path / "log").read_text()
    assert tracked.gone()
