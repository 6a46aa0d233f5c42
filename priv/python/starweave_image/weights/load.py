"""Loading a model's checked files into a stock pipeline on its device."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from ..device import devices
from ..device.devices import Choice
from ..errors import is_out_of_memory
from .catalog import shipped
from .find import Source
from .layout import unfit
from .screening import View

_logger = logging.getLogger(__name__)


def import_libraries() -> None:
    """Import the classes of all families, for all tasks, which diffusers and transformers would else import on first
    use.

    This makes the first request faster. It is also needed because loads and requests in several threads would import at
    the same time, and could see each other's half-initialised modules.
    """
    import diffusers
    import PIL.Image

    for name in (
        "AutoPipelineForText2Image",
        "AutoPipelineForImage2Image",
        "AutoPipelineForInpainting",
        *{card.pipeline for card in shipped()},
        *(name for name in dir(diffusers) if name.endswith("Scheduler")),
    ):
        try:
            getattr(diffusers, name)
        except Exception:
            # Models that need it will fail with an error of their own.
            _logger.warning("%s cannot be imported", name, exc_info=True)
    PIL.Image.init()


def quiet_libraries() -> None:
    """Turn off the progress bars of diffusers and transformers, and their warnings at each load about unused
    features."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def load_pipeline(
    source: Source,
    id: str,
    choice: Choice,
    alone: Callable[[], AbstractContextManager[None]],
    offload: str = "auto",
    compiled: bool = False,
) -> Any:
    """The stock pipeline with its weights on the chosen device, or offloaded as `devices.placement` says; raises
    `model_load_failed`.

    The context from `alone` is held while a network is constructed, because nothing may compute then.
    """
    import torch
    from diffusers import DiffusionPipeline

    dtype = getattr(torch, choice.dtype)
    view = View(source.screened)
    how = devices.placement(offload, source.bytes, source.largest, choice.free_bytes())
    try:
        with _LOADING, _constructing(torch, alone):
            pipeline = DiffusionPipeline.from_pretrained(
                str(view.folder), dtype=dtype, use_safetensors=True, local_files_only=True
            )
        _place(pipeline, choice, how)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # A damaged or mismatched folder can raise any exception; the log has the details.
        _logger.exception("loading %s failed", id)
        raise unfit(id, "could not be loaded: its files are damaged or do not belong together") from None
    _check_words(pipeline, id)
    # Kept as attributes, so that copies of the pipeline keep them too: some tokenizers read their file again when
    # copied.
    pipeline.lease, pipeline.view = source.lease, view
    pipeline.set_progress_bar_config(disable=True)
    if choice.device.kind == "cpu" and choice.dtype == "bfloat16":
        for name in ("unet", "vae"):
            network = getattr(pipeline, name, None)
            # There is no such format for the weights of 3D convolutions, as in Qwen-Image's decoder.
            if network is not None and all(weight.ndim < 5 for weight in network.parameters()):
                network.to(memory_format=torch.channels_last)
    if compiled:
        _compile(pipeline, id)
    return pipeline


def _check_words(pipeline: Any, id: str) -> None:
    """Raise `model_load_failed` if a tokenizer has token ids beyond its encoder's embeddings."""
    for name, tokenizer in pipeline.components.items():
        encoder = pipeline.components.get(name.replace("tokenizer", "text_encoder"))
        if "tokenizer" not in name or not hasattr(encoder, "get_input_embeddings"):
            continue
        known, said = len(tokenizer), encoder.get_input_embeddings().num_embeddings
        if known > said:
            raise unfit(id, f"could not be loaded: its {name} has {known} words, and its text encoder {said}")


def _compile(pipeline: Any, id: str) -> None:
    """Have the repeated blocks of a denoiser compiled, each kind once, on first use."""
    import torch._dynamo

    # Blocks that cannot be compiled run uncompiled.
    torch._dynamo.config.suppress_errors = True
    for name in ("unet", "transformer"):
        if (denoiser := getattr(pipeline, name, None)) is not None:
            try:
                denoiser.compile_repeated_blocks()
            except ValueError:
                _logger.warning("%s has no blocks that diffusers knows how to compile", id)


# Bytes that a decode takes for each byte of its last and widest layer, measured with the autoencoders of Stable
# Diffusion.
_DECODE_FACTOR = 8


def divide(
    pipeline: Any, attention: str, vae: str, device: devices.Device, weights: int, pixels: int
) -> dict[str, str]:
    """Make the networks of a loaded pipeline of `weights` bytes work in parts: attention in slices and decoding in
    tiles, as the options `attention` and `vae` say or, with "auto", as `devices.division` decides for a picture of
    `pixels`. Returns what was set, by option.

    This changes the bits of the results, and all requests share the networks, so it is set once, when a model is
    loaded.
    """
    done: dict[str, str] = {}
    decoder = getattr(pipeline, "vae", None)
    whole = 0
    if decoder is not None:
        config = decoder.config
        widths = config.get("block_out_channels") or config.get("decoder_block_out_channels")
        width = widths[0] if widths else config.get("base_dim", 128)
        whole = _DECODE_FACTOR * pixels * width * decoder.dtype.itemsize
    sliced, tiled = devices.division(attention, vae, device, weights, whole)
    if sliced and any(hasattr(part, "set_attention_slice") for part in pipeline.components.values()):
        pipeline.enable_attention_slicing()
        done["attention"] = "sliced"
    if tiled and decoder is not None and hasattr(decoder, "enable_tiling"):
        try:
            decoder.enable_tiling()
            done["vae"] = "tiled"
        except NotImplementedError:
            pass
    if done:
        _logger.info("to save memory: %s", ", ".join(f"{option} {how}" for option, how in done.items()))
    return done


def _place(pipeline: Any, choice: Choice, how: str) -> None:
    if choice.device.kind == "cpu" or how == "none":
        pipeline.to(choice.device.id)
    elif how == "model":
        pipeline.enable_model_cpu_offload(device=choice.device.id)
    else:
        pipeline.enable_sequential_cpu_offload(device=choice.device.id)
    if how != "none" and choice.device.kind != "cpu":
        _logger.info("offloading by %s: the weights do not fit on the device at once", how)
    # In half precision this decoder overflows. Its pipelines would widen the shared network for each decode, which
    # would affect other requests.
    if choice.dtype == "float16" and hasattr(pipeline, "upcast_vae") and pipeline.vae.config.force_upcast:
        pipeline.upcast_vae()


# accelerate replaces a method of torch.nn.Module while it loads: of two overlapping loads, one would restore the wrong
# one.
_LOADING = threading.Lock()


@contextmanager
def _constructing(torch: Any, alone: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Hold the context from `alone` whenever the calling thread has changed torch's default dtype.

    The libraries change it for the whole process while they construct a network: a scheduler that runs at that moment
    would compute in the wrong precision. After a failed construction, the changed default would also remain.
    """
    original, usual = torch.set_default_dtype, torch.get_default_dtype()
    loader = threading.get_ident()
    with ExitStack() as held:

        def set_default_dtype(dtype: Any) -> None:
            if threading.get_ident() == loader and dtype != torch.get_default_dtype() == usual:
                held.enter_context(alone())
            original(dtype)
            if threading.get_ident() == loader and dtype == usual:
                held.close()

        torch.set_default_dtype = set_default_dtype
        try:
            yield
        finally:
            torch.set_default_dtype = original
            original(usual)
