"""Whether weights are what they were: damaged, replaced, pinned, and found out while they are loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from engines import Bench
from starweave_image import schema
from starweave_image.errors import ImageError
from starweave_image.weights import integrity
from starweave_image.weights.integrity import Check

SMALL: dict[str, Any] = {"model": "local/model", "width": 64, "height": 64, "steps": 2, "seed": 1}
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(checkpoint: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint(checkpoints.stable_diffusion), tmp_path / "model"))


def bench_of(folder: Path, **entry: Any) -> Bench:
    return Bench(models=[schema.ModelEntry(id="local/model", path=str(folder), **entry)]).start()


def damage(path: Path, in_secret: bool = False) -> bytes:
    """Change a bit of the last tensor; what it was. In secret, nothing else of the file tells."""
    found, whole = path.stat(), path.read_bytes()
    with path.open("r+b") as content:
        content.seek(-2, os.SEEK_END)
        content.write(bytes([whole[-2] ^ 1]))
    if in_secret:
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    return whole


def refusal(bench: Bench) -> str:
    end = bench.generate(**SMALL)
    assert isinstance(end, schema.Failed) and end.kind == "model_load_failed", end
    assert "/tmp" not in end.message
    return end.message


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed from now on."""
    names: list[str] = []
    original = integrity._hashed

    def noted(path: Path, rest: float = 0.0) -> Any:
        if not rest:
            names.append(path.parent.name)
        return original(path, rest)

    monkeypatch.setattr(integrity, "_hashed", noted)
    return names


def test_weights_are_hashed_once_and_again_when_they_may_have_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = hashed(monkeypatch)
    first = bench_of(folder).done(**SMALL)[0].parameters
    assert sorted(names) == ["text_encoder", "unet", "vae"]
    names.clear()
    assert bench_of(folder).done(**SMALL)[0].parameters == first
    assert names == []
    os.utime(folder / UNET)
    shutil.copy2(folder / VAE, folder / "copy")
    (folder / "copy").replace(folder / VAE)
    assert bench_of(folder).done(**SMALL)[0].parameters == first
    assert sorted(names) == ["unet", "vae"]


def test_what_was_changed_is_named_until_it_is_accepted_or_put_back(folder: Path) -> None:
    bench_of(folder).done(**SMALL)
    whole = damage(folder / VAE)
    bench = bench_of(folder)
    assert f"its {VAE} is not what it was when it was first loaded here" in refusal(bench)
    assert f"its {VAE} is not" in refusal(bench), "it does not become right by being asked for again"
    changed = (folder / VAE).read_bytes()
    (folder / VAE).write_bytes(whole)
    bench.done(**SMALL)
    (folder / VAE).write_bytes(changed)
    bench.engine.unload_model("unload", "local/model")
    bench.wait_for(lambda: bench.of("unload", schema.Done) or None)
    assert f"its {VAE} is not" in refusal(bench)
    command = [sys.executable, "-m", "starweave_image", "models", "accept", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said == "3 weight files of model are taken as they are when they are next loaded\n"
    bench.done(**SMALL)


def test_a_file_that_was_damaged_under_its_time_is_found_in_the_background(folder: Path) -> None:
    bench_of(folder).done(**SMALL)
    damage(folder / UNET, in_secret=True)
    bench = bench_of(folder)
    bench.done(**SMALL)
    bench.wait_for(lambda: next((c for c in bench.engine.models() if c.state == "failed"), None))
    assert f"its {UNET} is not what it was" in refusal(bench)


def test_a_pin_of_the_configuration_counts_from_the_first_load(folder: Path) -> None:
    right = hashlib.sha256((folder / UNET).read_bytes()).hexdigest()
    bench_of(folder, sha256={UNET: right}).done(**SMALL)
    wrong = refusal(bench_of(folder, sha256={UNET: "0" * 64}))
    assert wrong.endswith(f"its {UNET} is not the file that the configuration pins")
    missing = refusal(bench_of(folder, sha256={"unet/other.safetensors": right}))
    assert "has no unet/other.safetensors" in missing


def test_weights_that_change_while_they_are_loaded_are_not_used(folder: Path) -> None:
    check = Check("local/model", {UNET: folder / UNET}, {})
    check._thread.join()
    damage(folder / UNET)
    os.utime(folder / UNET, (1, 1))
    with pytest.raises(ImageError, match="was changed meanwhile") as raised:
        check.wait()
    assert raised.value.retryable


@pytest.mark.parametrize("content", ["", "[]", "{}x", '{"a": 1}', '{"a": {"size": "1"}}', "[" * 10**5])
def test_a_book_of_checksums_that_is_damaged_is_begun_anew(folder: Path, content: str) -> None:
    book = Path(os.environ["STARWEAVE_IMAGE_CACHE"]) / "checksums.json"
    book.write_text(content)
    assert len(Check("local/model", {UNET: folder / UNET}, {}).wait()) == 64
    assert list(json.loads(book.read_text())) == [os.path.realpath(folder / UNET)]


def test_a_model_that_was_found_damaged_goes_over_to_nobody_else_and_leaves_memory(folder: Path) -> None:
    bench = bench_of(folder)
    bench.done(**SMALL)
    cache = bench.engine._models.cache
    assert cache is not None
    cache.condemn("local/model", "local/model cannot be used any more")
    [card] = [card for card in bench.engine.models() if card.id == "local/model"]
    assert (card.state, card.error) == ("failed", "local/model cannot be used any more")
    assert bench.engine.snapshot().resident == []
    # Its files are what they should be.
    bench.done(**SMALL)
