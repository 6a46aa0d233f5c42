"""The command line as a person without Elixir uses it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import PACKAGE, Tracked
from PIL import Image
from starweave_image.pictures import images


def run(
    tracked: Tracked, command: str, *arguments: str, cwd: Path, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "starweave_image", command, *options, *arguments],
        env=tracked.env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_generate_writes_the_image(tracked: Tracked, tmp_path: Path) -> None:
    result = run(tracked, "generate", "a red apple", "--out", "apple.webp", "--steps", "2", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "apple.webp\n"), result.stderr
    with Image.open(tmp_path / "apple.webp") as image:
        assert image.format == "WEBP"
    assert [path.name for path in tmp_path.iterdir()] == ["apple.webp"]
    assert re.search(r"^seed \d+$", result.stderr, re.MULTILINE)
    assert re.search(r"^Note: Rendered at 64x64 and enlarged", result.stderr, re.MULTILINE)


@pytest.mark.slow
def test_generate_starts_from_an_image(tracked: Tracked, tmp_path: Path) -> None:
    Image.new("RGB", (96, 64), "red").save(tmp_path / "red.png")
    arguments = ["--image", "red.png", "--strength", "0.5", "--steps", "4", "--seed", "1"]
    result = run(tracked, "generate", "a red apple", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "image.png\n"), result.stderr
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (96, 64)


@pytest.mark.slow
def test_the_preview_is_a_file_until_the_end(tracked: Tracked, tmp_path: Path) -> None:
    arguments = ["--out", "apple.png", "--preview", "--steps", "4"]
    result = run(tracked, "generate", "a red apple", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "apple.png\n"), result.stderr
    assert result.stderr.count("Preview in apple.preview.jpg, until the end\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["apple.png"]


def test_several_images_are_numbered(tracked: Tracked, tmp_path: Path) -> None:
    arguments = ["--num-images", "2", "--steps", "1", "--seed", "7", "--variation-strength", "0.3"]
    result = run(tracked, "generate", "a red apple", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "image-1.png\nimage-2.png\n"), result.stderr
    assert "seed 7\n" in result.stderr and "seed 8\n" in result.stderr
    record = images.read((tmp_path / "image-2.png").read_bytes())
    assert record is not None
    assert (record["seed"], record["variation_seed"], record["variation_strength"]) == (7, 8, 0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "250"], "width must be a multiple of 8 from 64 to 4096, got 250"),
        (["--width", "wide"], 'width must be a multiple of 8 from 64 to 4096, got "wide"'),
        (["--effort", "some"], 'effort must be one of draft, standard, high, got "some"'),
        (["--device", "abacus"], 'device must be one of auto, cpu, cuda, cuda:N, mps, xpu, got "abacus"'),
        (["--image", "nothing.png"], "image cannot be read: No such file or directory"),
        (["--out", "nowhere/image.png"], "out must be in a folder that exists, got nowhere/image.png"),
        (["--out", "x.gif"], "out must end in .png, .jpg, .jpeg or .webp, got .gif"),
        (["--out", "x.PNG.tmp"], "out must end in .png, .jpg, .jpeg or .webp, got .tmp"),
        (["--out", "-"], "out must name a file, not -"),
        (["--out", "."], "out must be a file, . is a folder"),
        (["--format", "gif"], 'format must be one of png, jpeg, webp, got "gif"'),
        (["--model", "./nowhere"], "model must be a model's id or a folder that exists, got ./nowhere"),
        (["--image", "/dev/zero"], "image must be a PNG, JPEG or WebP file of at most 12 MiB"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    tracked: Tracked, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run(tracked, "generate", "a red apple", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert result.stderr.startswith(f"starweave-image: {message}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [pytest.param("my model", marks=pytest.mark.slow), "模型", b"latin \xe9"])
def test_a_folder_of_any_name_is_a_model(tracked: Tracked, tmp_path: Path, name: str | bytes) -> None:
    folder = tmp_path / os.fsdecode(name)
    shutil.copytree(PACKAGE.parent / "models" / "starweave-tiny", folder)
    arguments = [f"--model={folder}", "--out", "x.png", "--steps", "1"]
    result = run(tracked, "generate", "--", "-a red apple", cwd=tmp_path, options=arguments)
    if isinstance(name, bytes):
        # What reads weights takes no other.
        said = "starweave-image: model must be a folder whose path is UTF-8\n"
        assert (result.returncode, result.stderr) == (2, said)
    else:
        assert (result.returncode, result.stdout) == (0, "x.png\n"), result.stderr


LOST = ("| true", "> /dev/full", ">&-", "2>&-", "<&- >&- 2>&-", "2> /dev/full")


@pytest.mark.parametrize(
    ("arguments", "lost"),
    [
        *(pytest.param("generate 'a red apple' --steps 1", lost, marks=pytest.mark.slow) for lost in LOST),
        *(("models list", lost) for lost in LOST),
        *(
            (command, "> /dev/full")
            for command in ("models --json", "doctor --device cpu", "generate --help")
        ),
    ],
)
def test_a_lost_stream_is_no_failure(tracked: Tracked, tmp_path: Path, arguments: str, lost: str) -> None:
    line = f'"$0" -m starweave_image {arguments} {lost}; echo "${{PIPESTATUS[0]}}" >> code'
    result = subprocess.run(
        ["bash", "-c", line, sys.executable],
        env=tracked.env,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (tmp_path / "code").read_text() == "0\n", result.stderr
    assert (tmp_path / "image.png").exists() == ("apple" in arguments)
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr
    told = "what was printed is lost: No space left on device" in result.stderr
    assert told == (lost == "> /dev/full")


@pytest.mark.slow
def test_a_picture_goes_to_the_standard_output(tracked: Tracked, tmp_path: Path) -> None:
    arguments = ["generate", "a red apple", "--steps", "1", "--out", "/dev/stdout", "--format", "jpeg"]
    command = [sys.executable, "-m", "starweave_image", *arguments]
    for stdout in (subprocess.PIPE, (tmp_path / "x.jpg").open("wb")):
        result = subprocess.run(
            command, env=tracked.env, cwd=tmp_path, stdout=stdout, stderr=subprocess.PIPE, timeout=300
        )
        assert result.returncode == 0, result.stderr
        data = result.stdout if stdout == subprocess.PIPE else (tmp_path / "x.jpg").read_bytes()
        assert (data[:3], data[-2:]) == (b"\xff\xd8\xff", b"\xff\xd9")
    assert [path.name for path in tmp_path.iterdir()] == ["x.jpg"]


def test_models_lists_the_embedded_one(tracked: Tracked, tmp_path: Path) -> None:
    result = run(tracked, "models", "--json", cwd=tmp_path)
    states = {card["id"]: card["state"] for card in json.loads(result.stdout)}
    assert states["starweave/tiny"] == "available"


def test_doctor_finds_everything(tracked: Tracked, tmp_path: Path) -> None:
    result = run(tracked, "doctor", "--json", "--device", "cpu", cwd=tmp_path)
    report = json.loads(result.stdout)
    assert (result.returncode, report["problems"], report["device"]) == (0, [], "cpu")
    assert all(report["packages"].values())


def test_a_port_imports_no_package_before_its_descriptors_are_in_order(
    tracked: Tracked, tmp_path: Path
) -> None:
    # One that is native may start threads, which the watchdog must not inherit.
    command = [sys.executable, "-X", "importtime", "-m", "starweave_image", "port"]
    result = subprocess.run(
        command, env=tracked.env, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 64 and "descriptor 3 is not open" in result.stderr
    assert "starweave_image.doors.process" in result.stderr
    assert not re.search(r"\| +(msgspec|msgpack|psutil)$", result.stderr, re.MULTILINE)


def test_doctor_without_packages_says_which(tmp_path: Path) -> None:
    bare = [sys.executable, "-S", "-m", "starweave_image", "doctor"]
    environment = {"PYTHONPATH": str(PACKAGE)}
    result = subprocess.run(bare, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "The Python package torch is missing." in result.stdout
