"""Models as people have them: damaged, hostile, of an older make, and for other tasks than text to image."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import diffusers
import pytest
import torch
from diffusers.pipelines import auto_pipeline
from engines import Bench
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from sidecar import Sidecar
from starweave_image import schema
from starweave_image.tasks.registry import class_for, offered
from starweave_image.weights.catalog import shipped
from starweave_image.weights.layout import spellings

SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "seed": 1}
UNET = "unet/diffusion_pytorch_model.safetensors"
INDEX = "model_index.json"
BRACKETS = "[" * 200_000


def file(mode: str = "RGB", colour: Any = (222, 38, 38)) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (64, 64), colour).save(out, "PNG")
    return out.getvalue()


GIVEN: dict[str, dict[str, Any]] = {
    "text_to_image": {},
    "image_to_image": {"image": file()},
    "edit": {"image": file()},
    "inpaint": {"image": file(), "mask": file("L", 255)},
}


@pytest.fixture
def copy(checkpoint: Any, tmp_path: Path) -> Callable[..., Path]:
    """Copies of a checkpoint, to be spoiled."""

    def copy(name: str = "model", make: Callable[[Path], Path] = checkpoints.stable_diffusion) -> Path:
        return Path(shutil.copytree(checkpoint(make), tmp_path / name))

    return copy


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def instead(path: Path, content: bytes | str | None = None, link: str | None = None) -> None:
    """Put something else in the place of a file: content, a link, or a FIFO."""
    path.unlink()
    if link is not None:
        path.symlink_to(link)
    elif content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def bench_of(*folders: Path, **config: Any) -> Bench:
    models = [schema.ModelEntry(id=f"local/{folder.name}", path=str(folder)) for folder in folders]
    return Bench(models=models, **config).start()


def states(bench: Bench) -> dict[str, schema.Card]:
    return {card.id: card for card in bench.engine.models()}


def refusal(bench: Bench, name: str = "model", **fields: Any) -> str:
    end = bench.generate(model=f"local/{name}", **SMALL | fields)
    assert isinstance(end, schema.Failed), end
    assert end.kind == "model_load_failed", end
    assert "/tmp" not in end.message and end.message.startswith(f"local/{name} ")
    return end.message


# One bad model among good ones

SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "fifo": (lambda folder: instead(folder / INDEX), "its model_index.json is no regular file"),
    "device": (lambda folder: instead(folder / INDEX, link="/dev/zero"), "is no regular file"),
    "loop": (lambda folder: instead(folder / INDEX, link=INDEX), "is a link that leads in a circle"),
    "dangling": (lambda folder: instead(folder / INDEX, link="/gone"), "is a link to nothing"),
    "deep": (lambda folder: instead(folder / INDEX, BRACKETS), "is nested too deeply"),
    "binary": (lambda folder: instead(folder / INDEX, b"\xff\xfe{}"), "is no text in UTF-8"),
    "large": (lambda folder: instead(folder / INDEX, " " * 2**21 + "{}"), "has 2097154 bytes, and may"),
    "number": (lambda folder: instead(folder / INDEX, "9" * 5000), "is no JSON"),
    "list": (lambda folder: instead(folder / INDEX, "[]"), "has the wrong shape"),
    "sample-empty": (lambda folder: change(folder / "unet/config.json", sample_size=[]), ""),
    "sample-text": (
        lambda folder: change(folder / "unet/config.json", sample_size="many"),
        "its unet/config.json has the wrong shape",
    ),
    "sample-nested": (
        lambda folder: change(folder / "unet/config.json", sample_size=[[64]]),
        "its unet/config.json has the wrong shape",
    ),
    "sample-huge": (
        lambda folder: change(folder / "unet/config.json", sample_size=10**300),
        "its unet/config.json has the wrong shape",
    ),
    "blocks-number": (
        lambda folder: change(folder / "vae/config.json", block_out_channels=7),
        "its vae/config.json has the wrong shape",
    ),
    "blocks-many": (
        lambda folder: change(folder / "vae/config.json", block_out_channels=[1] * 5000),
        "its vae/config.json has the wrong shape",
    ),
    "config-deep": (
        lambda folder: instead(folder / "unet/config.json", BRACKETS),
        "its unet/config.json is nested too deeply",
    ),
    "config-fifo": (lambda folder: instead(folder / "vae/config.json"), "its vae/config.json is no regular"),
    "weights-fifo": (lambda folder: instead(folder / UNET), "is incomplete: its unet"),
    "weights-dangling": (lambda folder: instead(folder / UNET, link="/gone"), "is incomplete: its unet"),
    "shards-list": (
        lambda folder: (folder / f"{UNET}.index.json").write_text('{"weight_map": []}'),  # type: ignore[dict-item]
        "does not say where the weights are",
    ),
    "shards-numbers": (
        lambda folder: (folder / f"{UNET}.index.json").write_text('{"weight_map": {"a": [1]}}'),  # type: ignore[dict-item]
        "does not say where the weights are",
    ),
    "folder-a-file": (lambda folder: (shutil.rmtree(folder), folder.write_text("x"))[0], "is no folder"),
    "folder-a-loop": (lambda folder: (shutil.rmtree(folder), folder.symlink_to(folder))[0], "is no folder"),
    "component-a-file": (
        lambda folder: (shutil.rmtree(folder / "unet"), (folder / "unet").write_text("x"))[0],
        "is incomplete: its unet",
    ),
}


def test_a_model_that_cannot_be_read_is_told_and_keeps_nobody_else_from_being_served(
    copy: Callable[..., Path],
) -> None:
    folders = []
    for name, (spoil, _) in SPOILED.items():
        folders.append(copy(name))
        spoil(folders[-1])
    bench = bench_of(*folders, copy("good"))
    told = states(bench)
    for name, (_, words) in SPOILED.items():
        card = told[f"local/{name}"]
        # An empty list says nothing of a size, which is no fault.
        assert card.state == ("failed" if words else "available"), card
        assert words in (card.error or "")
        if words:
            assert refusal(bench, name) == card.error
            assert card.tasks == []
    bench.done(model="local/good", **SMALL)
    assert states(bench)["local/good"].state == "loaded"


def test_what_others_left_in_the_hubs_cache_keeps_nobody_from_being_served(
    copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    known = [card for card in shipped() if card.source != "embedded"]
    spoils = [SPOILED[name] for name in ("fifo", "loop", "deep", "shards-list", "weights-dangling", "device")]
    for card, (spoil, _) in zip(known, spoils, strict=False):
        repository = tmp_path / "hub" / f"models--{card.source.replace('/', '--')}"
        spoil(Path(shutil.move(copy("cached"), repository / "snapshots" / ("a" * 40))))
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("a" * 40)
    last = tmp_path / "hub" / f"models--{known[-1].source.replace('/', '--')}"
    (last / "refs").mkdir(parents=True)
    os.mkfifo(last / "refs/main")
    bench = Bench().start()
    told = states(bench)
    for card, (_, words) in zip(known, spoils, strict=False):
        assert told[card.id].state == "failed" and words in (told[card.id].error or "")
    assert told[known[-1].id].state == "absent"
    bench.done(**SMALL)
    # A download may mend what is not all there, and nothing else.
    entries = [schema.ModelEntry(id=card.id) for card in known]
    assert states(Bench(models=entries).start())[known[0].id].state == "remote"


def test_a_sidecar_starts_beside_a_bad_model(
    copy: Callable[..., Path], ready: Callable[..., Sidecar]
) -> None:
    folder = copy()
    SPOILED["config-fifo"][0](folder)
    sidecar = ready(models=[{"id": "local/model", "path": str(folder)}])
    sidecar.send({"t": "load_model", "id": "load", "model": "local/model"})
    assert sidecar.expect("error", id="load")["kind"] == "model_load_failed"
    sidecar.send({"t": "models", "id": "models"})
    [card] = [c for c in sidecar.expect("models", id="models")["models"] if c["id"] == "local/model"]
    assert (card["state"], card["tasks"]) == ("failed", []) and "no regular file" in card["error"]


# Weights that are none


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n", "Git LFS"),
        (b"<!DOCTYPE html><title>Log in</title>" + b" " * 500, "is a web page"),
        (b"\n\n  <html>" + b" " * 500, "is a web page"),
        (b'{"error": "Repository not found"}', "is no safetensors file"),
        (b"\x80\x04\x95" + b"." * 500, "is a pickle under another name"),
        (b"PK\x03\x04" + b"." * 500, "is a pickle under another name"),
        (b"GGUF\x03" + b"." * 500, "is a GGUF file"),
        (b"\xff" * 500, "is no safetensors file"),
        ((20).to_bytes(8, "little") + b"{" * 20, "is no JSON"),
        ((9).to_bytes(8, "little") + b'{"a": [1]', "is no JSON"),
        ((10).to_bytes(8, "little") + b'{"a": [1]}', "does not say where its tensors are"),
        ((10**6).to_bytes(8, "little") + b'{"a": [1]}', "is cut short"),
    ],
)
def test_what_is_in_the_place_of_weights_is_named(
    copy: Callable[..., Path], content: bytes, words: str
) -> None:
    folder = copy()
    instead(folder / UNET, content)
    message = refusal(bench_of(folder))
    assert f"its {UNET} " in message and words in message


def test_weights_that_were_cut_or_grew_are_named(copy: Callable[..., Path]) -> None:
    cut, grown = copy("cut"), copy("grown")
    whole = (cut / UNET).read_bytes()
    (cut / UNET).write_bytes(whole[:-1])
    (grown / "vae/diffusion_pytorch_model.safetensors").write_bytes(
        (grown / "vae/diffusion_pytorch_model.safetensors").read_bytes() + b"\0" * 7
    )
    bench = bench_of(cut, grown)
    assert f"its {UNET} is cut short: 1 bytes are missing" in refusal(bench, "cut")
    assert "has 7 bytes too many" in refusal(bench, "grown")


# Code, pickles and names of what others keep

CODE = "raise SystemExit('ran')"


def write(folder: Path, name: str, text: str = CODE) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: write(f, "unet/diffusers.py"), "has a unet with code of its own"),
        (lambda f: write(f, "text_encoder/deep/down/transformers.py"), "text_encoder with code of its own"),
        (lambda f: write(f, "vae/native.so"), "has a vae with code of its own"),
        (lambda f: write(f, "unet/model_index.json", "{}"), "has a pipeline of its own in its unet"),
        (lambda f: write(f, "text_encoder/adapter_config.json", "{}"), "has an adapter of its own"),
        (
            lambda f: change(f / "text_encoder/config.json", auto_map={"AutoModel": "evil.Model"}),
            "auto_map in its text_encoder/config.json",
        ),
        (
            lambda f: change(
                f / "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["x--y.Z", None]}
            ),
            "auto_map in its tokenizer/tokenizer_config.json",
        ),
        (
            lambda f: change(
                f / "text_encoder/config.json", attn_implementation="kernels-community/vllm-flash-attn3"
            ),
            "attn_implementation in its text_encoder/config.json",
        ),
        (
            lambda f: change(
                f / "text_encoder/config.json", inner=[{"_attn_implementation": "someone/kernel@v1"}]
            ),
            "_attn_implementation in its",
        ),
        (
            lambda f: change(f / "text_encoder/config.json", _attn_implementation_internal={"": "paged|o/k"}),
            "_attn_implementation_internal in its",
        ),
        (
            lambda f: change(f / "unet/config.json", quantization_config={"quant_method": "torchao"}),
            "quantization_config in its unet/config.json",
        ),
        (
            lambda f: change(f / "scheduler/scheduler_config.json", trust_remote_code=True),
            "trust_remote_code in its scheduler",
        ),
        (
            lambda f: write(f, f"{UNET}.index.json", json.dumps({"weight_map": {"a": "x.bin"}})),
            "in files that are not safetensors",
        ),
        (
            lambda f: write(f, f"{UNET}.index.json", json.dumps({"weight_map": {"a": "../x.safetensors"}})),
            "in files of another folder",
        ),
    ],
)
def test_what_names_code_of_others_is_refused_before_it_is_opened(
    copy: Callable[..., Path], spoil: Callable[[Path], None], words: str
) -> None:
    folder = copy()
    spoil(folder)
    assert words in refusal(bench_of(folder))


def test_the_libraries_see_nothing_but_what_passed(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy()
    for name in ("StableDiffusionPipeline.py", "pipeline.py", "unet/._x.safetensors", ".DS_Store"):
        write(folder, name)
    write(folder, "README.md", "---\nprior: [someone/prior]\n---\n")
    write(folder, "unet/diffusion_pytorch_model.bin", "no pickle")
    write(folder, "unet/notes.json", "[1, 2]")
    change(
        folder / INDEX, feature_extractor=["transformers", "NoSuchProcessor"], unknown=[1, 2], also={"a": 1}
    )
    bench = bench_of(folder)
    bench.done(model="local/model", **SMALL)
    [view] = (Path(os.environ["STARWEAVE_IMAGE_CACHE"]) / "views").glob("view-*")
    seen = {path.relative_to(view).as_posix() for path in view.rglob("*") if path.is_file()}
    assert {name for name in seen if name.startswith("unet/")} == {"unet/config.json", UNET}
    assert {name for name in seen if "/" not in name} == {INDEX}
    bench.engine.unload_model("unload", "local/model")
    bench.wait_for(lambda: bench.of("unload", schema.Done) or None)
    assert not view.exists()


@pytest.mark.slow
def test_the_view_of_a_process_that_was_killed_is_swept_away(copy: Callable[..., Path]) -> None:
    views = Path(os.environ["STARWEAVE_IMAGE_CACHE"]) / "views"
    script = (
        "import os, sys, time; from pathlib import Path; from starweave_image.tasks.registry import offered\n"
        "from starweave_image.weights.screening import View, screen\n"
        "view = View(screen(Path(sys.argv[1]), 'x/y', offered)); print('made', flush=True); time.sleep(1000)"
    )
    folder = copy()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"made\n"
    [left] = views.glob("view-*")
    bench = bench_of(folder)
    bench.done(model="local/model", **SMALL)
    assert left.exists() and len(list(views.glob("view-*"))) == 2
    process.kill()
    process.communicate()
    other = copy("other")
    bench = bench_of(other)
    bench.done(model="local/other", **SMALL)
    assert not left.exists()


# Of an older make


def test_classes_that_were_renamed_are_found() -> None:
    assert "ViTImageProcessor" in spellings("ViTFeatureExtractor")
    assert "DPTImageProcessor" in spellings("DPTFeatureExtractor")
    assert "T5Tokenizer" in spellings("T5TokenizerFast")
    assert "GemmaTokenizerFast" in spellings("GemmaTokenizer")


def processor(folder: Path, kind: str) -> None:
    change(folder / INDEX, feature_extractor=["transformers", kind])
    settings = {"crop_size": 32, "size": 32, "do_resize": True, "feature_extractor_type": kind}
    write(folder, "feature_extractor/preprocessor_config.json", json.dumps(settings))


@pytest.mark.parametrize(
    "age",
    [
        lambda f: processor(f, "CLIPFeatureExtractor"),
        lambda f: processor(f, "ViTFeatureExtractor"),
        lambda f: change(f / INDEX, tokenizer=["transformers", "CLIPTokenizerFast"]),
        lambda f: change(f / INDEX, image_encoder=["transformers", "NoSuchVision"]),
        lambda f: change(f / INDEX, visual_tokenizer=["someones_library", "VisualTokenizer"]),
        lambda f: change(f / INDEX, requires_safety_checker=True, layers=[9, 18, 27]),
        lambda f: change(f / "scheduler/scheduler_config.json", skip_prk_steps=True, novelty=[1]),
    ],
)
def test_what_has_another_name_now_or_is_not_needed_does_not_stand_in_the_way(
    copy: Callable[..., Path], age: Callable[[Path], None]
) -> None:
    folder = copy()
    age(folder)
    bench_of(folder).done(model="local/model", **SMALL)


def test_a_safety_checker_that_a_model_names_is_never_left_out(copy: Callable[..., Path]) -> None:
    missing, unknown = copy("missing"), copy("unknown")
    change(missing / INDEX, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    change(unknown / INDEX, safety_checker=["stable_diffusion", "NextSafetyChecker"])
    bench = bench_of(missing, unknown)
    assert "its safety_checker is missing" in refusal(bench, "missing")
    assert "has a safety_checker that is no class" in refusal(bench, "unknown")


@pytest.mark.parametrize("length", [None, 10**30, 1e30, "many", 0, -1, 4096])
def test_a_tokenizer_that_does_not_say_how_much_it_takes_takes_what_its_encoder_does(
    copy: Callable[..., Path], length: Any
) -> None:
    folder = copy()
    change(folder / "tokenizer/tokenizer_config.json", model_max_length=length)
    done, _ = bench_of(folder).done(model="local/model", prompt="a red cat " * 30, **SMALL)
    assert any("longer than this model reads" in notice for notice in done.notices)


def test_a_tokenizer_without_settings_is_bounded_too(copy: Callable[..., Path]) -> None:
    folder = copy(make=checkpoints.stable_diffusion_xl)
    (folder / "tokenizer_2/tokenizer_config.json").unlink()
    bench_of(folder).done(model="local/model", prompt="a red cat " * 30, **SMALL)


def renamed(folder: Path, variant: str) -> None:
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", f".{variant}.safetensors")))


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_a_model_of_variants_alone_is_loaded(copy: Callable[..., Path], variant: str) -> None:
    folder = copy()
    renamed(folder, variant)
    bench_of(folder).done(model="local/model", **SMALL)


def test_variants_may_be_sharded_and_stand_beside_plain_weights(
    checkpoint: Any, copy: Callable[..., Path]
) -> None:
    folder = copy()
    fields = SMALL | {"model": "local/model", "metadata": False}
    plain = bench_of(checkpoint(checkpoints.stable_diffusion)).done(**fields)[1]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    (folder / UNET).unlink()
    pipeline.unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="40KB")
    assert len(list((folder / "unet").glob("*fp16-0*.safetensors"))) > 1
    vae = folder / "vae/diffusion_pytorch_model.safetensors"
    save_file(
        {key: torch.zeros_like(value) for key, value in load_file(vae).items()},
        vae.with_name("diffusion_pytorch_model.fp16.safetensors"),
    )
    assert bench_of(folder).done(**fields)[1] == plain


def test_weights_of_eight_bits_are_widened(copy: Callable[..., Path]) -> None:
    folder = copy()
    for name in (UNET, "text_encoder/model.safetensors"):
        eight = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(folder / name).items()}
        save_file(eight, folder / name, metadata={"format": "pt"})
    bench_of(folder).done(model="local/model", **SMALL)


@pytest.mark.parametrize("name", ["with space", "模型 ünï", ".hidden", "a,b;c", "quote'\""])
def test_a_folder_may_have_any_name_and_be_a_link(copy: Callable[..., Path], name: str) -> None:
    folder = copy(name)
    link = folder.parent / "link"
    link.symlink_to(folder)
    models = [schema.ModelEntry(id=id, path=str(path)) for id, path in (("a", folder), ("b", link))]
    bench = Bench(models=models).start()
    assert bench.done(model="a", **SMALL)[1][0] and bench.done(model="b", **SMALL)[1][0]


# Tasks


FROM_IMAGES = ["text_to_image", "image_to_image", "inpaint"]


def class_named(folder: Path, name: str) -> Path:
    change(folder / INDEX, _class_name=name)
    return folder


@pytest.mark.parametrize(
    ("make", "named", "tasks"),
    [
        (checkpoints.stable_diffusion, "StableDiffusionPipeline", FROM_IMAGES),
        (checkpoints.stable_diffusion, "StableDiffusionImg2ImgPipeline", FROM_IMAGES),
        (checkpoints.stable_diffusion, "StableDiffusionInpaintPipeline", FROM_IMAGES),
        (checkpoints.stable_diffusion, "StableDiffusionPAGPipeline", FROM_IMAGES),
        (checkpoints.stable_diffusion_xl, "StableDiffusionXLImg2ImgPipeline", FROM_IMAGES),
        (checkpoints.inpainting, "StableDiffusionInpaintPipeline", ["inpaint"]),
        (checkpoints.inpainting, "StableDiffusionPipeline", ["inpaint"]),
        (checkpoints.instructed, "StableDiffusionInstructPix2PixPipeline", ["edit"]),
        (checkpoints.flux_2_klein, "Flux2KleinPipeline", ["text_to_image", "edit"]),
        (checkpoints.flux, "FluxKontextPipeline", ["text_to_image", "edit"]),
        (checkpoints.flux, "FluxImg2ImgPipeline", FROM_IMAGES),
        (checkpoints.pixart, "PixArtSigmaPipeline", ["text_to_image"]),
        (checkpoints.sana, "SanaPipeline", ["text_to_image"]),
    ],
)
def test_what_a_card_says_is_what_a_model_does(
    copy: Callable[..., Path], make: Callable[[Path], Path], named: str, tasks: list[str]
) -> None:
    bench = bench_of(class_named(copy(make=make), named), dtype="float32")
    card = states(bench)["local/model"]
    assert (card.state, card.tasks) == ("available", tasks)
    for task, given in GIVEN.items():
        if task == "edit" and "image_to_image" in tasks or task == "image_to_image" and "edit" in tasks:
            continue
        end = bench.generate(model="local/model", **SMALL | {"steps": 4} | given)
        if task in tasks:
            assert isinstance(end, schema.Done), (task, end)
        else:
            assert isinstance(end, schema.Failed) and end.kind == "invalid_request", (task, end)
            assert end.field in ("image", "mask")


@pytest.mark.parametrize(
    ("make", "named", "words"),
    [
        (checkpoints.stable_diffusion, "StableDiffusionUpscalePipeline", "has no low_res_scheduler"),
        (checkpoints.stable_diffusion, "StableDiffusionControlNetPipeline", "has no controlnet"),
        (checkpoints.stable_diffusion, "AnimateDiffPipeline", "none of the tasks here"),
        (checkpoints.stable_diffusion, "StableDiffusionLDM3DPipeline", "none of the tasks here"),
        (checkpoints.instructed, "StableDiffusionPipeline", "and its unet takes 8 channels"),
        (checkpoints.stable_diffusion, "DDPMPipeline", "its pipeline is DDPMPipeline"),
        (checkpoints.flux, "FluxFillPipeline", ""),
    ],
)
def test_a_model_for_other_tasks_is_refused_with_the_reason(
    copy: Callable[..., Path], make: Callable[[Path], Path], named: str, words: str
) -> None:
    bench = bench_of(class_named(copy(make=make), named))
    card = states(bench)["local/model"]
    if not words:
        assert card.tasks == ["inpaint"]
        return
    assert card.state == "failed" and card.tasks == []
    assert words in refusal(bench)


def test_parts_that_do_not_fit_together_are_a_fault_of_the_model(copy: Callable[..., Path]) -> None:
    narrow, wordy = copy("narrow"), copy("wordy")
    checkpoints.stable_diffusion(narrow, cross_attention_dim=24)
    vocabulary = json.loads((wordy / "tokenizer/tokenizer.json").read_text())
    last = max(vocabulary["model"]["vocab"].values())
    vocabulary["model"]["vocab"] |= {f"new{index}</w>": last + index for index in range(1, 50)}
    (wordy / "tokenizer/tokenizer.json").write_text(json.dumps(vocabulary))
    bench = bench_of(narrow, wordy)
    assert "its parts do not fit together" in refusal(bench, "narrow")
    assert "words, and its text encoder" in refusal(bench, "wordy")


def test_the_shipped_cards_say_what_the_signatures_do() -> None:
    for card in shipped():
        kind = getattr(diffusers, card.pipeline)
        assert offered(kind, {}, {}) == card.tasks, card.id


def test_relatives_are_those_of_diffusers() -> None:
    text = auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING
    assert class_for(diffusers.StableDiffusionImg2ImgPipeline, "text_to_image") is text["stable-diffusion"]
    assert class_for(diffusers.WanPipeline, "text_to_image") is None
    assert class_for(diffusers.StableDiffusionXLControlNetPipeline, "text_to_image") is None
    assert class_for(diffusers.QwenImageEditPipeline, "edit") is diffusers.QwenImageEditPipeline
