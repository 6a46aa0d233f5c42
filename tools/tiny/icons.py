"""Vector icons of two npm packages, rendered once into a memory-mapped cache.

The packages are fetched at exact versions with `npm pack` and checked against their digests; nothing of them is part
of this repository.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

EDGE = 128
"""Height and width in pixels of a rendered icon."""

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Package:
    """An npm package at an exact version; `sha256` is the digest of its tarball."""

    name: str
    version: str
    sha256: str


STYLES: Mapping[str, Package] = {
    "flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "glossy": Package(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
}
"""The style words of captions and the package whose icons have that style."""

LABELS = Package(
    "emojibase-data", "16.0.3", "cab288279075778f15b37f3ca60dfb17759af6fe29758e07338e248879991689"
)
"""Tags of the icons, in English."""

# Things that both packages lack, drawn for this model on 128 x 128 units.
_OWN = Path(__file__).with_name("own.svg.json")

# Skin tones differ in nothing that captions tell; the plain picture stands for all.
_TONE = re.compile(r"-skin-tone|-tone\d|(?<!traffic)-(dark|light|medium)(-(dark|light|medium))*$")


@dataclass(frozen=True)
class Icons:
    """All icons: `pixels` (N, EDGE, EDGE, 4) uint8, RGB and alpha (not multiplied); `rows` finds (style, key)."""

    pixels: Pixels
    rows: Mapping[tuple[str, str], int]

    def __getitem__(self, place: tuple[str, str]) -> Pixels:
        found: Pixels = self.pixels[self.rows[place]]
        return found


def fetch(package: Package, cache: Path) -> Path:
    """Path of the package's tarball in `cache`, fetched there if it is missing.

    Raises `RuntimeError` when npm is missing, fails, or delivers something else.
    """
    stem = package.name.replace("@", "").replace("/", "-")
    tarball = cache / f"{stem}-{package.version}.tgz"
    if not tarball.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError("npm is needed to fetch the icons")
        cache.mkdir(parents=True, exist_ok=True)
        wanted = f"{package.name}@{package.version}"
        command = [npm, "pack", "--silent", "--pack-destination", str(cache), wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        if done.returncode != 0:
            raise RuntimeError(f"npm pack {wanted} failed: {done.stderr.strip()}")
    if hashlib.sha256(tarball.read_bytes()).hexdigest() != package.sha256:
        raise RuntimeError(f"{tarball} is not {package.name} {package.version}: remove it")
    return tarball


def load_tags(cache: Path) -> dict[str, tuple[str, ...]]:
    """Key of an icon → single words that go with what it shows."""
    with tarfile.open(fetch(LABELS, cache)) as tar:
        member = tar.extractfile("package/en/data.json")
        assert member is not None
        records = json.load(member)
    tags = {}
    for record in records:
        label = record["label"].lower().replace("\u2019", "").replace("'", "").replace("\u00f1", "n")
        key = re.sub("[^a-z0-9]+", "-", label).strip("-")
        tags[key] = tuple(tag for tag in record.get("tags", ()) if re.fullmatch("[a-z]{3,}", tag))
    return tags


def _drawings(package: Package, cache: Path) -> dict[str, str]:
    """Key → SVG document of every icon without a skin tone."""
    with tarfile.open(fetch(package, cache)) as tar:
        member = tar.extractfile("package/icons.json")
        assert member is not None
        found = json.load(member)
    size = found["width"]
    own = json.loads(_OWN.read_text())
    scale = size / 128
    found["icons"] |= {
        key: {"body": f'<g transform="scale({scale})">{body}</g>'} for key, body in own.items()
    }
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {size} {size}">'
    )
    return {
        key: f"{head}{icon['body']}</svg>"
        for key, icon in sorted(found["icons"].items())
        if not _TONE.search(key)
    }


def _render(svg: str) -> Pixels:
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=EDGE, height=EDGE))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def load(cache: Path) -> Icons:
    """The icons kept in `cache`, fetched and rendered now unless they are there."""
    pixels_path, index_path = cache / "icons.npy", cache / "icons.json"
    versions = {style: package.sha256 for style, package in STYLES.items()}
    versions["own"] = hashlib.sha256(_OWN.read_bytes()).hexdigest()
    if index_path.exists():
        index = json.loads(index_path.read_text())
        if index["versions"] == versions:
            rows = {(style, key): row for row, (style, key) in enumerate(index["rows"])}
            return Icons(np.load(pixels_path, mmap_mode="r"), rows)
    drawings = {
        (style, key): svg
        for style, package in STYLES.items()
        for key, svg in _drawings(package, cache).items()
    }
    pixels = np.stack([_render(svg) for svg in drawings.values()])
    np.save(pixels_path, pixels)
    # The index is written last: it is what says that the cache is whole.
    index_path.write_text(json.dumps({"versions": versions, "rows": list(drawings)}))
    return load(cache)
