"""`backend: openvino`: real conversions of tiny networks, against what PyTorch computes."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from engines import Bench, difference
from starweave_image import schema
from starweave_image.device import devices, openvino
from starweave_image.device.devices import Device
from starweave_image.errors import ImageError

pytestmark = pytest.mark.slow

# requirements-dev.txt says the same.
pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" and sys.platform != "darwin",
    reason="OpenVINO has no wheel for this machine",
)

UNETS = [checkpoints.stable_diffusion, checkpoints.stable_diffusion_2, checkpoints.stable_diffusion_xl]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("converted")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, shared: Path) -> None:
    """What one test has converted the next one finds."""
    monkeypatch.setenv("STARWEAVE_IMAGE_CACHE", str(shared))


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where converted models are kept, and none is yet."""
    monkeypatch.setenv("STARWEAVE_IMAGE_CACHE", str(tmp_path))
    return tmp_path / "openvino"


def bench(folder: Path | None = None, backend: str = "openvino", dtype: str = "float32") -> Bench:
    models = [schema.ModelEntry(id="test/model", path=str(folder))] if folder else []
    default = "test/model" if folder else "starweave/tiny"
    return Bench(models=models, default_model=default, device="cpu", dtype=dtype, backend=backend).start()


def only_openvino(engine: Bench) -> Any:
    """The loaded model; from now on its UNet's own forward fails."""
    model = engine.engine._models.cache._entries["test/model"].model.result()
    model.pipeline.unet.forward._stock = None
    return model


@pytest.mark.parametrize("make", UNETS)
def test_pictures_are_those_of_torch(checkpoint: Callable[..., Path], make: Any) -> None:
    folder = checkpoint(make)
    ours, stock = bench(folder), bench(folder, "torch")
    ours.done(seed=1, steps=1)
    only_openvino(ours)
    # With and without guidance, a width that does not halve evenly, and from an image.
    _, [image] = stock.done(seed=9, steps=1, format="png")
    for fields in (
        {"guidance_scale": 5.0, "num_images": 2, "width": 64, "height": 64},
        {"guidance_scale": 0.0, "width": 72, "height": 64, "scheduler": "euler"},
        {"image": image, "strength": 0.6},
    ):
        (end, files), (_, wanted) = (each.done(seed=3, steps=5, **fields) for each in (ours, stock))
        assert difference(files, wanted) <= 1
        assert end.notices == []
    assert end.parameters["environment"]["openvino"]
    # Nothing is told to its maker.
    assert sys.modules["openvino_telemetry"] is None


def test_bfloat16_differs_by_its_rounding(checkpoint: Callable[..., Path]) -> None:
    (end, files), (_, wanted) = (
        bench(None, backend, "bfloat16").done(seed=1, steps=8) for backend in ("openvino", "torch")
    )
    # PyTorch's own bfloat16 is about as far from its float32.
    _, exact = bench(None, "torch").done(seed=1, steps=8)
    assert difference(files, wanted) <= 2 * max(difference(wanted, exact), 8)
    assert not any("OpenVINO" in notice for notice in end.notices)


def test_reproducible_is_so_in_company(checkpoint: Callable[..., Path]) -> None:
    engine = bench(checkpoint(checkpoints.stable_diffusion))
    _, alone = engine.done(seed=4, steps=6, reproducible=True)
    only_openvino(engine)
    ids = [
        engine.submit(seed=4, steps=6, reproducible=True),
        *(engine.submit(seed=n, steps=7) for n in range(5)),
    ]
    assert all(isinstance(engine.end(id), schema.Done) for id in ids)
    assert engine.files(ids[0]) == alone


def test_a_converted_model_is_kept_and_one_that_is_damaged_made_again(
    checkpoint: Callable[..., Path], empty: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint(checkpoints.stable_diffusion)
    _, first = bench(folder).done(seed=1, steps=2)
    [weights] = empty.glob("*/model.bin")
    written = weights.stat()
    assert bench(folder).done(seed=1, steps=2)[1] == first
    assert weights.stat() == written
    os.truncate(weights, 1000)
    assert bench(folder).done(seed=1, steps=2)[1] == first
    assert weights.stat().st_size == written.st_size
    assert "damaged" in caplog.text


def test_where_nothing_can_be_kept_torch_computes(checkpoint: Callable[..., Path], empty: Path) -> None:
    empty.write_text("in the way")
    end, _ = bench(checkpoint(checkpoints.stable_diffusion)).done(seed=1, steps=1)
    assert end.notices == [openvino._OTHERWISE]


def test_what_it_does_not_take_torch_computes_and_says_so(
    checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint(checkpoints.pixart)
    (end, files), (_, wanted) = (
        bench(folder, backend).done(seed=1, steps=2) for backend in ("openvino", "torch")
    )
    assert difference(files, wanted) == 0
    assert [notice for notice in end.notices if "OpenVINO" in notice] == [openvino._OTHERWISE]
    assert "does not take a PixArtTransformer2DModel" in caplog.text

    engine = bench(checkpoint(checkpoints.stable_diffusion))
    engine.done(seed=1, steps=1)
    unet = engine.engine._models.cache._entries["test/model"].model.result().pipeline.unet
    caplog.clear()
    rows = torch.randn(2, 4, 8, 8), 7, torch.randn(2, 5, unet.config.cross_attention_dim)
    mask = torch.ones(2, 5)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            given = unet(*rows, encoder_attention_mask=mask, return_dict=False)[0]
        assert torch.equal(given, unet.forward._stock(*rows, encoder_attention_mask=mask).sample)
        taken = unet(*rows)
        assert torch.allclose(taken.sample, unet.forward._stock(*rows).sample, atol=1e-3)
    [line] = [record.getMessage() for record in caplog.records if "OpenVINO" in record.getMessage()]
    assert "encoder_attention_mask" in line
    end, _ = engine.done(seed=1, steps=1)
    assert end.notices == [openvino._OTHERWISE]


def test_what_cannot_be_had_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**config: Any) -> str:
        with pytest.raises(ImageError) as error:
            devices.choose(schema.Config(backend="openvino", **config))
        assert error.value.kind == "unavailable"
        return error.value.message

    assert (
        refused(compile="blocks", device="cpu")
        == "the backend openvino cannot be combined with compile blocks"
    )
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert "mix image.setup --openvino" in refused(device="cpu")
    gpu = Device("cuda:0", "A card", "float16", "no native bfloat16", 1)
    monkeypatch.setattr(devices, "present", lambda: [gpu])
    assert "computes on a CPU only, and the device is cuda:0" in refused()
