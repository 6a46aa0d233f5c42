"""The command line as a person without Elixir uses it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PACKAGE, Tracked
from PIL import Image
from starweave_image import images


def run(tracked: Tracked, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "starweave_image", *arguments],
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


def test_generate_starts_from_an_image(tracked: Tracked, tmp_path: Path) -> None:
    Image.new("RGB", (96, 64), "red").save(tmp_path / "red.png")
    arguments = ["--image", "red.png", "--strength", "0.5", "--steps", "4", "--seed", "1"]
    result = run(tracked, "generate", "a red apple", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "image.png\n"), result.stderr
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (96, 64)


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
        (["--device", "abacus"], 'device must be one of auto, cpu, cuda, cuda:N, mps, xpu, got "abacus"'),
        (["--image", "nothing.png"], "image cannot be read: No such file or directory"),
        (["--out", "nowhere/image.png"], "out must be in a folder that exists, got nowhere/image.png"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    tracked: Tracked, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run(tracked, "generate", "a red apple", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (2, f"starweave-image: {message}\n")
    assert not list(tmp_path.iterdir())


def test_models_lists_the_embedded_one(tracked: Tracked, tmp_path: Path) -> None:
    result = run(tracked, "models", "--json", cwd=tmp_path)
    states = {card["id"]: card["state"] for card in json.loads(result.stdout)}
    assert states["starweave/tiny"] == "available"


def test_doctor_finds_everything(tracked: Tracked, tmp_path: Path) -> None:
    result = run(tracked, "doctor", "--json", "--device", "cpu", cwd=tmp_path)
    report = json.loads(result.stdout)
    assert (result.returncode, report["problems"], report["device"]) == (0, [], "cpu")
    assert all(report["packages"].values())


def test_doctor_without_packages_says_which(tmp_path: Path) -> None:
    bare = [sys.executable, "-S", "-m", "starweave_image", "doctor"]
    environment = {"PYTHONPATH": str(PACKAGE)}
    result = subprocess.run(bare, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "The Python package torch is missing." in result.stdout
