"""A hub on the loopback interface that speaks as much of the real one's HTTP as its client uses, and serves real files.

Large files are answered with a redirect to another origin, as the real hub answers with its storage's. As a program it
takes ID=FOLDER arguments, prints its address and serves until its standard input ends.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE = (".safetensors", ".bin", ".ckpt")


@dataclass
class Repository:
    """Its folders by commit, of which the last one is `main`; with a `token` it is gated."""

    commits: dict[str, Path]
    token: str | None = None

    def commit(self, revision: str) -> str | None:
        return (
            list(self.commits)[-1] if revision == "main" else revision if revision in self.commits else None
        )


@dataclass
class Hub:
    """`asked` has the path of each request, `served` the bytes of large files that were sent, by name. `errors` are
    the answers to requests whose path contains the key. After `limit` bytes of large files `at_limit` is called, and
    connections are cut."""

    repositories: dict[str, Repository]
    asked: list[str] = field(default_factory=list)
    served: dict[str, int] = field(default_factory=dict)
    errors: dict[str, tuple[int, str]] = field(default_factory=dict)
    limit: int | None = None
    at_limit: Callable[[], None] = lambda: None
    spoil: bool = False
    leaked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        handlers = [type("Handler", (kind,), {"hub": self}) for kind in (_Hub, _Storage)]
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in handlers]
        # Two hosts, not only two ports: older clients take those for one.
        hosts = zip(("127.0.0.1", "localhost"), self._servers, strict=True)
        self.url, self.storage = (f"http://{host}:{server.server_port}" for host, server in hosts)
        for server in self._servers:
            server.daemon_threads = True
            # The interval is how long `stop` waits.
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def weights_asked(self) -> list[str]:
        return [path for path in self.asked if path.endswith(_LARGE)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raise NotImplementedError

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class _Hub(_Handler):
    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.hub.asked.append(url.path)
        for part, (status, code) in self.hub.errors.items():
            if part in url.path:
                return self.answer(status, X_Error_Code=code)
        words = url.path.removeprefix("/api/models/").strip("/").split("/")
        id, question, revision, rest = "/".join(words[:2]), *(*words[2:4], "revision", "main")[:2], words[4:]
        if id not in self.hub.repositories:
            return self.answer(404, X_Error_Code="RepoNotFound")
        repository = self.hub.repositories[id]
        commit = repository.commit(revision)
        if commit is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        folder = repository.commits[commit]
        if question == "resolve":
            return self.resolve(repository, commit, folder / "/".join(rest))
        files = [_described(file, folder) for file in sorted(folder.rglob("*")) if file.is_file()]
        if question == "tree":
            return self.answer(200, json.dumps([{"type": "file", **file} for file in files]).encode())
        info: dict[str, Any] = {"id": id, "sha": commit, "gated": "auto" if repository.token else False}
        info |= {"cardData": _card(folder), "siblings": [{"rfilename": file["path"]} for file in files]}
        if "true" in parse_qs(url.query).get("blobs", []):
            for sibling, file in zip(info["siblings"], files, strict=True):
                sibling |= {"size": file["size"], "blobId": file["oid"], "lfs": file.get("lfs")}
        return self.answer(200, json.dumps(info).encode())

    def resolve(self, repository: Repository, commit: str, file: Path) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository.token and token != repository.token:
            return self.answer(403 if token else 401, X_Error_Code="GatedRepo")
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if not file.name.endswith(_LARGE):
            return self.answer(200, file.read_bytes(), ETag=f'"{git_sha1(file)}"', X_Repo_Commit=commit)
        place = f"{self.hub.storage}{file}"
        linked = {"X_Linked_Etag": f'"{sha256(file)}"', "X_Linked_Size": str(file.stat().st_size)}
        return self.answer(302, Location=place, X_Repo_Commit=commit, **linked)


class _Storage(_Handler):
    def do_GET(self) -> None:
        if "Authorization" in self.headers:
            self.hub.leaked.append(self.path)
        file = Path(self.path)
        body = bytearray(file.read_bytes())
        if self.hub.spoil:
            body[-1] ^= 1
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        part = bytes(body[start:])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        left = len(part) if self.hub.limit is None else self.hub.limit - sum(self.hub.served.values())
        sent = part[: max(left, 0)]
        self.wfile.write(sent)
        self.wfile.flush()
        name = f"{file.parent.name}/{file.name}"
        self.hub.served[name] = self.hub.served.get(name, 0) + len(sent)
        if len(sent) < len(part):
            self.hub.at_limit()
            self.close_connection = True


def git_sha1(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _described(file: Path, folder: Path) -> dict[str, Any]:
    described = {"path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": git_sha1(file)}
    if file.name.endswith(_LARGE):
        described["lfs"] = {"size": file.stat().st_size, "oid": sha256(file), "pointerSize": 134}
        # The two ways to ask name it differently.
        described["lfs"]["sha256"] = sha256(file)
    return described


def _card(folder: Path) -> dict[str, Any]:
    card = folder / "README.md"
    _, _, rest = card.read_text().partition("---\n") if card.exists() else ("", "", "")
    loaded: dict[str, Any] = yaml.safe_load(rest.partition("---\n")[0]) or {}
    return loaded


if __name__ == "__main__":
    named = (argument.split("=", 1) for argument in sys.argv[1:])
    hub = Hub({id: Repository({COMMIT: Path(folder).resolve()}) for id, folder in named})
    print(hub.url, flush=True)
    sys.stdin.read()
