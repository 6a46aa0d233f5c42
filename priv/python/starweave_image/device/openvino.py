"""`backend: openvino`: on a CPU, the denoiser of a loaded model computes through OpenVINO.

Only its forward is replaced, by one that runs a model converted from the loaded network; all else is stock. Calls that
the converted model does not support run in PyTorch, and so do networks of other classes. The package is optional.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import inspect
import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import paths
from ..errors import ImageError, is_out_of_memory

_logger = logging.getLogger(__name__)

_OTHERWISE = "OpenVINO cannot compute all of what this model was asked for: PyTorch did."
_HINTS = {torch.bfloat16: "bf16", torch.float32: "f32"}
_FILE = "model.xml"
# By a UNet's type of added conditions: the names of those that are passed beside the captions.
_ADDED: dict[str | None, tuple[str, ...]] = {None: (), "text": (), "text_time": ("text_embeds", "time_ids")}


def require() -> None:
    """Raise `unavailable` where the package is missing or cannot be imported."""
    # OpenVINO's telemetry would report the import and each conversion to its maker's servers.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino  # noqa: F401
    except ImportError:
        _logger.warning("OpenVINO cannot be imported", exc_info=True)
        why = "the backend openvino needs the Python package openvino: add it with mix image.setup --openvino"
        raise ImageError("unavailable", f"{why}, or pip install 'starweave-image[openvino]'") from None


def attach(pipeline: Any, folder: Path, name: str, notice: Callable[[str], None]) -> int:
    """Have the denoiser of a pipeline that was loaded from `folder` compute through OpenVINO; returns the bytes of
    memory that this takes in addition. `name` identifies its weights and their format.

    The first time takes minutes for a large network; the converted model is kept on the disk, about as large as the
    weights. `notice` is called with a sentence for people when PyTorch has to compute something instead, now or later.
    """
    unet: Any = getattr(pipeline, "unet", None)
    if not _converts(unet):
        kind = type(unet or getattr(pipeline, "transformer", None)).__name__
        _logger.warning("OpenVINO does not take a %s of this kind: PyTorch computes it", kind)
        notice(_OTHERWISE)
        return 0
    try:
        compiled = _compiled(unet, folder / "unet", name)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        _logger.warning("OpenVINO cannot compute the UNet of %s: PyTorch does", name, exc_info=True)
        notice(_OTHERWISE)
        return 0
    unet.forward = _Forward(unet, compiled, notice)
    return sum(weight.numel() * weight.element_size() for weight in unet.parameters())


def _converts(network: Any) -> bool:
    if type(network).__name__ != "UNet2DConditionModel":
        return False
    config = network.config
    others = (config.class_embed_type, config.num_class_embeds, config.encoder_hid_dim_type)
    return config.addition_embed_type in _ADDED and others == (None, None, None)


class _Forward:
    """Replaces a UNet's `forward`. One call at a time."""

    def __init__(self, unet: Any, compiled: Any, notice: Callable[[str], None]) -> None:
        functools.update_wrapper(self, unet.forward)
        self._stock = unet.forward
        self._names = tuple(inspect.signature(unet.forward).parameters)
        self._request = compiled.create_infer_request()
        self._notice = notice
        self._dtype = unet.dtype
        self._added = _ADDED[unet.config.addition_embed_type]
        self._refused = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        inputs = self._inputs(**arguments)
        if inputs is None:
            if not self._refused:
                self._refused = True
                given = ", ".join(name for name, value in arguments.items() if value is not None)
                _logger.warning("OpenVINO does not take a call with %s: PyTorch computes it", given)
                self._notice(_OTHERWISE)
            return self._stock(*args, **kwargs)
        # OpenVINO uses the tensors' memory directly, so they must live until the end of the call.
        for index, tensor in enumerate(inputs):
            self._request.set_input_tensor(index, _lent(tensor))
        self._request.infer()
        sample = _copied(self._request.get_output_tensor(0))
        if not arguments.get("return_dict", True):
            return (sample,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=sample)

    def _inputs(
        self,
        sample: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        added_cond_kwargs: Any = None,
        return_dict: bool = True,
        **others: Any,
    ) -> list[torch.Tensor] | None:
        """The inputs of the converted model; None for a call that it does not support."""
        added = {name: value for name, value in (added_cond_kwargs or {}).items() if value is not None}
        if any(value is not None for value in others.values()) or set(added) != set(self._added):
            return None
        tensors = [sample, encoder_hidden_states, *(added[name] for name in self._added)]
        if any(not isinstance(tensor, torch.Tensor) or tensor.dtype != self._dtype for tensor in tensors):
            return None
        times = torch.as_tensor(timestep).to(torch.float32).reshape(-1).expand(len(sample))
        return [tensor.contiguous() for tensor in (sample, times, *tensors[1:])]


def _compiled(unet: Any, source: Path, name: str) -> Any:
    import diffusers
    import openvino

    # One call at a time with all threads, which are not pinned to cores, since other processes run too.
    settings = {
        "INFERENCE_PRECISION_HINT": _HINTS[unet.dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    versions = f"{importlib.metadata.version('openvino')} {torch.__version__} {diffusers.__version__}"
    config = sorted((field, value) for field, value in unet.config.items() if not field.startswith("_"))
    key = hashlib.sha256(f"{name} {versions} {config}".encode()).hexdigest()[:32]
    folder = paths.converted() / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    core = openvino.Core()
    # The sidecars of one machine convert one after the other, so the second one finds the result of the first.
    with folder.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for attempt in range(2):
            if not folder.is_dir():
                _convert_apart(source, str(unet.dtype).removeprefix("torch."), folder)
            try:
                return core.compile_model(core.read_model(folder / _FILE), "CPU", settings)
            except RuntimeError:
                if attempt:
                    raise
                _logger.warning("a converted model is damaged, and is made again", exc_info=True)
                shutil.rmtree(folder)


def _convert_apart(source: Path, dtype: str, folder: Path) -> None:
    """Convert in a process of its own, since conversion holds the interpreter for longer than a heartbeat may be late,
    and takes memory that this process could not free again."""
    fresh = folder.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    begun = time.monotonic()
    command = [sys.executable, "-B", "-m", __name__, str(source.absolute()), dtype, str(fresh.absolute())]
    # `-m` imports from the working folder first, so that must be this package's folder and not the application's.
    ours = Path(__file__).parents[2]
    paths = [str(ours), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, env=environment, cwd=ours)
    if ended.returncode != 0:
        shutil.rmtree(fresh, ignore_errors=True)
        raise RuntimeError(f"the conversion ended with {ended.returncode}")
    fresh.rename(folder)
    _logger.info("converted for OpenVINO in %.1f s", time.monotonic() - begun)


def _convert(source: Path, dtype: str, folder: Path) -> None:
    """The UNet in the folder `source`, for any number of rows and any size, written to `folder`."""
    import openvino
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(
        source, torch_dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
    )
    config, names = unet.config, _ADDED[unet.config.addition_embed_type]

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: Any, timestep: Any, captions: Any, *added: Any) -> Any:
            conditions = dict(zip(names, added, strict=True)) or None
            result = self.unet(sample, timestep, captions, added_cond_kwargs=conditions, return_dict=False)
            return result[0]

    # Sizes that do not halve evenly make the trace take the branch that passes explicit sizes to the upsamplers.
    odd = 2 * 2**unet.num_upsamplers + 1
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    shapes = [[2, config.in_channels, odd, odd + 2], [2], [2, 5, width]]
    free = [[-1, config.in_channels, -1, -1], [-1], [-1, -1, width]]
    if names:
        # Any division works: the pooled captions take the dimensions that the six size numbers leave.
        numbers = 6 * config.addition_time_embed_dim
        shapes += [[2, config.projection_class_embeddings_input_dim - numbers], [2, 6]]
        free += [[-1, -1], [-1, -1]]
    examples = tuple(
        torch.zeros(shape, dtype=torch.float32 if len(shape) == 1 else unet.dtype) for shape in shapes
    )
    with torch.no_grad():
        traced = torch.jit.trace(Positional(), examples, strict=False, check_trace=False)  # type: ignore[no-untyped-call]
    # Shared weights would be freed with the traced network while the converted model still uses them.
    model = openvino.convert_model(traced, example_input=examples, input=free, share_weights=False)
    openvino.save_model(model, folder / _FILE, compress_to_fp16=False)


def _lent(tensor: torch.Tensor) -> Any:
    import openvino

    if tensor.dtype == torch.bfloat16:
        # numpy has no such format.
        return openvino.Tensor(tensor.view(torch.int16).numpy(), list(tensor.shape), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy())


def _copied(tensor: Any) -> torch.Tensor:
    import openvino

    if tensor.element_type == openvino.Type.bf16:
        return torch.from_numpy(tensor.data.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(tensor.data.copy())


if __name__ == "__main__":
    # The tracer warns about limits that do not depend on the size, or are never reached.
    warnings.simplefilter("ignore")
    require()
    _convert(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    # Finalisation would wait for native threads.
    os._exit(0)
