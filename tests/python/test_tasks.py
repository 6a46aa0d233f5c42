"""What starts from an image: image to image and inpainting, in small checkpoints of each family and the embedded model."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from engines import Bench, picture_of
from PIL import Image
from starweave_image import schema
from starweave_image.errors import ImageError
from starweave_image.pictures import images
from starweave_image.tasks import registry
from starweave_image.tasks.settings import fitted
from starweave_image.tasks.task import File
from starweave_image.weights.catalog import find, shipped

SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 4, "seed": 1, "guidance_scale": 3.0}


def file(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()


def halves(width: int = 64, height: int = 64) -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", (width, height), (222, 38, 38))
    picture.paste((36, 84, 214), (width // 2, 0, width, height))
    return picture


def right_half(width: int = 64, height: int = 64) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    return mask


IMAGE, MASK = file(halves()), file(right_half())


@pytest.fixture(scope="module")
def tiny() -> Bench:
    return Bench().start()


def error(end: schema.Done | schema.Failed) -> schema.Failed:
    assert isinstance(end, schema.Failed), end
    return end


@pytest.mark.parametrize(
    "make",
    [
        checkpoints.stable_diffusion,
        checkpoints.stable_diffusion_2,
        checkpoints.stable_diffusion_xl,
        checkpoints.stable_diffusion_3,
        checkpoints.flux,
        checkpoints.z_image,
        checkpoints.qwen_image,
    ],
)
def test_every_family_starts_from_an_image(
    checkpoint: Callable[[Callable[[Path], Path]], Path], make: Callable[[Path], Path]
) -> None:
    models = [schema.ModelEntry(id="local/model", path=str(checkpoint(make)))]
    bench = Bench(models=models, default_model="local/model", dtype="float32").start()
    requests: list[dict[str, Any]] = [
        SMALL,
        SMALL | {"image": IMAGE, "strength": 0.5},
        SMALL | {"image": IMAGE, "mask": MASK, "strength": 1.0},
    ]
    ids = [bench.submit(**fields) for fields in requests]
    assert all(isinstance(bench.end(id), schema.Done) for id in ids)
    assert len({bench.files(id)[0] for id in ids}) == 3
    progress = bench.of(ids[1], schema.Progress)
    steps = [p for p in progress if p.phase == "denoising" and p.step]
    assert [(p.step, p.steps) for p in steps] == [(1, 2), (2, 2)]
    assert progress[-2].phase == "decoding"


@pytest.fixture(scope="module")
def klein(checkpoint: Callable[[Callable[[Path], Path]], Path]) -> Bench:
    models = [
        schema.ModelEntry(id=f"local/{make.__name__}", path=str(checkpoint(make)))
        for make in (checkpoints.flux_2_klein, checkpoints.flux)
    ]
    return Bench(models=models, default_model="local/flux_2_klein", dtype="float32").start()


def test_a_model_that_was_not_listed_edits_from_one_and_from_two_images(klein: Bench) -> None:
    [card] = [card for card in klein.engine.models() if card.id == "local/flux_2_klein"]
    assert card.tasks == ["text_to_image", "edit"]
    one, two = file(halves()), file(halves(96, 64).rotate(180))
    from_text = klein.done(**SMALL)[1]
    from_one = klein.done(**SMALL, image=one)[1]
    assert klein.done(**SMALL, images=[one], task="edit")[1] == from_one
    done, from_two = klein.done(**SMALL, images=[one, two])
    assert done.parameters is not None
    assert done.parameters["task"] == "edit" and len(done.parameters["images_sha256"]) == 2
    swapped = klein.done(**SMALL | {"width": 64, "height": 64}, images=[two, one])[1]
    assert len({pictures[0] for pictures in (from_text, from_one, from_two, swapped)}) == 4
    assert picture_of(from_two[0]).shape == (64, 64, 3)


def test_edits_from_several_images_are_the_same_in_company(klein: Bench) -> None:
    fields = SMALL | {"images": [file(halves()), file(halves(96, 64))], "metadata": False}
    alone = klein.done(**fields, reproducible=True)[1]
    ids = [klein.submit(**fields | {"seed": seed}, reproducible=seed == 1) for seed in (1, 2, 3)]
    assert all(isinstance(klein.end(id), schema.Done) for id in ids)
    assert klein.files(ids[0]) == alone


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        (
            {"model": "local/flux", "images": [IMAGE, IMAGE]},
            "images",
            "local/flux takes one image for image_to_image, got 2",
        ),
        (
            {"task": "image_to_image", "image": IMAGE},
            "task",
            "task must be one of text_to_image, edit for local/flux_2_klein, got image_to_image",
        ),
        ({"task": "edit"}, "image", "task edit needs image"),
        ({"task": "inpaint", "image": IMAGE}, "mask", "task inpaint needs mask"),
        ({"task": "text_to_image", "image": IMAGE}, "image", "task text_to_image takes no image"),
        (
            {"images": [IMAGE], "mask": MASK},
            "mask",
            "local/flux_2_klein takes no mask: it draws from text alone or from an image",
        ),
        ({"images": [IMAGE, IMAGE[:-30]]}, "images[1]", "images[1] must be a whole PNG"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(
    klein: Bench, fields: dict[str, Any], field: str, message: str
) -> None:
    id = klein.submit(**SMALL, **fields)
    refused = error(klein.end(id))
    assert (refused.kind, refused.field) == ("invalid_request", field)
    assert refused.message.startswith(message)
    assert klein.of(id, schema.Accepted, schema.Progress) == []


def test_a_task_may_be_named(klein: Bench) -> None:
    fields = SMALL | {"model": "local/flux", "image": IMAGE}
    assert klein.done(**fields)[1] == klein.done(**fields, task="image_to_image")[1]


def test_a_result_of_another_kind_is_told_as_a_file_with_its_facts(
    tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = dataclasses.replace(
        registry.TASKS["text_to_image"],
        kind="text",
        result=lambda output: File("text/plain", b"a picture", {"width": output.images[0].width}),
    )
    monkeypatch.setitem(registry.TASKS, "text_to_image", described)
    id = tiny.submit(**SMALL, num_images=2)
    assert isinstance(tiny.end(id), schema.Done)
    parts = tiny.of(id, schema.ResultPart)
    assert [(part.index, part.seed, part.offset, part.size) for part in parts] == [(0, 1, 0, 9), (1, 2, 0, 9)]
    for part in parts:
        assert (part.kind, part.media_type, bytes(part.data)) == ("text", "text/plain", b"a picture")
        assert part.facts == {"width": 64} and part.sha256 == hashlib.sha256(b"a picture").hexdigest()
    assert tiny.of(id, schema.ImagePart) == []


def test_strength_is_how_far_the_picture_is_left(tiny: Bench) -> None:
    original = picture_of(IMAGE)
    fields: dict[str, Any] = SMALL | {"prompt": "a green star", "image": IMAGE, "steps": 20}
    far = [
        np.abs(picture_of(tiny.done(**fields, strength=strength)[1][0]) - original).mean()
        for strength in (0.1, 0.5, 1.0)
    ]
    assert far[0] < far[1] < far[2]
    assert far[0] < 20


def test_inpainting_changes_what_is_white_in_the_mask_and_not_a_pixel_elsewhere(tiny: Bench) -> None:
    large, mask = halves(512, 256), right_half(512, 256)
    fields = {"prompt": "a yellow circle", "image": file(large), "mask": file(mask), "strength": 1.0}
    done, [data] = tiny.done(**fields, steps=10, seed=3)
    drawn, original = picture_of(data), np.asarray(large, np.int16)
    assert drawn.shape == original.shape
    assert np.array_equal(drawn[:, :248], original[:, :248])
    assert np.abs(drawn[:, 264:] - original[:, 264:]).mean() > 10
    record = images.read(data)
    assert record is not None
    assert (record["task"], record["strength"]) == ("inpaint", 1.0)
    assert len(record["image_sha256"]) == len(record["mask_sha256"]) == 64
    assert done.parameters["task"] == "inpaint"


def test_the_picture_has_the_size_of_its_image_unless_another_is_asked_for(tiny: Bench) -> None:
    fields: dict[str, Any] = {"image": file(halves(200, 120)), "steps": 4, "seed": 1}
    assert picture_of(tiny.done(**fields)[1][0]).shape == (120, 200, 3)
    assert picture_of(tiny.done(**fields, width=64, height=64)[1][0]).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("model", "size", "made"),
    [
        ("tiny", (512, 512), (512, 512)),
        ("tiny", (515, 130), (512, 128)),
        ("tiny", (30, 20), (96, 64)),
        ("tiny", (4096, 4096), (1024, 1024)),
        ("sd15", (3000, 2000), (1024, 680)),
        ("sdxl", (1, 4096), (512, 2048)),
        ("flux-schnell", (1000, 1000), (992, 992)),
    ],
)
def test_an_image_of_any_size_is_fitted_to_the_model(
    model: str, size: tuple[int, int], made: tuple[int, int]
) -> None:
    limits = find(model, shipped()).limits
    assert fitted(size, limits) == made
    for side in made:
        assert side % limits.multiple_of == 0 and limits.min_size <= side <= limits.max_size


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises that many pixels and whose body has none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    body = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def moving() -> bytes:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    return file(frames[0], "WEBP", save_all=True, append_images=frames[1:])


NOISE = Image.frombytes("RGB", (64, 64), bytes(i * 97 % 256 for i in range(64 * 64 * 3)))


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        (
            {"image": b"\x89PNG\r\n\x1a\n" + b"x" * 100},
            "image",
            "image must be a whole PNG, JPEG or WebP file",
        ),
        ({"image": IMAGE[:-30]}, "image", "image must be a whole PNG"),
        ({"image": file(NOISE, "JPEG")[:700]}, "image", "image must be a whole"),
        ({"image": file(NOISE, "WEBP")[:700]}, "image", "image must be a whole"),
        ({"image": bomb(60_000, 60_000)}, "image", "image must be a"),
        ({"image": bomb(5_000, 100)}, "image", "image must be at most 4096x4096 pixels, got 5000x100"),
        ({"image": moving()}, "image", "image must be a still picture"),
        ({"image": IMAGE, "mask": MASK[:-30]}, "mask", "mask must be a whole"),
        (
            {"image": IMAGE, "mask": file(right_half(32, 32))},
            "mask",
            "mask must have the size of image, 64x64, got 32x32",
        ),
        (
            {"image": IMAGE, "strength": 0.0},
            "strength",
            "strength must be at least 1 / steps, 0.25 here, got 0.0",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_work(
    tiny: Bench, fields: dict[str, Any], field: str, message: str
) -> None:
    id = tiny.submit(**SMALL, **fields)
    refused = error(tiny.end(id))
    assert (refused.kind, refused.field) == ("invalid_request", field)
    assert refused.message.startswith(message)
    assert tiny.of(id, schema.Accepted, schema.Progress) == []


def test_an_image_is_upright_and_has_no_holes() -> None:
    sideways = Image.Exif()
    sideways[0x0112] = 6
    turned = images.decode(file(halves(64, 32), "JPEG", exif=sideways), "image")
    assert turned.size == (32, 64)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert images.decode(file(clear), "image").getpixel((0, 0)) == (255, 255, 255)
    assert images.decode(file(Image.new("LA", (8, 8), (0, 0))), "image").getpixel((0, 0)) == (255, 255, 255)
    for mode in ("L", "P", "CMYK", "1"):
        format = "JPEG" if mode == "CMYK" else "PNG"
        assert images.decode(file(Image.new(mode, (8, 8)), format), "image").mode == "RGB"


def test_a_mask_stays_where_it_is_transparent() -> None:
    mask = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (4, 0, 8, 8))
    told = images.decode_mask(file(mask), (8, 8))
    assert (told.getpixel((0, 0)), told.getpixel((7, 0))) == (0, 255)
    with pytest.raises(ImageError, match="mask must have the size of image, 9x8, got 8x8"):
        images.decode_mask(file(mask), (9, 8))
