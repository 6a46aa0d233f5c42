"""The package as pip installs it: built from a copy of the tree, unpacked elsewhere, used without Elixir."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "priv", source / "priv", ignore=shutil.ignore_patterns("__pycache__", ".*_cache", "*.egg-info")
    )
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_it_has_the_command_the_catalog_and_the_embedded_model(site: Path) -> None:
    entry_points = configparser.ConfigParser()
    entry_points.read(next(site.glob("*.dist-info")) / "entry_points.txt")
    assert dict(entry_points["console_scripts"]) == {"starweave-image": "starweave_image.__main__:main"}
    assert (site / "starweave_image/weights/catalog.json").is_file()
    assert (site / "starweave_image/py.typed").is_file()
    assert (site / "starweave_image/models/starweave-tiny/model_index.json").is_file()
    assert not list(site.glob("bootstrap*"))


def test_it_requires_what_the_sources_name(site: Path) -> None:
    metadata = (next(site.glob("*.dist-info")) / "METADATA").read_text()
    required = [
        line
        for line in (ROOT / "priv/python/requirements.txt").read_text().splitlines()
        if line[:1] not in ("", "#")
    ]
    for requirement in required:
        assert f"Requires-Dist: {requirement}\n" in metadata
    assert "Requires-Python: >=3.10\n" in metadata
    assert 'Requires-Dist: openvino>=2026.0; extra == "openvino"\n' in metadata


@pytest.mark.slow
def test_it_generates_without_elixir(site: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "starweave_image", "generate", "a red apple"]
    command += ["--steps", "2", "--seed", "1", "--out", "apple.png"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "apple.png") as image:
        image.load()
        assert image.format == "PNG"
