"""Which device computes, and in which number format.

The libraries read `CUDA_VISIBLE_DEVICES`, `HSA_OVERRIDE_GFX_VERSION`, `HCC_AMDGPU_TARGET` and `HF_HOME` themselves;
none is set here. This module reads `TORCH_DTYPE`, which overrides the configuration.
"""

from __future__ import annotations

import itertools
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import schema
from ..errors import ImageError

_logger = logging.getLogger(__name__)

_DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}


@dataclass(frozen=True)
class Device:
    """A device of this machine. `auto_dtype` is the format used when none is requested, `why` the reason for it."""

    id: str
    name: str
    auto_dtype: str
    why: str
    total_bytes: int

    @property
    def kind(self) -> str:
        return self.id.partition(":")[0]


@dataclass(frozen=True)
class Choice:
    device: Device
    dtype: str
    reason: str
    backend: str = "torch"

    def synchronize(self) -> None:
        """Wait until the device has finished all submitted work."""
        import torch

        # Without an index it would be the first of several devices.
        if self.device.kind in ("cuda", "xpu"):
            getattr(torch, self.device.kind).synchronize(self.device.id)
        elif self.device.kind == "mps":
            torch.mps.synchronize()

    def free_bytes(self) -> int:
        """Memory that this process can still get on the device, in bytes."""
        import torch

        if self.device.kind == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device.id)
            cached = torch.cuda.memory_reserved(self.device.id) - torch.cuda.memory_allocated(self.device.id)
            return int(free + cached)
        if self.device.kind == "xpu":
            return self.device.total_bytes - torch.xpu.memory_allocated(self.device.id)
        if self.device.kind == "mps":
            return self.device.total_bytes - torch.mps.driver_allocated_memory()
        return _available_ram() or self.device.total_bytes

    @contextmanager
    def measured(self) -> Iterator[Callable[[], int]]:
        """A context that measures the work inside, including its end on the device; the function gives the peak of
        memory in bytes on top of what was in use before, or 0 if that cannot be measured."""
        import torch

        taken = 0
        if self.device.kind in ("cuda", "xpu"):
            backend = getattr(torch, self.device.kind)
            backend.reset_peak_memory_stats(self.device.id)
            before = backend.memory_allocated(self.device.id)
            yield lambda: taken
            self.synchronize()
            taken = backend.max_memory_allocated(self.device.id) - before
        elif self.device.kind == "cpu":
            # Count single allocations: the size of the process says little, since much freed memory is not returned.
            with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
                yield lambda: taken
            taken = _highest(profile.kineto_results.events())
        else:
            yield lambda: taken
            self.synchronize()

    def memory(self) -> schema.DeviceMemory | None:
        """Bytes that this process holds on the device, as its allocator counts them, not the driver; None on a CPU."""
        import torch

        if self.device.kind == "cuda":
            used = torch.cuda.memory_reserved(self.device.id)
        elif self.device.kind == "xpu":
            used = torch.xpu.memory_reserved(self.device.id)
        elif self.device.kind == "mps":
            used = torch.mps.driver_allocated_memory()
        else:
            return None
        return schema.DeviceMemory(used=used, total=self.device.total_bytes)


def placement(wanted: str, weights: int, largest: int, free: int) -> str:
    """The offload mode of a model of `weights` bytes, `largest` of them in its largest network, with `free` bytes on
    the device: `none`, all of it on the device; `model`, only the active network; `sequential`, layer by layer. A
    `wanted` mode other than `auto` is returned as it is. A fifth of the free memory is reserved for the work itself."""
    if wanted != "auto":
        return wanted
    room = 0.8 * free
    return "none" if weights <= room else "model" if largest <= room else "sequential"


# diffusers recommends slices on Macs with less than 64 GB, of which Metal makes at most three quarters available.
_ROOMY_MAC = 48 * 2**30


def division(attention: str, vae: str, device: Device, weights: int, decode: int) -> tuple[bool, bool]:
    """Whether attention is computed in slices and pictures are decoded in tiles, for a model of `weights` bytes whose
    largest picture takes `decode` bytes to decode whole. A setting other than `auto` is kept.

    This depends only on the size of the device, not on what is free at the moment: a reproducible picture must not
    change with the next load.
    """
    sliced = attention == "sliced"
    if attention == "auto":
        # On other devices torch's attention never holds all scores at once, so slices would only cost time.
        sliced = device.kind == "mps" and device.total_bytes < _ROOMY_MAC
    tiled = vae == "tiled" or (vae == "auto" and decode > 0.8 * device.total_bytes - weights)
    return sliced, tiled


def choose(config: schema.Config) -> Choice:
    """The device and dtype for this process, logged in one line; raises `unavailable`."""
    choice = decide(config.device, config.dtype, present(), os.environ)
    if config.backend == "openvino":
        choice = _with_openvino(choice, config.compile)
    if choice.device.kind == "cpu":
        # The profiler must first be used in the thread that imported torch, else it writes warnings to the log.
        with choice.measured():
            pass
    _logger.info(
        "device %s (%s), dtype %s: %s", choice.device.id, choice.device.name, choice.dtype, choice.reason
    )
    return choice


def _with_openvino(choice: Choice, compile: str) -> Choice:
    if choice.device.kind != "cpu":
        why = f"the backend openvino computes on a CPU only, and the device is {choice.device.id}"
        raise ImageError("unavailable", f"{why}: configure the device cpu, or the backend torch")
    if compile != "none":
        raise ImageError("unavailable", f"the backend openvino cannot be combined with compile {compile}")
    from . import openvino

    openvino.require()
    return replace(choice, backend="openvino")


def decide(device: str, dtype: str, found: Sequence[Device], environment: Mapping[str, str]) -> Choice:
    """Choose among `found`, fastest first. The dtype follows from the chosen device."""
    chosen = _device(device, found)
    wanted, asker = dtype, "configured"
    if named := environment.get("TORCH_DTYPE", "").strip().lower().removeprefix("torch."):
        if named not in _DTYPES:
            raise ImageError(
                "unavailable", "TORCH_DTYPE must be float32, bfloat16 or float16 (fp32, bf16, fp16)"
            )
        wanted, asker = _DTYPES[named], "TORCH_DTYPE"
    if wanted == "auto":
        return Choice(chosen, chosen.auto_dtype, chosen.why)
    if wanted == "float16" and chosen.kind == "cpu":
        return Choice(
            chosen, chosen.auto_dtype, f"{asker} asks for float16, which a CPU cannot use; {chosen.why}"
        )
    return Choice(chosen, wanted, asker)


def _device(wanted: str, found: Sequence[Device]) -> Device:
    if wanted == "auto":
        return found[0]
    for device in found:
        if wanted in (device.id, device.kind):
            return device
    here = ", ".join(device.id for device in found)
    raise ImageError("unavailable", f"device {wanted} is configured but not present here; present: {here}")


def present() -> list[Device]:
    """The devices of this machine, the preferred one first; the CPU is always included, last."""
    import torch

    devices = []
    # Check `is_available` first: `device_count` may include cards that this build of torch cannot use.
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        try:
            devices.append(_cuda(torch, index))
        except Exception:
            _logger.warning("cuda:%d cannot be used and is left out", index, exc_info=True)
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        for index in range(torch.xpu.device_count()):
            properties = torch.xpu.get_device_properties(index)
            devices.append(
                Device(
                    f"xpu:{index}", properties.name, "bfloat16", "native bfloat16", properties.total_memory
                )
            )
    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        devices.append(Device("mps", "Apple GPU", "float16", "native float16", total))
    return [*devices, _cpu(torch)]


def _cuda(torch: Any, index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    name = properties.name + (" with ROCm" if torch.version.hip else "")
    with torch.cuda.device(index):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    if native:
        dtype, why = "bfloat16", "native bfloat16"
    else:
        dtype, why = "float16", "no native bfloat16"
    return Device(f"cuda:{index}", name, dtype, why, properties.total_memory)


def _cpu(torch: Any) -> Device:
    # Emulated bfloat16 is many times slower than float32, so it is used only if the CPU has instructions for it.
    if torch.cpu._is_amx_tile_supported():
        dtype, why = "bfloat16", "the CPU has AMX"
    elif torch.cpu._is_avx512_bf16_supported():
        dtype, why = "bfloat16", "the CPU has AVX512_BF16"
    else:
        dtype, why = "float32", "the CPU has no bfloat16 instructions"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", _cpu_name(), dtype, why, total)


def _available_ram() -> int:
    """Bytes of memory available without swapping; 0 if the system does not report it."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _highest(events: Any) -> int:
    """The most bytes allocated at one time, from a profile's allocations and releases."""
    changes: list[tuple[int, int]] = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    return max(itertools.accumulate((change for _, change in changes), initial=0))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
