from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from starweave_image.pictures import images

FORMATS = ["png", "jpeg", "webp"]
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=200)


def record(**fields: Any) -> dict[str, Any]:
    return {
        "prompt": 'a "red" äpple 😀, big\nand round',
        "negative_prompt": "bad, 日本",
        "model": "starweave/tiny",
        "width": 64,
        "height": 48,
        "steps": 25,
        "guidance_scale": 4.0,
        "scheduler": "DDIMScheduler",
        "seed": 2**63 - 1,
        "environment": {"starweave_image": "0.1.0", "checksum": "ab" * 32},
    } | fields


PARAMETERS = (
    'a "red" äpple 😀, big\nand round\nNegative prompt: bad, 日本\n'
    "Steps: 25, Sampler: DDIM, Schedule type: Automatic, CFG scale: 4, Seed: 9223372036854775807, Size: 64x48, "
    "Model: starweave/tiny, Model hash: ababababab, Version: starweave_image 0.1.0"
)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.effect_noise((64, 48), 60).convert("RGB")


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_gives_its_record_back_and_is_the_same_each_time(picture: Image.Image, format: str) -> None:
    data = images.encode(picture, format, 90, record())
    assert images.read(data) == record()
    assert images.encode(picture, format, 90, record()) == data
    decoded = Image.open(io.BytesIO(data))
    assert (decoded.format, decoded.size, decoded.mode) == (format.upper(), (64, 48), "RGB")


@pytest.mark.parametrize("format", FORMATS)
def test_without_a_record_nothing_is_embedded(picture: Image.Image, format: str) -> None:
    data = images.encode(picture, format, 90, None)
    assert images.read(data) is None
    decoded = Image.open(io.BytesIO(data))
    assert dict(decoded.getexif()) == {} and "parameters" not in decoded.info
    assert b"starweave" not in data


def test_the_widely_read_text_is_where_other_tools_look(picture: Image.Image) -> None:
    assert images.parameters_text(record()) == PARAMETERS
    png = Image.open(io.BytesIO(images.encode(picture, "png", 90, record())))
    assert png.info["parameters"] == PARAMETERS
    for format in ("jpeg", "webp"):
        exif = Image.open(io.BytesIO(images.encode(picture, format, 90, record()))).getexif()
        comment = exif.get_ifd(0x8769)[0x9286]
        assert comment == b"UNICODE\0" + PARAMETERS.encode("utf-16-be")


def test_a_variation_is_told_under_the_names_that_other_tools_know() -> None:
    varied = record(variation_seed=9, variation_strength=0.25)
    assert ", Variation seed: 9, Variation seed strength: 0.25, " in images.parameters_text(varied)


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
@pytest.mark.parametrize(
    ("format", "text", "structured"),
    [
        ("png", "Parameters", "Starweave_image"),
        ("jpeg", "UserComment", "ImageDescription"),
        ("webp", "UserComment", "ImageDescription"),
    ],
)
def test_exiftool_reads_both_forms(
    picture: Image.Image, tmp_path: Path, format: str, text: str, structured: str
) -> None:
    file = tmp_path / f"picture.{format}"
    file.write_bytes(images.encode(picture, format, 90, record()))
    shown = subprocess.run(["exiftool", "-j", file], capture_output=True, check=True, timeout=60).stdout
    [tags] = json.loads(shown)
    assert tags[text] == PARAMETERS
    assert json.loads(tags[structured]) == record()
    assert "Warning" not in tags and "Error" not in tags


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "é" * 4096, "negative_prompt": "\x01" * 8192},
        {"prompt": "a" * 8192, "negative_prompt": "😀" * 2048},
    ],
)
def test_the_longest_prompts_fit(picture: Image.Image, format: str, fields: dict[str, str]) -> None:
    assert images.read(images.encode(picture, format, 90, record(**fields))) == record(**fields)


@given(prompt=TEXT, negative_prompt=TEXT, format=st.sampled_from(FORMATS))
def test_any_text_survives(prompt: str, negative_prompt: str, format: str) -> None:
    fields = record(prompt=prompt, negative_prompt=negative_prompt)
    assert images.read(images.encode(Image.new("RGB", (8, 8)), format, 90, fields)) == fields


def test_a_file_of_another_maker_has_no_record() -> None:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "a holiday"
    Image.new("RGB", (8, 8)).save(out, "JPEG", exif=exif)
    assert images.read(out.getvalue()) is None
    with pytest.raises(OSError, match="cannot identify"):
        images.read(b"no image at all")


def test_quality_is_honoured(picture: Image.Image) -> None:
    for format in ("jpeg", "webp"):
        assert len(images.encode(picture, format, 20, None)) < len(images.encode(picture, format, 95, None))


def test_enlarging_cuts_what_does_not_fit_and_bends_nothing() -> None:
    picture = Image.new("RGB", (96, 64), "white")
    picture.paste("black", (32, 16, 64, 48))
    assert images.resize(picture, 96, 64) is picture
    wide = images.resize(picture, 960, 320)
    assert wide.size == (960, 320)
    # The square's sides are scaled alike: 32 pixels by 10, across the middle, and cut above and below.
    row = wide.convert("L").crop((0, 160, 960, 161)).tobytes()
    assert sum(grey < 128 for grey in row) == 320


def test_gray_of_sixteen_bits_is_scaled_and_not_cut_off() -> None:
    values = [0, 0x0140, 0x8000, 0xFFFF]
    gray = Image.new("I;16", (len(values), 1))
    for x, value in enumerate(values):
        gray.putpixel((x, 0), value)
    out = io.BytesIO()
    gray.save(out, "PNG")
    read = images.decode(out.getvalue(), "image")
    assert [read.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]
    mask = images.decode_mask(out.getvalue(), (4, 1))
    assert [mask.getpixel((x, 0)) for x in range(4)] == [0, 1, 128, 255]
