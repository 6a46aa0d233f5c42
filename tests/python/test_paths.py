"""Users without a home, folders that are not there, and an application's files beside the working folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PACKAGE, SUPPORT, Tracked

RUN = PACKAGE / "run.py"
# A user without an entry in passwd, whoever runs the tests.
UNKNOWN = (
    "import pwd, runpy, sys\n"
    "def unknown(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')\n"
    "pwd.getpwuid = unknown\n"
    "runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
)

Arrange = Callable[[dict[str, str], Path], None]


def no_home(env: dict[str, str], folder: Path) -> None:
    env.pop("HOME", None)


def empty_home(env: dict[str, str], folder: Path) -> None:
    env["HOME"] = ""


def home_that_is_not_there(env: dict[str, str], folder: Path) -> None:
    env["HOME"] = str(folder / "nobody")


def caches_that_are_files(env: dict[str, str], folder: Path) -> None:
    (folder / "file").write_text("")
    for name in ("STARWEAVE_IMAGE_CACHE", "XDG_CACHE_HOME", "HF_HOME"):
        env[name] = str(folder / "file")


def no_folder_for_temporary_files(env: dict[str, str], folder: Path) -> None:
    env["TMPDIR"] = str(folder / "nowhere")


SURROUNDINGS = [
    no_home,
    *(pytest.param(how, marks=pytest.mark.slow) for how in (empty_home, home_that_is_not_there)),
    caches_that_are_files,
    pytest.param(no_folder_for_temporary_files, marks=pytest.mark.slow),
]
COMMANDS = [
    ("doctor", 0, "Everything needed is here."),
    ("models", 0, "starweave/tiny"),
    ("models list", 0, "starweave/tiny"),
    ("port", 64, "descriptor 3 is not open"),
]


def run(
    arguments: list[str], env: dict[str, str], cwd: Path, known: bool = True
) -> subprocess.CompletedProcess[str]:
    how = [str(RUN)] if known else ["-c", UNKNOWN, str(RUN)]
    command = [sys.executable, *how, *arguments]
    return subprocess.run(
        command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )


def bare(tracked: Tracked) -> dict[str, str]:
    names = ("PATH", "HOME", "STARWEAVE_TEST_MARK", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    return {name: tracked.env[name] for name in names if name in tracked.env}


@pytest.mark.parametrize("command,code,words", COMMANDS, ids=[command for command, _, _ in COMMANDS])
def test_a_user_without_a_home_or_a_name_can_use_every_command(
    tracked: Tracked, tmp_path: Path, command: str, code: int, words: str
) -> None:
    env = bare(tracked)
    no_home(env, tmp_path)
    result = run(command.split(), env, tmp_path, known=False)
    assert result.returncode == code, result.stderr
    assert words in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arrange", SURROUNDINGS)
def test_a_picture_is_made_wherever_nothing_can_be_kept(
    tracked: Tracked, tmp_path: Path, arrange: Arrange
) -> None:
    env = bare(tracked)
    arrange(env, tmp_path)
    arguments = ["generate", "a red apple", "--steps", "1", "--width", "64", "--height", "64"]
    result = run([*arguments, "--out", str(tmp_path / "apple.png")], env, tmp_path, known=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "apple.png").read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_working_folder_that_was_removed_is_none_that_is_needed(tracked: Tracked, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script = f'cd "{tmp_path}/gone" && rmdir "{tmp_path}/gone" && exec "$@"'
    command = ["/bin/sh", "-c", script, "sh", sys.executable, str(RUN), "doctor"]
    result = subprocess.run(command, env=bare(tracked), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


# Its own interpreter may be started in any folder, with any of the application's variables.


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """An application's folder with files that are called as modules are, and end whoever runs them."""
    folder = tmp_path / "application"
    for name in (
        "queue.py",
        "torch/__init__.py",
        "starweave_image/__init__.py",
        "msgspec.py",
        "usercustomize.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(
            "import os\nos.write(2, b'a file of the application was run')\nos._exit(99)\n"
        )
    return folder


def test_the_files_of_the_application_are_not_run(tracked: Tracked, trap: Path) -> None:
    result = run(["doctor", "--device", "cpu"], bare(tracked), trap)
    assert result.returncode == 0, result.stderr


def test_nor_by_what_libraries_start(tracked: Tracked, trap: Path) -> None:
    # The package as it is, with a module in it that starts another interpreter as libraries do.
    copy = trap.parent / "python"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "starweave_image" / "__main__.py").write_text(
        "import subprocess, sys\n"
        "def main():\n"
        "    for how in (['-c', 'import queue'], ['-m', 'queue']):\n"
        "        code = subprocess.run([sys.executable, *how]).returncode\n"
        "        if code: sys.exit(code)\n"
    )
    command = [sys.executable, str(copy / "run.py")]
    result = subprocess.run(command, env=bare(tracked), cwd=trap, capture_output=True, text=True, timeout=60)
    safe = sys.version_info >= (3, 11)
    assert result.returncode == (0 if safe else 99)


def test_nothing_is_written_beside_the_package(tracked: Tracked, tmp_path: Path) -> None:
    copy = tmp_path / "python"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(copy.rglob("*"))
    command = [sys.executable, str(copy / "run.py"), "models", "list"]
    result = subprocess.run(command, env=bare(tracked), cwd=tmp_path, capture_output=True, timeout=300)
    assert result.returncode == 0
    assert sorted(copy.rglob("*")) == before


def test_the_folder_of_a_log_socket_is_removed_by_whoever_is_left(tracked: Tracked, tmp_path: Path) -> None:
    """Of an application that was killed before the process was connected."""
    folder = tmp_path / "starweave_image-1.1-abc"
    folder.mkdir()
    program = (
        "import os, socket, sys\n"
        "socket.socket(socket.AF_UNIX).bind(sys.argv[1])\n"
        "pipes = [os.pipe(), os.pipe()]\n"
        "ends = [os.dup(end) for end in (pipes[0][0], pipes[1][1])]\n"
        "ends = [__import__('fcntl').fcntl(end, 0, 20) for end in ends]\n"
        "os.dup2(ends[0], 3); os.dup2(ends[1], 4)\n"
        "from starweave_image.doors import process\n"
        "try: process.prepare(sys.argv[1])\n"
        "except process.NotAPort as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, str(folder / "log")]
    result = subprocess.run(
        command, env={**tracked.env}, cwd=SUPPORT, capture_output=True, text=True, timeout=60
    )
    assert "the log socket cannot be connected" in result.stdout, result.stderr
    assert not folder.exists()
