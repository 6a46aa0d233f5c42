"""Where images go, by the cases of the contract."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import PACKAGE
from contract import load
from starweave_image.doors import output
from starweave_image.errors import ImageError

CASES = load("outputs.jsonl")
FORMATS = [case for case in CASES if "format" in case]
FILES = [case for case in CASES if "before" in case]
# The image, by its size.
DATA = {3: b"new", 200_000: b"n" * 200_000}


def attempt(out: str, count: int, preview: bool, data: bytes) -> dict[str, str | None]:
    """Plans and writes, as the command line does."""
    try:
        plan = output.plan(out, count, preview)
    except ImageError as error:
        assert (error.kind, error.field) == ("invalid_request", "out")
        return {"refusal": error.message, "error": None}
    try:
        for path in plan.paths:
            output.write(path, data)
    except OSError as error:
        return {"refusal": None, "error": errno.errorcode[error.errno or 0].lower()}
    return {"refusal": None, "error": None}


def elsewhere(case: dict[str, Any], out: str, data: bytes) -> dict[str, str | None]:
    """The same in a process with less rights or room."""
    command = [sys.executable, __file__, out, str(case.get("count", 1)), str(len(data))]
    if case.get("plain_user") and os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    if "room" in case:
        command = ["prlimit", f"--fsize={case['room']}:unlimited", *command]
    environment = {**os.environ, "PYTHONPATH": f"{PACKAGE}:{Path(__file__).parent}"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    said: dict[str, str | None] = json.loads(result.stdout)
    return said


@pytest.mark.parametrize("case", FORMATS, ids=[case["name"] for case in FORMATS])
def test_format(case: dict[str, Any]) -> None:
    if case["format"] in ("png", "jpeg", "webp"):
        assert output.format_of(case["out"]) == case["format"]
    else:
        with pytest.raises(ImageError) as raised:
            output.format_of(case["out"])
        assert raised.value.message == f"out {case['format']}"


@pytest.mark.parametrize("case", FILES, ids=[case["name"] for case in FILES])
def test_file(case: dict[str, Any], tmp_path: Path) -> None:
    case = json.loads(json.dumps(case).replace("FOLDER", str(tmp_path)).replace("FULL", "n" * 251))
    before, expected = case["before"], case["before"] | case["after"]
    for name, entry in before.items():
        make(tmp_path / name, entry)
    close(tmp_path, before)
    out = case["out"] if case["out"] == "-" else os.path.join(tmp_path, case["out"])
    data = DATA[200_000 if "error" in case else 3]
    reader = Reader(tmp_path / "x.png") if "read" in case else None
    if case.get("plain_user") or "room" in case:
        said = elsewhere(case, out, data)
    else:
        said = attempt(out, case.get("count", 1), case.get("preview", False), data)
    refusal = case["refusal"] and f"out {case['refusal']}"
    assert said == {"refusal": refusal, "error": case.get("error")}
    # Nothing else is left behind.
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == set(expected)
    for name, entry in expected.items():
        check(tmp_path / name, entry, before)
    if reader:
        assert reader.got() == case["read"].encode()


class Reader(threading.Thread):
    """Reads a pipe to its end."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path, self.bytes = path, b""
        self.start()

    def run(self) -> None:
        self.bytes = self.path.read_bytes()

    def got(self) -> bytes:
        self.join(60)
        return self.bytes


def make(path: Path, entry: Any) -> None:
    match entry:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(os.path.relpath(path))
        case {"text": content, "mode": mode}:
            path.write_text(content)
            path.chmod(int(mode, 8))
        case {"folder": _}:
            path.mkdir()
        case {"link": target}:
            path.symlink_to(target)
        case {"same": target}:
            os.link(path.parent / target, path)
        case content:
            path.write_text(content)


def close(folder: Path, entries: dict[str, Any]) -> None:
    """The modes of folders, once all is in them."""
    for name, entry in entries.items():
        if "folder" in entry:
            (folder / name).chmod(int(entry["folder"], 8))


def check(path: Path, entry: Any, before: dict[str, Any]) -> None:
    match entry:
        case "pipe":
            assert stat.S_ISFIFO(path.lstat().st_mode)
        case "socket":
            assert stat.S_ISSOCK(path.lstat().st_mode)
        case {"text": content, "mode": mode}:
            assert (path.read_text(), stat.S_IMODE(path.lstat().st_mode)) == (content, int(mode, 8))
        case {"folder": mode}:
            assert (path.is_dir(), stat.S_IMODE(path.lstat().st_mode)) == (True, int(mode, 8))
            path.chmod(0o755)
        case {"link": target}:
            assert os.readlink(path) == target
        case {"same": target}:
            assert path.read_text() == before[target]
        case content:
            assert (path.is_symlink(), path.read_text()) == (False, content)


def test_nobody_knows_the_name_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    open_file = os.open

    def remember(path: str, flags: int, *more: Any) -> int:
        names.append(os.path.basename(path))
        assert flags & os.O_EXCL
        return open_file(path, flags, *more)

    monkeypatch.setattr(os, "open", remember)
    for _ in range(20):
        output.write(str(tmp_path / "x.png"), b"new")
    assert len(set(names)) == 20
    assert max(map(len, names)) < 30


if __name__ == "__main__":
    print(json.dumps(attempt(sys.argv[1], int(sys.argv[2]), False, DATA[int(sys.argv[3])])))
