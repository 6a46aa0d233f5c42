"""A client written from docs/protocol.md alone, which holds a real process to each of its words.

It knows nothing of the package: neither its code nor its types.
"""

from __future__ import annotations

import hashlib
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from sidecar import Sidecar

RUN = Path(__file__).parents[2] / "priv/python/run.py"
Message = dict[str, Any]
GENERATION = 7


class Client:
    """Checks the order and the fields of whatever it hears."""

    def __init__(self, *arguments: str) -> None:
        self.process = Sidecar([str(RUN), "port", *arguments])
        self.asked: dict[str, Message] = {}
        self.heard: list[Message] = []
        self.files: dict[str, dict[int, bytes]] = {}
        self._accepted: dict[str, Message] = {}
        self._ended: set[str] = set()

    def send(self, *messages: Message) -> None:
        """In one write, so that all of them are read before the first has had its end."""
        frames = b""
        for message in messages:
            body = msgpack.packb({"g": GENERATION, **message})
            frames += struct.pack(">I", len(body)) + body
        self.process.send_bytes(frames)

    def ask(self, **message: Any) -> Message:
        assert message["id"] not in self.asked
        self._ended.discard(message["id"])
        self.asked[message["id"]] = message
        self.files[message["id"]] = {}
        self.send(message)
        return message

    def hear(self) -> Message:
        message: Message = self.process.receive(timeout=120)
        assert message["g"] in (0, GENERATION)
        self.heard.append(message)
        getattr(self, "_on_" + message["t"], self._on_other)(message)
        return message

    def until(self, type: str, **fields: Any) -> Message:
        while True:
            message = self.hear()
            if message["t"] == type and fields.items() <= message.items():
                return message

    def answer(self, **message: Any) -> Message:
        """Ask and hear the end of it."""
        self.ask(**message)
        while message["id"] in self.asked:
            last = self.hear()
        return last

    # What is heard

    def _asked(self, message: Message, *types: str) -> Message:
        id = message["id"]
        assert id not in self._ended, message
        assert self.asked[id]["t"] in types, message
        return self.asked[id]

    def _end(self, message: Message) -> None:
        del self.asked[message["id"]]
        self._accepted.pop(message["id"], None)
        self._ended.add(message["id"])

    def _on_accepted(self, message: Message) -> None:
        asked = self._asked(message, "generate")
        assert message["id"] not in self._accepted
        count = asked.get("num_images", 1)
        first = asked.get("variation_seed", asked["seed"])
        assert message["seeds"] == [(first + index) % 2**63 for index in range(count)]
        for field in ("width", "height", "steps", "format"):
            assert asked.get(field, message[field]) == message[field]
        self._accepted[message["id"]] = message

    def _on_progress(self, message: Message) -> None:
        asked = self._asked(message, "generate", "load_model")
        if asked["t"] == "load_model":
            assert message["phase"] == "loading"
        else:
            assert 0 <= message["image"] < len(self._accepted[message["id"]]["seeds"])
        assert 0 <= message["step"] <= max(message["steps"], 0)

    def _on_preview(self, message: Message) -> None:
        assert self._asked(message, "generate")["preview"] is True
        assert message["id"] in self._accepted
        assert message["data"][:3] == b"\xff\xd8\xff"

    def _on_image(self, message: Message) -> None:
        self._asked(message, "generate")
        accepted, files = self._accepted[message["id"]], self.files[message["id"]]
        have = files.setdefault(message["index"], b"")
        assert list(files) == list(range(message["index"] + 1))
        assert message["offset"] == len(have)
        assert 1 <= len(message["data"]) <= 4 * 1024 * 1024
        files[message["index"]] = have + message["data"]
        for field in ("format", "width", "height"):
            assert message[field] == accepted[field]
        assert message["seed"] == accepted["seeds"][message["index"]]
        if len(files[message["index"]]) == message["size"]:
            assert hashlib.sha256(files[message["index"]]).hexdigest() == message["sha256"]

    def _on_done(self, message: Message) -> None:
        asked = self._asked(message, "generate", "load_model", "unload_model")
        if asked["t"] == "generate":
            assert len(self.files[message["id"]]) == len(self._accepted[message["id"]]["seeds"])
            assert message["parameters"] and message["timings"]
        self._end(message)

    def _on_error(self, message: Message) -> None:
        # One sentence without a path.
        assert message["message"] and not re.search(r"(^|\s)/|\n", message["message"])
        if message["terminal"] and message["id"] in self.asked:
            self._end(message)

    def _on_models(self, message: Message) -> None:
        if self._asked(message, "models", "load_model", "unload_model")["t"] == "models":
            self._end(message)

    def _on_other(self, message: Message) -> None:
        assert message["t"] in ("heartbeat", "ready", "log"), message


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    client = Client()
    try:
        assert client.hear()["phase"] == "starting"
        client.send({"t": "hello", "v": 1, "config": {}})
        client.until("ready")
        yield client
        # Nobody is left waiting at the end.
        assert client.asked == {}
        client.send({"t": "shutdown"})
        assert client.process.wait() == 0
    finally:
        client.process.kill()


def generate(id: str, **fields: Any) -> Message:
    return {"t": "generate", "id": id, "prompt": "a cat", "seed": 1, "width": 64, "height": 64} | fields


def test_a_request_is_answered_as_it_is_written(client: Client) -> None:
    done = client.answer(**generate("two", num_images=2, steps=4, preview=True, seed=2**63 - 1))
    assert done["t"] == "done" and set(done) >= {"model", "parameters", "timings", "notices"}
    assert set(done["timings"]) == {"queue", "load", "denoise", "decode", "encode", "total"}
    assert set(done["parameters"]) == {
        *("prompt", "negative_prompt", "model", "width", "height", "rendered_width", "rendered_height"),
        *("steps", "guidance_scale", "scheduler", "seed", "seeds", "environment"),
    }
    assert done["parameters"]["seeds"] == [2**63 - 1, 0]
    assert set(done["parameters"]["environment"]) == {
        *("starweave_image", "python", "torch", "diffusers", "transformers"),
        *("device", "dtype", "revision", "checksum"),
    }
    # The name of its scheduler may be asked for as it is.
    again = client.answer(
        **generate("again", steps=4, scheduler=done["parameters"]["scheduler"], seed=2**63 - 1)
    )
    assert again["t"] == "done"
    assert client.files["again"][0] == client.files["two"][0]


def test_further_parameters_are_those_of_variations_and_of_pictures_that_begin_from_one(
    client: Client,
) -> None:
    done = client.answer(**generate("varied", steps=2, variation_strength=0.5, variation_seed=9))
    assert (done["parameters"]["seed"], done["parameters"]["variation_seed"]) == (1, 9)
    image = client.files["varied"][0]
    done = client.answer(**generate("from-image", steps=4, image=image, mask=image, strength=0.5))
    extra = {name: done["parameters"][name] for name in ("task", "strength", "image_sha256", "mask_sha256")}
    digest = hashlib.sha256(image).hexdigest()
    assert extra == {"task": "inpaint", "strength": 0.5, "image_sha256": digest, "mask_sha256": digest}


def test_an_id_in_use_is_refused_to_all_others_and_what_runs_goes_on(client: Client) -> None:
    client.ask(**generate("held", steps=100, num_images=16))
    client.until("accepted", id="held")
    for message, kind, field in [
        (generate("held"), "invalid_request", "id"),
        ({"t": "load_model", "id": "held", "model": "starweave/tiny"}, "invalid_request", "id"),
        ({"t": "unload_model", "id": "held", "model": "starweave/tiny"}, "invalid_request", "id"),
        ({"t": "models", "id": "held"}, "invalid_request", "id"),
        (generate("held", width=250), "invalid_request", "width"),
        ({"t": "load_model", "id": "held"}, "invalid_request", "model"),
        ({"t": "paint", "id": "held"}, "unknown_message", "t"),
        ({"t": "cancel", "id": "held", "g": GENERATION + 1}, "wrong_generation", "g"),
    ]:
        client.send(message)
        error = client.until("error")
        assert (error["id"], error["kind"], error["field"]) == ("held", kind, field)
        assert error["terminal"] is False and error["retryable"] is False
    beat = client.until("heartbeat")
    assert [running["id"] for running in beat["running"]] == ["held"]
    client.until("progress", id="held")
    client.send({"t": "cancel", "id": "held"})
    error = client.until("error")
    assert (error["id"], error["kind"], error["terminal"]) == ("held", "cancelled", True)
    assert client.answer(**generate("held", steps=1))["t"] == "done"


def test_an_operation_holds_its_id_too(client: Client) -> None:
    assert client.answer(t="unload_model", id="away", model="starweave/tiny")["t"] == "done"
    client.ask(t="load_model", id="op", model="starweave/tiny")
    client.send(
        {"t": "models", "id": "op"},
        generate("op"),
        {"t": "unload_model", "id": "op", "model": "starweave/tiny"},
    )
    for _ in range(3):
        error = client.until("error")
        assert (error["id"], error["field"], error["terminal"]) == ("op", "id", False)
    last = client.until("done", id="op")
    assert "parameters" not in last or last["parameters"] is None
    missing = client.answer(t="unload_model", id="op", model="nobody/nothing")
    assert (missing["t"], missing["kind"], missing["terminal"]) == ("error", "model_not_found", True)


def test_what_models_holds(client: Client) -> None:
    [ready] = [message for message in client.heard if message["t"] == "ready"]
    models = client.answer(t="models", id="m")["models"]
    assert [card["id"] for card in models] == [card["id"] for card in ready["catalog"]]
    assert all(set(card) == set(models[0]) for card in models)


@pytest.mark.parametrize(
    "body",
    [
        b"\x82\xa1t\xa6models\xa2id\xa2\xc3\x28",
        b"\x82\xa1t\xa6models\xa1\xff\xa1x",
        b"\x83\xa1t\xa6models\xa2id\xa1a\xa1x\xdd" + (200_000).to_bytes(4, "big") + b"\xc0" * 200_000,
        b"\x83\xa1t\xa6models\xa2id\xa1a\xa1x" + b"\x91" * 40 + b"\xc0",
        b"\x93\x01\x02\x03",
    ],
    ids=["text that is no UTF-8", "a key that is no UTF-8", "200,000 nulls", "40 lists", "a list"],
)
def test_a_frame_that_is_none_is_told_of_and_the_next_one_is_taken(client: Client, body: bytes) -> None:
    client.process.send_body(body)
    error = client.until("error")
    assert (error["id"], error["kind"], error["terminal"]) == (None, "invalid_frame", True)
    assert client.answer(t="models", id="next")["t"] == "models"


def test_what_is_refused_has_its_end_and_leaves_its_id_free(client: Client) -> None:
    for _ in range(2):
        error = client.answer(**generate("wrong", width=250))
        assert (error["kind"], error["field"], error["terminal"]) == ("invalid_request", "width", True)
        error = client.answer(**generate("wrong", scheduler="brush"))
        assert (error["kind"], error["field"], error["terminal"]) == ("invalid_request", "scheduler", True)
    client.send({"t": "cancel", "id": "nobody"})
    assert client.answer(t="models", id="wrong")["t"] == "models"


def ends(*messages: Message, arguments: tuple[str, ...] = (), raw: bytes = b"", close: bool = False) -> int:
    client = Client(*arguments)
    try:
        client.send(*messages)
        client.process.send_bytes(raw)
        if close:
            client.process.close_input()
        code: int = client.process.wait(timeout=120)
        return code
    except BrokenPipeError:
        return client.process.wait(timeout=120)
    finally:
        client.process.kill()


def hello(**config: Any) -> Message:
    return {"t": "hello", "v": 1, "config": config}


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (0, {"close": True}),
        (0, {"messages": [{"t": "shutdown"}]}),
        (64, {"arguments": ("--paint",)}),
        (64, {"arguments": ("--log-socket", "/nonexistent/socket")}),
        (65, {"raw": bytes(4)}),
        (65, {"raw": b"\xff" * 4}),
        (66, {"messages": [hello() | {"v": 2}]}),
        (66, {"messages": [hello(capacity=0)]}),
        (69, {"messages": [hello(device="cuda:99")]}),
        pytest.param(
            69,
            {
                "messages": [
                    hello(models=[{"id": "local/x", "path": "/nonexistent"}], default_model="local/x")
                ]
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_how_it_ends_is_in_its_exit_code(code: int, how: dict[str, Any]) -> None:
    messages = how.pop("messages", [])
    assert ends(*messages, **how) == code


def test_without_its_descriptors_it_is_no_port() -> None:
    command = [sys.executable, str(RUN), "port"]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 64 and "descriptor 3" in ended.stderr
