from __future__ import annotations

import pytest
from starweave_image.device import devices
from starweave_image.device.devices import Device, decide, present
from starweave_image.errors import ImageError

GPU = Device("cuda:0", "A card", "float16", "no native bfloat16", 1)
SECOND = Device("cuda:1", "Another card", "bfloat16", "native bfloat16", 1)
CPU = Device("cpu", "A processor", "float32", "the CPU has no bfloat16 instructions", 1)
ALL = [GPU, SECOND, CPU]


@pytest.mark.parametrize(
    ("device", "dtype", "environment", "chosen"),
    [
        ("auto", "auto", {}, ("cuda:0", "float16")),
        ("cuda", "auto", {}, ("cuda:0", "float16")),
        ("cuda:1", "auto", {}, ("cuda:1", "bfloat16")),
        ("cpu", "auto", {}, ("cpu", "float32")),
        ("cpu", "bfloat16", {}, ("cpu", "bfloat16")),
        ("cpu", "float16", {}, ("cpu", "float32")),
        ("auto", "float32", {"TORCH_DTYPE": "bf16"}, ("cuda:0", "bfloat16")),
        ("auto", "auto", {"TORCH_DTYPE": "torch.float32"}, ("cuda:0", "float32")),
        ("auto", "bfloat16", {"TORCH_DTYPE": ""}, ("cuda:0", "bfloat16")),
        ("cpu", "bfloat16", {"TORCH_DTYPE": "fp16"}, ("cpu", "float32")),
    ],
)
def test_device_and_dtype(
    device: str, dtype: str, environment: dict[str, str], chosen: tuple[str, str]
) -> None:
    choice = decide(device, dtype, ALL, environment)
    assert (choice.device.id, choice.dtype) == chosen
    assert choice.reason


def test_falling_back_to_the_cpu_changes_the_dtype_too() -> None:
    assert decide("auto", "float16", [CPU], {}).dtype == "float32"


@pytest.mark.parametrize(
    ("device", "environment", "words"),
    [
        ("cuda:7", {}, "device cuda:7 is configured but not present here; present: cuda:0, cuda:1, cpu"),
        ("mps", {}, "device mps is configured but not present here"),
        ("cpu", {"TORCH_DTYPE": "half"}, "TORCH_DTYPE must be float32, bfloat16 or float16"),
    ],
)
def test_what_cannot_be_had_is_unavailable(device: str, environment: dict[str, str], words: str) -> None:
    with pytest.raises(ImageError, match=words) as error:
        decide(device, "auto", ALL, environment)
    assert error.value.kind == "unavailable"


def test_this_machine_has_a_cpu_at_least() -> None:
    devices = present()
    assert devices[-1].id == "cpu" and devices[-1].auto_dtype in ("float32", "bfloat16")
    assert devices[-1].total_bytes > 2**28


@pytest.mark.parametrize("usable", [False, True])
def test_a_gpu_that_the_driver_knows_and_torch_cannot_use_is_left_out(
    monkeypatch: pytest.MonkeyPatch, usable: bool
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: usable)
    # Its properties are asked for in earnest, which fails here.
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: 1 / 0)
    assert [device.kind for device in present()] == ["cpu"]


@pytest.mark.parametrize(
    ("wanted", "weights", "largest", "free", "how"),
    [
        ("auto", 4, 3, 8, "none"),
        ("auto", 7, 4, 8, "model"),
        ("auto", 7, 7, 8, "sequential"),
        ("none", 7, 7, 8, "none"),
        ("sequential", 1, 1, 8, "sequential"),
    ],
)
def test_a_model_that_does_not_fit_is_offloaded(
    wanted: str, weights: int, largest: int, free: int, how: str
) -> None:
    assert devices.placement(wanted, weights, largest, free) == how


@pytest.mark.parametrize(
    ("attention", "vae", "kind", "total", "divided"),
    [
        ("auto", "auto", "cuda:0", 24, (False, False)),
        ("auto", "auto", "cuda:0", 8, (False, True)),
        ("auto", "auto", "mps", 24, (True, False)),
        ("auto", "auto", "mps", 96, (False, False)),
        ("none", "none", "mps", 8, (False, False)),
        ("sliced", "tiled", "cpu", 96, (True, True)),
    ],
)
def test_what_would_not_fit_is_computed_part_by_part(
    attention: str, vae: str, kind: str, total: int, divided: tuple[bool, bool]
) -> None:
    device = devices.Device(kind, "a device", "float32", "", total * 2**30)
    assert devices.division(attention, vae, device, 4 * 2**30, 6 * 2**30) == divided


def test_what_runs_is_measured_in_time_and_memory() -> None:
    import torch

    choice = devices.decide("cpu", "float32", devices.present(), {})
    with choice.measured() as peak:
        for _ in range(3):
            torch.ones(64 * 2**20 // 4).sum()
    assert 64 * 2**20 <= peak() < 65 * 2**20
    assert 0 < choice.free_bytes() <= choice.device.total_bytes
