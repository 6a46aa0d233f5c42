"""Feeds damaged and random frames to the sidecar's side of the wire.

    python bench/fuzz.py decoder [--count 1000000] [--seed 1]
    python bench/fuzz.py sidecar [--count 100000] [--seed 1]

`decoder` calls it in this process: anything but a message or one of its two errors ends the run. `sidecar` writes
to a live one, which has to answer, to go on, and to make an image at the end; every tenth of the frames a length that
loses the framing has to end it with code 65, and a new one takes over. The same count and seed give the same frames.
docs/fuzzing.md has results.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "priv" / "python"
sys.path[:0] = [str(PACKAGE), str(ROOT / "tests" / "contract"), str(ROOT / "tests" / "support" / "python")]

from contract import expand, load, pack  # noqa: E402
from sidecar import Closed, Sidecar  # noqa: E402
from starweave_image.doors import wire  # noqa: E402

# Headers with the longest lengths, and bytes that are easily got wrong.
NASTY = [
    b"\xdf\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\xdb\x7f\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\xff",
    b"\xde\xff\xff",
    b"\xd6\xff",
    b"\xcb\x7f\xf0\0\0\0\0\0\x01",
    b"\xcf" + b"\xff" * 8,
    b"\xc1",
    b"\xc0",
    b"\xed\xa0\x80",
    b"\x91" * 10,
    b"\x91" * 2000,
]


ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    2**63,
    2**64 - 1,
    1e308,
    float("nan"),
    "",
    "\0",
    "../x",
    "🍎" * 3000,
    b"",
    [],
    [[]],
    {},
    {"t": 1},
]


class Frames:
    """Bodies of frames, as random as the seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        golden = load("frames.jsonl")
        # Those that are long by many equal values would make a run one of minutes a frame.
        golden = [case for case in golden if isinstance(case["hex"], str)]
        self._golden = [body for case in golden if (body := bytes.fromhex(case["hex"])[4:])]
        self._values = [value for case in golden if (value := expand(case.get("value")))]

    def body(self) -> bytes:
        rng = self.rng
        kind = rng.randrange(10)
        if kind == 0:
            return rng.randbytes(rng.randint(1, 64))
        if kind == 1:
            return rng.choice(NASTY) + rng.randbytes(rng.randint(1, 64))
        if kind < 6:
            return pack(self._odd(rng.choice(self._values)))
        body = rng.choice(self._golden)
        for _ in range(3 if kind < 8 else 1):
            body = self._mutate(body)
        return body or b"\0"

    def stream(self) -> bytes:
        """A body with its length, which is sometimes not its length."""
        body = self.body()
        match self.rng.randrange(50):
            case 0:
                length = self.rng.randrange(2**32)
            case 1:
                return len(body).to_bytes(4, "big")[: self.rng.randrange(4)]
            case 2:
                length = len(body) + 1
            case _:
                length = len(body)
        return length.to_bytes(4, "big") + body

    def _odd(self, value: Any) -> Any:
        """`value` with something in it replaced, removed or added."""
        rng = self.rng
        if not isinstance(value, dict) or not value or rng.random() < 0.2:
            return rng.choice(ODD)
        key = rng.choice(list(value))
        match rng.randrange(6):
            case 0:
                return {name: item for name, item in value.items() if name != key}
            case 1:
                return value | {rng.choice(list(value)): value[key]}
            case 2:
                return value | {"x" * rng.randrange(300): rng.choice(ODD)}
            case _:
                return value | {key: self._odd(value[key])}

    def _mutate(self, body: bytes) -> bytes:
        rng = self.rng
        at = rng.randint(0, len(body))
        head, tail = body[:at], body[at:]
        match rng.randrange(7):
            case 0 if tail:
                return head + bytes([tail[0] ^ 1 << rng.randrange(8)]) + tail[1:]
            case 1 if tail:
                return head + rng.randbytes(1) + tail[1:]
            case 2:
                return head + rng.randbytes(rng.randint(1, 4)) + tail
            case 3:
                return head + tail[rng.randint(1, 8) :]
            case 4:
                return head + tail[: rng.randint(1, 8)] + tail
            case 5:
                return head
            case _:
                return head + rng.choice(NASTY) + tail


def fuzz_decoder(count: int, seed: int) -> None:
    frames = Frames(seed)
    verdicts: Counter[str] = Counter()
    size = 0
    slowest = 0.0
    before = peak_mebibytes()
    start = time.monotonic()
    for _ in range(count):
        stream = frames.stream()
        size += len(stream)
        began = time.perf_counter()
        try:
            bodies = list(wire.FrameDecoder().feed(stream))
            for body in bodies[:1]:
                wire.decode(body)
            verdicts["messages" if bodies else "incomplete"] += 1
        except wire.FramingError:
            verdicts["lost framing"] += 1
        except wire.InvalidMessage as error:
            verdicts[f"refused ({error.kind})"] += 1
        slowest = max(slowest, time.perf_counter() - began)
    seconds = time.monotonic() - start
    print(f"{count} frames ({size // 1_000_000} MB, seed {seed}) in {seconds:.0f} s, no crash")
    print("verdicts:", ", ".join(f"{n} {what}" for what, n in sorted(verdicts.items())))
    print(f"slowest frame: {slowest * 1e6:.0f} µs")
    print(f"peak memory: {before} MiB before, {peak_mebibytes()} MiB after")


def peak_mebibytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def fuzz_sidecar(count: int, seed: int, model: str | None, log: Path) -> None:
    frames = Frames(seed)
    start = time.monotonic()
    answers: Counter[str] = Counter()
    sent = 0
    while sent < count:
        live = Live(model, log)
        try:
            share = min(count - sent, max(1, count // 10))
            for _ in range(share):
                live.send(harmless_body(frames))
            sent += share
            live.settle()
            live.generate()
            print(
                f"{sent} frames; rss {live.rss_ready} MiB when ready, {live.rss} MiB now; an image came",
                flush=True,
            )
            live.lose_framing(frames.rng)
            answers += live.answers
        finally:
            live.sidecar.kill()
    print(f"{count} frames (seed {seed}) in {time.monotonic() - start:.0f} s")
    print("answers:", ", ".join(f"{n} {what}" for what, n in sorted(answers.items())))


def harmless_body(frames: Frames) -> bytes:
    """A body that does not ask a healthy sidecar to end."""
    while True:
        body = frames.body()
        try:
            if not isinstance(wire.decode(body).content, wire.Shutdown):
                return body
        except wire.InvalidMessage:
            return body


class Live:
    """A sidecar that is ready, and a thread that reads what it says so that it never has to wait."""

    def __init__(self, model: str | None, log: Path) -> None:
        with log.open("ab") as file:
            env = {"PYTHONPATH": str(PACKAGE), "HF_HUB_OFFLINE": "1"}
            self.sidecar = Sidecar(env=env, stderr=file.fileno())
        config = (
            {"models": [{"id": "local/fuzzed", "path": model}], "default_model": "local/fuzzed"}
            if model
            else {}
        )
        self.sidecar.hello(offline=True, **config)
        self.sidecar.expect("ready", timeout=300)
        self.rss_ready = self.rss = self.sidecar.expect("heartbeat")["rss"] >> 20
        self.answers: Counter[str] = Counter()
        self._heard = threading.Condition()
        self._ended: dict[str, dict[str, Any]] = {}
        self._closed = False
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, body: bytes) -> None:
        self.sidecar.send_body(body)

    def settle(self) -> None:
        """Until everything before is read."""
        self.sidecar.send({"t": "models", "g": 1, "id": "fuzz-settle"})
        self._await("fuzz-settle")

    def generate(self) -> None:
        """Until an image is made: a request above the capacity, which the fuzz may fill, is made again."""
        for attempt in range(600):
            id = f"fuzz-generate-{attempt}"
            self.sidecar.send({"t": "generate", "g": 1, "id": id, "prompt": "a red apple", "steps": 1})
            answer = self._await(id)
            if answer["t"] == "done":
                return
            if answer.get("kind") != "overloaded":
                raise SystemExit(f"{id} was answered by {answer}")
            time.sleep(0.5)
        raise SystemExit("the sidecar was never free again")

    def lose_framing(self, rng: random.Random) -> None:
        length = rng.choice([0, 2**25 + 1, 2**32 - 1, rng.randrange(2**25 + 1, 2**32)])
        self.sidecar.send_bytes(length.to_bytes(4, "big"))
        if (code := self.sidecar.wait(60)) != 65:
            raise SystemExit(f"exit {code} in place of 65 after a length of {length}")

    def _await(self, id: str) -> dict[str, Any]:
        with self._heard:
            if not self._heard.wait_for(lambda: id in self._ended or self._closed, timeout=300):
                raise SystemExit(f"no answer to {id}")
            if id not in self._ended:
                raise SystemExit(f"the sidecar ended before it answered {id}")
            return self._ended[id]

    def _read(self) -> None:
        try:
            while True:
                self._hear(self.sidecar.receive(600))
        except (Closed, OSError, TimeoutError):
            with self._heard:
                self._closed = True
                self._heard.notify_all()

    def _hear(self, message: dict[str, Any]) -> None:
        said = message["t"] + (f" {message['kind']}" if message["t"] == "error" else "")
        with self._heard:
            self.rss = message["rss"] >> 20 if "rss" in message else self.rss
            self.answers[said] += 1
            if message["t"] in ("done", "error", "models") and message.get("id"):
                self._ended[message["id"]] = message
                self._heard.notify_all()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Feeds damaged and random frames to the sidecar's side of the wire."
    )
    parser.add_argument("target", choices=["decoder", "sidecar"])
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", help="a local model folder, in place of the embedded model")
    parser.add_argument("--log", help="where the sidecar's log goes", type=Path, default=Path("/dev/null"))
    arguments = parser.parse_args()
    if arguments.target == "decoder":
        fuzz_decoder(arguments.count or 1_000_000, arguments.seed)
    else:
        fuzz_sidecar(arguments.count or 100_000, arguments.seed, arguments.model, arguments.log)


if __name__ == "__main__":
    main()
