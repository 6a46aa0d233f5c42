"""Downloads, against a hub of our own on the loopback interface that serves real files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import checkpoints
import pytest

PACKAGE = Path(__file__).parents[2] / "priv" / "python"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Runs in a process of its own: the hub's address is read when its client is imported.
CLIENT = """
import json, sys
sys.path[:0] = [{package!r}, {tests!r}]
from engines import Bench
from starweave_image import wire
known = json.loads(sys.argv[1])
entries = [wire.ModelEntry(id=id) for id in known["models"] if known["configured"]]
bench = Bench(models=entries, offline=known["offline"]).start()
answers = {{}}
for model in known["models"]:
    end = bench.generate(model=model, steps=1, seed=1)
    if isinstance(end, wire.Done):
        answers[model] = [end.parameters["width"], end.parameters["environment"]["revision"]]
    else:
        answers[model] = [end.kind, end.message]
states = {{card.id: card.state for card in bench.engine.models()}}
print(json.dumps([answers, states]))
"""


class Hub:
    def __init__(self, repositories: dict[str, Path]) -> None:
        self.asked: list[str] = []
        self.status: dict[str, tuple[int, dict[str, str]]] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                hub.asked.append(path)
                for repository, (status, headers) in hub.status.items():
                    if repository in path:
                        return self.answer(status, b"", headers)
                for repository, folder in repositories.items():
                    if path.startswith((f"/api/models/{repository}", f"/{repository}/")):
                        return self.serve(repository, folder, path)
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

            def serve(self, repository: str, folder: Path, path: str) -> None:
                files = sorted(file for file in folder.rglob("*") if file.is_file())
                names = [str(file.relative_to(folder)) for file in files]
                rest = path.removeprefix(f"/api/models/{repository}")
                if rest.startswith("/tree/"):
                    tree = [
                        {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest(file)}
                        for name, file in zip(names, files, strict=True)
                    ]
                    return self.answer(200, json.dumps(tree).encode(), {})
                if path.startswith("/api/"):
                    info = {
                        "_id": "1",
                        "id": repository,
                        "sha": COMMIT,
                        "siblings": [{"rfilename": name} for name in names],
                    }
                    return self.answer(200, json.dumps(info).encode(), {})
                file = folder / path.removeprefix(f"/{repository}/resolve/").partition("/")[2]
                if not file.is_file():
                    return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                headers = {"ETag": f'"{digest(file)}"', "X-Repo-Commit": COMMIT}
                return self.answer(200, file.read_bytes(), headers)

            def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    good = checkpoints.stable_diffusion(tmp_path / "good")
    (good / "unet/diffusion_pytorch_model.bin").write_bytes(b"not for us")
    (good / "extra.ckpt").write_bytes(b"not for us")
    coded = checkpoints.stable_diffusion(tmp_path / "coded")
    index = json.loads((coded / "model_index.json").read_text())
    (coded / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Mine"]}))
    pickled = checkpoints.pickled(tmp_path / "pickled")
    names = {"good": good, "pickled": pickled, "coded": coded, "empty": tmp_path / "empty"}
    hub = Hub({f"owner/{name}": folder for name, folder in names.items()})
    yield hub
    hub.server.shutdown()


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Any:
    """Asks for one picture of each model; what came of it by model, and the state of each card."""

    def run(*models: str, offline: bool = False, configured: bool = True) -> Any:
        known = {"models": models, "offline": offline, "configured": configured}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        script = CLIENT.format(package=str(PACKAGE), tests=str(Path(__file__).parent))
        ran = subprocess.run(
            [sys.executable, "-c", script, json.dumps(known)],
            env=environment
            | {
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_XET": "1",
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            timeout=600,
        )
        print(ran.stderr.decode())
        assert ran.returncode == 0
        answers, states = json.loads(ran.stdout.splitlines()[-1])
        assert str(tmp_path) not in str(answers) and "127.0.0.1" not in str(answers)
        return answers, states

    return run


def test_a_configured_model_is_downloaded_once_and_without_pickles(
    hub: Hub, client: Any, tmp_path: Path
) -> None:
    answers, states = client("owner/good")
    assert answers == {"owner/good": [64, COMMIT]}
    assert states["owner/good"] == "loaded"
    fetched = [path.rpartition("/")[2] for path in hub.asked]
    assert "diffusion_pytorch_model.safetensors" in fetched
    assert "diffusion_pytorch_model.bin" not in fetched and "extra.ckpt" not in fetched
    assert (tmp_path / "hf/hub/models--owner--good").is_dir()
    hub.asked.clear()
    assert client("owner/good", offline=True)[0] == answers
    assert hub.asked == []


def test_what_the_hub_will_not_give_is_one_clear_sentence(hub: Hub, client: Any) -> None:
    hub.status["owner/gated"] = (403, {"X-Error-Code": "GatedRepo"})
    hub.status["owner/moved"] = (404, {"X-Error-Code": "RevisionNotFound"})
    hub.status["owner/down"] = (503, {})
    wanted = {
        "owner/pickled": ("model_load_failed", "pickled weights only"),
        "owner/coded": ("model_load_failed", "code of its own"),
        "owner/empty": ("model_load_failed", "no model_index.json"),
        "owner/nobody": ("model_not_found", "is not on the hub"),
        "owner/gated": ("model_load_failed", "set HF_TOKEN"),
        "owner/moved": ("model_not_found", "no such revision"),
        "owner/down": ("model_load_failed", "the hub cannot be reached"),
    }
    answers, states = client(*wanted)
    for model, (kind, words) in wanted.items():
        assert answers[model][0] == kind and words in answers[model][1]
        assert states[model] == "remote"
    assert not [path for path in hub.asked if path.endswith((".bin", ".ckpt", ".safetensors", ".py"))]


def test_a_request_for_what_is_not_configured_asks_the_hub_nothing(hub: Hub, client: Any) -> None:
    answers, _ = client("owner/good", configured=False)
    assert answers["owner/good"][0] == "model_not_found" and hub.asked == []
